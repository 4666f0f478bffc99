"""Where a model's files are: a local folder, or a repository of the Hugging Face hub at one revision."""

import contextlib
import re
from pathlib import Path

from jaxdraft.errors import ConfigError
from jaxdraft.huggingface import hub_errors
from jaxdraft.remote import is_url, local_copy

CARD = "README.md"  # says its licence
# Weights that are plain arrays, and text; never pickles, never code.
# Weights under the names that are loaded: some repositories hold a second copy under another.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_PATTERNS = (*_WEIGHTS, "*.json", "tokenizer.model", "merges.txt", "*.jinja", CARD)
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model given as a folder here or in a bucket, or as ``owner/name[@revision]`` on the hub.

    Of a bucket (``gs://``, ``s3://``), the same kinds of files as of a repository are copied once.

    Of a repository, configuration, safetensors and tokenizer files are downloaded once into huggingface_hub's cache
    (``HF_HOME``); a token (``HF_TOKEN``, ``hf auth login``) opens gated ones; ``HF_HUB_OFFLINE=1`` keeps to the cache.

    Args:
      name: a folder goes before a repository of the same name.
      revision: a commit, tag or branch; ``None`` is the one after ``@``, else the main branch as it stands. Give a
        commit where a run shall be repeatable.

    Raises:
      ConfigError: no such folder, and no repository that can be had: the message says why.
    """
    if is_url(name):
        if not (folder := Path(local_copy(str(name), _PATTERNS)) / "config.json").exists():
            raise ConfigError(f"{name} holds no config.json: it is not a model folder")
        return folder.parent
    if Path(name).is_dir():
        return Path(name)
    repository, _, at = str(name).partition("@")
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{name} is neither a folder here nor a hub repository written owner/name[@revision]")
    import huggingface_hub

    with hub_errors(str(name)):
        found = huggingface_hub.snapshot_download(
            repository, revision=revision or at or None, allow_patterns=list(_PATTERNS), ignore_patterns=["*/*"]
        )
    return Path(found)


def model_card(name: str, revision: str | None = None) -> Path | None:
    """The card of a model that is not in a folder here, without the rest of it; ``None`` where there is none."""
    with contextlib.suppress(ConfigError):
        if is_url(name):
            return Path(local_copy(f"{name.rstrip('/')}/{CARD}"))
        repository, _, at = name.partition("@")
        if _REPOSITORY.fullmatch(repository):
            import huggingface_hub

            with hub_errors(name):
                return Path(huggingface_hub.hf_hub_download(repository, CARD, revision=revision or at or None))
    return None
