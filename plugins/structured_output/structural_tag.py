"""Structural tags in llguidance's Lark: free text with structures in it, structures alone, or JSON in their place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quire.plugins.structured_output.json_schema import prepare_schema
from quire.plugins.structured_output.lark import LarkWriter, TextRegex
from quire.sdk import InvalidRequestError

__all__ = ["TagGrammar", "check_structural_tag", "list_json_schemas"]

_MAX_STRUCTURES = 512
_TEXT_LISTS = ("excluded", "excluded_first")
_FLAGS = ("free_text", "at_least_one", "structure_first", "stop_after_first")
_STRUCTURE_FLAGS = ("first", "free")


def check_structural_tag(tag: Any) -> None:
    """Raise ``InvalidRequestError`` where the tag is not of the form that ``StructuredOutputsParams`` describes."""
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not 0 < len(structures) <= _MAX_STRUCTURES:
        raise _refuse(f"structures must be a list of 1 to {_MAX_STRUCTURES} objects")
    if not isinstance(triggers, list) or not all(isinstance(trigger, str) and trigger for trigger in triggers):
        raise _refuse("triggers must be a list of texts that are not empty")
    for name in _TEXT_LISTS:
        if not isinstance(tag.get(name, []), list) or not all(isinstance(text, str) for text in tag.get(name, [])):
            raise _refuse(f"{name!r} must be a list of texts")
    _check_flags(tag, _FLAGS)
    for structure in structures:
        if not isinstance(structure, dict) or not isinstance(structure.get("begin"), str | list):
            raise _refuse("every structure must be an object with a text 'begin'")
        _check_flags(structure, _STRUCTURE_FLAGS)
        begins = _list_begins(structure)
        if not begins or not all(isinstance(begin, str) for begin in begins):
            raise _refuse("'begin' of a structure must be a text")
        if not isinstance(structure.get("end", ""), str):
            raise _refuse("'end' of a structure must be a text")
        for begin in () if structure.get("first") else begins:
            if not any(begin.startswith(trigger) for trigger in triggers):
                raise _refuse(f"no trigger begins {begin!r:.60}")
        group = structure.get("group") or ["", "", ""]
        if not isinstance(group, list) or len(group) != 3 or not all(isinstance(text, str) for text in group):
            raise _refuse("'group' of a structure must be three texts")
        if not structure.get("end", "").endswith(group[2]) or not all(begin.startswith(group[0]) for begin in begins):
            raise _refuse("a structure must begin and end as its 'group' does")
        if not isinstance(structure.get("schema", {}), dict | bool):
            raise _refuse("'schema' of a structure must be a JSON schema")
        try:
            prepare_schema(structure.get("schema", {}))
        except InvalidRequestError as error:
            reason = str(error).removeprefix("json: ")
            raise _refuse(f"the structure that begins {begins[0]!r:.100}: {reason}") from None
    if "answer" in tag:
        if not isinstance(tag["answer"], dict | bool):
            raise _refuse("'answer' must be a JSON schema")
        prepare_schema(tag["answer"])


def _check_flags(value: Any, names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(value.get(name, False), bool):
            raise _refuse(f"{name!r} must be true or false")


def list_json_schemas(tag: Any) -> list[Any] | None:
    """The schemas of all JSON in the tag's structures; None where arguments have a syntax of their own."""
    if any("arguments" in structure for structure in tag["structures"]):
        return None
    structures = (structure for structure in tag["structures"] if not structure.get("free"))
    return [structure.get("schema", {}) for structure in structures] + ([tag["answer"]] if "answer" in tag else [])


class _Parts(NamedTuple):
    """Alternatives behind which more may come, and those that end an answer; each empty if there is none."""

    inner: str
    last: str

    def join(self) -> str:
        """One of either."""
        return f"({' | '.join(filter(None, self))})"

    def repeat(self) -> str:
        """Any number, but at least one."""
        if not self.last:
            return f"({self.inner})+"
        return f"(({self.inner})+ | ({self.inner})* ({self.last}))" if self.inner else f"({self.last})"


