import itertools
import time
from collections import Counter

import numpy as np
import pytest

from jaxdraft.data import pipeline
from jaxdraft.data.pipeline import Batches, encode, pack_concatenate, pack_whole, sample, segment_positions
from jaxdraft.errors import ConfigError

LENGTH = 64
PINNED_SAMPLE = [541, 660, 662, 799, 940]  # what a seed means may not change


class Rows:
    """Rows in memory that say where they are from: every token of row i of source s is 1000 * s + i."""

    def __init__(self, source: int, count: int, length: int = 8):
        self.source, self.count, self.length = source, count, length

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        tokens = np.full(self.length, 1000 * self.source + index, np.uint16)
        return {"tokens": tokens, "segment_ids": np.ones_like(tokens), "loss_mask": np.ones(self.length, np.uint8)}


def seen(batch) -> list[int]:
    return [int(token) for token in batch["tokens"][:, 0]]


def packed(texts, tokenizer, length=LENGTH, counts=None, **settings):
    """The rows of texts that come two by two."""
    encoded = (encode(texts[i : i + 2], tokenizer) for i in range(0, len(texts), 2))
    blocks = pack_concatenate(encoded, length, counts, **settings)
    return [dict(zip(block, row, strict=True)) for block in blocks for row in zip(*block.values(), strict=True)]


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 18])
def test_concatenate_is_the_papers_concatenate_and_cut(documents, tokenizer, at_once, monkeypatch):
    monkeypatch.setattr(pipeline, "_BLOCK_TOKENS", at_once)
    counts: Counter[str] = Counter()
    rows = packed(documents, tokenizer, counts=counts)
    stream = [token for text in documents for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    kept = len(stream) // LENGTH * LENGTH
    assert np.concatenate([row["tokens"] for row in rows]).tolist() == stream[:kept]
    assert counts == {"documents": len(documents), "tokens": len(stream), "dropped_tokens": len(stream) - kept}

    owner = np.repeat(np.arange(len(documents)), [len(tokenizer.encode(text)) + 1 for text in documents])
    for i, row in enumerate(rows):
        mine = owner[i * LENGTH : (i + 1) * LENGTH]
        assert (row["segment_ids"] == mine - mine[0] + 1).all()
        assert (row["loss_mask"] == (segment_positions(row["segment_ids"]) > 0)).all()


def test_concatenate_of_exactly_full_rows_drops_nothing(tokenizer):
    counts: Counter[str] = Counter()
    tokens = len(tokenizer.encode("abc = 1\n")) + 1
    rows = packed(["abc = 1\n"] * 6, tokenizer, 2 * tokens, counts)
    assert (len(rows), counts["dropped_tokens"]) == (3, 0)
    assert packed(["x"], tokenizer, 100, counts) == []


@pytest.mark.parametrize("at_once", [1, 1 << 18])
def test_concatenate_stops_at_so_many_rows(documents, tokenizer, at_once, monkeypatch):
    monkeypatch.setattr(pipeline, "_BLOCK_TOKENS", at_once)
    whole = packed(documents, tokenizer)
    ends = np.cumsum([len(tokenizer.encode(text)) + 1 for text in documents])
    for count in (1, 7, len(whole) - 1, len(whole), len(whole) + 1):
        counts: Counter[str] = Counter()
        rows = packed(documents, tokenizer, counts=counts, rows=count)
        assert len(rows) == min(count, len(whole))
        assert all((a[key] == b[key]).all() for a, b in zip(rows, whole, strict=False) for key in a)
        if count <= len(whole):
            begun = int(np.searchsorted(ends, count * LENGTH)) + 1
            assert counts == {"documents": begun, "tokens": count * LENGTH, "dropped_tokens": 0}


def test_without_segments_a_row_is_one_text(documents, tokenizer):
    apart, joined = packed(documents, tokenizer), packed(documents, tokenizer, segments=False)
    assert any(row["segment_ids"].max() > 1 for row in apart)
    for a, b in zip(apart, joined, strict=True):
        assert (a["tokens"] == b["tokens"]).all()
        assert (b["segment_ids"] == 1).all()
        assert b["loss_mask"].tolist() == [0, *[1] * (LENGTH - 1)]


def test_samples_nest_and_do_not_repeat():
    samples = {size: sample(1000, size, 3, "text").tolist() for size in (1, 10, 50, 100, 500, 1000)}
    for smaller, larger in itertools.pairwise(samples.values()):
        assert set(smaller) < set(larger)
    assert samples[1000] == list(range(1000))
    assert all(found == sorted(found) and len(found) == size for size, found in samples.items())
    assert samples[50] != sample(1000, 50, 4, "text").tolist()
    assert samples[50] != sample(1000, 50, 3, "code").tolist()
    assert sample(1000, 5, 0, "text").tolist() == PINNED_SAMPLE


def test_samples_are_uniform():
    hits = np.zeros(100, int)
    for seed in range(2000):
        hits[sample(100, 10, seed, "text")] += 1
    chi_square = ((hits - 200) ** 2 / (200 * 0.9)).sum()
    assert 60 < chi_square < 150  # 99 degrees of freedom


def test_whole_examples_stay_whole():
    rng = np.random.default_rng(0)
    examples = []
    for i, size in enumerate(rng.integers(2, LENGTH + 1, 300)):
        prompt = int(rng.integers(0, size))
        examples.append(([i + 1] * int(size), [0] * prompt + [1] * (int(size) - prompt)))
    counts: Counter[str] = Counter()
    rows = list(pack_whole(({"tokens": tokens, "loss_mask": mask} for tokens, mask in examples), LENGTH, counts))

    found = {}
    for row in rows:
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            place = row["segment_ids"] == segment
            tokens, mask = row["tokens"][place].tolist(), row["loss_mask"][place].tolist()
            assert tokens[0] not in found
            found[tokens[0]] = tokens, mask
        assert (row["loss_mask"][row["segment_ids"] == 0] == 0).all()
    assert found == {i + 1: (tokens, [0, *mask[1:]]) for i, (tokens, mask) in enumerate(examples)}
    assert counts["examples"] == 300
    assert counts["cut_examples"] == 0
    assert counts["tokens"] + counts["padding"] == len(rows) * LENGTH
    assert counts["padding"] < 0.1 * len(rows) * LENGTH


def test_whole_cuts_the_over_long_and_loses_nothing():
    counts: Counter[str] = Counter()
    tokens = list(range(1, 2 * LENGTH + 11))
    said = np.arange(len(tokens) * 2, dtype=np.float16).reshape(-1, 2)
    examples = [
        {"tokens": tokens, "loss_mask": [1] * len(tokens), "said": said},
        {"tokens": [500, 501], "loss_mask": [1, 1], "said": np.full((2, 2), -1, np.float16)},
    ]
    rows = list(pack_whole(examples, LENGTH, counts))
    kept = np.concatenate([row["tokens"][row["segment_ids"] > 0] for row in rows])
    assert sorted(kept.tolist()) == [*tokens, 500, 501]
    assert counts["cut_examples"] == 1
    for row in rows:  # what rides along stays beside its token
        at = np.flatnonzero((row["tokens"] > 0) & (row["tokens"] < 500))
        assert row["said"].dtype == np.float16
        np.testing.assert_array_equal(row["said"][at], said[row["tokens"][at] - 1])
    with pytest.raises(ConfigError, match=r"2 tokens, but of other columns .'loss_mask': 1"):
        list(pack_whole([{"tokens": [1, 2], "loss_mask": [1]}], LENGTH))
    assert list(pack_whole([], LENGTH)) == []


def test_positions_restart_with_each_segment():
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1] * 8])
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8))]


