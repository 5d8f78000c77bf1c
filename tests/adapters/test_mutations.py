"""LoRA with one deliberate fault at a time, and the check that must notice it."""

from __future__ import annotations

import pytest
from tests.plugin.mutations import Mutation

MUTATIONS = [
    Mutation("adapter/lora", old, new, check)
    for old, new, check in (
        ("* weights.scaling).T", "* 1.0).T", "check_an_adapter_is_that_of_its_weights"),
        ("at += size\n        return", "at += 1\n        return", "check_an_adapter_is_that_of_its_weights"),
        ("each.a[:, start : start + width]", "each.a[:, :width]", "check_shards_make_up_the_whole"),
        ("weights.b[first : first + count]", "weights.b[:count]", "check_shards_make_up_the_whole"),
        ("return [None] * (len(weights) + 2)", "return [None]", "check_tensors_fit_their_slot"),
        ("torch.tensor(ranks, dtype=torch.int32)]", "torch.tensor(ranks)]", "check_tensors_fit_their_slot"),
        ("*self._a[slot].unbind(0)", "*self._a[0].unbind(0)", "check_slots_hold_other_adapters"),
        ("(*self._a[slot].unbind(0), self._b[slot]", "(*self._a[slot].unbind(0), self._b[0]",
         "check_tensors_fit_their_slot"),
        ("torch._foreach_zero_([buffer for buffer in buffers if buffer.dtype == dtype])", "pass",
         "check_a_cleared_slot_adds_nothing"),
        ("[buffer for layer in self._layers for buffer in layer.slot_buffers(slot)]",
         "[buffer for layer in self._layers for buffer in layer.slot_buffers(slot)[-1:]]",
         "check_slots_hold_other_adapters"),
        ("apply_one_adapter(x, out, self._a[slot], self._b[slot], sizes)",
         "apply_one_adapter(x, out, self._a[0], self._b[0], sizes)", "check_a_token_does_not_depend_on_others"),
        ("apply_lora(x, out, self._a, self._b, self._ranks, sizes, self._batch, norm)\n\n",
         "apply_one_adapter(x, out, self._a[0], self._b[0], sizes)\n\n",
         "check_rows_without_an_adapter_keep_their_bits"),
        ("module_shapes=module_shapes, dtype", "module_shapes=None, dtype", "check_other_modules_are_refused_by_name"),
    )
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_fault_is_noticed(mutation: Mutation) -> None:
    result = mutation.run_check()
    assert result.outcome == "failed", f"{mutation.check} {result.outcome} {result.reason}"
