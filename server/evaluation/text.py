"""How well a model foresees a held-out text, token by token, and how far it is from a reference there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from quire.core import assets
from quire.core.errors import ConfigError
from quire.core.sampling_params import SamplingParams
from quire.server.evaluation.logprob_recorder import ARGUMENT, SCORES

__all__ = ["Complete", "TextScores", "Windows", "cut_windows", "read_held_out_text", "score_windows"]

#: Completes prompts of token ids, each with its own parameters; what it returns is not read.
Complete = Callable[[Sequence[list[int]], Sequence[SamplingParams]], object]

_FILE = Path(assets.__file__).resolve().parent / "eval" / "held_out.txt"
_PROMPT_TOKENS, _SCORED_TOKENS = 64, 128  # tokens of a window


@dataclass(frozen=True, slots=True)
class Windows:
    """Stretches of a text. The model reads the first ``prompt`` tokens of each and is scored on the others."""

    tokens: NDArray[np.int32]  # (windows, prompt + scored)
    prompt: int

    @property
    def num_scored(self) -> int:
        """Tokens that are scored, over all windows."""
        return int(self.tokens.shape[0] * (self.tokens.shape[1] - self.prompt))


@dataclass(frozen=True, slots=True)
class TextScores:
    """Figures of one model for every scored token, by window."""

    logprob: NDArray[np.float64]  # (windows, scored) of the text's own token, nats
    top: NDArray[np.int64]  # (windows, scored) the most likely token
    kl: NDArray[np.float64]  # (windows, scored) from the reference, nats; NaN without one

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-probability."""
        return float(np.exp(-self.logprob.mean()))


def read_held_out_text(path: Path | None = None) -> str:
    """The text that comes with Quire, or the file ``path``. ConfigError if it cannot be read."""
    try:
        return (path or _FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text {str(path)!r} cannot be read ({error}); give a file of UTF-8 text") from None


def cut_windows(tokens: Sequence[int], num_tokens: int, max_model_len: int) -> Windows:
    """Windows spread evenly over ``tokens`` with about ``num_tokens`` scored ones (at least one window).

    ConfigError if the text is shorter than a window.
    """
    prompt = min(_PROMPT_TOKENS, max_model_len // 3)
    length = min(prompt + _SCORED_TOKENS, max_model_len)
    count = min(len(tokens) // length, max(1, round(num_tokens / (length - prompt))))
    if count < 1:
        raise ConfigError(f"the text has {len(tokens)} tokens and a window takes {length}; give a longer one")
    stride = len(tokens) // count
    starts = [i * stride for i in range(count)]
    return Windows(np.array([tokens[s : s + length] for s in starts], dtype=np.int32), prompt)


def score_windows(
    complete: Complete, windows: Windows, folder: Path, vocab_size: int, *, has_reference: bool
) -> TextScores:
    """Score the model behind ``complete``, an engine whose logits processors include ``LogprobRecorder``.

    ``folder`` keeps the reference's distributions, 4 bytes for each token and entry of the vocabulary: the first call
    writes them (``has_reference=False``), later ones compare with them.
    """
    count, length = windows.tokens.shape
    scored = length - windows.prompt
    paths = {"scores": folder / "scores.npy", "logprobs": folder / "logprobs.npy"}
    open_memmap(paths["scores"], mode="w+", dtype=np.float64, shape=(count * scored, len(SCORES)))[:] = np.nan
    if not has_reference:
        open_memmap(paths["logprobs"], mode="w+", dtype=np.float32, shape=(count * scored, vocab_size))
    prompts, params = [], []
    for i, tokens in enumerate(windows.tokens.tolist()):
        task = {name: str(path) for name, path in paths.items()} | {
            "tokens": tokens[windows.prompt :],
            "row": i * scored,
            "has_reference": has_reference,
        }
        prompts.append(tokens[: windows.prompt])
        params.append(
            SamplingParams(
                temperature=0, max_tokens=scored, ignore_eos=True, detokenize=False, extra_args={ARGUMENT: task}
            )
        )
    complete(prompts, params)
    values = np.array(open_memmap(paths["scores"], mode="r")).reshape(count, scored, len(SCORES))
    if np.isnan(values[..., :2]).any():
        raise RuntimeError("some tokens of the text were not scored; is a logits processor quarantined? see the log")
    return TextScores(values[..., 0], values[..., 1].astype(np.int64), values[..., 2])