@pytest.mark.parametrize(
    "weights, batch_size, expected",
    [
        ({"a": 0.9, "b": 0.1}, 40, (36, 4)),
        ({"a": 0.9, "b": 0.1}, 20, (18, 2)),
        ({"a": 0.25, "b": 0.75}, 8, (2, 6)),
        ({"a": 2 / 3, "b": 1 / 3}, 48, (32, 16)),  # FastDraft's 5 B tokens of code to 2.5 B of text
        ({"a": 85 / 128, "b": 43 / 128}, 128, (85, 43)),  # the same in its batches, as nearly as rows allow
    ],
)
def test_mix_is_exact_in_every_batch(weights, batch_size, expected):
    batches = Batches({"a": Rows(0, 700), "b": Rows(1, 300)}, weights, batch_size=batch_size, seed=0)
    for step in range(40):
        tokens = batches[step]["tokens"]
        assert ((tokens < 1000).sum() / 8, (tokens >= 1000).sum() / 8) == expected


@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_are_parts_of_the_global_batch(count):
    sources = {"a": Rows(0, 100), "b": Rows(1, 30)}
    batches = Batches(sources, {"a": 0.75, "b": 0.25}, batch_size=8, seed=3)
    size = len(batches) // count
    for step in (0, 1, 16, 17, 5000):
        parts = [batches.part(step, slice(p * size, (p + 1) * size)) for p in range(count)]
        for key, expected in batches[step].items():
            assert (np.concatenate([part[key] for part in parts]) == expected).all()


