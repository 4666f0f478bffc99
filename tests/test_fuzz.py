"""Real files of every kind that comes from outside, with something in them changed: each loads, or is a ConfigError.

Nothing else may be raised, no more memory taken than a folder of a few kilobytes can want, and no file be written.
``JAXDRAFT_FUZZ=5000`` is how many changes of each kind are tried, other ones than the few of every day.
"""

import contextlib
import copy
import faulthandler
import gzip
import io
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdraft.check_rules import Pair
from jaxdraft.data.conversations import ConversationFile
from jaxdraft.data.prompts import PromptFile
from jaxdraft.data.quarantine import Rejected
from jaxdraft.data.records import PackedRows
from jaxdraft.data.sources import Text
from jaxdraft.errors import ConfigError
from jaxdraft.home import Home
from jaxdraft.inspect import inspect
from jaxdraft.inspect_rows import inspect_stage
from jaxdraft.models import ModelConfig, init_params
from jaxdraft.models.hf import check_weights, save_model
from jaxdraft.models.rope import LongRope
from jaxdraft.tokenizers import load_tokenizer
from tests.conftest import MadeRun
from tests.data.test_sources import write_array_record

EXAMPLES = int(os.environ.get("JAXDRAFT_FUZZ", "0"))
FEW = 25
ROOM = 4 << 30  # bytes of address space that a loader may take besides: its threads reserve some
SECONDS = 60  # that one change may take; a hang ends the process with its stack
ROWS = [{"id": str(i), "text": f"Text {i}.\n" * 9, "prompt": f"Say {i}."} for i in range(20)]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
SHAPE = ModelConfig(vocab_size=40, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1)
EXTREMES = [None, True, -1, 0, 1 << 31, 1 << 62, 10**400, 1e308, float("nan"), float("inf"), "", "../x", "/etc/passwd"]
EXTREMES += ["a\0b", "\ud800", "x" * 9999, [], {}, [[]], [None], {"a": {}}, "|O", [1 << 62, -1]]


def _rng(i: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(i).integers(1, 300, 32)
    return {"tokens": tokens, "segment_ids": np.ones(32, np.int32), "loss_mask": np.arange(32) > 0}


def _read_rows(folder: Path) -> None:
    rows = PackedRows(folder, verify=False)
    for i in range(min(len(rows), 9)):
        rows[i]


def _text(name: str) -> Callable[[Path], None]:
    return lambda folder: list(Text(str(folder / name)).documents())


def _tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("A text.\n  <s> Zürich 中"))
    tokenizer.fingerprint()
    tokenizer.template_fingerprint()


def _prompts(name: str) -> Callable[[Path], None]:
    return lambda folder: list(PromptFile(str(folder / name)).prompts(load_tokenizer(folder / "tokenizer")))


def _stage(name: str) -> Callable[[Path], None]:
    return lambda folder: inspect_stage(Home(folder), name, 2, 0)


def _check(folder: Path) -> None:
    check_weights(folder)
    list(Pair(folder, folder).raw)


