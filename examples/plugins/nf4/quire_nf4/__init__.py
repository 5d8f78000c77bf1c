"""NF4 weights: checkpoints whose ``quantization_config`` has the ``quant_method`` ``nf4``, and what writes them."""

from quire.sdk import hookimpl


@hookimpl
def quire_register_quant(register):
    register("nf4", "quire_nf4.loader:NF4", "4-bit NormalFloat weights in groups of 64")


@hookimpl
def quire_register_quantizer(register):
    register("nf4", "quire_nf4.quantizer:NF4Quantizer", "rounds the weights to NF4")
