"""LoRA keeps the contract of adapter methods."""

from __future__ import annotations

from quire.plugins.adapters.lora.method import Lora
from quire.testing import parametrize_with_checks


@parametrize_with_checks(Lora)
def test_lora(check) -> None:
    check()
