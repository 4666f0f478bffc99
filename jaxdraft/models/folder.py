"""The files of a Hugging Face model folder: which there are, and the small ones read."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdraft import untrusted
from jaxdraft.errors import ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
D2T = "d2t"
"""Tensor that maps rows of a draft vocabulary to tokens, as in EAGLE-3's folders: int64, token id less row."""


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file of a model folder holds.

    Raises:
      ConfigError: no such file, or no JSON object in it.
    """
    return untrusted.read_json(path, limit=untrusted.CONFIG_BYTES, remedy="give a Hugging Face model folder")


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder, in name order; one whole file goes before shards, as in transformers.

    Raises:
      ConfigError: there is none, or the index names a path instead of a file beside it.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif not (folder / INDEX).exists():
        wanted = f"a model folder holds {WEIGHTS}, or shards and {INDEX}"
        raise ConfigError(f"{folder / WEIGHTS} does not exist: {wanted}{_pickles(folder)}")
    else:
        names = sorted(set(weight_map(folder).values()))
        if bad := [n for n in names if not untrusted.is_plain_name(n) or not n.endswith(".safetensors")]:
            raise ConfigError(f"{folder / INDEX}: shard {bad[0]!r} is not a safetensors file of this folder")
        files = [folder / name for name in names]
        if missing := [f for f in files if not f.is_file()]:
            raise ConfigError(f"{missing[0]} does not exist, but {INDEX} names it: is the download complete?")
    for file in files:
        untrusted.check_file(file)
    return files


def _pickles(folder: Path) -> str:
    """What to say of weights that are never read."""
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not pickles:
        return ""
    return (
        f". {pickles[0]} is a pickle, which can run code when it is read, so it never is: convert it to safetensors "
        "(transformers' save_pretrained does, on a machine where its code may run)"
    )


def weight_map(folder: Path) -> dict[str, str]:
    """Which file holds each tensor, by the index.

    Raises:
      ConfigError: the index is damaged.
    """
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ConfigError(f"{folder / INDEX}: no weight_map from tensors to files")
    return found


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
      ConfigError: it is none, or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(f"{path}: not a readable safetensors file ({error})") from error


def head_ids(folder: Path, size: int) -> tuple[int, ...]:
    """The draft vocabulary of a folder whose ``config.json`` has a ``draft_vocab_size``.

    Raises:
      ConfigError: there is no map of that size.
    """
    for path in weight_files(folder):
        with opened(path) as file:
            if D2T in file.keys():  # noqa: SIM118 - not a dict
                stored = file.get_slice(D2T)
                if stored.get_shape() != [size] or stored.get_dtype() not in ("I64", "I32"):
                    found = f"{stored.get_dtype()}{stored.get_shape()}"
                    raise ConfigError(f"{folder}: {D2T} is {found}; draft_vocab_size is {size}")
                return tuple((file.get_tensor(D2T) + np.arange(size)).tolist())
    raise ConfigError(f"{folder}: config.json has a draft_vocab_size, but no file the map {D2T}")
