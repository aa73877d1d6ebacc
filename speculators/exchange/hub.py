"""Uploads an export to the model hub, only when the user asks for it."""

from __future__ import annotations

from pathlib import Path

from speculators.errors import ArtifactError


def push(folder: Path, repo: str) -> str:
    """Uploads a folder to a repository, creating it if necessary; returns its address.

    Raises:
        ArtifactError: the hub cannot be reached, or rejects the upload.
    """
    # Late: the hub client takes half a second to import.
    import huggingface_hub

    try:
        huggingface_hub.create_repo(repo, exist_ok=True)
        done = huggingface_hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Speculator written by spec export"
        )
    # The client's HTTP library, and with it the class of its errors, differs between its versions.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = f"{folder} is complete: log in (hf auth login) and push it with hf upload {repo} {folder}"
        raise ArtifactError(f"{repo}: the upload failed: {reason}", hint=hint) from error
    return str(done)