class TagGrammar:
    """The rules of one structural tag, written one after the other."""

    def __init__(self, lark: LarkWriter, tag: Any, json_options: Mapping[str, Any]) -> None:
        self._lark, self._tag, self._json_options = lark, tag, json_options
        self._rules: list[str] = []
        self._bodies: dict[str, _Parts] = {}  # by trigger
        self._first = [structure for structure in tag["structures"] if structure.get("first")]
        self._others = [structure for structure in tag["structures"] if not structure.get("first")]
        # No free text holds what would begin a structure in another way than by a rule.
        special = [trigger for trigger in tag["triggers"] if trigger in lark.special_ids]
        self._excluded = (*tag.get("excluded", ()), *special)

    def write(self, answer_begin: str) -> str:
        """The grammar. Text that is no structure, and JSON in place of structures, come behind ``answer_begin``."""
        tag, begin = self._tag, self._lark.write_text(answer_begin)
        starts = [self._write_bodies("first", self._first).join()] if self._first else []
        if "answer" in tag:
            starts.append(self._add_rule("answer", begin, self._write_json(tag["answer"])))
        if tag.get("free_text") is not False and "answer" not in tag:
            if tag.get("structure_first") and self._others:
                text = self._write_structure_and_text()
            else:
                text = self._write_text() if self._others or not tag.get("at_least_one") else ""
            starts += [self._add_rule("text", begin, text)] if text else []
        elif self._others:
            segments = self._write_segments("", None)
            starts.append(segments.join() if tag.get("stop_after_first") else segments.repeat())
        return "\n".join(("%llguidance {}", f"start: {' | '.join(starts)}", *self._rules, ""))

    def _write_text(self) -> str:
        """Free text, in which after a trigger one of the structures that begin with it follows."""
        regex = TextRegex().exclude(*self._excluded)
        first = self._add_rule("FIRST", str(regex.exclude_begins(*self._tag.get("excluded_first", ()))))
        if not self._others:
            return first
        segments = self._write_segments("first_", first)
        parts = [] if self._tag.get("at_least_one") else [first]
        if self._tag.get("stop_after_first"):
            return f"({' | '.join((segments.join(), *parts))})"
        text = self._add_rule("TEXT", str(regex))
        more = self._write_segments("next_", text)
        if segments.last:
            parts.append(segments.last)
        if segments.inner:
            parts.append(f"({segments.inner}) ({more.inner})* ({' | '.join(filter(None, (text, more.last)))})")
        return f"({' | '.join(parts)})"

    def _write_structure_and_text(self) -> str:
        """A structure, and behind it free text with others in it."""
        first = self._write_segments("", None)
        if self._tag.get("stop_after_first"):
            return first.join()
        text = self._add_rule("TEXT", str(TextRegex().exclude(*self._excluded)))
        more = self._write_segments("next_", text)
        rest = f"({more.inner})* " if more.inner else ""
        parts = [f"({first.inner}) {rest}({' | '.join(filter(None, (text, more.last)))})"] if first.inner else []
        return f"({' | '.join(filter(None, (*parts, first.last)))})"

    def _write_segments(self, prefix: str, text: str | None) -> _Parts:
        """Structures that begin with a trigger, behind ``text`` where there is free text."""
        inner, last = [], []
        for index, trigger in enumerate(self._tag["triggers"]):
            # A structure belongs to the first trigger that begins it.
            own = [each for each in self._others if _find_trigger(each, self._tag["triggers"]) == trigger]
            if not own:
                continue
            if text is None or trigger in self._lark.special_ids:
                begin = f"{text or ''} {self._lark.write_text(trigger)}"
            else:
                # Lazy: the text ends at the first trigger, so that none can pass as text.
                begin = self._add_rule(f"{prefix}trigger_{index}[lazy]", text, json.dumps(trigger))
            if trigger not in self._bodies:
                self._bodies[trigger] = self._write_bodies(f"bodies_{index}", own, trigger)
            bodies = self._bodies[trigger]
            inner += [self._add_rule(f"{prefix}segment_{index}", begin, bodies.inner)] if bodies.inner else []
            last += [self._add_rule(f"{prefix}last_{index}", begin, bodies.last)] if bodies.last else []
        return _Parts(" | ".join(inner), " | ".join(last))

    def _write_bodies(self, name: str, structures: Sequence[Any], trigger: str = "") -> _Parts:
        """Any of the structures, without the trigger that they begin with, and what may follow it in its group."""
        inner, last = [], []
        for group in dict.fromkeys(tuple(structure.get("group") or ()) for structure in structures):
            own = [structure for structure in structures if tuple(structure.get("group") or ()) == group]
            if not group:
                inner += [self._write_structure(structure, len(trigger)) for structure in own]
                continue
            enforced = [
                self._write_structure(each, len(trigger), len(group[2])) for each in own if not each.get("free")
            ]
            last += [self._write_structure(each, len(trigger)) for each in own if each.get("free")]
            if enforced:
                first = self._add_rule(f"{name}_{len(self._rules)}", " | ".join(enforced))
                rest = self._write_group_rest(own, group)
                # Behind a group that nothing ends, text could be taken for more of it.
                (inner if group[2] else last).append(f"{first} {rest.inner}")
                last += [f"{first} {rest.last}"] if rest.last else []
        names = [
            self._add_rule(f"{name}_{kind}", " | ".join(parts)) if parts else ""
            for kind, parts in (("inner", inner), ("last", last))
        ]
        return _Parts(*names)

    def _write_group_rest(self, structures: Sequence[Any], group: Sequence[str]) -> _Parts:
        """What follows the first structure of a group. One whose arguments are free is the last."""
        before, between, behind = group
        serial, end = len(self._rules), self._lark.write_end(behind) or '""'
        if self._tag.get("stop_after_first"):
            return _Parts(end, "")
        separator, more, free = self._lark.write_text(between), [], []
        for structure in structures:
            if structure.get("free"):
                free.append(f"{separator} {self._write_structure(structure, len(before))}")
            else:
                more.append(self._write_structure(structure, len(before), len(behind)))
        others = self._add_rule(f"more_{serial}", f"({separator} ({' | '.join(more)}))*" if more else '""')
        last = self._add_rule(f"free_{serial}", others, f"({' | '.join(free)})") if free else ""
        return _Parts(f"{others} {end}", last)

    def _write_structure(self, structure: Any, num_begun: int = 0, num_after: int = 0) -> str:
        """One structure, without the first ``num_begun`` characters of its begin and the last ``num_after`` of its
        end."""
        begins, end = _list_begins(structure), structure.get("end", "")
        begin = " | ".join(self._lark.write_text(begin[num_begun:]) or '""' for begin in begins)
        if structure.get("free"):
            return f"({begin}) {self._write_free(structure, end)}"
        if "arguments" in structure:
            value = self._write_arguments(structure["arguments"], str(structure.get("separator", "")))
        else:
            value = self._write_json(structure.get("schema", {}))
        return f"({begin}) {value} {self._lark.write_end(end[: len(end) - num_after])}"

    def _write_free(self, structure: Any, end: str) -> str:
        """Anything up to ``end``; in a group anything to the end of the answer but a structure that is not free."""
        group, excluded = structure.get("group"), [end.strip()]
        if group:
            others = (each for each in self._tag["structures"] if each.get("group") and not each.get("free"))
            excluded = [begin[len(each["group"][0]) :] for each in others for begin in _list_begins(each)]
            end = ""
        regex, special = TextRegex().exclude(*excluded), self._lark.write_other_tokens(end)
        if not special:
            return self._write_text_value(regex, end) if end else self._add_rule(f"REST_{len(self._rules)}", str(regex))
        text = self._add_rule(f"REST_{len(self._rules)}", str(regex))
        return f"({text} {special})* {self._write_text_value(regex, end) if end else text}"

    def _write_arguments(self, arguments: Sequence[Any], separator: str) -> str:
        """Arguments in their order, with separators between those that are there: one rule for each place, by whether
        an argument stands before it."""
        written = [self._write_argument(argument) for argument in arguments]
        between, serial = self._lark.write_text(separator), len(self._rules)
        if not separator:
            pairs = zip(arguments, written, strict=True)
            return " ".join(each if argument["required"] else f"({each})?" for argument, each in pairs)
        behind = first = '""'
        for index in reversed(range(len(arguments))):
            is_required, value = arguments[index]["required"], written[index]
            first_now = f"{value} {behind}" if is_required else f"({value} {behind} | {first})"
            behind_now = f"{between} {value} {behind}" if is_required else f"({between} {value})? {behind}"
            first = self._add_rule(f"first_{serial}_{index}", first_now)
            behind = self._add_rule(f"behind_{serial}_{index}", behind_now)
        return first

    def _write_argument(self, argument: Any) -> str:
        values = " | ".join(self._write_value(value, argument) for value in argument["values"])
        return f"{self._lark.write_text(argument['begin'])} ({values})"

    def _write_value(self, value: Any, argument: Any) -> str:
        end, stop, quote = argument["end"], argument["stop"], value.get("quote", "")
        if "json" in value:
            return f"{self._write_json(value['json'])} {self._lark.write_text(end)}"
        schema = value["text"]
        excluded = [stop, *((quote, "\\", "\n") if quote else ())]
        begin, end = self._lark.write_text(quote), quote + end
        if "enum" not in schema and "const" not in schema:
            return f"{begin} {self._write_text_value(TextRegex.from_schema(schema).exclude(*excluded), end)}"
        texts = schema.get("enum", [schema.get("const")])
        texts = [text for text in texts if not any(each and each in text for each in excluded)]
        return " | ".join(f"{begin} {self._lark.write_text(text + end)}" for text in texts) or self._refuse_texts()

    def _refuse_texts(self) -> str:
        raise _refuse("no value of an argument can be written in the syntax of this model's calls")

    def _write_text_value(self, regex: TextRegex, end: str) -> str:
        """A text that ``end`` ends. Up to the first special token the end belongs to the terminal, which is lazy: text
        cannot be told from it otherwise."""
        plain, rest = self._lark.split_text(end)
        serial = len(self._rules)
        value = self._add_rule(f"VALUE_{serial}", str(regex))
        if plain:
            value = self._add_rule(f"value_{serial}[lazy]", value, json.dumps(plain))
        return f"{value} {rest}"

    def _write_json(self, schema: Any) -> str:
        prepared = {**prepare_schema(schema), "x-guidance": self._json_options}
        return self._add_rule(f"json_{len(self._rules)}", f"%json {json.dumps(prepared)}")

    def _add_rule(self, name: str, *parts: str) -> str:
        """Write it. Returns its name."""
        self._rules.append(f"{name}: {' '.join(filter(None, parts))}")
        return name.removesuffix("[lazy]")


def _list_begins(structure: Any) -> list[str]:
    begin = structure["begin"]
    return begin if isinstance(begin, list) else [begin]


def _find_trigger(structure: Any, triggers: Sequence[str]) -> str:
    return next(trigger for trigger in triggers if _list_begins(structure)[0].startswith(trigger))


def _refuse(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"structural_tag: {what}", "structured_outputs")
