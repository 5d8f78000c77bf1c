"""Writes checkpoints that ``loader.py`` reads: ``quire quantize MODEL --method nf4 --out DIR``."""

import json

from safetensors.torch import load_file, save_file

from quire.sdk import ConfigError, Quantizer
from quire_nf4.loader import GROUP, quantize


class NF4Quantizer(Quantizer):
    """Rounds every projection to the nearest codes; needs no text."""

    schemes = uncalibrated = ("rounded",)

    def quantize(self, job):
        tensors = {}
        for file in sorted(job.model.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                if not name.endswith("_proj.weight"):
                    tensors[name] = tensor
                elif tensor.shape[1] % GROUP:
                    raise ConfigError(f"{name} has {tensor.shape[1]} inputs, which are not whole groups of {GROUP}")
                else:
                    of_layer = quantize(tensor)
                    tensors |= {name.replace("weight", key): value.contiguous() for key, value in of_layer.items()}
        job.out.mkdir()
        save_file(tensors, job.out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((job.model / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "nf4"}
        (job.out / "config.json").write_text(json.dumps(config))
        return "quire-nf4"
