"""A verifier on the model hub, fetched by huggingface_hub into its own cache."""

from __future__ import annotations

from pathlib import Path

from speculators.errors import VerifierError

# Never pickles (*.bin, *.pt): reading one runs what its author wrote into it.
_WEIGHTS = "*.safetensors"
_WANTED = [_WEIGHTS, "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]


def fetch_folder(repo: str, revision: str | None, *, trust_remote_code: bool = False) -> Path:
    """Returns the local snapshot of a hub model: safetensors, config and tokenizer.

    Raises:
        VerifierError: no network, no such model or revision, or no access to it.
    """
    return _snapshot(repo, revision, [*_WANTED, "*.py"] if trust_remote_code else _WANTED)


def fetch_tokenizer(repo: str, revision: str | None, *, trust_remote_code: bool = False) -> Path:
    """Returns the same snapshot with config and tokenizer, without fetching weights. Raises as `fetch_folder` does."""
    wanted = [pattern for pattern in _WANTED if pattern != _WEIGHTS]
    return _snapshot(repo, revision, [*wanted, "*.py"] if trust_remote_code else wanted)


def fetch_config(repo: str, revision: str | None) -> Path:
    """Returns the local path of a hub model's config.json; fetches nothing else. Raises as `fetch_folder` does."""
    return _snapshot(repo, revision, ["config.json"]) / "config.json"


def _snapshot(repo: str, revision: str | None, wanted: list[str]) -> Path:
    # Late: the hub client takes half a second to import, and local verifiers do without it.
    from huggingface_hub import errors, snapshot_download

    name = f"verifier {repo}@{revision}" if revision else f"verifier {repo}"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=["original/*"]))
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
