"""A file is a page of 250 lines and never more than 400."""

from __future__ import annotations

LIMIT = 400


def test_no_file_is_longer_than_the_limit(everything):
    counted = [source for source in everything if source.folder in ("core", "plugins", "server", "tests", "tools")]
    too_long = [f"{source.path}: {source.lines} lines" for source in counted if source.lines > LIMIT]
    assert not too_long, f"over {LIMIT} lines; split them by what they are about:\n" + "\n".join(too_long)
