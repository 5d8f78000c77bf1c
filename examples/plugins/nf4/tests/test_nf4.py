import torch
from quire_nf4.loader import NF4, dequantize, quantize
from quire_nf4.quantizer import NF4Quantizer

from quire.testing import parametrize_with_checks


@parametrize_with_checks(NF4)
def test_keeps_its_contract(check):
    check()


@parametrize_with_checks(NF4Quantizer)
def test_the_quantizer_keeps_its_contract(check):
    check()


def test_quantizing_loses_little_and_is_repeatable():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    once = quantize(weight)
    loaded = dequantize(once["weight"], once["scale"])
    assert (loaded - weight).norm() / weight.norm() < 0.1
    assert all(torch.equal(once[name], tensor) for name, tensor in quantize(loaded).items())
