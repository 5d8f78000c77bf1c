"""A file is a page of 250 lines and never more than 400; core as a whole stays readable in a day or two."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings

PAGE = 250
LIMIT = 400
CORE = 9_700
"""Lines of code, without blanks, comments and docstrings: docs/decisions/0004-how-large-the-core-is.md, and what
0005-speculation.md and 0007-quantized-checkpoints.md added."""
BESIDE_THE_ENGINE = ("core/testing/", "server/evaluation/")
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
    total = sum(lines_of_code(source.text) for source in engine)
    assert total <= CORE, f"core has {total} lines of code; what is a choice belongs in plugins/"


def lines_of_code(text: str) -> int:
    """Lines that hold more than blanks, comments and bare strings."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {line for t in tokens if t.type not in silent for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)
