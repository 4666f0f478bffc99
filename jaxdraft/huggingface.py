"""The Hugging Face hub: files of a repository at one commit, and its errors in this project's words.

Downloads go into huggingface_hub's cache (``HF_HOME``); a token (``HF_TOKEN``, ``hf auth login``) opens gated
repositories; ``HF_HUB_OFFLINE=1`` keeps to the cache.
"""

import contextlib
import functools
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from jaxdraft.errors import ConfigError

_log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into a ConfigError that begins with ``name`` and says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ConfigError(
            f"{name} is gated: accept its licence on its page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ConfigError(f"{name}: the hub has no such repository or revision ({_first_line(error)})") from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{name} is no folder here, and no name of a repository ({_first_line(error)})") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"{name} is no folder here and the hub could not be reached ({_first_line(error)}): download it where "
            "there is a network, and give its folder"
        ) from None


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit's full name, and not a branch or tag that may move."""
    return bool(_COMMIT.fullmatch(revision))


@functools.cache  # within a process a branch stays where it was found
def list_dataset(repository: str, revision: str | None, pattern: str) -> tuple[str, tuple[str, ...]]:
    """The commit that a revision of a dataset is, and the names of its files, sorted.

    Without a network both come from the cache, which must hold all files that match ``pattern``.

    Raises:
      ConfigError: no such repository or revision, or the hub cannot be reached.
    """
    import huggingface_hub

    if not is_commit(revision or ""):
        branch = f"revision {revision!r}" if revision else "its main branch"
        _log.warning("%s is read at %s, which may change between runs: pin a commit", repository, branch)
    with hub_errors(repository):
        try:
            info = huggingface_hub.HfApi().dataset_info(repository, revision=revision)
        except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError):
            raise
        except Exception:  # the HTTP library's own, which differs between versions of huggingface_hub
            folder = Path(_snapshot(repository, revision, pattern, local_files_only=True))
            names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
            return folder.name, tuple(sorted(names))
    assert info.sha is not None
    return info.sha, tuple(sorted(file.rfilename for file in info.siblings or ()))


@functools.cache  # checked once in a process
def dataset_file(repository: str, commit: str, name: str) -> Path:
    """A file of a dataset, downloaded unless it is in the cache already.

    Raises:
      ConfigError: it cannot be had, or what is in the cache is not what the hub holds.
    """
    with hub_errors(f"{repository}/{name}"):
        path = Path(_snapshot(repository, commit, name)) / name
    blob = path.resolve()
    # The cache names large files by their sha256. Parquet is mostly written without checksums of its own.
    if _SHA256.fullmatch(blob.name):
        with blob.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                raise ConfigError(f"{blob}: damaged since it was downloaded: delete it, and run again")
    return path


def _snapshot(repository: str, revision: str | None, pattern: str, local_files_only: bool = False) -> str:
    import huggingface_hub

    return huggingface_hub.snapshot_download(
        repository,
        repo_type="dataset",
        revision=revision,
        allow_patterns=pattern,
        local_files_only=local_files_only,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
