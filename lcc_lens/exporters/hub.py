"""Upload an export to the Hugging Face hub, under the user's own login."""

from __future__ import annotations

import re
from pathlib import Path

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError, RequestError, first_line
from lcc_lens.core.ranges import ranged

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@ranged
def push_to_hub(directory: str | Path, repository: str, *, private: bool = True) -> str:
    """Upload an exported directory as a model repository of the hub.

    The login is the user's own (``hf auth login``, or ``HF_TOKEN``); no token is asked for or kept here.

    Args:
        directory: what :func:`lcc_lens.exporters.huggingface.export` wrote.
        repository: ``owner/name``; created if it does not exist.
        private: whether a repository that is created here is private.

    Returns:
        The address of the commit.

    Raises:
        RequestError: no Hugging Face directory, or not a repository name; nothing is sent.
        LensError: the hub refuses, or cannot be reached.

    Example:
        >>> push_to_hub("out/restored", "me/llama-wanda50-restored")  # doctest: +SKIP
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    path = Path(directory)
    require_repository(repository)
    Checkpoint(path).require_whole()
    try:
        huggingface_hub.create_repo(repository, private=private, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=repository, folder_path=path, commit_message="Upload a restored model"
        )
    except HFValidationError as error:
        raise RequestError(f"expected a repository owner/name, got {repository!r} ({first_line(error)})") from error
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise LensError(
            f"expected to upload {path} to {repository}, got a refusal ({first_line(error)}); log in with hf auth "
            "login, and check that the hub can be reached (HF_HUB_OFFLINE)"
        ) from error
    return str(commit.commit_url)


def require_repository(repository: str) -> None:
    """Refuse what is not ``owner/name``, before anything is written."""
    if not _REPOSITORY.fullmatch(repository):
        raise RequestError(f"expected a repository owner/name to upload to, got {repository!r}; write me/my-model")
