"""A stream writes what ``generate`` writes, whatever shares the batch with a text; and keeps the batch full."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.decode import Request, Usage, generate, stream
from jaxdraft.decode.blocks import start_in_blocks, write_in_blocks
from jaxdraft.decode.generate import Alone, start, write
from jaxdraft.decode.score import TopK
from jaxdraft.decode.stream import empty, insert
from jaxdraft.errors import ConfigError
from jaxdraft.models import Decoder

VOCAB = 24  # of the tiny models
LONGEST = 16
END = (7,)


@pytest.fixture(scope="module")
def requests():
    """Short and long, greedy and sampled, with and without top-p."""
    rng = np.random.default_rng(0)
    return [
        Request(
            key=f"text {i}",
            tokens=rng.integers(0, VOCAB, int(rng.integers(1, 16))).tolist(),
            max_new_tokens=int(rng.integers(1, LONGEST + 1)),
            temperature=(0.0, 0.7, 1.3)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            example_id=1000 - i,
            top_k=(0, 0, 0, 0, 5)[i % 5],
        )
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def expected(tiny, requests):
    """What ``generate`` writes, whose batches run to their end."""
    texts = generate(
        tiny.target,
        tiny.target_params,
        [request.tokens for request in requests],
        max_new_tokens=[request.max_new_tokens for request in requests],
        temperature=[request.temperature for request in requests],
        top_p=[request.top_p for request in requests],
        top_k=[request.top_k for request in requests],
        example_ids=[request.example_id for request in requests],
        eos_ids=END,
    )
    cut = [len(text) < request.max_new_tokens for request, text in zip(requests, texts, strict=True)]
    assert 5 < sum(cut) < 35
    return {request.key: text for request, text in zip(requests, texts, strict=True)}


def streamed(pair, requests, **settings):
    settings = {"batch_size": 8, "longest": LONGEST, "eos_ids": END} | settings
    return {
        finished.request.key: finished.tokens
        for finished in stream(pair.target, pair.target_params, requests, **settings)
    }


@pytest.mark.parametrize("batch_size", [8, 32, 1])
def test_texts_are_those_of_batches_that_run_to_their_end(batch_size, tiny, requests, expected):
    assert streamed(tiny, requests, batch_size=batch_size) == expected


def test_order_and_neighbours_change_nothing(tiny, requests, expected):
    assert streamed(tiny, requests[::-1]) == expected
    shuffled = np.random.default_rng(1).permutation(len(requests))
    assert streamed(tiny, [requests[i] for i in shuffled]) == expected
    few = requests[10:13]
    assert streamed(tiny, few) == {request.key: expected[request.key] for request in few}


def test_another_seed_is_another_text(tiny, requests, expected):
    other = streamed(tiny, requests, seed=1)
    same = {request.key for request in requests if other[request.key] == expected[request.key]}
    assert {request.key for request in requests if not request.temperature} <= same < expected.keys()


def test_no_requests_no_texts(tiny):
    usage = Usage()
    assert streamed(tiny, [], usage=usage) == {}
    assert usage == Usage()
    assert usage.busy == 1


def test_greedy_requests_need_no_sampling_in_the_program(tiny, requests, expected):
    greedy = [request for request in requests if not request.temperature]
    assert streamed(tiny, greedy, sampled=False) == {request.key: expected[request.key] for request in greedy}


def test_requests_are_taken_as_rows_get_free(tiny, requests):
    taken = 0

    def source():
        nonlocal taken
        for request in requests:
            taken += 1
            yield request

    texts = stream(tiny.target, tiny.target_params, source(), batch_size=1, longest=LONGEST, eos_ids=END)
    assert taken == 0
    for done, _ in enumerate(texts, 1):
        assert taken == min(done + 2, len(requests)), "one is written, one is ahead"


def test_the_devices_go_on_before_a_text_is_handed_over(tiny, requests, monkeypatch):
    writes = 0

    def counted(self, *arguments):
        nonlocal writes
        writes += 1
        return write_on(self, *arguments)

    write_on = Alone.write
    monkeypatch.setattr(Alone, "write", counted)
    next(stream(tiny.target, tiny.target_params, requests, batch_size=8, longest=LONGEST, eos_ids=END))
    assert writes == 2


def test_a_new_bucket_is_a_new_batch(tiny, requests, expected):
    rng = np.random.default_rng(2)
    long = [
        Request(f"long {i}", rng.integers(0, VOCAB, 129).tolist(), 3 + i, temperature=i % 2, example_id=i)
        for i in range(3)
    ]
    (alone,) = generate(
        tiny.target, tiny.target_params, [long[1].tokens], max_new_tokens=4, temperature=1, example_ids=[1], eos_ids=END
    )
    texts = streamed(tiny, [*requests[:9], *long])
    assert texts["long 1"] == alone
    assert texts.keys() == {request.key for request in [*requests[:9], *long]}
    assert all(texts[request.key] == expected[request.key] for request in requests[:9])


def test_usage_counts_steps_and_rows(tiny):
    """Rows of 4 and 2 tokens; 2 takes the place of 2, and both end with step 4; then 1 is alone for a step."""
    usage = Usage()
    requests = [Request(count, [1], new) for count, new in enumerate((4, 2, 2, 1))]
    streamed(tiny, requests, batch_size=2, eos_ids=(), usage=usage)
    counted = dataclasses.replace(usage, compiling=0, waiting=0)
    assert counted == Usage(steps=5, slots=10, useful=9, tokens=9, prefills=4)
    assert usage.busy == 0.9
    assert usage.compiling > 0
    assert usage.waiting > 0


def test_rows_are_kept_busy(tiny):
    """As many rows wait as are refilled together, but for the end; a batch that waits for its longest is half idle."""
    usage, rng = Usage(), np.random.default_rng(0)
    requests = [Request(i, [1], int(rng.integers(1, LONGEST + 1))) for i in range(400)]
    streamed(tiny, requests, batch_size=32, eos_ids=(), usage=usage)
    assert usage.useful == usage.tokens == sum(request.max_new_tokens for request in requests)
    # 4 of 32 rows are refilled together: 3 of them are free at most, and more where several are done in one step.
    assert 0.85 < usage.busy < 0.95


def test_one_compilation_per_bucket(tiny, requests):
    def compiled():
        return [program._cache_size() for program in (start, empty, insert, write, start_in_blocks, write_in_blocks)]

    streamed(tiny, requests)
    streamed(tiny, requests, draft=(tiny.draft, tiny.draft_params))
    before = compiled()
    streamed(tiny, requests[5:], eos_ids=(3,))
    streamed(tiny, requests[::-1], draft=(tiny.draft, tiny.draft_params))
    assert compiled() == before


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_draft_changes_nothing_of_the_text(sampled, tiny, requests, expected):
    asked = [request for request in requests if sampled or not request.temperature]
    usage = Usage()
    how = {"draft": (tiny.draft, tiny.draft_params), "sampled": sampled, "usage": usage}
    assert streamed(tiny, asked, **how) == {request.key: expected[request.key] for request in asked}
    assert usage.tokens > 1.5 * usage.useful, "the draft is accepted often"


def test_a_draft_that_knows_some_tokens_only_changes_nothing(tiny, requests, expected):
    config = dataclasses.replace(tiny.draft.config, head_ids=(1, 2, 5, 6, 7, 11, 12, 13, 15, 18, 19, 22, 23))
    usage = Usage()
    assert streamed(tiny, requests, draft=(Decoder(config, scan=False), tiny.draft_params), usage=usage) == expected
    assert usage.tokens > 1.2 * usage.useful


def test_a_draft_equal_to_the_target_is_always_accepted(tiny, requests, expected):
    usage = Usage()
    assert streamed(tiny, requests, draft=(tiny.target, tiny.target_params), usage=usage) == expected
    assert usage.useful == sum(math.ceil(len(text) / 5) for text in expected.values())


def test_real_models_write_the_same_with_a_draft(stories):
    requests = [Request(i, [1, 403][: 1 + i % 2], 20 + 5 * i, 0.5 * (i % 3), 0.95, i) for i in range(8)]
    usage = Usage()
    how = {"batch_size": 3, "longest": 60, "eos_ids": None}
    alone = streamed(stories, requests, **how)
    with_draft = streamed(stories, requests, draft=(stories.draft, stories.draft_params), usage=usage, **how)
    assert with_draft == alone
    assert usage.tokens > 2 * usage.useful


@pytest.mark.parametrize("broken", ["model", "target", "draft"])
def test_broken_weights_are_an_error_that_names_the_keys(broken, tiny, requests):
    bad = lambda params: params | {"head": params["head"].at[0, 3].set(jnp.nan)}
    target = tiny.target_params if broken == "draft" else bad(tiny.target_params)
    draft = bad(tiny.draft_params) if broken == "draft" else tiny.draft_params
    pair = dataclasses.replace(tiny, target_params=target)
    with pytest.raises(FloatingPointError, match=rf"the {broken} .* prompts \['text 0', 'text 1', 'text 2'\]"):
        streamed(pair, requests[:3], draft=None if broken == "model" else (tiny.draft, draft))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": []}, "prompt mine is empty"),
        ({"tokens": [VOCAB]}, "prompt mine has token ids from 24 to 24"),
        ({"tokens": [1] * 140}, "prompt mine has 140 tokens and may grow by 8, past the model's 144"),
        ({"max_new_tokens": 0}, "mine: max_new_tokens"),
        ({"max_new_tokens": LONGEST + 1}, "mine: max_new_tokens is 17, longest 16"),
        ({"temperature": -0.1}, "mine: temperature"),
        ({"temperature": math.nan}, "mine: temperature"),
        ({"temperature": 0.5, "sampled": False}, "mine: temperature is 0.5, and sampled=False"),
        ({"top_p": 0}, "mine: top_p"),
        ({"example_id": 2**32}, "mine: example_id"),
        ({"top_k": -1}, "mine: top_k"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_bad_settings_are_named(change, message, tiny):
    asked = {"key": "mine", "tokens": [1], "max_new_tokens": 8}
    fields = {field.name for field in dataclasses.fields(Request)}
    settings = {name: value for name, value in change.items() if name not in fields}
    draft = (tiny.draft, tiny.draft_params) if "block_size" in settings else None
    with pytest.raises(ConfigError, match=message):
        streamed(tiny, [Request(**asked | {k: v for k, v in change.items() if k in fields})], draft=draft, **settings)


def test_rows_are_put_into_their_group():
    state = {"length": jnp.zeros(6), "cache": jnp.zeros((6, 1, 2, 1))}
    new = {"length": jnp.arange(1.0, 5), "cache": jnp.ones((4, 1, 2, 1)) * jnp.arange(1, 5)[:, None, None, None]}
    filled = insert(state, new, np.asarray([[2, 0], [1, 3]], np.int32))
    np.testing.assert_array_equal(filled["length"], [2, 0, 1, 0, 3, 0])
    np.testing.assert_array_equal(filled["cache"][:, 0, 0, 0], filled["length"])
    assert jax.tree.map(jnp.shape, empty(new, 6)) == {"length": (6,), "cache": (6, 1, 2, 1)}


@pytest.mark.parametrize("with_draft", [False, True])
def test_what_the_model_said_of_its_tokens_is_kept(with_draft, tiny, plain_forward, requests, expected):
    keep, tolerance = TopK(4, 0.8), 2e-5  # float32 logits of size 10, which another order of sums moves by some 1e-6
    draft = (tiny.draft, tiny.draft_params) if with_draft else None
    given = {"batch_size": 8, "longest": LONGEST, "eos_ids": END, "draft": draft, "keep": keep}
    for request, tokens, scores in stream(tiny.target, tiny.target_params, requests, **given):
        assert tokens == expected[request.key]
        text = [*request.tokens, *tokens]
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        own = slice(len(request.tokens) - 1, len(text) - 1)
        logits = np.asarray(plain_forward(tiny.target, tiny.target_params, padded), np.float64)[0, own] / 0.8
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert scores.ids_BTK.shape == (len(tokens), 4)
        for said, ids, token, found in zip(log_probs, scores.ids_BTK, tokens, scores.log_probs_BTS, strict=True):
            assert ids.tolist() == np.argsort(-said, kind="stable")[:4].tolist()
            rest = sorted(set(range(VOCAB)) - {token, *ids.tolist()})
            np.testing.assert_allclose(
                found, [*said[ids], said[token], np.log(np.exp(said[rest]).sum())], atol=tolerance
            )


def test_rows_are_put_in_where_the_cache_lies():
    state, new = ({"cache": jax.ShapeDtypeStruct((rows, 2, 10_000, 8), jnp.float32)} for rows in (8, 1))
    memory = insert.lower(state, new, jnp.zeros((1, 1), jnp.int32)).compile().memory_analysis()
    held = 4 * 8 * 2 * 10_000 * 8
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 4
