"""An adapter method: ``--adapter-method adapter_example:RankOne``."""

import torch
from safetensors.torch import load_file, save_file

from quire.sdk import AdapterLayer, AdapterMethod, CheckpointError
from quire.sdk.ops import copy_to_device


class RankOne(AdapterMethod):
    """Adds ``b (a x)`` to a module's output, of two vectors for each module: MODULE.a and MODULE.b in one file."""

    def __init__(self, limits, options=None):
        super().__init__(limits, options)
        self.layers = []
        self.token_slots = torch.zeros(limits.max_num_tokens, dtype=torch.int64, device=limits.device)

    @classmethod
    def read_adapter(cls, path, *, max_rank, module_shapes=None, dtype=None, content_hash=None):
        if not (path / "vectors.safetensors").is_file():
            raise CheckpointError(f"adapter {str(path)!r} has no vectors.safetensors; give a folder with one")
        vectors = load_file(path / "vectors.safetensors")
        for name in vectors if module_shapes is not None else ():
            module, _, vector = name.rpartition(".")
            expected = module_shapes.get(module, (0, 0))["ba".index(vector)]
            if vectors[name].shape != (expected,):
                raise CheckpointError(f"adapter {str(path)!r}: {name} fits no linear layer of this model")
        return vectors

    @classmethod
    def save_example_adapter(cls, path, module_shapes, seed):
        torch.manual_seed(seed)
        shapes = {f"{m}.{v}": size for m, sizes in module_shapes.items() for v, size in zip("ba", sizes, strict=True)}
        vectors = {name: torch.randn(size) for name, size in shapes.items()}
        path.mkdir()
        save_file(vectors, path / "vectors.safetensors")
        return {module: torch.outer(vectors[f"{module}.b"], vectors[f"{module}.a"]) for module in module_shapes}

    def make_layer(self, info, rank, world_size):
        self.layers.append(RankOneLayer(self, info, rank, world_size))
        return self.layers[-1]

    def clear_slot(self, slot):
        torch._foreach_zero_([buffer for layer in self.layers for buffer in layer.slot_buffers(slot)])

    def prepare_metadata(self, token_slots, *, is_captured=False):
        slots = copy_to_device(token_slots, torch.int64, self.limits.device)
        self.token_slots[: len(slots)] = slots  # -1 is the last row: one more than there are slots, always zero


class RankOneLayer(AdapterLayer):
    def __init__(self, method, info, rank, world_size):
        self.method, self.info, self.rank, self.world_size = method, info, rank, world_size
        rows, options = method.limits.num_slots + 1, {"dtype": method.limits.dtype, "device": method.limits.device}
        self.a = torch.zeros(rows, len(info.part_names), info.in_features, **options)
        self.b = torch.zeros(rows, info.out_features, **options)

    def slot_buffers(self, slot):
        return self.a[slot], self.b[slot]

    def make_tensors(self, vectors):
        first, width = self.info.in_range(self.rank)
        a, b = torch.zeros_like(self.a[0], device="cpu"), []
        for part, (name, size) in enumerate(zip(self.info.part_names, self.info.part_sizes, strict=True)):
            row, count = self.info.out_range(part, self.rank, self.world_size)
            b.append(vectors[f"{name}.b"][row : row + count] if f"{name}.b" in vectors else torch.zeros(size))
            if f"{name}.a" in vectors:
                a[part] = vectors[f"{name}.a"][first : first + width]
        return a, torch.cat(b).to(a.dtype)

    def apply(self, x, out):
        slots = self.method.token_slots[: len(x)]
        scales = torch.einsum("tk,tpk->tp", x.to(self.a.dtype), self.a[slots])
        scales = torch.cat([scales[:, [i]].expand(-1, size) for i, size in enumerate(self.info.part_sizes)], 1)
        out += (scales * self.b[slots]).to(out.dtype)
