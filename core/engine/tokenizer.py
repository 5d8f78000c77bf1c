"""The model's tokenizer and chat template, behind the few methods the engine and the server need."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser

from quire.core.engine.byte_level import restore_byte_level, undo_byte_level
from quire.core.engine.chat import (
    drop_broken_arguments,
    normalize_messages,
    rename_developer,
    show_python_objects,
    template_variables,
)
from quire.core.engine.token_view import TokenTable, TokenView
from quire.core.errors import CheckpointError, ConfigError, InvalidRequestError
from quire.core.loading.chat_template import make_missing_template_error
from quire.core.loading.hf_config import read_tokenizer_hint
from quire.core.loading.hub import BUNDLED_MODELS, resolve_model

__all__ = ["Tokenizer", "get_tokenizer"]

_log = logging.getLogger("quire.engine")

_CHARS_PER_TOKEN = 8
"""A text with more characters for each token than this is unusual: it is looked at before it is tokenized whole."""
_PIECE_CHARS, _TOKENS_PER_CUT = 65_536, 16
"""How long texts are cut to be counted, and how many tokens a cut adds at most."""


class Tokenizer:
    """Wraps a transformers fast tokenizer. Raises ``CheckpointError`` if the folder has none."""

    def __init__(self, path: str, chat_template: str | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            self._hf_tokenizer = AutoTokenizer.from_pretrained(
                path, config=read_tokenizer_hint(path), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            raise CheckpointError(
                f"{path} has no tokenizer that can be loaded: {_explain_failure(path, error)}"
            ) from error
        if not self._hf_tokenizer.is_fast:
            raise CheckpointError(f"{path} has no tokenizer.json; convert it with transformers, or use --tokenizer")
        self.backend = restore_byte_level(self._hf_tokenizer.backend_tokenizer, Path(path, "tokenizer.json"))
        """The ``tokenizers.Tokenizer`` itself."""
        # What tokenizer.json says of training batches, which transformers sets aside too: no prompt is cut or padded.
        self.backend.no_truncation()
        self.backend.no_padding()
        self._views: dict[frozenset[int] | None, TokenView] = {}
        templates = self._hf_tokenizer.chat_template or {}
        self._chat_templates: dict[str, str] = templates if isinstance(templates, dict) else {"default": templates}
        if chat_template:
            self._chat_templates = {"default": self._chat_templates.get(chat_template) or _read_template(chat_template)}
        for name, text in self._chat_templates.items():
            if (problem := _find_syntax_error(text)) is not None:
                if chat_template:
                    raise ConfigError(f"--chat-template has a syntax error, {problem}; mend it")
                _log.warning(
                    "chat template %r of %s has a syntax error, %s; give one with --chat-template", name, path, problem
                )

    @property
    def hf_tokenizer(self) -> Any:
        """The transformers tokenizer, for callers that want more of it than this class has."""
        return self._hf_tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens it knows, added ones included; the model's vocabulary may be larger."""
        return len(self._hf_tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to ids."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Texts to ids, while other threads run."""
        try:
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequestError("the text holds half of a surrogate pair; leave it out", "prompt") from None

    def find_excess(self, text: str, max_tokens: int) -> int | None:
        """How many tokens ``text`` has at least, where that is surely more than ``max_tokens``; else None. Takes time
        and memory for about ``max_tokens`` tokens, however long the text is."""
        min_tokens = len(text) // self.max_token_chars
        if min_tokens > max_tokens:
            return min_tokens
        if len(text) <= _CHARS_PER_TOKEN * max_tokens:
            return None  # a text of the usual kind would fit, or is soon tokenized
        num_tokens = 0
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            # Where pieces meet, the text may have a few tokens less than both together.
            num_tokens += len(self.encode(piece, add_special_tokens=False)) - _TOKENS_PER_CUT
            if num_tokens > max_tokens:
                return num_tokens
        return None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Ids to text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def convert_id_to_text(self, token_id: int) -> str:
        """What one token adds to a text that it does not begin, a space before it included; for log-probabilities.
        Bytes that are no character show as the replacement character."""
        alone, twice = self.decode([token_id]), self.decode([token_id, token_id])
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone

    def convert_id_to_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for."""
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self.has_byte_pieces:
            return undo_byte_level(piece)
        byte = self.byte_of_token.get(token_id)
        return self.token_texts[token_id].encode() if byte is None else bytes([byte])

    @cached_property
    def token_texts(self) -> Mapping[int, str]:
        """``convert_id_to_text`` of any token, kept once it was asked for."""
        return TokenTable(self.convert_id_to_text)

    @cached_property
    def token_bytes(self) -> Mapping[int, bytes]:
        """``convert_id_to_bytes`` of any token, kept once it was asked for."""
        return TokenTable(self.convert_id_to_bytes)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that ``skip_special_tokens`` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def byte_of_token(self) -> Mapping[int, int]:
        """The byte of each token that stands for one (``<0x0A>``); empty unless the decoder falls back to bytes."""
        if not any(step["type"] == "ByteFallback" for step in self._decoder_steps):
            return {}
        pieces = ((f"<0x{byte:02X}>", byte) for byte in range(256))
        return {i: byte for piece, byte in pieces if (i := self.backend.token_to_id(piece)) is not None}

    @cached_property
    def spells_by_context(self) -> bool:
        """Whether the text of a token depends on more than whether it is the first."""
        types = [step["type"] for step in self._decoder_steps]
        if types in (["Metaspace"], ["WordPiece"]):
            return False
        return not types or not all(_spells_alone(step) for step in self._decoder_steps)

    def view_tokens(self, skip_special_tokens: bool, shown: frozenset[int] = frozenset()) -> TokenView:
        """What decoders see: all tokens, or all but special ones that are not ``shown``. Kept for the next decoder."""
        key = shown if skip_special_tokens else None
        view = self._views.get(key)
        if view is None:
            hidden = frozenset[int]() if key is None else self.special_token_ids - shown
            view = self._views[key] = TokenView(
                hidden, TokenTable(self.convert_id_to_bytes, dict.fromkeys(hidden, b"")), {}
            )
        return view

    def find_special_tokens(self, texts: Iterable[str]) -> frozenset[int]:
        """The special tokens that stand in one of ``texts``."""
        texts = tuple(texts)
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i in self.special_token_ids if any(added[i].content in text for text in texts))

    @cached_property
    def has_byte_pieces(self) -> bool:
        """Whether pieces that spell bytes by GPT-2's mapping may end inside a character."""
        return any(step["type"] == "ByteLevel" for step in self._decoder_steps)

    @cached_property
    def is_plain_byte_level(self) -> bool:
        """Whether text is the bytes of its tokens and nothing else."""
        return [step["type"] for step in self._decoder_steps if step["type"] != "Fuse"] == ["ByteLevel"]

    @cached_property
    def max_token_chars(self) -> int:
        """Characters of the longest token: a text of ``n`` characters has at least ``n / max_token_chars`` tokens."""
        return max((len(piece) for piece in self.backend.get_vocab()), default=1)

    @cached_property
    def _decoder_steps(self) -> list[dict[str, Any]]:
        """What decoding does one after the other, as ``tokenizer.json`` describes it."""
        if self.backend.decoder is None:
            return []
        decoder = json.loads(self.backend.decoder.__getstate__())
        return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]

    @property
    def eos_token_id(self) -> int | None:
        """The token that the tokenizer itself ends a text with; a model's files may list more."""
        token: int | None = self._hf_tokenizer.eos_token_id
        return token

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """``render_chat_template``, tokenized."""
        text = self.render_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Normalize messages and render them with the chat template; see ``chat.template_variables``.

        ``chat_template`` is a template, or the name of one of the model's; None: as transformers chooses.
        ``InvalidRequestError`` if there is no template or it refuses the messages.
        """
        if chat_template:
            template = self._chat_templates.get(chat_template, chat_template)
        else:
            template = _select_template(self._chat_templates, bool(tools))
        messages = rename_developer(messages, template)
        variables = template_variables(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        try:
            return self._render_template(template, variables, messages)
        except Exception as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", "messages") from error

    def _render_template(self, template: str, variables: dict[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
        """With the arguments of tool calls as objects (Llama, Qwen), or as JSON text where that fails: templates that
        join them (DeepSeek-R1, functionary) do not say so. Arguments that are no object, such as text that was cut off,
        are left out where the template fails on them."""
        others = {name: value for name, value in variables.items() if name != "messages"}

        def render(conversation: list[dict[str, Any]]) -> str:
            apply = self._hf_tokenizer.apply_chat_template
            return str(apply(conversation, chat_template=template, tokenize=False, **others))

        normalized = variables["messages"]
        if not any(message.get("tool_calls") for message in normalized):
            return render(normalized)
        try:
            text = render(normalized)
        except Exception as error:
            with contextlib.suppress(Exception):
                return render(normalize_messages(messages, decode_arguments=False))
            with contextlib.suppress(Exception):
                return render(drop_broken_arguments(normalized))
            raise error
        if show_python_objects(text, normalized):
            return render(normalize_messages(messages, decode_arguments=False))
        return text


def get_tokenizer(tokenizer_name: str, *, revision: str | None = None, download_dir: str | None = None) -> Any:
    """The transformers tokenizer of a model, as ``LLM.get_tokenizer`` gives it, without the model. ``tokenizer_name``
    is a folder, a name on the hub, or ``quire-tiny``. Raises ``CheckpointError``."""
    if tokenizer_name in BUNDLED_MODELS or Path(tokenizer_name).expanduser().is_dir():
        return Tokenizer(str(resolve_model(tokenizer_name))).hf_tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            tokenizer_name, revision=revision, cache_dir=download_dir, trust_remote_code=False
        )
    except Exception as error:
        raise CheckpointError(
            f"{tokenizer_name} has no tokenizer that can be loaded: {_explain_failure(tokenizer_name, error)}"
        ) from error


def _spells_alone(step: Mapping[str, Any]) -> bool:
    """Whether a step of decoding changes a token without regard to its neighbours, but for the first one's space."""
    match step["type"]:
        case "ByteFallback" | "Fuse":
            return True
        case "Replace":
            return len(step["pattern"].get("String", "")) == 1
        case "Strip":
            return bool(step["start"] <= 1 and step["stop"] == 0)
    return False


