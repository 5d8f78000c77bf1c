"""Softmax attention over a paged KV cache, block by block (Milakov and Gimelshein, 2018, arXiv:1805.02867)."""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, k, v, out, lse, starts, lengths, table, scale, softcap, num_reqs,
    q_token, q_head, k_block, k_head, k_slot, v_block, v_head, v_slot, out_token, out_head, table_row,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr, QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    request = 0
    for i in range(1, num_reqs):
        request += (tl.load(starts + i) <= token).to(tl.int32)
    end = tl.load(starts + request + 1)
    if token < end:  # else it is padding
        position = tl.load(lengths + request) - end + token
        features, outputs, slots = tl.arange(0, QK_PADDED), tl.arange(0, V_PADDED), tl.arange(0, BLOCK)
        query = tl.load(q + token * q_token + head * q_head + features, features < QK_DIM, 0.0).to(tl.float32)
        best, total = float("-inf"), 0.0
        result = tl.zeros([V_PADDED], tl.float32)
        first = 0
        if WINDOW > 0:
            first = tl.maximum(position - WINDOW + 1, 0)
        for b in range(first // BLOCK, position // BLOCK + 1):
            block = tl.load(table + request * table_row + b).to(tl.int64)
            key_position = b * BLOCK + slots
            seen = (key_position <= position) & (key_position >= first)  # what is not may be NaN: it is never read
            keys = k + block * k_block + head // GROUP * k_head + slots[:, None] * k_slot + features[None, :]
            keys = tl.load(keys, seen[:, None] & (features < QK_DIM)[None, :], 0.0).to(tl.float32)
            scores = tl.sum(query[None, :] * keys, 1) * scale
            if HAS_SOFTCAP:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 0))
            weights, keep = tl.exp(scores - higher), tl.exp(best - higher)
            values = v + block * v_block + head // GROUP * v_head + slots[:, None] * v_slot + outputs[None, :]
            values = tl.load(values, seen[:, None] & (outputs < V_DIM)[None, :], 0.0).to(tl.float32)
            result = result * keep + tl.sum(weights[:, None] * values, 0)
            total = total * keep + tl.sum(weights, 0)
            best = higher
        to = out + token * out_token + head * out_head + outputs
        tl.store(to, (result / total).to(out.dtype.element_ty), outputs < V_DIM)
        if HAS_LSE:
            tl.store(lse + token * NUM_HEADS + head, best + tl.log(total))
