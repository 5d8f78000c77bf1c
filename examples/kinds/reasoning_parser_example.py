"""A reasoning parser: ``--reasoning-parser reasoning_parser_example:Scratchpad``."""

from quire.sdk import ReasoningParser


class Scratchpad(ReasoningParser):
    """Reasoning stands between ``[scratchpad]`` and ``[answer]``."""

    begin = ("[scratchpad]",)
    end = ("[answer]",)
