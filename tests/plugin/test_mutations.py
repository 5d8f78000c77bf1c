"""A mutation run: copies of bundled plugins with one deliberate fault each, and the check that must notice it."""

from __future__ import annotations

import pytest
from tests.plugin.mutations import Mutation

ATTENTION = [
    ("key_position <= query_position", "key_position < query_position", "check_decode"),
    ("key_position <= query_position", "key_position <= query_position + 1", "check_prefill"),
    ("key_position > query_position - window", "key_position >= query_position - window", "check_sliding_window"),
    ("(kv_lens - query_len + torch.arange", "(torch.zeros_like(kv_lens) + torch.arange", "check_chunks"),
    ("range(batch.num_decodes, batch.num_reqs)", "range(batch.num_decodes + 1, batch.num_reqs)", "check_mixed_steps"),
    ("scale=self.spec.scale)", "scale=None)", "check_head_dims"),
    ("flat.index_fill_(0, group.unseen_keys, 0)", "pass", "check_unused_slots_do_not_leak"),
    ("permute(0, 2, 3, 1, 4)", "permute(0, 2, 1, 3, 4)", "check_verification"),
    ("blocks = batch.block_table[requests, columns].long()", "blocks = columns.long() + 1", "check_decode"),
    ("(1.0 if scale is None else scale)", "1.0", "check_fp8_cache"),
    ("batch.decode_query_len, seq_lens[r])", "1, seq_lens[r])", "check_verification"),
    ("kv_len = seq_lens[request] - (end - start - query_len)", "kv_len = seq_lens[request]",
     "check_long_chunks"),
]  # fmt: skip

KV = [
    ("if max(num_blocks - len(blocks), 0) + len(indices)", "if False and len(indices)",
     "check_a_refusal_changes_nothing"),
    ("+ num_reserved_blocks > pool.num_free", "> pool.num_free", "check_the_reserve_stays_free"),
    ("if refs[blocks[i]] > 1]", "if False]", "check_a_shared_block_is_copied_before_it_is_written"),
    ("pool.add_references(blocks)\n        self._tables[child", "pass\n        self._tables[child",
     "check_a_shared_block_is_copied_before_it_is_written"),
    ("or request.skip_prefix_cache:\n            return PrefixMatch", "or False:\n            return PrefixMatch",
     "check_the_last_token_is_never_matched"),
    ("self._tables.pop(request.request_id, None)", "self._tables.get(request.request_id, None)",
     "check_everything_comes_back"),
    ("self._pools[group].drop_references(reversed(blocks[start:end]))", "pass",
     "check_blocks_out_of_the_window_come_back"),
    ("blocks[start:end] = [NULL_BLOCK] * (end - start)", "pass", "check_blocks_out_of_the_window_come_back"),
    ("blocks[i] = copy", "pass", "check_a_shared_block_is_copied_before_it_is_written"),
]  # fmt: skip