def test_every_epoch_is_another_permutation():
    batches = Batches({"a": Rows(0, 24)}, batch_size=8, seed=0)
    epochs = [[token for step in range(3 * e, 3 * e + 3) for token in seen(batches[step])] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batch_depends_on_seed_and_step_alone():
    a, b = Rows(0, 50), Rows(1, 50)
    first = Batches({"a": a}, batch_size=4, seed=1)
    again = Batches({"a": a}, batch_size=4, seed=1)
    backwards = {step: seen(again[step]) for step in reversed(range(30))}
    assert [seen(first[step]) for step in range(30)] == [backwards[step] for step in range(30)]
    other = Batches({"a": a}, batch_size=4, seed=2)
    assert [seen(first[step]) for step in range(5)] != [seen(other[step]) for step in range(5)]
    larger = Batches({"a": a}, batch_size=8, seed=1)
    assert seen(first[0]) + seen(first[1]) == seen(larger[0])
    mixed = Batches({"b": b, "a": a}, {"a": 0.5, "b": 0.5}, batch_size=8, seed=1)
    assert sorted(t for t in seen(mixed[0]) if t < 1000) == sorted(seen(first[0]))
    assert [t % 1000 for t in seen(mixed[0]) if t >= 1000] != seen(first[0]), "sources share one order"


def test_pinned_order():
    """What a seed means may not change with a version of grain or of this code: old runs could not be repeated."""
    batches = Batches({"a": Rows(0, 1000)}, batch_size=4, seed=0)
    assert [seen(batches[step]) for step in (0, 250)] == [[220, 897, 297, 30], [357, 125, 164, 952]]
    assert batches.rows(0) == [("a", index) for index in [220, 897, 297, 30]]


def test_types_and_shapes():
    batch = Batches({"a": Rows(0, 10)}, batch_size=4, seed=0)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((4, 8), "int32"),
        "segment_ids": ((4, 8), "int32"),
        "positions": ((4, 8), "int32"),
        "loss_mask": ((4, 8), "float32"),
    }


def test_a_batch_is_fast():
    batches = Batches({"a": Rows(0, 5000, 256)}, batch_size=16, seed=0)
    seconds = []
    for step in range(100):
        start = time.perf_counter()
        batches[step]
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 5e-3


@pytest.mark.parametrize(
    "sources, settings, message",
    [
        ("ab", {"weights": {"a": 0.9, "b": 0.1}, "batch_size": 16}, "nearest: 10 or 20"),
        ("ab", {"weights": {"a": 0.9, "b": 0.1}, "batch_size": 4}, "nearest: 10"),
        ("ab", {"weights": {"a": 0.9, "b": 0.2}, "batch_size": 10}, "sum to 1"),
        ("ab", {"weights": {"a": 1.0, "b": 0.0}, "batch_size": 10}, "positive"),
        ("ab", {"weights": {"a": 1.0}, "batch_size": 10}, "do not name the sources"),
        ("ab", {"batch_size": 10}, "do not name the sources"),
        ("ac", {"weights": {"a": 0.5, "c": 0.5}, "batch_size": 10}, "row length"),
        ("e", {"batch_size": 2}, "no rows"),
        ("", {"batch_size": 2}, "at least one source"),
        ("a", {"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_settings_are_named(sources, settings, message):
    known = {"a": Rows(0, 10), "b": Rows(1, 10), "c": Rows(2, 10, length=4), "e": Rows(3, 0)}
    with pytest.raises(ConfigError, match=message):
        Batches({name: known[name] for name in sources}, **settings, seed=0)