def _explain_failure(path: str, error: Exception) -> str:
    """Why transformers has no tokenizer for ``path``, and what would mend it."""
    if Path(path, "tokenizer.model").is_file() and not Path(path, "tokenizer.json").is_file():
        missing = [name for name in ("sentencepiece", "google.protobuf") if not _can_import(name)]
        if missing:  # transformers then takes the file for tiktoken's, and says so
            return "tokenizer.model needs more packages to be read; pip install sentencepiece protobuf"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{reason}; name one with --tokenizer"


def _can_import(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of its package
        return False


def _select_template(templates: Mapping[str, str], has_tools: bool) -> str:
    """The one of several named templates that transformers takes: with tools ``tool_use``, else ``default``."""
    template = (templates.get("tool_use") if has_tools else None) or templates.get("default")
    if not template:
        lacking = f"no default chat template, only {', '.join(sorted(templates))}" if templates else "no chat template"
        raise InvalidRequestError(
            f"this model has {lacking}; start the server with --chat-template FILE or use /v1/completions", "messages"
        )
    return template


def _read_template(source: str) -> str:
    """A template given as a file, or as itself."""
    path = Path(source)
    if "{" not in source:
        if not path.is_file():
            raise make_missing_template_error(source)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {source}: {error}; give a Jinja file or the template itself") from None
    return source


class _GenerationTag(Extension):
    """``{% generation %}``, by which templates mark the answer for training; transformers renders it as its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Any:
        """The statements up to ``{% endgeneration %}``."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _find_syntax_error(template: str) -> str | None:
    """Where and why a template cannot be compiled; None if it can."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag])
    try:
        environment.compile(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None
