"""Tool calls as families of models write them: a table each."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence

from quire.sdk import (
    CallFormat,
    HeaderToolParser,
    JsonToolParser,
    PythonicToolParser,
    Reading,
    TextReader,
    ToolCalls,
    ToolParser,
    XmlToolParser,
)

__all__ = [
    "DeepSeekV3",
    "Glm45",
    "Granite",
    "Harmony",
    "Hermes",
    "KimiK2",
    "Llama3Json",
    "Llama4Pythonic",
    "Mistral",
    "NoToolCalls",
    "Phi4Mini",
    "Pythonic",
    "Qwen3Coder",
]


class NoToolCalls(ToolParser):
    """No calls: the text stays as it is."""

    begin = ()

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        """Never called: nothing begins a call."""
        yield from text.wait()


class Hermes(JsonToolParser):
    """Hermes 2 Pro, Qwen2.5, Qwen3 and quire-tiny: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

    begin = ("<tool_call>",)
    end = ("</tool_call>",)
    call_formats = (("<tool_call>\n", "\n</tool_call>"),)
    example = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


class Llama3Json(JsonToolParser):
    """Llama 3.1 to 3.3: ``{"name": ..., "parameters": {...}}``, alone or after ``<|python_tag|>``, ``;`` between."""

    begin = ("<|python_tag|>",)
    begin_first = ("{",)
    arguments_keys = ("parameters", "arguments")
    call_formats = (("", ""), ("<|python_tag|>", ""))
    separator = "; "
    example = '{"name": "get_weather", "parameters": {"city": "Paris"}}'


class Granite(JsonToolParser):
    """Granite 3: ``<|tool_call|>[{"name": ..., "arguments": {...}}]``; later ones write ``<tool_call>``."""

    begin = ("<|tool_call|>", "<tool_call>")
    end = ("</tool_call>",)
    call_formats = (("<|tool_call|>[", "]"),)
    separator = ", "
    example = '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]'


class Phi4Mini(JsonToolParser):
    """Phi-4-mini: ``functools[{"name": ..., "arguments": {...}}]``, or between ``<|tool_call|>`` and
    ``<|/tool_call|>``."""

    begin = ("functools", "<|tool_call|>")
    end = ("<|/tool_call|>",)
    call_formats = (("functools[", "]"),)
    separator = ", "
    example = 'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]'


