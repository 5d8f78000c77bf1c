"""The bundled backends keep their contract."""

from __future__ import annotations

from quire.plugins.structured_output.guidance import GuidanceBackend
from quire.testing import parametrize_with_checks


@parametrize_with_checks(GuidanceBackend)
def test_llguidance(check):
    check()
