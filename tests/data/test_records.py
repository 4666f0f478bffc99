import json
from collections import Counter

import numpy as np
import pytest

from jaxdraft.data.pipeline import Batches, pack_concatenate
from jaxdraft.data.records import PackedRows, write_rows
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
    rows = list(pack_concatenate(documents, tokenizer, LENGTH))
    packed = pack_concatenate(documents, tokenizer, LENGTH, counts)
    manifest = write(tmp_path, packed, vocab_size=vocab_size, counts=counts, shard_rows=1000)
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
        ({"format": 99}, "format 99"),
        ({"shards": [{"file": "../rows-00000.array_record", "rows": 1, "bytes": 1, "sha256": ""}]}, "plain file name"),
    ],
)
def test_foreign_manifests_are_refused(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        PackedRows(folder)
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