# By the file that is changed: the folder it is in, and what reads it.
LOADERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "config.json": ("llama", _check),
    "generation_config.json": ("llama", _check),
    "model.safetensors": ("llama", _check),
    "config.json ": ("phi3", _check),
    "model.safetensors.index.json": ("phi3", _check),
    "tokenizer.json": ("fast", _tokenizer),
    "tokenizer.model": ("spm", _tokenizer),
    "tokenizer_config.json": ("spm", _tokenizer),
    "special_tokens_map.json": ("spm", _tokenizer),
    "added_tokens.json": ("spm", _tokenizer),
    "chat_template.jinja": ("spm", lambda folder: load_tokenizer(folder).render(TURNS)),
    "text/manifest.json": ("run", lambda folder: _read_rows(folder / "text")),
    "text/rows-00000.array_record": ("run", lambda folder: _read_rows(folder / "text")),
    "recipe.json": ("run", lambda folder: (inspect(folder), _stage("text")(folder))),
    "run.json": ("run", inspect),
    "text/stage.json": ("run", lambda folder: (inspect(folder), _stage("text")(folder))),
    "answers/answers.json": ("run", _stage("answers")),
    "answers/quarantine.jsonl": ("run", _stage("answers")),
    "prompts.jsonl": ("run", _prompts("prompts.jsonl")),
    "talk.jsonl.gz": ("run", lambda folder: list(ConversationFile(str(folder / "talk.jsonl.gz")).conversations())),
    "a.json": ("texts", _text("a.json")),
    "a.jsonl": ("texts", _text("a.jsonl")),
    "a.jsonl.gz": ("texts", _text("a.jsonl.gz")),
    "a.txt.gz": ("texts", _text("a.txt.gz")),
    "a.parquet": ("texts", _text("a.parquet")),
    "a.array_record": ("texts", _text("a.array_record")),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A folder of each kind, as jaxdraft and others write them."""
    root = tmp_path_factory.mktemp("real")
    run = MadeRun(root / "run")
    run.rows("text", [_rng(i) for i in range(6)])
    run.answers("answers", ["one", "two", Rejected("x: line 3", "not JSON")], lambda question: "three")
    made_with = {"command": ["jaxdraft", "run"], "git": "a1b2c3", "jaxdraft": "0.1", "packages": {"jax": "0.10"}}
    made_with |= {"python": "3.11", "xla_flags": "--x", "mesh": {"data": 1}, "devices": ["cpu"], "processes": 1}
    (run.folder / "run.json").write_text(json.dumps({**made_with, "target_licence": "MIT"}))
    prompts = [{"id": 1, "prompt": "a"}, {"tokens": [5, 6], "temperature": 0.5}, {"prompt": "b", "reference": "c"}]
    (run.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    with gzip.open(run.folder / "talk.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"id": i, "messages": TURNS}) + "\n" for i in range(20))
    shutil.copytree(run.folder / "tokenizer", root / "spm")
    added = {"content": "<x>", "lstrip": True, "special": True}
    config = json.loads((root / "spm" / "tokenizer_config.json").read_text())
    (root / "spm" / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": {"401": added}}))
    (root / "spm" / "added_tokens.json").write_text(json.dumps({"<y>": 400}))
    (root / "spm" / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(run.folder / "tokenizer", root / "fast")
    if (root / "spm" / "tokenizer.json").exists():
        (root / "spm" / "tokenizer.json").unlink()
        (root / "fast" / "tokenizer.model").unlink()
    params = init_params(SHAPE, jax.random.key(0))
    save_model(root / "llama", SHAPE, params)
    (root / "llama" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    scaling = LongRope((1.0, 1.0), (1.5, 2.0), 2048)
    phi3 = {"family": "phi3", "rope_scaling": scaling, "sliding_window": 2047, "max_positions": 4096}
    save_model(root / "phi3", ModelConfig(**{**vars(SHAPE), **phi3}), params, shard_bytes=4000)
    (root / "texts").mkdir()
    texts = {"a.json": json.dumps(ROWS), "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS)}
    for name, text in texts.items():
        (root / "texts" / name).write_text(text)
    (root / "texts" / "a.jsonl.gz").write_bytes(gzip.compress(texts["a.jsonl"].encode()))
    (root / "texts" / "a.txt.gz").write_bytes(gzip.compress(ROWS[0]["text"].encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), root / "texts" / "a.parquet")
    write_array_record(root / "texts" / "a.array_record", [row["text"].encode() for row in ROWS])
    return root


@st.composite
def changed(draw: Any, content: bytes) -> bytes:
    """Bytes with one to three changes: bits, blocks, ends, pieces of its own, numbers; or of JSON, values and keys."""
    with contextlib.suppress(ValueError):
        if content[:1] in b"[{" and draw(st.booleans()):
            return draw(_changed_json(json.loads(content)))
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start, size = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.sampled_from([1, 4, 8, 64, 4096]))
        kind = draw(st.sampled_from(["bit", "zeros", "ones", "cut", "splice", "number", "size"]))
        if kind == "bit" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind in ("zeros", "ones"):
            data[start : start + size] = (b"\0" if kind == "zeros" else b"\xff") * len(data[start : start + size])
        elif kind == "cut":
            del data[start : start + draw(st.sampled_from([size, len(data)]))]
        elif kind == "splice":
            place = draw(st.integers(0, len(data)))
            data[place:place] = data[start : start + size]
        elif kind == "size":
            data[:8] = draw(st.sampled_from([1 << 62, (1 << 63) + 1, 0, len(data), 1 << 26])).to_bytes(8, "little")
        elif numbers := list(re.finditer(rb"-?\d+", data)):
            chosen = draw(st.sampled_from(numbers))
            number = draw(st.sampled_from(["-1", "0", str(1 << 31), str(1 << 62), "9" * 5000, "1e999", "NaN"]))
            data[chosen.start() : chosen.end()] = number.encode()
    return bytes(data)


@st.composite
def _changed_json(draw: Any, value: Any) -> bytes:
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["value", "value", "remove", "key", "deep"])):
            case "value":
                holder[key] = copy.deepcopy(draw(st.sampled_from(EXTREMES)))
            case "remove":
                del holder[key]
            case "key" if isinstance(holder, dict):
                holder[draw(st.sampled_from([x for x in EXTREMES if isinstance(x, str)]))] = holder.pop(key)
            case _:
                holder[key] = "DEEP"
    return json.dumps(value).replace('"DEEP"', "[" * 100_000 + "]" * 100_000).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Meanwhile no more than ``ROOM`` can be taken, and a hang ends the process."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, limits[1]))
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", LOADERS)
def test_a_changed_file_loads_or_is_named(name, real, tmp_path):
    kind, load = LOADERS[name]
    folder = Path(shutil.copytree(real / kind, tmp_path / kind))
    file = folder / name.strip()
    content = file.read_bytes()
    load(folder)  # as it is
    there = sorted(tmp_path.rglob("*"))

    @settings(
        max_examples=EXAMPLES or FEW,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changed(content))
    def check(damaged: bytes) -> None:
        file.write_bytes(damaged)
        with bounded(), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ConfigError):
            load(folder)

    check()
    assert sorted(tmp_path.rglob("*")) == there
