import itertools
import json
from collections import Counter

import numpy as np
import pytest

from jaxdraft.data.pipeline import Batches, encode, pack_concatenate
from jaxdraft.data.records import PackedRows, columns, write_rows
from jaxdraft.errors import ConfigError

LENGTH = 32


def row(first: int, length: int = LENGTH) -> dict[str, np.ndarray]:
    ones = np.ones(length, np.int32)
    return {"tokens": np.arange(first, first + length, dtype=np.int32), "segment_ids": ones, "loss_mask": ones}


def write(folder, rows, **changes):
    settings = {"length": LENGTH, "vocab_size": 512, "tokenizer_fingerprint": "abc", "source": {"path": "x"}}
    return write_rows(folder, iter(rows), **{**settings, **changes})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "rows", [row(i) for i in range(100)], shard_rows=40)
    return tmp_path / "rows"


@pytest.mark.parametrize("vocab_size, dtype", [(512, "<u2"), (65536, "<u2"), (128256, "<u4")])
def test_rows_come_back_equal(documents, tokenizer, tmp_path, vocab_size, dtype):
    counts: Counter[str] = Counter()
    blocks = pack_concatenate([encode(documents, tokenizer)], LENGTH, counts)
    rows = [dict(zip(block, row, strict=True)) for block in blocks for row in zip(*block.values(), strict=True)]
    manifest = write(tmp_path, rows, vocab_size=vocab_size, counts=counts, shard_rows=1000)
    stored = PackedRows(tmp_path)
    assert len(stored) == len(rows) == manifest["rows"] > 1001
    assert stored.length == LENGTH
    assert manifest["columns"]["tokens"] == dtype
    for i in (0, 1, 999, 1000, 1001, len(rows) - 1):
        assert all((stored[i][key] == rows[i][key]).all() for key in rows[i])
    assert manifest["tokens"] == len(rows) * LENGTH
    assert manifest["labels"] == sum(int(r["loss_mask"].sum()) for r in rows)
    assert manifest["counts"]["documents"] == len(documents)
    assert [shard["rows"] for shard in manifest["shards"]] == [1000] * (len(rows) // 1000) + [len(rows) % 1000]
    with pytest.raises(IndexError):
        stored[len(rows)]


def test_same_rows_same_bytes_and_nothing_else(folder, tmp_path):
    write(tmp_path / "again", [row(i) for i in range(100)], shard_rows=40)
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["manifest.json", *(f"rows-0000{i}.array_record" for i in range(3))]
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


def test_writing_again_replaces(folder):
    write(folder, [row(7)])
    assert len(PackedRows(folder)) == 1
    assert len(list(folder.iterdir())) == 2


def test_an_interrupted_write_leaves_no_data_set(folder):
    def interrupted():
        yield from (row(i) for i in range(50))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, interrupted(), shard_rows=40)
    with pytest.raises(ConfigError, match=r"manifest\.json: missing"):
        PackedRows(folder)
    write(folder, [row(i) for i in range(50)])
    assert not list(folder.glob("*.tmp"))


def test_every_kind_of_damage_is_named(folder):
    shard = folder / "rows-00001.array_record"
    good = shard.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(good), 20):
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"rows-00001\.array_record.*sha256"):
            PackedRows(folder)
    shard.write_bytes(good[:-1])
    with pytest.raises(ConfigError, match=r"rows-00001\.array_record.*bytes"):
        PackedRows(folder, verify=False)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"rows-00001\.array_record: missing"):
        PackedRows(folder, verify=False)
    shard.write_bytes(good)
    assert len(PackedRows(folder)) == 100


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format=99), "format 99"),
        (lambda m: m["shards"][0].update(file="../rows-00000.array_record"), "plain file name"),
        (lambda m: m["shards"][0].update(file="a\0b"), "plain file name"),
        (lambda m: m.pop("length"), "no 'length'"),
        (lambda m: m.update(length="32"), "'length' is \"32\", not of type int"),
        (lambda m: m.update(length=-32), "'length' is -32"),
        (lambda m: m.update(length=1 << 62), "'length' is 4611686018427387904"),
        (lambda m: m.update(length=1 << 30), "do not hold the 40 rows"),
        (lambda m: m["columns"].update(tokens="|O"), "'columns' are"),
        (lambda m: m["columns"].update(more=["<f8", 1 << 40]), "'columns' are"),
        (lambda m: m.update(vocab_size=None), "'vocab_size' is null"),
        (
            lambda m: m.update(target_logits={"k": 1 << 40, "vocabulary": 9, "temperature": 1.0}),
            "'target_logits' has k",
        ),
        (lambda m: m.update(shards=[7]), "damaged"),
        (lambda m: m.update(rows=10**9), "'rows' is 1000000000"),
    ],
)
def test_foreign_manifests_are_refused(folder, change, message):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=rf"{folder}.*{message}"):
        PackedRows(folder, verify=False)
    path.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        PackedRows(folder)


