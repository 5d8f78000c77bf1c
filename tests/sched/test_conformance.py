import pytest

from quire.core.plugin.builtin import quire_register_policy
from quire.core.plugin.registry import Registrar
from quire.core.plugin.target import load_target
from quire.core.testing.conformance import checks_for

registrar = Registrar("policy")
quire_register_policy(registrar)
BUNDLED = {registration.name: load_target(registration.target) for registration in registrar.registrations}


@pytest.mark.parametrize("check", checks_for("policy"), ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", BUNDLED.values(), ids=BUNDLED)
def test_bundled_policies_keep_the_contract(cls, check):
    check(cls)
