"""A tool-call parser: ``--tool-call-parser tool_parser_example:ActionJson``."""

from quire.sdk import JsonToolParser


class ActionJson(JsonToolParser):
    """Calls are ``ACTION: {"tool": ..., "input": {...}} DONE``."""

    begin = ("ACTION:",)
    end = ("DONE",)
    name_keys = ("tool",)
    arguments_keys = ("input",)
    example = 'ACTION: {"tool": "get_weather", "input": {"city": "Paris"}} DONE'
