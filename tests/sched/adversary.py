"""A policy that does harm, a little of each kind, by a seed."""

from __future__ import annotations

import random

import numpy as np

from quire.core.contracts.policy import BatchingPolicy, Grants, Reject, make_default_plan


class Adversary(BatchingPolicy):
    """Mostly it stays in the contract and is only a bad policy: random, starving, over-granting, refusing, preempting
    the wrong ones. Now and then it breaks the contract: it raises, returns nonsense, or writes into its view."""

    def __init__(self, seed=0):
        super().__init__()
        self.random = random.Random(seed)
        self.reads_prefix_cache = self.random.random() < 0.5
        self.harm = self.random.choice([0.0, 0.0, 0.01, 0.1])
        self.unused_methods = frozenset({"schedule"} if self.random.random() < 0.3 else ())

    def admission_key(self, request):
        if self.random.random() < self.harm:
            return self.random.choice([None, (float("nan"),), ("text",), (1, 2)])
        if self.random.random() < 0.05:
            return Reject("a whim")
        return (self.random.choice([0, 1.5, -3]),)

    def group_key(self, request):
        if self.random.random() < self.harm:
            raise KeyError(request.request_id)
        return self.random.choice([None, 0, "a", request.request_number])

    def order_waiting(self, view):
        """Of one that does without ``schedule``."""
        if self.random.random() < self.harm:
            return self.misbehave(view)
        if self.random.random() < 0.2:
            return None
        count = len(view.waiting)
        order = self.random.sample(range(count), self.random.randint(0, count))
        return np.array(order, self.random.choice([np.int64, np.uint16]))

    def schedule(self, view):
        harm = self.random.random()
        if harm < self.harm:
            return self.misbehave(view)
        num_running, num_all = len(view.running), len(view.running) + len(view.waiting)
        if harm < 0.4:
            grants = make_default_plan(view)
        else:
            chosen = self.random.sample(range(num_all), self.random.randint(0, num_all))
            tokens = [self.random.choice([0, 1, 1, 5, 10**6]) for _ in chosen]
            grants = Grants(np.array(chosen, np.int64), np.array(tokens, np.int64))
        if num_running and self.random.random() < 0.5:
            grants.victims = np.array(self.random.choices(range(num_running), k=3))
        if num_running < num_all and self.random.random() < 0.1:
            grants.refuse(self.random.randrange(num_running, num_all), "a whim")
        return grants

    def misbehave(self, view):
        kind = self.random.randrange(6)
        if kind == 0:
            raise ZeroDivisionError
        if kind == 1:
            return [0]
        if kind == 2:
            return Grants(np.array([10**6]), np.array([1]))
        # It writes into the columns, whatever their flags say, and grants by what it wrote.
        for columns in (view.running, view.waiting):
            columns.num_remaining_tokens = np.full(len(columns), 7)
            columns.num_computed_tokens.flags.writeable = True
            columns.num_computed_tokens[:] = 0
        if kind == 3:
            raise RuntimeError("after it changed the view")
        if kind == 4:
            return self.order_badly(view)
        count = len(view.running) + len(view.waiting)
        return Grants(np.arange(count), np.full(count, 7))

    def order_badly(self, view):
        """The engine's own plan, of what is not there or twice, or with more than there is."""
        view.token_budget, view.num_free_rows = 10**6, 10**6
        bad = self.random.choice([[-1], [0, 0, 0], [10**6], [0.5], [True]])
        plan = make_default_plan(view, waiting_order=np.array(bad), min_prefill_tokens=self.random.choice([-5, 10**9]))
        if self.random.random() < 0.5:
            source = next(name for name in type(plan).__slots__ if name.endswith("source"))
            budget = self.random.choice([-3, -(10**30), 2.5, 10**9, "much"])
            if (made_from := getattr(plan, source)) is not None:  # None if the order was so bad that the plan is made
                setattr(plan, source, made_from._replace(token_budget=budget))
        return plan

    def step_scheduled(self, report):
        if self.random.random() < self.harm:
            raise ValueError("a bug")

    def request_finished(self, request, usage):
        if self.random.random() < self.harm:
            raise ValueError("a bug")
