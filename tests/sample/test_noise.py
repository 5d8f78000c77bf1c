"""The generator against published vectors, and the noise against its distribution."""

import math

import torch

from quire.core.sample.noise import gumbel, philox


def test_philox_known_answers() -> None:
    # Random123's kat_vectors for philox4x32-10: counters and keys all zero.
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(zero, zero, zero).item() == 0x6627E8D5


def test_philox_reads_all_64_bits_of_the_seed() -> None:
    seeds = torch.tensor([1, 1 + (1 << 32), -1, (1 << 62) + 5])
    words = philox(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), seeds)
    assert len(set(words.tolist())) == 4


def test_noise_depends_on_nothing_else() -> None:
    seed, position = torch.tensor([7, 7, 9]), torch.tensor([3, 4, 3])
    together = gumbel(seed, position, 100)
    for i in range(3):
        assert torch.equal(together[i], gumbel(seed[i : i + 1], position[i : i + 1], 100)[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], together[2])


def test_noise_is_gumbel() -> None:
    noise = gumbel(torch.arange(64), torch.arange(64), 4096).double().flatten()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02
    for x in (-1.0, 0.0, 1.0, 3.0):
        expected = math.exp(-math.exp(-x))
        assert abs((noise <= x).double().mean().item() - expected) < 0.004
