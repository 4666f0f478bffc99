"""Collectives read from a program's text: a small one that shows each form the TPU and CPU compilers write."""

from pathlib import Path

import pytest

from jaxdraft.plan.hlo import buffers, collectives

TEXT = (Path(__file__).parent / "small.hlo").read_text()


@pytest.fixture(scope="module")
def found():
    return {(c.kind, c.group, c.is_open): c for c in collectives(TEXT)}


def test_each_collective_is_found_once():
    assert len(collectives(TEXT)) == 6  # what one device reduces alone is none


def test_a_loop_runs_as_often_as_xla_says(found):
    gather = found["all-gather", 4, False]
    assert (gather.bytes, gather.times, gather.depth) == (16 * 8 * 4, 4, 1)
    assert gather.traffic == 4 * 16 * 8 * 4 * 3 / 4
    assert gather.name == "jit(step)/layers/gather"


def test_a_loop_runs_as_often_as_its_counter_says(found):
    """From 1 in steps of 2 up to 7 is three times, in each of four layers."""
    permute = found["collective-permute", 1, False]
    assert (permute.bytes, permute.times, permute.depth) == (4 * 8 * 4, 3 * 4, 2)
    assert permute.traffic == 12 * 4 * 8 * 4


def test_a_gather_beside_a_loop_is_outside_of_it(found):
    """XLA goes on with it in every layer: it is one all the same, of the whole mesh."""
    gather = found["all-gather", 8, False]
    assert (gather.bytes, gather.times, gather.depth) == (128 * 8 * 2, 1, 0)


def test_a_loop_until_all_rows_are_done_is_open(found):
    reduced = found["all-reduce", 2, True]
    assert (reduced.bytes, reduced.times) == (2 * 8 * 4 + 8 * 2, 1)
    assert reduced.traffic == 2 * reduced.bytes / 2


def test_reduce_scatter_in_both_spellings():
    scattered = [c for c in collectives(TEXT) if c.kind == "reduce-scatter"]
    assert sorted(c.bytes for c in scattered) == [16 * 8 * 4, 64 * 8 * 4]
    assert {c.group for c in scattered} == {4}


def test_buffers_are_those_outside_of_fusions():
    shapes = {(kind, shape) for kind, shape, _ in buffers(TEXT)}
    assert ("bf16", (128, 8)) in shapes
    assert ("f32", (64, 8)) not in shapes
