"""The linear layer: column-sharded, row-sharded or whole, its parts fused, its weights stored as a method likes."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from quire.core.contracts.quant import ActivationFormat, AppendedTerm, LayerInfo, LinearMethod, QuantActivation
from quire.core.layers.adapters import AdaptedLinearMethod
from quire.core.layers.checkpoint import CheckpointLayer, WeightLoader
from quire.core.layers.norm import RMSNorm
from quire.core.layers.parallel import PartialSum, TensorParallel
from quire.core.ops.operation_table import OperationTable

__all__ = ["Linear"]


class Linear(CheckpointLayer):
    """``y = x W^T + b``.

    A column-sharded layer gives this rank's share of the output features; a row-sharded one takes this rank's share
    of the input features and sums over the ranks. The method owns the weights: this class never looks at them.
    """

    def __init__(
        self,
        info: LayerInfo,
        method: LinearMethod,
        parallel: TensorParallel,
        operations: OperationTable | None = None,
    ) -> None:
        super().__init__()
        self.name = info.name
        self.info = info
        self.method = method
        self.parallel = parallel
        self.operations = operations or OperationTable()
        self._fuses_norm = "rms_norm" not in self.operations.replaced
        self._fuses_activation = "silu_and_mul" not in self.operations.replaced

    def forward(self, x: Tensor | QuantActivation) -> Tensor:
        """``x`` (num_tokens, in_features) -> (num_tokens, out_features)."""
        bias = getattr(self, "bias", None)
        if self.info.shard != "row" or self.parallel.size == 1:
            return self.method.apply(self, x, bias)
        out = self.parallel.all_reduce(self.method.apply(self, x))
        return out if bias is None else out + bias

    @property
    def input_format(self) -> ActivationFormat:
        """What the operation before the layer should emit."""
        return ActivationFormat(self.method.input_format, self.method.input_scale(self))

    def forward_after_norm(
        self,
        norm: RMSNorm,
        x: Tensor | PartialSum,
        residual: Tensor | None,
        activation: str | None = None,
        consumer: Linear | None = None,
    ) -> tuple[Tensor | QuantActivation, Tensor]:
        """``(activation(self(norm(s))), s)`` of the residual stream ``s = x + residual`` (``x`` where that is None).

        The operations are fused into as few kernels as the method offers. ``x`` and ``residual`` (num_tokens,
        in_features); see ``LinearMethod.apply_fused`` for ``activation``, whose result may be in the input format of
        the layer ``consumer`` that reads it.
        """
        bias = getattr(self, "bias", None)
        is_whole = activation is None or self._fuses_activation  # whether one kernel may run all that is asked for
        if residual is None and isinstance(x, Tensor) and self._fuses_norm and is_whole:
            out = self.method.apply_fused(self, x, bias, norm=(norm.weight, norm.eps), activation=activation)
            if out is not None:
                return out, x
        y, stream = norm.norm_stream(x, residual, self.input_format)
        out = None
        if activation is not None and self._fuses_activation:
            out = self.method.apply_fused(self, y, bias, activation=activation)
        if out is None:
            out = self(y)
            if activation is not None:
                output_format = ActivationFormat() if consumer is None else consumer.input_format
                assert activation == "silu"
                return self.operations.silu_and_mul(out, output_format), stream
        return out, stream

    def forward_after_norm_unadded(
        self, norm: RMSNorm, x: Tensor | PartialSum, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, AppendedTerm | None]:
        """``forward_after_norm``, and what adapters add to the result where the operation behind it is to do that; its
        rows are strided then."""
        num_tokens = x.num_tokens if isinstance(x, PartialSum) else len(x)
        if isinstance(self.method, AdaptedLinearMethod) and self.method.leaves_adapters(num_tokens):
            y, stream = norm.norm_stream(x, residual, self.input_format)
            unadded = self.method.apply_unadded(self, y, getattr(self, "bias", None))
            if unadded is not None:
                product, term = unadded.split()
                return product, stream, term
            return self(y), stream, None
        out, stream = self.forward_after_norm(norm, x, residual)
        assert isinstance(out, Tensor), "only an activation is emitted quantized"
        return out, stream, None

    def forward_add_residual(
        self, x: Tensor | QuantActivation, stream: Tensor
    ) -> tuple[Tensor | PartialSum, Tensor | None]:
        """The layer's result and the residual stream: ``(result + stream, None)``, or ``(result, stream)`` where the
        method leaves the addition to the norm that follows. Where ranks share the layer they leave their exchange to
        it as well."""
        bias = getattr(self, "bias", None)
        if self.info.shard != "row" or self.parallel.size == 1:
            if isinstance(self.method, AdaptedLinearMethod):
                unadded = self.method.apply_unadded(self, x, bias)
                if unadded is not None:
                    return unadded, stream
            out = self.method.apply_fused(self, x, bias, residual=stream)
            if out is not None:
                return out, None
        elif bias is None:
            if isinstance(x, Tensor) and not isinstance(self.method, AdaptedLinearMethod):
                sent = self.parallel.multiply_and_send(x, self.info.out_features, partial(self.method.apply, self))
                if sent is not None:
                    return sent, stream
            return PartialSum(self.method.apply(self, x), self.parallel), stream
        return self(x), stream

    def weight_loaders(self) -> dict[str, WeightLoader]:
        """One entry per part and tensor of the method."""
        return {
            f"{part_name}.{tensor_name}": self._make_weight_loader(part, tensor_name)
            for part, part_name in enumerate(self.info.part_names)
            for tensor_name in self.method.tensor_names(self.info.select_part(part))
        }

    def optional_tensors(self) -> set[str]:
        """Those that the method calls optional."""
        return {
            f"{part_name}.{tensor_name}"
            for part, part_name in enumerate(self.info.part_names)
            for tensor_name in self.method.optional_names(self.info.select_part(part))
        }

    def tensor_aliases(self) -> dict[str, str]:
        """As the method knows them."""
        return {
            f"{part_name}.{alias}": f"{part_name}.{tensor_name}"
            for part, part_name in enumerate(self.info.part_names)
            for alias, tensor_name in self.method.alias_names(self.info.select_part(part)).items()
        }

    def process_weights_after_loading(self) -> None:
        """Let the method repack."""
        self.method.process_weights_after_loading(self)

    def _make_weight_loader(self, part: int, tensor_name: str) -> WeightLoader:
        def load(tensor: Tensor) -> None:
            rank, size = self.parallel.rank, self.parallel.size
            self.method.load_tensor(self, self.info, part, tensor_name, tensor, rank, size)

        return load
