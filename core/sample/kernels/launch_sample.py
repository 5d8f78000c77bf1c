"""Random sampling: three launches for any mix of greedy and random rows, without a synchronization.

``sample_scan`` reads every row once, ``sample_topk_candidates`` finishes the rows with a top-k, and ``sample_resolve``
those without. Each kernel reads on the device what a row asks for and leaves the rows of the other alone, so grids and
launches do not depend on the parameters: a CUDA graph holds them. None of them sorts: as in FlashInfer's sorting-free
sampling, a token is picked first and then checked against top-p and min-p, and picked anew from what is left if it is
refused. Unlike there, a pick is the argmax of logits plus Gumbel noise, which makes the result the one that sorting and
masking would give; ``sample_resolve`` has the argument.
"""

from __future__ import annotations

import triton
from torch import Tensor

from quire.core.sample.inputs import SamplingColumns
from quire.core.sample.kernels.sample_resolve import sample_resolve_kernel
from quire.core.sample.kernels.sample_scan import sample_scan_kernel
from quire.core.sample.kernels.sample_topk_candidates import sample_topk_candidates_kernel
from quire.core.sample.kernels.workspace import Workspace

__all__ = ["launch_sample"]


def launch_sample(
    logits: Tensor,
    columns: SamplingColumns,
    workspace: Workspace,
    out: Tensor,
    rows: Tensor | None = None,
    token_ids: Tensor | None = None,
    *,
    mark_invalid: bool = False,
) -> None:
    """``logits`` (n, vocab), rows dense, bf16, f16 or f32 -> ``out`` (n,) int32, as ``GumbelSampler.sample``.

    With ``rows`` (n,) int64 and ``token_ids`` (rows, length) the columns are the request table's, ``position`` being
    its ``num_tokens``, and each token is appended to its row, but for the table's last row, which stands for padding.
    With ``mark_invalid`` a row with a NaN, or without a logit above minus infinity, gets ``NO_LOGITS`` in ``out``.
    """
    n, w = len(logits), workspace
    # Triton has no null pointers: where nothing is appended, ``out`` stands for what the kernels then do not follow.
    rows, token_ids, append = (out, out, False) if rows is None or token_ids is None else (rows, token_ids, True)
    parameters = (logits, rows, *columns)
    strides = (logits.stride(0), token_ids.stride(0), len(columns.temperature) - 1)  # the last row is padding
    modes = {"append": append, "fast": not triton.knobs.runtime.interpret}  # the interpreter runs no inline PTX
    marks = {"mark_invalid": mark_invalid}
    sample_scan_kernel[(w.num_chunks, n)](*parameters, *w.chunks, w.group_max, *strides, **w.scan_constants, **modes)
    sample_topk_candidates_kernel[(n,)](
        *parameters, w.group_max, *w.candidates, out, token_ids, *strides, **w.topk_constants, **modes, **marks
    )
    sample_resolve_kernel[(w.num_parts, n)](
        *parameters, *w.chunks, *w.parts, out, token_ids, *strides, **w.resolve_constants, **modes, **marks
    )