@pytest.mark.parametrize(
    "rows, message",
    [([], "no rows"), ([row(0, 31)], "shape"), ([row(500)], "token 531 is outside"), ([row(-1)], "token -1")],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, rows)


def test_batches_read_packed_rows(folder):
    batches = Batches({"a": PackedRows(folder)}, batch_size=10, seed=0)
    firsts = sorted(int(first) for step in range(10) for first in batches[step]["tokens"][:, 0])
    assert firsts == list(range(100))


STORED = {"k": 3, "temperature": 0.7, "target": "hash", "vocabulary": 600}


def scored_row(first: int, k: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(first)
    log_probs = np.log(rng.random((LENGTH, k + 2))).astype(np.float16)
    log_probs[-1, k] = -np.inf
    return {**row(first), "target_ids": rng.integers(0, 600, (LENGTH, k)), "target_log_probs": log_probs}


@pytest.mark.parametrize("vocabulary, dtype", [(65536, "<u2"), (65537, "<u4")])
def test_what_is_stored_of_the_target_comes_back_equal(tmp_path, vocabulary, dtype):
    rows = [scored_row(i) for i in range(5)]
    rows[2]["target_ids"][4, 1] = vocabulary - 1
    stored = {**STORED, "vocabulary": vocabulary}
    manifest = write(tmp_path, rows, target_logits=stored)
    assert manifest["columns"]["tokens"] == "<u2"
    assert manifest["columns"]["target_ids"] == [dtype, 3]
    assert manifest["columns"]["target_log_probs"] == ["<f2", 5]
    assert json.loads((tmp_path / "manifest.json").read_text())["target_logits"] == stored
    packed = PackedRows(tmp_path)
    for i, expected in enumerate(rows):
        for name, values in expected.items():
            np.testing.assert_array_equal(packed[i][name], values)


def test_32_tokens_of_the_target_take_132_bytes(tmp_path):
    count = 3000  # the files' ends are filled up to 64 KiB
    write(tmp_path / "plain", (row(i % 400) for i in range(count)))
    write(tmp_path / "stored", itertools.repeat(scored_row(0, 32), count), target_logits={**STORED, "k": 32})
    stored, plain = ((tmp_path / name / "rows-00000.array_record").stat().st_size for name in ("stored", "plain"))
    assert (stored - plain) / (count * LENGTH) == pytest.approx(132, abs=1)
    assert sum(column.bytes for column in columns(512, {**STORED, "k": 32}).values()) == 5 + 132


def test_folders_written_before_anything_was_stored_are_read(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["columns"] == {"tokens": "<u2", "segment_ids": "<u2", "loss_mask": "|u1"}
    assert "target_logits" not in manifest
    assert PackedRows(folder)[3].keys() == manifest["columns"].keys()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_ids": np.zeros((LENGTH, 2), int)}, r"target_ids has shape \(32, 2\), not \(32, 3\)"),
        ({"target_log_probs": np.zeros((LENGTH, 3))}, r"target_log_probs has shape \(32, 3\), not \(32, 5\)"),
        ({"target_ids": np.full((LENGTH, 3), 600)}, "token 600 is outside the vocabulary of 600"),
    ],
)
def test_stored_columns_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, [{**scored_row(0), **change}], target_logits=STORED)


def test_batches_give_what_is_stored_when_asked(folder, tmp_path):
    write(tmp_path / "a", [scored_row(i) for i in range(9)], target_logits=STORED)
    write(tmp_path / "b", [scored_row(i, 2) for i in range(9)], target_logits={**STORED, "k": 2})
    a, b, plain = (PackedRows(path) for path in (tmp_path / "a", tmp_path / "b", folder))
    assert "target_ids" not in Batches({"a": a}, batch_size=2, seed=0)[0]
    batches = Batches({"a": a}, batch_size=2, seed=0, stored=True)
    batch = batches[1]
    assert (batch["target_ids"].shape, batch["target_ids"].dtype) == ((2, LENGTH, 3), np.int32)
    assert (batch["target_log_probs"].shape, batch["target_log_probs"].dtype) == ((2, LENGTH, 5), np.float16)
    for i, (_, index) in enumerate(batches.rows(1)):
        np.testing.assert_array_equal(batch["target_ids"][i], a[index]["target_ids"])
        np.testing.assert_array_equal(batch["target_log_probs"][i], a[index]["target_log_probs"])
    half = {"weights": {"a": 0.5, "b": 0.5}, "batch_size": 2, "seed": 0, "stored": True}
    with pytest.raises(ConfigError, match=r"how many of the target's tokens.*'a': 3, 'b': 2"):
        Batches({"a": a, "b": b}, **half)
    with pytest.raises(ConfigError, match="source 'b' stores nothing"):
        Batches({"a": a, "b": plain}, **half)
