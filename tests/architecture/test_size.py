"""A file is a page of 250 lines and never more than 400; core as a whole stays readable in a day or two."""

from __future__ import annotations

import warnings

PAGE = 250
LIMIT = 400
CORE = 9_000
BESIDE_THE_ENGINE = ("core/testing/", "core/evaluation/")
"""The kit that plugin authors run, and the judge of models: in core, and no part of the step."""


def test_no_file_is_longer_than_the_limit(everything):
    counted = [source for source in everything if source.room in ("core", "plugins", "server", "tests", "tools")]
    too_long = [f"{source.path}: {source.lines} lines" for source in counted if source.lines > LIMIT]
    assert not too_long, f"over {LIMIT} lines; split them by what they are about:\n" + "\n".join(too_long)
    long = [f"{source.path} ({source.lines})" for source in counted if source.lines > PAGE]
    if long:
        warnings.warn(f"over a page of {PAGE} lines: {', '.join(long)}", stacklevel=1)


def test_core_stays_small(product):
    engine = [s for s in product if s.room == "core" and not s.path.startswith(BESIDE_THE_ENGINE)]
    total = sum(source.lines for source in engine)
    assert total <= CORE, f"core has {total} lines; what is a choice belongs in plugins/"