class Mistral(JsonToolParser):
    """Mistral: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``; since tokenizer version 11
    ``[TOOL_CALLS]name[ARGS]{...}``, with or without ``[ARGS]`` and ``[CALL_ID]``."""

    class Named(HeaderToolParser):
        """The newer form."""

        call_begin = ("[TOOL_CALLS]",)
        header = r"\s*(?P<name>[\w.\-]+)\s*(?:\[CALL_ID\](?P<id>[\w\-]+))?(?:\[ARGS\])?\s*"
        hidden_tokens = ("[ARGS]", "[CALL_ID]")
        call_formats = (("[TOOL_CALLS]{name}[ARGS]", ""),)

    begin = ("[TOOL_CALLS]",)
    call_formats = (("[TOOL_CALLS][", "]"),)
    separator = ", "
    example = '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]'

    @property
    def markers(self) -> tuple[str, ...]:
        """Those of both forms."""
        return self.Named().markers

    def parse_calls(self, text: TextReader, calls: ToolCalls) -> Reading[None]:
        """Either form."""
        named = self.Named()
        while (yield from text.accept(*self.begin)):
            yield from text.skip_space()
            if (yield from text.peek()) in ("[", "{"):
                yield from self.parse_objects(text, calls, is_bare=False)
            else:
                yield from named.parse_call(text, calls)
            yield from text.skip_space()

    def list_call_formats(self, name: str) -> Sequence[CallFormat]:
        """Both forms."""
        return (*super().list_call_formats(name), *self.Named().list_call_formats(name))

    def make_call_id(self, name: str, index: int) -> str:
        """Nine letters and digits: Mistral's chat templates refuse anything else."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class DeepSeekV3(HeaderToolParser):
    """DeepSeek V3, R1 and V3.1: a name and JSON, in a code fence except in V3.1, between special tokens."""

    section_begin = ("<｜tool▁calls▁begin｜>",)
    section_end = ("<｜tool▁calls▁end｜>",)
    call_begin = ("<｜tool▁call▁begin｜>",)
    call_end = ("<｜tool▁call▁end｜>",)
    header = r"\s*(?:function<｜tool▁sep｜>)?(?P<name>[\w.\-]+)\s*(?:<｜tool▁sep｜>|```(?:json)?)\s*"
    hidden_tokens = ("<｜tool▁sep｜>",)
    after_arguments = ("```",)
    call_separators = ("\n", "")
    call_formats = (
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
            "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
    )
    example = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    )


class KimiK2(HeaderToolParser):
    """Kimi K2: ``functions.NAME:0``, which is the id of the call too, and JSON, between special tokens."""

    section_begin = ("<|tool_calls_section_begin|>",)
    section_end = ("<|tool_calls_section_end|>",)
    call_begin = ("<|tool_call_begin|>",)
    call_end = ("<|tool_call_end|>",)
    header = r"\s*(?P<id>(?:functions\.)?(?P<name>[\w.\-]+?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>\s*"
    hidden_tokens = ("<|tool_call_argument_begin|>",)
    call_formats = (
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>",
            "<|tool_call_end|><|tool_calls_section_end|>",
        ),
    )
    example = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>'
    )

    def make_call_id(self, name: str, index: int) -> str:
        """As the model writes it."""
        return f"functions.{name}:{index}"


class Harmony(HeaderToolParser):
    """gpt-oss: messages on the commentary channel whose recipient is ``functions.NAME``. The prompt ends within the
    header of a message, which may go on with the recipient."""

    begin_first = ("to=",)
    call_begin = ("<|channel|>commentary to=", "<|channel|>analysis to=", "<|start|>assistant to=")
    call_end = ("<|call|>", "<|end|>")
    header = (
        r"functions\.(?P<name>[\w.\-]+?)(?:<\|channel\|>\w+)?\s*"
        r"(?:<\|constrain\|>)?\s*(?:json|code)?\s*<\|message\|>\s*"
    )
    hidden_tokens = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>")
    call_formats = (("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", "<|call|>"),)
    calls_end_answer = True
    example = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'


class Qwen3Coder(XmlToolParser):
    """Qwen3-Coder: ``<function=NAME>`` and ``<parameter=KEY>`` in ``<tool_call>``."""

    call_begin = ("<tool_call>",)
    name_begin, name_end = "<function=", (">",)
    key_begin, key_end = "<parameter=", ">"
    value_end = "</parameter>"
    strips_newlines = True
    arguments_end = ("</function>",)
    call_end = ("</tool_call>",)
    call_format = ("<tool_call>\n<function={name}>\n", "</function>\n</tool_call>")
    argument_format = ("<parameter={key}>\n", "\n</parameter>\n")
    example = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"


class Glm45(XmlToolParser):
    """GLM-4.5 and later: a name, ``<arg_key>`` and ``<arg_value>`` in ``<tool_call>``."""

    call_begin = ("<tool_call>",)
    name_end = ("\n",)
    key_begin, key_end = "<arg_key>", "</arg_key>"
    value_begin, value_end = "<arg_value>", "</arg_value>"
    call_end = ("</tool_call>",)
    call_format = ("<tool_call>{name}\n", "</tool_call>")
    argument_format = ("<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n")
    example = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"


class Pythonic(PythonicToolParser):
    """Llama 3.2 and others: the answer is a Python list, ``[get_weather(city="Paris"), get_time()]``."""

    begin = ()
    begin_first = ("[",)
    example = '[get_weather(city="Paris")]'


class Llama4Pythonic(PythonicToolParser):
    """Llama 4: a Python list, alone or between ``<|python_start|>`` and ``<|python_end|>``."""

    begin = ("<|python_start|>",)
    begin_first = ("[",)
    end = ("<|python_end|>",)
    example = '<|python_start|>[get_weather(city="Paris")]<|python_end|>'
