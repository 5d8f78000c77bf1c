"""VeRA (Kopiczko et al., 2024, arXiv:2310.11454): ``y + b * (B (d * (A x)))``, with A and B shared by all layers of an
adapter, random and frozen, and the vectors b and d of each layer trained."""

import json
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quire.sdk import AdapterLayer, AdapterMethod, CheckpointError, compute_content_hash
from quire.sdk.ops import copy_to_device

PREFIX = "base_model.model."


@dataclass
class VeraAdapter:
    a: torch.Tensor  # (rank, the largest layer's inputs): others use its first columns
    b: torch.Tensor  # (the largest layer's outputs, rank): others use its first rows
    vectors: dict  # by module: d (rank,) and b (outputs,)


class Vera(AdapterMethod):
    """Adapters in the folders that PEFT writes with ``save_projection=True``, an adapter at a time in torch."""

    def __init__(self, limits, options=None):
        super().__init__(limits, options)
        self.layers = []
        self.a, self.b = self.make_shared(0), self.make_shared(0)  # (slots, max_rank, inputs or outputs)
        self.token_slots = torch.zeros(limits.max_num_tokens, 1, dtype=torch.int64, device=limits.device)
        self.step_slots = []

    @classmethod
    def read_adapter(cls, path, *, max_rank, module_shapes=None, dtype=None, content_hash=None):
        try:
            config = json.loads((path / "adapter_config.json").read_text("utf-8"))
            tensors = load_file(path / "adapter_model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"adapter {str(path)!r} cannot be read: {' '.join(str(error).split())}") from None
        if content_hash is not None and compute_content_hash(path) != content_hash:
            raise CheckpointError(f"the files of adapter {str(path)!r} have changed since it was loaded; load it again")
        rank = config.get("r", 0)
        if config.get("peft_type") != "VERA" or "base_model.vera_A" not in tensors:
            raise CheckpointError(f"adapter {str(path)!r} is no VeRA adapter with save_projection=True; save it so")
        if not 0 < rank <= max_rank:
            raise CheckpointError(f"adapter {str(path)!r}: rank {rank} is above --max-lora-rank {max_rank}; raise that")
        a, b, vectors = tensors.pop("base_model.vera_A"), tensors.pop("base_model.vera_B"), {}
        for name, tensor in tensors.items():
            module, _, which = name.removeprefix(PREFIX).rpartition(".vera_lambda_")
            outputs, inputs = (module_shapes or {}).get(module, (len(b), a.shape[1]))
            if module_shapes is not None and module not in module_shapes:
                raise CheckpointError(f"adapter {str(path)!r}: {module!r} is no linear layer of this model")
            if tensor.shape != ((rank,) if which == "d" else (outputs,)) or outputs > len(b) or inputs > a.shape[1]:
                raise CheckpointError(f"adapter {str(path)!r}: lambda_{which} of {module!r} has another shape")
            vectors.setdefault(module, {})[which] = tensor
        return VeraAdapter(a, b, vectors)

    @classmethod
    def save_example_adapter(cls, path, module_shapes, seed):
        torch.manual_seed(seed)
        rank = 3 + seed % 4
        outputs, inputs = (max(sizes) for sizes in zip(*module_shapes.values(), strict=True))
        a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
        tensors, deltas = {"base_model.vera_A": a, "base_model.vera_B": b}, {}
        for module, (outputs, inputs) in module_shapes.items():
            lambda_d, lambda_b = torch.randn(rank), torch.randn(outputs)
            tensors[f"{PREFIX}{module}.vera_lambda_d"] = lambda_d
            tensors[f"{PREFIX}{module}.vera_lambda_b"] = lambda_b
            deltas[module] = lambda_b[:, None] * b[:outputs] @ (lambda_d[:, None] * a[:, :inputs])
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA", "r": rank}), "utf-8")
        return deltas

    def make_shared(self, size):
        limits = self.limits
        return torch.zeros(limits.num_slots, limits.max_rank, size, dtype=limits.dtype, device=limits.device)

    def make_layer(self, info, rank, world_size):
        if info.in_total > self.a.shape[2]:  # no slot is filled before the last layer is made
            self.a = self.make_shared(info.in_total)
        if max(info.part_totals) > self.b.shape[2]:
            self.b = self.make_shared(max(info.part_totals))
        self.layers.append(VeraLayer(self, info, rank, world_size))
        return self.layers[-1]

    def slot_buffers(self, slot):
        return self.a[slot], self.b[slot]

    def make_tensors(self, adapter):
        return pad(adapter.a, self.a), pad(adapter.b.T, self.b)

    def clear_slot(self, slot):
        owners = (self, *self.layers)
        torch._foreach_zero_([buffer for owner in owners for buffer in owner.slot_buffers(slot)])

    def prepare_metadata(self, token_slots, *, is_captured=False):
        self.token_slots[: len(token_slots), 0] = copy_to_device(token_slots, torch.int64, self.limits.device)
        used = set(token_slots.tolist()) - {-1}
        self.step_slots = range(self.limits.num_slots) if is_captured else sorted(used)


class VeraLayer(AdapterLayer):
    def __init__(self, method, info, rank, world_size):
        self.method, self.info, self.rank, self.world_size = method, info, rank, world_size
        limits = method.limits
        options = {"dtype": limits.dtype, "device": limits.device}
        self.lambda_d = torch.zeros(limits.num_slots, len(info.part_names), limits.max_rank, **options)
        self.lambda_b = torch.zeros(limits.num_slots, info.out_features, **options)

    def slot_buffers(self, slot):
        return self.lambda_d[slot], self.lambda_b[slot]

    def make_tensors(self, adapter):
        lambda_d, lambda_b = (torch.zeros(each.shape, dtype=each.dtype) for each in self.slot_buffers(0))
        parts = zip(self.info.part_names, lambda_d, lambda_b.split(self.info.part_sizes), strict=True)
        for part, (name, d, b) in enumerate(parts):
            if name in adapter.vectors:
                first, count = self.info.out_range(part, self.rank, self.world_size)
                d[: len(adapter.a)] = adapter.vectors[name]["d"]
                b[:count] = adapter.vectors[name]["b"][first : first + count]
        return lambda_d, lambda_b

    def apply(self, x, out):
        method, info = self.method, self.info
        first, width = info.in_range(self.rank)
        token_slots, x = method.token_slots[: len(x)], x.to(method.a.dtype)
        for slot in method.step_slots:
            ranks = x @ method.a[slot, :, first : first + width].T  # (num_tokens, max_rank)
            added = []
            for part, size in enumerate(info.part_sizes):
                row, _ = info.out_range(part, self.rank, self.world_size)
                added.append(ranks * self.lambda_d[slot, part] @ method.b[slot, :, row : row + size])
            changed = out + (torch.cat(added, 1) * self.lambda_b[slot]).to(out.dtype)
            out.copy_(torch.where(token_slots == slot, changed, out))


def pad(matrix, buffer):
    """``matrix`` in the first columns of rows as wide as ``buffer``'s."""
    padded = torch.zeros(len(matrix), buffer.shape[2], dtype=buffer.dtype)
    width = min(matrix.shape[1], buffer.shape[2])
    padded[:, :width] = matrix[:, :width]
    return padded