OTHERS = [
    ("logits_processor/logit_bias", "tokens, values = self._rows[row]\n",
     "tokens, values = self._rows[row] = (self._rows[row][0], self._rows[row][1] + 1)\n",
     "check_rejected_drafts_leave_no_trace"),
    ("logits_processor/logit_bias", "+= values", "+= values * float('nan')", "check_a_token_can_still_be_sampled"),
    ("logits_processor/logit_bias", "logits[logits_row, tokens] += values", "pass",
     "check_the_example_request_is_worked_on"),
    ("logits_processor/logit_bias", "logits[logits_row, tokens]", "logits[:, tokens]",
     "check_only_its_own_rows_change"),
    ("logits_processor/min_tokens", "del self._rows[row]", "pass", "check_remove_row_forgets"),
    ("logits_processor/min_tokens", "logits[logits_row].index_fill_(0, stops, float(\"-inf\"))",
     "logits[logits_row].fill_(float(\"-inf\"))", "check_a_token_can_still_be_sampled"),
    ("logits_processor/min_tokens", "batch.num_tokens[logits_row] < min_position", "batch.num_tokens[0] < min_position",
     "check_a_row_does_not_depend_on_its_neighbours"),
    ("op/torch", "embedding(token_ids, weight, first_token_id,", "embedding(token_ids, weight, 0,",
     "check_results_are_those_of_torch"),
    ("op/torch", "rms_norm_in_torch(x, weight, eps, residual, output_format)\n\n    def silu",
     "(rms_norm_in_torch(x, weight, eps, residual, output_format)[0], x)\n\n    def silu",
     "check_results_are_those_of_torch"),
    ("op/torch", "silu_and_mul_in_torch(gate_up, output_format)", "silu_and_mul_in_torch(gate_up, ActivationFormat())",
     "check_quantized_results_are_those_of_torch"),
    ("op/torch", "positions, cos_sin, kv, slot_mapping, q_norm=q_norm",
     "positions, cos_sin, kv, slot_mapping // 2 * 2, q_norm=q_norm", "check_the_cache_is_written_at_its_slots_alone"),
    ("op/torch", "F.linear(hidden, weight)", "F.linear(hidden.mul_(2), weight)", "check_arguments_are_left_alone"),
    ("sampler/gumbel", "torch.where(random, batch.temperature, 1.0)", "torch.ones_like(batch.temperature)",
     "check_samples_follow_the_distribution"),
    ("sampler/gumbel", "gumbel(batch.seed, batch.position,", "gumbel(batch.seed, batch.position // 2,",
     "check_neighbours_are_sampled_independently"),
    ("sampler/gumbel", "gumbel(batch.seed, batch.position,", "gumbel(batch.seed // 2, batch.position,",
     "check_neighbours_are_sampled_independently"),
    ("sampler/gumbel", "logits = apply_filters(logits, batch)", "pass", "check_top_k_top_p_and_min_p_restrict"),
    ("sampler/gumbel", "logits + noise, logits)", "logits + 0.8 * noise, logits)",
     "check_samples_follow_the_distribution"),
    ("policy/fcfs", "return (request.arrival_ns,)",
     "return (request.arrival_ns,) if request.prompt_len % 2 else (str(request.arrival_ns),)",
     "check_keys_can_be_compared"),
    ("quant/awq", "(0, 2, 4, 6, 1, 3, 5, 7)", "(0, 1, 2, 3, 4, 5, 6, 7)", "check_the_product_is_the_dense_one"),
    ("quant/awq", "tensors[\"scales\"].T.contiguous(), zeros, 4)", "tensors[\"scales\"].T.contiguous() * 0, zeros, 4)",
     "check_the_product_is_the_dense_one"),
    ("quant/gptq", "unpack_codes(words, self.bits) + 1)", "unpack_codes(words, self.bits))",
     "check_the_product_is_the_dense_one"),
    ("quant/gptq", "unpack_codes(tensors[\"qweight\"].T.contiguous(), self.bits)",
     "unpack_codes(tensors[\"qweight\"].T.contiguous(), self.bits).flip(1)",
     "check_the_product_is_the_dense_one"),
    ("quant/compressed-tensors", "codes, scales = unpack_codes(tensors[\"weight_packed\"], self.bits, inputs)",
     "codes, scales = unpack_codes(tensors[\"weight_packed\"], self.bits, inputs) // 2 * 2",
     "check_the_product_is_the_dense_one"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), ATTENTION, ids=str)
def test_a_fault_in_attention_is_noticed(old, new, check):
    assert Mutation("attention/torch_sdpa", old, new, check).run_check().outcome == "failed"


@pytest.mark.parametrize(("old", "new", "check"), KV, ids=str)
def test_a_fault_in_the_allocator_is_noticed(old, new, check):
    assert Mutation("kv/paged", old, new, check).run_check().outcome == "failed"


@pytest.mark.parametrize(("plugin", "old", "new", "check"), OTHERS, ids=str)
def test_a_fault_is_noticed(plugin, old, new, check):
    assert Mutation(plugin, old, new, check).run_check().outcome == "failed"
