"""NF4 (Dettmers et al., 2023, arXiv:2305.14314): each weight is one of 16 quantiles of the normal distribution, times
the largest magnitude of its group of 64 inputs."""

import torch
from torch import nn

from quire.sdk import CheckpointError, LinearMethod, QuantizationLoader, StoredWeight

GROUP = 64
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize(weight):
    """(outputs, inputs) -> the tensors of a checkpoint: two codes a byte, the first in its low half."""
    grouped = weight.float().unflatten(1, (-1, GROUP))
    scale = grouped.abs().amax(-1)
    distance = (grouped / scale[..., None].clamp(min=1e-12))[..., None] - torch.tensor(CODEBOOK)
    codes = distance.abs().argmin(-1).flatten(1).to(torch.uint8)
    return {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "scale": scale}


def dequantize(codes, scale, codebook=None):
    """(outputs, inputs / 2) bytes and (outputs, groups) -> (outputs, inputs)."""
    if codebook is None:
        codebook = torch.tensor(CODEBOOK, device=codes.device, dtype=scale.dtype)
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(1).int()
    values = codebook[both]
    return (values.unflatten(1, (-1, GROUP)) * scale[..., None]).flatten(1)


class NF4(QuantizationLoader):
    """Every linear layer is NF4, the head and the embedding are not."""

    @classmethod
    def unsupported(cls, quant_config, device):
        method = quant_config.get("quant_method")
        return [] if method == "nf4" else [f"checkpoints of the method {method!r}"]

    @classmethod
    def example_config(cls):
        return {"quant_method": "nf4"}

    @classmethod
    def example_tensors(cls, outputs, inputs):
        generator = torch.Generator().manual_seed(outputs)
        codes = torch.randint(16, (outputs, inputs), generator=generator)
        scale = torch.rand(outputs, inputs // GROUP, generator=generator) + 0.1
        weight = torch.tensor(CODEBOOK)[codes] * scale.repeat_interleave(GROUP, 1)
        packed = sum(codes[:, i::2] * 16**i for i in range(2)).to(torch.uint8)
        return StoredWeight({"weight": packed, "scale": scale}, weight)

    def get_linear_method(self, info):
        return DenseLinear() if info.kind == "lm_head" else NF4Linear()


class DenseLinear(LinearMethod):
    """``weight`` (outputs, inputs) as it is."""

    inputs_per_column = {"weight": 1, "bias": 0}

    def create_weights(self, layer, info, device):
        layer.weight = make_parameter(info.out_features, info.in_features, dtype=info.dtype, device=device)
        self.create_bias(layer, info, device)

    def create_bias(self, layer, info, device):
        if info.bias:
            layer.bias = make_parameter(info.out_features, dtype=info.dtype, device=device)

    def load_tensor(self, layer, info, part, tensor_name, tensor, rank, world_size):
        per_column = self.inputs_per_column[tensor_name]
        columns = (info.in_total // per_column,) if per_column else ()
        if tensor.shape != (info.part_totals[part], *columns):
            name = f"{info.part_names[part]}.{tensor_name}"
            raise CheckpointError(f"tensor {name!r} has the shape {tuple(tensor.shape)}, which is not this layer's")
        first, count = info.out_range(part, rank, world_size)
        shard = tensor[first : first + count]
        if per_column:
            start, width = info.in_range(rank)
            shard = shard[:, start // per_column : (start + width) // per_column]
        row = sum(info.part_sizes[:part])
        getattr(layer, tensor_name)[row : row + count].copy_(shard)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class NF4Linear(DenseLinear):
    """``weight`` (outputs, inputs / 2) and ``scale`` (outputs, inputs / 64), dequantized where it is multiplied."""

    inputs_per_column = {"weight": 2, "scale": GROUP, "bias": 0}

    def create_weights(self, layer, info, device):
        if info.in_features % GROUP:
            raise CheckpointError(f"{info.name} has {info.in_features} inputs, which are not whole groups of {GROUP}")
        shape = info.out_features, info.in_features
        layer.weight = make_parameter(shape[0], shape[1] // 2, dtype=torch.uint8, device=device)
        layer.scale = make_parameter(shape[0], shape[1] // GROUP, dtype=info.dtype, device=device)
        # On the device before a step is captured: a CUDA graph holds no copy of numbers of the host.
        codebook = torch.tensor(CODEBOOK, dtype=info.dtype, device=device)
        layer.register_buffer("codebook", codebook, persistent=False)
        self.create_bias(layer, info, device)

    def tensor_names(self, info):
        return ("weight", "scale", "bias") if info.bias else ("weight", "scale")

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, dequantize(layer.weight, layer.scale, layer.codebook).to(x.dtype), bias)


def make_parameter(*shape, **kind):
    return nn.Parameter(torch.zeros(*shape, **kind), requires_grad=False)
