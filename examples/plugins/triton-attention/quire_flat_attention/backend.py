import os

import triton

from quire.sdk import AttentionBackend

from .kernel import attend


class FlatAttention(AttentionBackend):
    """One program for each query and head, which reads the request's blocks in order: short, right, and the same bits
    whatever else is in the batch. Every step can be captured, since it only launches."""

    graph_support = frozenset({"decode", "verify", "mixed"})
    batch_invariant = True

    @classmethod
    def unsupported(cls, spec, device):
        reasons = [] if spec.kind in ("full", "sliding") else [f"attention of kind {spec.kind!r}"]
        reasons += [] if spec.causal else ["attention that is not causal"]
        reasons += ["attention sinks"] if spec.sinks else []
        reasons += [f"a KV cache of {spec.kv_dtype}"] if spec.kv_dtype.itemsize < 2 else []
        reasons += [f"blocks of {spec.block_size} tokens"] if spec.block_size & (spec.block_size - 1) else []
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            reasons.append(f"the device {device.type}; it has Triton kernels")
        return reasons

    def prepare_metadata(self, batch, key=None):
        self.batch = batch

    def run(self, layer, q, kv, out, *, lse_out=None, k=None, v=None):
        spec, batch = self.spec, self.batch
        attend[(len(q), spec.num_heads)](
            q, kv.k, kv.v, out, out if lse_out is None else lse_out, batch.query_start_loc, batch.seq_lens,
            batch.block_table, spec.scale, spec.softcap or 0.0, batch.num_reqs,
            q.stride(0), q.stride(1), *kv.k.stride()[:3], *kv.v.stride()[:3], out.stride(0), out.stride(1),
            batch.block_table.stride(0), NUM_HEADS=spec.num_heads, GROUP=spec.num_heads // spec.num_kv_heads,
            BLOCK=spec.block_size, WINDOW=spec.window or 0, QK_DIM=spec.qk_head_dim, V_DIM=spec.v_head_dim,
            QK_PADDED=triton.next_power_of_2(spec.qk_head_dim), V_PADDED=triton.next_power_of_2(spec.v_head_dim),
            HAS_SOFTCAP=spec.softcap is not None, HAS_LSE=lse_out is not None,
        )  # fmt: skip
