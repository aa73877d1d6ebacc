"""Fetches a verifier from the model hub into the cache of huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from speculators.errors import VerifierError

# Never pickles (*.bin, *.pt): reading one runs any code that its author put there.
_WEIGHTS = "*.safetensors"
_PATTERNS = [_WEIGHTS, "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]


def fetch_folder(repo: str, revision: str | None, *, trust_remote_code: bool = False) -> Path:
    """Fetches safetensors, config and tokenizer of a hub model; returns the local snapshot.

    Raises:
        VerifierError: no network, no such model or revision, or no access to it.
    """
    return _snapshot(repo, revision, [*_PATTERNS, "*.py"] if trust_remote_code else _PATTERNS)


def fetch_tokenizer(repo: str, revision: str | None, *, trust_remote_code: bool = False) -> Path:
    """Fetches config and tokenizer into the same snapshot, without weights. Raises as `fetch_folder` does."""
    patterns = [pattern for pattern in _PATTERNS if pattern != _WEIGHTS]
    return _snapshot(repo, revision, [*patterns, "*.py"] if trust_remote_code else patterns)


def fetch_config(repo: str, revision: str | None, *, trust_remote_code: bool = False) -> Path:
    """Fetches only config.json of a hub model and generation_config.json beside it, and code if it is trusted.

    Returns the path of config.json.

    Raises as `fetch_folder` does.
    """
    patterns = ["config.json", "generation_config.json", *(["*.py"] if trust_remote_code else [])]
    return _snapshot(repo, revision, patterns) / "config.json"


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    # Late: the hub client takes half a second to import, and local verifiers do not need it.
    from huggingface_hub import errors, snapshot_download

    name = f"verifier {repo}@{revision}" if revision else f"verifier {repo}"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=["original/*"]))
    except errors.GatedRepoError as error:
        raise VerifierError(
            f"{name}: the model is gated", hint="accept its licence on the hub, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise VerifierError(f"{name}: the hub has the model, but not this revision") from error
    except errors.RepositoryNotFoundError as error:
        raise VerifierError(
            f"{name}: the hub has no such model, or it is private",
            hint="check the spelling of verifier.model, or run `hf auth login`",
        ) from error
    # The client's HTTP library, and with it the class of a broken connection, differs between its versions.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise VerifierError(
            f"{name}: it is not in the local hub cache, and the hub cannot be reached ({reason})",
            hint="connect once and repeat, or give a local folder (./folder) or a GGUF file as verifier.model",
        ) from error
