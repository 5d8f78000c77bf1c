"""Checks that cannot fail are worth nothing: each is shown an implementation that breaks just its promise."""

import dataclasses

import pytest
import torch

from quire.core.plugin.target import load_target
from quire.core.sample.filters import apply_filters
from quire.core.testing.conformance import run_checks
from quire.sdk import make_default_plan

Gumbel = load_target("quire.core.sample.sampler:GumbelSampler")
LogitBias = load_target("quire.plugins.logits.logit_bias:LogitBias")
Prometheus = load_target("quire.plugins.metrics.prometheus:PrometheusExporter")
FCFS = load_target("quire.plugins.sched.fcfs:FCFSPolicy")
Dense = load_target("quire.plugins.quant.none:Unquantized")
DenseLinear = load_target("quire.plugins.quant.none:UnquantizedLinear")


class WideTokens(Gumbel):
    def sample(self, logits, batch):
        return super().sample(logits, batch).long()


class NeverGreedy(Gumbel):
    def sample(self, logits, batch):
        batch.temperature = batch.temperature.clamp(min=1.0)
        return super().sample(logits, batch)


class HiddenGenerator(Gumbel):
    def sample(self, logits, batch):
        return super().sample(logits + torch.randn_like(logits), batch)


class DependsOnTheBatch(Gumbel):
    def sample(self, logits, batch):
        batch.seed = batch.seed + torch.arange(len(batch.seed))
        return super().sample(logits, batch)


class IgnoresThePosition(Gumbel):
    def sample(self, logits, batch):
        batch.position = torch.zeros_like(batch.position)
        return super().sample(logits, batch)


class TooWarm(Gumbel):
    def sample(self, logits, batch):
        batch.temperature = batch.temperature * 1.5
        return super().sample(logits, batch)


class NoTopK(Gumbel):
    def sample(self, logits, batch):
        batch.any_top_k = False
        batch.top_k = torch.zeros_like(batch.top_k)
        return super().sample(logits, batch)


class TopPOfAll(Gumbel):
    def sample(self, logits, batch):
        off = {"top_k": torch.zeros_like(batch.top_k), "min_p": torch.zeros_like(batch.min_p)}
        alone = dataclasses.replace(batch, any_top_k=False, any_min_p=False, **off)
        rest = dataclasses.replace(batch, top_p=torch.ones_like(batch.top_p), any_top_p=False)
        return super().sample(apply_filters(logits, alone), rest)


class BiasForAll(LogitBias):
    def apply(self, logits, batch):
        logits += 1.0


class NeverForgets(LogitBias):
    def remove_row(self, row):
        pass


class ReturnsACopy(LogitBias):
    def apply(self, logits, batch):
        return logits + 1.0


class ClaimsInvariance(LogitBias):
    argmax_invariant = True

    def apply(self, logits, batch):
        logits.neg_()


class KnowsOnlyToday(Prometheus):
    def record_engine(self, stats):
        {"num_requests_running": 0}[next(iter(stats))]


class RendersText(Prometheus):
    def render(self):
        return "text/plain", "a string"


class PromisesTooMuch(FCFS):
    """Says that it grants each decode its token, and leaves one out."""

    changes_only_at_events = True

    def schedule(self, view):
        grants = make_default_plan(view)
        grants.num_scheduled_tokens[-1:] = 0
        return grants


class Optimist(Dense):
    @classmethod
    def unsupported(cls, quant_config, device):
        return []


class HalfTheWeight(Dense):
    def get_linear_method(self, info):
        return _Half()


class _Half(DenseLinear):
    def process_weights_after_loading(self, layer):
        layer.weight.mul_(0.5)


class Divides(Dense):
    def get_linear_method(self, info):
        return _ByZero()


class _ByZero(DenseLinear):
    def process_weights_after_loading(self, layer):
        layer.weight.div_(0.0)


class IgnoresTheRank(Dense):
    def get_linear_method(self, info):
        return _FirstShard()


class _FirstShard(DenseLinear):
    def load_tensor(self, layer, info, part, tensor_name, tensor, rank, world_size):
        super().load_tensor(layer, info, part, tensor_name, tensor, 0, world_size)


