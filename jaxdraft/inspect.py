"""``jaxdraft inspect``: what a model folder or a run directory holds, in a screenful."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdraft.errors import ConfigError
from jaxdraft.files import sizes
from jaxdraft.models.folder import opened, weight_files
from jaxdraft.models.hf import load_config
from jaxdraft.tokenizers import load_tokenizer, tokenizer_files
from jaxdraft.untrusted import check_fields, damaged, is_plain_name, printable, read_json

_RECIPE = {"title": str, "target": object, "seed": int, "stages": list}
_STAGE = {"name": str, "kind": str}
_RECORD = {"kind": str, "status": str, "seconds": object}


def inspect(folder: Path) -> None:
    """Prints what a Hugging Face folder or a run directory holds.

    Raises:
      ConfigError: it is neither, or what it holds cannot be read.
    """
    if (folder / "recipe.json").is_file():
        lines = _run(folder)
    elif (folder / "config.json").is_file():
        lines = _model(folder)
    else:
        raise ConfigError(f"{folder} holds neither config.json (a model folder) nor recipe.json (a run directory)")
    print_facts(lines)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    rows = [(printable(name), printable(str(value))) for name, value in facts]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _model(folder: Path) -> Iterator[tuple[str, str]]:
    config = load_config(folder)
    files, dtypes = weight_files(folder), set()
    for file in files:
        with opened(file) as tensors:
            dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - not a dict
    c = config
    yield "family", c.family
    yield "parameters", f"{c.num_parameters:,}"
    yield "shape", f"{c.num_layers} layers, hidden {c.hidden_size}, intermediate {c.intermediate_size}"
    yield "attention", f"{c.num_heads} heads of {c.head_size}, {c.num_kv_heads} for keys and values"
    if c.sliding_window:
        yield "sliding window", f"{c.sliding_window} tokens"
    yield "vocabulary", f"{c.vocabulary:,} rows, head {'tied to' if c.tie_embeddings else 'apart from'} the embedding"
    if c.head_ids is not None:
        yield "draft vocabulary", f"{len(c.head_ids):,} tokens that the head can propose"
    scaling = type(c.rope_scaling).__name__ if c.rope_scaling else "no scaling"
    yield "rotary embedding", f"theta {c.rope_theta:g}, {scaling}, {c.max_positions:,} positions"
    yield (
        "weights",
        f"{len(files)} file(s), {', '.join(sorted(dtypes))}, {as_bytes(sum(f.stat().st_size for f in files))}",
    )
    cache = 2 * 2 * c.num_layers * c.num_kv_heads * c.head_size
    yield "cache", f"{as_bytes(cache)} a token in bfloat16"
    yield "BOS, EOS", f"{c.bos_id}, {', '.join(map(str, c.eos_ids)) or 'none'}"
    if (folder / "generation_config.json").is_file():
        yield "generation", json.dumps(read_json(folder / "generation_config.json"))
    if not any(file.name in ("tokenizer.json", "tokenizer.model") for file in tokenizer_files(folder)):
        yield "tokenizer", "none"
        return
    tokenizer = load_tokenizer(folder)
    adds = "adds" if tokenizer.adds_bos else "does not add"
    yield "tokenizer", f"{tokenizer.vocab_size:,} pieces, BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}, {adds} BOS"
    yield "tokenizer files", ", ".join(file.name for file in tokenizer_files(folder))


def _run(folder: Path) -> Iterator[tuple[str, str]]:
    recipe = read_json(folder / "recipe.json", fields=_RECIPE)
    with damaged(folder / "recipe.json"):
        target = recipe["target"]
        yield "recipe", recipe["title"]
        yield "target", str(target if isinstance(target, str) else target["path"])
        yield "seed", str(recipe["seed"])
        for stage in recipe["stages"]:
            check_fields(stage, _STAGE)
            if not is_plain_name(stage["name"]):
                raise ValueError(f"{stage['name']!r} is no stage's name")
    if (folder / "run.json").is_file():
        with damaged(folder / "run.json"):
            yield from _made_with(read_json(folder / "run.json"))
    for stage in recipe["stages"]:
        place = folder / stage["name"]
        if not (place / "stage.json").is_file():
            yield stage["name"], f"{stage['kind']}, not run"
            continue
        record = read_json(place / "stage.json", fields=_RECORD)
        size = sum(sizes(place).values())
        with damaged(place / "stage.json"):
            summary = record.get("summary", {}).items()
            facts = [f"{name} {value}" for name, value in summary if not isinstance(value, dict)]
            told = [record["kind"], record["status"], f"{record['seconds']:.1f} s", as_bytes(size), *facts]
        yield stage["name"], ", ".join(told)


def _made_with(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The essential of ``run.json``."""
    yield "command", " ".join(run["command"]) or "none: run from Python"
    git = f" ({run['git']})" if run["git"] else ""
    yield "software", f"jaxdraft {run['jaxdraft']}{git}, jax {run['packages']['jax']}, Python {run['python']}"
    if run["xla_flags"]:
        yield "XLA_FLAGS", run["xla_flags"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in run["mesh"].items())
    yield (
        "devices",
        f"{len(run['devices'])} {run.get('device_kind', '')} in {run['processes']} process(es), mesh {mesh}",
    )
    if licence := run.get("target_licence"):
        yield "target's licence", licence + (", accepted" if run.get("accepted_licence") else "")


def as_bytes(count: int) -> str:
    """A number of bytes to three digits: "1.25 MB"."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
