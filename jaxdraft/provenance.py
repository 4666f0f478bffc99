"""Where a run's files come from: the hashes that a stage's record holds, and the machine and software of a run."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxdraft import __version__

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "array-record",
)
"""Those whose version may change what a run makes."""


def stage_fingerprint(settings: Any, shape: Any, inputs: Mapping[str, str], seed: int) -> str:
    """Hash of all that decides what a stage makes, as its record holds it.

    Args:
      settings: of the stage, as JSON.
      shape: of what a Train stage trains, as JSON; else ``None``.
      inputs: hash of each thing it reads.
      seed: of the recipe.
    """
    return _hash([settings, shape, dict(inputs), seed])


def output_hash(outputs: Mapping[str, str]) -> str:
    """Hash of what a stage made, for the records of those that read it: of its files' names and hashes."""
    return _hash(dict(outputs))


def environment() -> dict[str, Any]:
    """The software and the devices of this process's run, for ``run.json``: no host names, no paths, no secrets."""
    return {
        "jaxdraft": __version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "backend": jax.default_backend(),
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
    }


def changed(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Each field that is another now, in words: ``steps was 10 and is 8``; of an object in an object ``a.b``."""
    found: list[str] = []
    for key in before.keys() | now.keys():
        old, new, name = before.get(key), now.get(key), f"{path}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changed(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} was {json.dumps(old)} and is {json.dumps(new)}")
    return sorted(found)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _git_revision() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
