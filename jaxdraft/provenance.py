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


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that two JSON objects have otherwise, with both values; ``a.b`` is field b of the object in field a.

    A field that one lacks is ``None`` there.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*first, *second]):
        one, other = first.get(key), second.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= {f"{key}.{name}": values for name, values in differences(one, other).items()}
        elif one != other:
            found[key] = one, other
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _git_revision() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
