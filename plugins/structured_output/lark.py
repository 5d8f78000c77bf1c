"""Grammars in llguidance's Lark: free text with structural tags in it, and reasoning before an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quire.plugins.structured_output.json_schema import prepare_schema
from quire.sdk import InvalidRequestError

__all__ = ["LarkWriter"]

_TEXT = r"TEXT: /(.|\n)*/"
_MAX_STRUCTURES = 512


class LarkWriter:
    """Writes Lark for one tokenizer, whose special tokens are ``special_ids`` by their text: a text that is one of them
    is matched as that token, since no text matches a special token."""

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._special_ids = special_ids

    @staticmethod
    def check_structural_tag(tag: Any) -> None:
        """Raise ``InvalidRequestError`` where the tag is not of the form that ``StructuredOutputsParams`` describes."""
        structures, triggers = tag.get("structures"), tag.get("triggers")
        if not isinstance(structures, list) or not 0 < len(structures) <= _MAX_STRUCTURES:
            raise _refuse(f"structures must be a list of 1 to {_MAX_STRUCTURES} objects")
        if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
            raise _refuse("triggers must be a list of texts that are not empty")
        for structure in structures:
            if not isinstance(structure, dict) or not isinstance(structure.get("begin"), str):
                raise _refuse("every structure must be an object with a text 'begin'")
            if not isinstance(structure.get("end", ""), str):
                raise _refuse("'end' of a structure must be a text")
            if not any(structure["begin"].startswith(trigger) for trigger in triggers):
                raise _refuse(f"no trigger begins {structure['begin']!r:.60}")
            if not isinstance(structure.get("schema", {}), dict | bool):
                raise _refuse("'schema' of a structure must be a JSON schema")
            prepare_schema(structure.get("schema", {}))
        if "answer" in tag:
            if not isinstance(tag["answer"], dict | bool):
                raise _refuse("'answer' must be a JSON schema")
            prepare_schema(tag["answer"])

    def write_structural_tag(self, tag: Any, json_options: dict[str, Any]) -> str:
        """Free text, in which after a trigger one of the structures that begin with it follows; or the structures
        alone, or in their place JSON."""
        self.check_structural_tag(tag)
        free_text = tag.get("free_text") is not False and "answer" not in tag
        rules, segments = [_TEXT], []
        for index, trigger in enumerate(tag["triggers"]):
            bodies = []
            for structure in tag["structures"]:
                # A structure belongs to the first trigger that begins it.
                first = next(t for t in tag["triggers"] if structure["begin"].startswith(t))
                if first == trigger:
                    schema = {**prepare_schema(structure.get("schema", {})), "x-guidance": json_options}
                    parts = (self._write_text(structure["begin"][len(trigger) :]), f"%json {json.dumps(schema)}")
                    bodies.append(" ".join((*parts, self._write_text(structure.get("end", "")))))
            if not bodies:
                continue
            segments.append(f"segment_{index}")
            rules.append(f"body_{index}: " + " | ".join(bodies))
            if not free_text:
                rules.append(f"segment_{index}: {self._write_text(trigger)} body_{index}")
            elif trigger in self._special_ids:
                rules.append(f"segment_{index}: TEXT {self._write_text(trigger)} body_{index}")
            else:
                # Lazy: the text ends at the first trigger, so that none can pass as text.
                rules += [f"trigger_{index}[lazy]: TEXT {json.dumps(trigger)}"]
                rules.append(f"segment_{index}: trigger_{index} body_{index}")
        segment = "(" + " | ".join(segments) + ")"
        tail = " TEXT" if free_text else ""
        if tag.get("stop_after_first"):
            start = segment if tag.get("at_least_one") or not free_text else f"{segment} | TEXT"
        else:
            start = f"{segment}{'+' if tag.get('at_least_one') or not free_text else '*'}{tail}"
        if "answer" in tag:
            rules.append(f"answer: %json {json.dumps({**prepare_schema(tag['answer']), 'x-guidance': json_options})}")
            start = f"answer | {start}"
        return "\n".join(("%llguidance {}", f"start: {start}", *rules, ""))

    def write_reasoning(self, start: str | None, end: str, answer: str) -> str:
        """Free text up to ``end``, then white space and the grammar called ``answer``. With ``start``, free text comes
        only behind it."""
        if end in self._special_ids:
            rules, thought = [_TEXT], f"TEXT {self._write_text(end)}"
        else:
            rules, thought = [_TEXT, f"thought[lazy]: TEXT {json.dumps(end)}"], "thought"
        begin = "" if start is None else f"{self._write_text(start)} "
        reasoning = f"({begin}{thought} BLANK)" + ("" if start is None else "?")
        return "\n".join(("%llguidance {}", f"start: {reasoning} @{answer}", r"BLANK: /[ \t\r\n]{0,8}/", *rules, ""))

    def _write_text(self, text: str) -> str:
        """``text`` as Lark terminals: special tokens in it by their ids, the rest in quotes."""
        terminals, rest = [], text
        while rest:
            found = [(rest.find(name), name) for name in self._special_ids if name and name in rest]
            position, name = min(found, default=(len(rest), ""))
            if position:
                terminals.append(json.dumps(rest[:position]))
            if name:
                terminals.append(f"<[{self._special_ids[name]}]>")
            rest = rest[position + len(name) :]
        return " ".join(terminals)


def _refuse(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"structural_tag: {what}", "structured_outputs")