class OneBuffer(Dense):
    def get_linear_method(self, info):
        return _OneBuffer()


class _OneBuffer(DenseLinear):
    def apply(self, layer, x, bias=None):
        product = super().apply(layer, x, bias)
        if not hasattr(self, "buffer") or self.buffer.shape != product.shape:
            self.buffer = torch.empty_like(product)
        return self.buffer.copy_(product)


class RemembersProducts(Dense):
    def get_linear_method(self, info):
        return _Remembering()


class _Remembering(DenseLinear):
    def apply(self, layer, x, bias=None):
        self.products = getattr(self, "products", {})
        return self.products.setdefault(float(x.sum()), super().apply(layer, x, bias))


class LosesAPartialSum(Dense):
    def get_linear_method(self, info):
        return _LosesAPartialSum()


class _LosesAPartialSum(DenseLinear):
    def apply_partial(self, layer, x):
        quarters = zip(x.chunk(4, 1), layer.weight.chunk(4, 1), strict=True)
        return torch.stack([each @ weight.T for each, weight in quarters][:3])


class AppendsInFront(Dense):
    def get_linear_method(self, info):
        return _AppendsInFront()


class _AppendsInFront(DenseLinear):
    def apply_appended(self, layer, x, bias, num_rows, *, norm=None):
        wide = super().apply_appended(layer, x, bias, num_rows, norm=norm)
        return wide.roll(num_rows, 1)


class OneScaleForAll(Dense):
    def get_linear_method(self, info):
        return _OneScale()


class _OneScale(DenseLinear):
    """Inputs of 8 bits, of one scale for all tokens."""

    def apply(self, layer, x, bias=None):
        scale = x.abs().amax().clamp(min=1e-6) / 127
        return super().apply(layer, (x / scale).round() * scale, bias)


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (WideTokens, "check_result_is_one_int32_per_row"),
        (NeverGreedy, "check_temperature_zero_is_the_argmax"),
        (HiddenGenerator, "check_same_seed_and_position_sample_the_same_token"),
        (DependsOnTheBatch, "check_a_row_does_not_depend_on_its_neighbours"),
        (IgnoresThePosition, "check_position_and_seed_matter"),
        (TooWarm, "check_samples_follow_the_distribution"),
        (NoTopK, "check_top_k_top_p_and_min_p_restrict"),
        (TopPOfAll, "check_top_k_top_p_and_min_p_restrict"),
        (BiasForAll, "check_only_its_own_rows_change"),
        (NeverForgets, "check_remove_row_forgets"),
        (ReturnsACopy, "check_apply_changes_in_place"),
        (ClaimsInvariance, "check_argmax_invariant_keeps_the_argmax"),
        (KnowsOnlyToday, "check_takes_figures_it_does_not_know"),
        (RendersText, "check_renders_a_document_or_nothing"),
        (PromisesTooMuch, "check_decodes_are_granted_as_promised"),
        (Optimist, "check_unsupported_gives_reasons"),
        (HalfTheWeight, "check_the_product_is_the_dense_one"),
        (Divides, "check_random_weights_multiply"),
        (IgnoresTheRank, "check_shards_make_up_the_whole"),
        (OneBuffer, "check_a_product_is_kept"),
        (RemembersProducts, "check_a_product_is_kept"),
        (LosesAPartialSum, "check_products_for_adapters_are_the_product"),
        (AppendsInFront, "check_products_for_adapters_are_the_product"),
        (OneScaleForAll, "check_a_row_does_not_depend_on_the_others"),
    ],
)
def test_a_broken_promise_is_noticed(cls, check):
    failed = {r.name for r in run_checks(cls) if r.outcome == "failed"}
    assert check in failed, failed


class GrantsLess(load_target("quire.plugins.sched.fairbatch:FairBatchPolicy")):
    """Other plans than those of the class below it, which alone has promised something of its own."""

    schedule = PromisesTooMuch.schedule


def test_a_promise_of_another_class_is_not_checked():
    outcomes = {r.name: r.outcome for r in run_checks(GrantsLess)}
    assert outcomes["check_decodes_are_granted_as_promised"] == "passed"
