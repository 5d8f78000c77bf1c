"""Grammars in llguidance's Lark: texts with special tokens in them, expressions of text, reasoning before an answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark

from quire.sdk import InvalidRequestError

__all__ = ["LarkWriter", "TextRegex"]

_ANY = r"(.|\n)*"
_BLANKS = r"[\x09-\x0d\x1c-\x20\x85\xa0\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}]*"
"""What Python takes for white space, as the parsers of answers do."""
_META = frozenset(r"\.+*?()|[]{}^$/-#&~")


class LarkWriter:
    """Writes Lark for one tokenizer, whose special tokens are ``special_ids`` by their text: a text that is one of them
    is matched as that token, since no text matches a special token. ``eos_token_ids`` end answers."""

    def __init__(self, special_ids: Mapping[str, int], eos_token_ids: Collection[int] = ()) -> None:
        self.special_ids = special_ids
        self._eos_token_ids = frozenset(eos_token_ids)

    def write_reasoning(
        self, starts: Sequence[str], ends: Sequence[str], between: str, answer_begin: str, answer: str
    ) -> str:
        """Free text up to one of ``ends``, then white space and the grammar called ``answer`` behind ``answer_begin``.
        With ``starts``, free text comes only behind one of them; with ``between``, which follows each, several times.
        Without ``ends`` there is no free text."""
        rules, thoughts = [f"TEXT: {TextRegex()}", r"BLANK: /[ \t\r\n]{0,8}/"], []
        for index, end in enumerate(ends):
            if end in self.special_ids:
                thoughts.append(f"TEXT {self.write_text(end)}")
            else:
                rules.append(f"thought_{index}[lazy]: TEXT {json.dumps(end)}")
                thoughts.append(f"thought_{index}")
        begin = f"({' | '.join(map(self.write_text, starts))})" if starts else ""
        reasoning = f"({begin} ({' | '.join(thoughts)}) BLANK {self.write_text(between)})" if ends else ""
        if reasoning and starts:
            reasoning += "*" if between else "?"
        start = " ".join(filter(None, (reasoning, self.write_text(answer_begin), f"@{answer}")))
        return "\n".join(("%llguidance {}", f"start: {start}", *rules, ""))

    def write_text(self, text: str) -> str:
        """``text`` as Lark terminals: special tokens in it by their ids, the rest in quotes."""
        terminals = []
        while text:
            plain, special = self._find_special(text)
            if plain:
                terminals.append(json.dumps(plain))
            if special:
                terminals.append(f"<[{self.special_ids[special]}]>")
            text = text[len(plain) + len(special) :]
        return " ".join(terminals)

    def write_end(self, text: str) -> str:
        """The same for a text that may end an answer: a token that does is no part of the grammar."""
        special = next(
            (
                name
                for name, token in self.special_ids.items()
                if token in self._eos_token_ids and name and text.endswith(name)
            ),
            "",
        )
        return self.write_text(text.removesuffix(special))

    def split_text(self, text: str) -> tuple[str, str]:
        """What stands before the first special token, as it is, and the rest as terminals."""
        plain, _ = self._find_special(text)
        return plain, self.write_text(text[len(plain) :])

    def write_other_tokens(self, end: str) -> str:
        """Any special token but those that end answers or are part of ``end``; empty if there is none."""
        ids = {token for name, token in self.special_ids.items() if name not in end} - self._eos_token_ids
        return f"<[{','.join(map(str, sorted(ids)))}]>" if ids else ""

    def _find_special(self, text: str) -> tuple[str, str]:
        """The text before the first special token, and that."""
        found = [(text.find(name), -len(name), name) for name in self.special_ids if name and name in text]
        position, _, name = min(found, default=(len(text), 0, ""))
        return text[:position], name


class TextRegex:
    """A terminal: text without special tokens, of which some is excluded."""

    def __init__(self, *expressions: str) -> None:
        self._expressions = expressions or (f"/{_ANY}/",)

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any]) -> TextRegex:
        """Texts that match ``minLength``, ``maxLength`` and ``pattern``."""
        expressions = []
        if schema.keys() & {"minLength", "maxLength"}:
            expressions.append(f"/(.|\\n){{{int(schema.get('minLength', 0))},{schema.get('maxLength', '')}}}/")
        if "pattern" in schema:
            expressions.append(f"/{_write_pattern(str(schema['pattern']))}/")
        return cls(*expressions)

    def exclude(self, *texts: str) -> TextRegex:
        """Without those that hold one of ``texts``."""
        words = "|".join(_escape(text) for text in texts if text)
        return TextRegex(*self._expressions, f"~/{_ANY}({words}){_ANY}/") if words else self

    def exclude_begins(self, *texts: str) -> TextRegex:
        """Without those that begin with one of ``texts``, white space aside."""
        words = "|".join(_escape(text) for text in texts if text)
        return TextRegex(*self._expressions, f"~/{_BLANKS}({words}){_ANY}/") if words else self

    def __str__(self) -> str:
        return " & ".join(self._expressions)


def _escape(text: str) -> str:
    return "".join("\\n" if char == "\n" else f"\\{char}" if char in _META else char for char in text)


def _write_pattern(pattern: str) -> str:
    """A pattern of JSON Schema, which may match anywhere, as an expression of the whole text."""
    is_begun, is_ended = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    body = pattern[is_begun : len(pattern) - is_ended]
    if "|" in body and (is_begun or is_ended) and not (body.startswith("(") and body.endswith(")")):
        message = f"pattern {pattern!r:.60} has anchors beside alternatives; put the alternatives in brackets"
        raise InvalidRequestError(f"structural_tag: {message}", "structured_outputs")
    return f"{'' if is_begun else _ANY}({regex_to_lark(body)}){'' if is_ended else _ANY}"
