"""Finds the local folder of a model by name: a bundled model, a folder, or a download from the Hugging Face hub."""

from __future__ import annotations

import difflib
from pathlib import Path

from quire.core.errors import CheckpointError

__all__ = ["BUNDLED_ADAPTERS", "BUNDLED_MODELS", "check_adapter_path", "resolve_adapter", "resolve_model"]

BUNDLED_MODELS = ("quire-tiny", "quire-tiny-draft")
"""Models that come with the package, in ``core/assets``."""

BUNDLED_ADAPTERS = ("quire-tiny-upper", "quire-tiny-json")
"""LoRA adapters of quire-tiny that come with it."""

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
_PICKLED_WEIGHTS = "pytorch_model.bin"  # in which some drafting heads are published
_DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_ADAPTER_PATTERNS = ["adapter_config.json", "adapter_model.safetensors"]


def resolve_model(
    name: str, *, revision: str | None = None, download_dir: str | Path | None = None, draft_head: bool = False
) -> Path:
    """The local folder of model ``name``.

    A bundled model is its folder in the package. A path is itself. Anything else is a repository on the hub, fetched
    into ``download_dir`` or the hub's own cache, at ``revision``. The hub's variables hold: ``HF_TOKEN``,
    ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME``. Only safetensors, configuration and tokenizer files are fetched,
    never pickles or code; of a ``draft_head`` without safetensors also ``pytorch_model.bin``, which is read for its
    tensors alone. Raises ``CheckpointError``, one line that says what to do.
    """
    if name in BUNDLED_MODELS:
        return _find_bundled_model(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise CheckpointError(f"model {name!r} is a file; give the folder that holds config.json and *.safetensors")
    if _looks_like_path(name):
        raise CheckpointError(
            f"model folder {name!r} does not exist; give a folder, a name on the Hugging Face hub, or 'quire-tiny'"
        )
    return _download_model(name, revision, download_dir, draft_head)


def check_adapter_path(name: str) -> None:
    """Raises ``CheckpointError`` for the path of an adapter that is no folder; asks no hub for what may be a name."""
    try:
        path = Path(name).expanduser()
        is_wrong = not path.is_dir() and (path.exists() or _looks_like_path(name))
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a home of nobody
        is_wrong = True
    if name not in BUNDLED_ADAPTERS and is_wrong:
        raise CheckpointError(f"adapter {name!r} is not a folder; give one that PEFT wrote, or a name on the hub")


def resolve_adapter(name: str, *, download_dir: str | Path | None = None) -> Path:
    """The local folder of the LoRA adapter ``name``: a bundled one, a path, or a repository on the hub, of which only
    the configuration and safetensors are fetched. Raises ``CheckpointError``."""
    check_adapter_path(name)
    if name in BUNDLED_ADAPTERS:
        return _ASSETS / name
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path.resolve()
    return _fetch_snapshot("adapter", name, None, download_dir, _ADAPTER_PATTERNS)


def _find_bundled_model(name: str) -> Path:
    path = _ASSETS / name
    if not (path / "config.json").is_file():
        raise CheckpointError(f"the bundled model {name!r} is not in this installation; install quire again")
    return path


def _looks_like_path(name: str) -> bool:
    return not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def _download_model(name: str, revision: str | None, download_dir: str | Path | None, draft_head: bool) -> Path:
    at = f" at revision {revision!r}" if revision else ""
    folder = _fetch_snapshot("model", name, revision, download_dir, _DOWNLOAD_PATTERNS)
    if draft_head and not any(folder.glob("*.safetensors")):
        _fetch_snapshot("model", name, revision, download_dir, [_PICKLED_WEIGHTS])
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"repository {name!r}{at} has no config.json; it is not a model in Hugging Face layout")
    if not any(folder.glob("*.safetensors")) and not (draft_head and (folder / _PICKLED_WEIGHTS).is_file()):
        raise CheckpointError(
            f"repository {name!r}{at} has no safetensors; pickled weights (*.bin, *.pt) can run code when loaded and "
            f"are refused; convert the model, or choose a revision that has safetensors"
        )
    return folder


def _fetch_snapshot(
    what: str, name: str, revision: str | None, download_dir: str | Path | None, patterns: list[str]
) -> Path:
    from huggingface_hub import errors, snapshot_download

    cache = None if download_dir is None else str(Path(download_dir).expanduser())
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=patterns))
    except errors.HFValidationError:
        raise CheckpointError(
            f"{what} {name!r} is neither a folder nor a valid name on the hub (owner/name){_suggest_name(name)}"
        ) from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{what} {name!r} is gated; accept its terms on the hub, then set HF_TOKEN to a token that may read it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{what} {name!r} is neither a folder nor a repository on the hub, or it is private: check the name, or "
            f"set HF_TOKEN{_suggest_name(name)}"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{what} {name!r} has no revision {revision!r}; check --revision") from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{what} {name!r}{at} is not in the cache and the hub cannot be reached (no network, or HF_HUB_OFFLINE is "
            f"set); go online, or give a local folder{_suggest_name(name)}"
        ) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{what} {name!r}{at} could not be downloaded ({reason}); try again") from None


def _suggest_name(name: str) -> str:
    close_names = difflib.get_close_matches(name, BUNDLED_MODELS, n=1)
    return f"; did you mean {close_names[0]!r}?" if close_names else ""
