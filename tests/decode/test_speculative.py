import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.decode import Speculation, generate, speculative_batches, speculative_generate, token_origins
from jaxdraft.decode.blocks import WithDraft, WrittenInBlocks, write_in_blocks
from jaxdraft.decode.generate import Alone, write
from jaxdraft.errors import ConfigError
from jaxdraft.models import Decoder, init_cache

LIMIT = 25
SAMPLED = {"temperature": 1.0, "top_p": 0.9}
FOUR = Speculation(4)
ADAPTIVE = Speculation(3, stop_below=0.08)


def decode(pair, prompts, speculation=FOUR, **settings):
    settings = {"max_new_tokens": LIMIT, "batch_size": 8} | settings
    return speculative_generate(*pair.models, prompts, speculation=speculation, **settings)


def twins(pair):
    """The target as its own draft."""
    return type(pair)(pair.target, pair.target_params, pair.target, pair.target_params)


@pytest.fixture(scope="module")
def by_hand(tiny, prompts, greedy_by_hand):
    return greedy_by_hand(tiny.target, tiny.target_params, prompts, LIMIT)


ALL_SHAPES = list(itertools.product(range(1, 7), (1, 3, 8), (0, 0.08)))
QUICK_SHAPES = [(1, 3, 0), (4, 8, 0), (6, 1, 0), (4, 8, 0.08)]


@pytest.mark.parametrize(
    "block_size, batch_size, stop_below",
    [pytest.param(*s, marks=() if s in QUICK_SHAPES else pytest.mark.slow) for s in ALL_SHAPES],
)
def test_greedy_writes_what_the_target_writes(block_size, batch_size, stop_below, tiny, prompts, by_hand):
    speculation = Speculation(block_size, stop_below=stop_below)
    for limit in (LIMIT, [LIMIT, *(1 + i % LIMIT for i in range(1, len(prompts)))]):
        results = decode(tiny, prompts, speculation, batch_size=batch_size, max_new_tokens=limit)
        limits = np.broadcast_to(limit, len(prompts))
        assert [r.tokens for r in results] == [text[:n] for text, n in zip(by_hand, limits, strict=True)]
        for result in results:
            check_counts(result, speculation)
    accepted = {a for result in results for a in result.accepted}
    assert ({0} if stop_below else {0, block_size}) <= accepted <= set(range(block_size + 1))
    drafted = {d for result in results for d in result.drafted}
    assert {1, block_size} <= drafted <= set(range(1, block_size + 1)) if stop_below else drafted == {block_size}


def check_counts(result, speculation):
    """Blocks account for every token: complete ones for accepted + 1, a cut one for less, but for at least one."""
    rest = len(result.tokens) - sum(a + 1 for a in result.complete)
    assert 0 < rest < result.accepted[-1] + 1 if result.cut else rest == 0
    for accepted, drafted, rejected in zip(result.accepted, result.drafted, result.rejected, strict=True):
        assert 0 <= accepted <= drafted <= speculation.block_size
        assert (rejected >= 0) == (accepted < drafted)


@pytest.mark.parametrize("speculation", [FOUR, ADAPTIVE], ids=["full", "adaptive"])
def test_end_tokens_at_every_place_of_a_block(speculation, tiny, prompts, by_hand):
    places = set()
    for end in sorted({token for text in by_hand for token in text}):
        results = decode(tiny, prompts, speculation, eos_ids=(end,))
        assert [r.tokens for r in results] == [t[: t.index(end) + 1] if end in t else t for t in by_hand]
        for result in results:
            check_counts(result, speculation)
            if result.tokens[-1] == end and len(result.tokens) < LIMIT:
                place = len(result.tokens) - sum(a + 1 for a in result.accepted[:-1])
                places.add((place, result.cut))
    assert {place for place, _ in places} == set(range(1, speculation.block_size + 2))
    assert {cut for _, cut in places} == {True, False}


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_equal_to_the_target_is_always_accepted(settings, verification, tiny, prompts):
    for result in decode(twins(tiny), prompts, Speculation(4, verification), **settings):
        assert result.accepted == [4] * 5
        assert not result.cut


@pytest.mark.parametrize("speculation", [FOUR, Speculation(4, "block", "greedy", 0.08)], ids=["default", "all options"])
def test_sampled_tokens_depend_on_seed_and_example_id_alone(speculation, tiny, prompts):
    ids = list(range(100, 100 + len(prompts)))
    write = functools.partial(decode, tiny, speculation=speculation, **SAMPLED)
    results = write(prompts, example_ids=ids)
    assert write(prompts[::-1], example_ids=ids[::-1]) == results[::-1]
    assert write(prompts[2:3], example_ids=ids[2:3]) == results[2:3]
    assert write(prompts, example_ids=ids, batch_size=3) == results
    assert write(prompts, example_ids=ids, seed=1) != results
    for result in results:
        check_counts(result, speculation)


@pytest.mark.parametrize("speculation", [FOUR, Speculation(4, "block", "greedy", 0.08)], ids=["default", "all options"])
def test_rows_of_temperature_zero_are_greedy_beside_sampled_ones(speculation, tiny, prompts, by_hand):
    greedy = decode(tiny, prompts, speculation)
    mixed = decode(tiny, prompts, speculation, temperature=[float(i % 2) for i in range(len(prompts))])
    assert mixed[::2] == greedy[::2]
    assert [r.tokens for r in greedy] == by_hand
    assert [r.tokens for r in mixed[1::2]] != by_hand[1::2]


def test_a_row_stops_after_the_first_token_that_the_draft_is_unsure_of(tiny, prompts, plain_forward):
    """What each block proposed, by plain forward passes of the draft over the text and its own tokens after it."""
    checked = set()
    for prompt, result in zip(prompts, decode(tiny, prompts, ADAPTIVE), strict=True):
        text, n = [*prompt, *result.tokens], len(prompt)
        for accepted, drafted in zip(result.accepted[:4], result.drafted, strict=False):
            tokens, sure = text[:n], []
            while not sure or (sure[-1] >= ADAPTIVE.stop_below and len(sure) < ADAPTIVE.block_size):
                padded = np.zeros((1, 48), np.int32)
                padded[0, : len(tokens)] = tokens
                law = jax.nn.softmax(plain_forward(tiny.draft, tiny.draft_params, padded)[0, len(tokens) - 1])
                tokens.append(int(law.argmax()))
                sure.append(law.max())
            assert drafted == len(sure)
            checked.add((drafted, accepted))
            n += accepted + 1
    assert {drafted for drafted, _ in checked} == {1, 2, 3}


@pytest.mark.parametrize("with_draft", [False, True])
def test_written_a_few_steps_at_a_time(with_draft, tiny, prompts):
    """The same text by the same program, whatever number of steps it is asked for."""
    eos_E = np.asarray((), np.int32)
    writer = WithDraft(*tiny.models, FOUR, eos_E) if with_draft else Alone(*tiny.models[:2], eos_E)
    program = write_in_blocks if with_draft else write
    tokens, length, end = np.asarray([p[:1] for p in prompts]), np.full(11, 1, np.int32), np.full(11, 25, np.int32)
    begin = lambda: writer.start(tokens, length, end, 25)
    with jax.set_mesh(writer.mesh):
        whole = writer.write(begin(), None, None)
        before = program._cache_size()
        state = begin()
        for most in (2, 0, 1, 3, 24):
            steps = state.steps_B.max()
            state = writer.write(state, None, None, most=most)
            assert state.steps_B.max() == min(steps + most, whole.steps_B.max())
    assert program._cache_size() == before
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_what_was_drafted_and_refused_in_each_block(tiny, prompts, by_hand):
    alone = generate(
        tiny.draft, tiny.draft_params, [[*p, *t[:9]] for p, t in zip(prompts, by_hand, strict=True)], max_new_tokens=4
    )
    for result, text, draft in zip(decode(tiny, prompts), by_hand, alone, strict=True):
        assert result.drafted == [4] * len(result.accepted)
        assert [token >= 0 for token in result.rejected] == [count < 4 for count in result.accepted]
        ends = np.cumsum([count + 1 for count in result.accepted])
        for start, count, token in zip([0, *ends], result.accepted, result.rejected, strict=False):
            if start + count < LIMIT:
                assert token != text[start + count]
            if start == 9 and count < 4:
                assert token == draft[count]


def test_one_compilation_per_bucket_and_block_size(tiny, prompts):
    decode(tiny, prompts)
    decode(tiny, prompts, **SAMPLED)
    before = write_in_blocks._cache_size()
    decode(tiny, prompts[:2], eos_ids=(3,))
    decode(tiny, prompts, temperature=0.5, top_k=[5] * len(prompts), seed=3)
    decode(twins(tiny), prompts[::-1], max_new_tokens=[LIMIT] + [2] * (len(prompts) - 1))
    list(speculative_batches(*tiny.models, prompts, speculation=FOUR, max_new_tokens=LIMIT, batch_size=8, repeats=3))
    assert write_in_blocks._cache_size() == before


def test_batches_match_those_of_plain_generation_and_carry_times(tiny, prompts):
    batches = list(speculative_batches(*tiny.models, prompts, speculation=FOUR, max_new_tokens=LIMIT, batch_size=8))
    assert [batch.indices for batch in batches] == [list(range(8)), [8, 9, 10]]
    assert all(batch.seconds.decode > 0 and batch.seconds.prefill > 0 for batch in batches)
    assert [batch.seconds.compile > 0 for batch in batches] == [True, False]


@pytest.mark.parametrize("broken", ["target", "draft"])
def test_broken_weights_are_an_error_that_names_the_model(broken, tiny, prompts):
    params = {"target": dict(tiny.target_params), "draft": dict(tiny.draft_params)}
    params[broken]["head"] = params[broken]["head"].at[0, 3].set(jnp.nan)
    pair = type(tiny)(tiny.target, params["target"], tiny.draft, params["draft"])
    with pytest.raises(FloatingPointError, match=rf"the {broken} .* prompts \[0, 1, 2\]"):
        decode(pair, prompts[:3])


def test_bad_settings_are_named(tiny, prompts):
    with pytest.raises(ConfigError, match="block_size is 0"):
        decode(tiny, prompts, Speculation(0))
    for change, message in (
        ({"verification": "tokens"}, "verification is 'tokens': it must be one of token, block"),
        ({"drafting": None}, "drafting is None: it must be one of sampled, greedy"),
        ({"stop_below": 1}, "stop_below is 1"),
        ({"stop_below": -0.1}, "stop_below is -0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Speculation(4, **change)
    with pytest.raises(ConfigError, match="verified token by token"):
        WithDraft(*tiny.models, Speculation(4, "block"), np.zeros(0, np.int32), drafter_invariant=True)
    other = Decoder(tiny.draft.config.__class__(16, 32, 1, 2, 1, vocab_size=30), scan=False)
    with pytest.raises(ConfigError, match="30 rows, the target's 24"):
        decode(type(tiny)(tiny.target, tiny.target_params, other, {}), prompts)


def test_real_models_write_what_the_target_writes(stories):
    prompts = [[1], [1, 403], [1, 410, 300, 280]]
    settings = {"max_new_tokens": 60, "batch_size": 3}
    alone = generate(stories.target, stories.target_params, prompts, **settings)
    results = decode(stories, prompts, **settings)
    assert [r.tokens for r in results] == alone
    assert 2 < sum(map(len, alone)) / sum(len(r.accepted) for r in results) < 4


@pytest.mark.slow
def test_the_loop_holds_one_pair_of_caches(tiny):
    B, S, zeros, ones = 4, 10_000, jnp.zeros(4, jnp.int32), jnp.ones(4, bool)
    caches = [init_cache(tiny.target.config, B, S + 5, jnp.float32) for _ in range(2)]
    tokens = jnp.zeros((B, S), jnp.int32)
    state = WrittenInBlocks(tokens, zeros + 1, zeros + 2, *caches, tokens, tokens, tokens, zeros, zeros > 0, ones, ones)
    program = write_in_blocks.lower(*tiny.models, state, speculation=FOUR, eos_E=zeros, sampling=None, draws=None)
    memory = program.compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(caches))
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 2


@pytest.mark.slow
def test_bfloat16_writes_near_maxima(tiny, prompts, plain_forward):
    """In bfloat16 nothing promises equal tokens: each is within the rounding of the best one's logit."""
    config = tiny.target.config
    decoder = Decoder(config, scan=False, dtype=jnp.bfloat16)
    half = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), p) for p in (tiny.target_params, tiny.draft_params)]
    for result, prompt in zip(decode(type(tiny)(decoder, half[0], decoder, half[1]), prompts), prompts, strict=True):
        tokens = np.asarray([(prompt + result.tokens + [0] * 48)[:48]])
        logits = np.asarray(plain_forward(decoder, half[0], tokens))[0, len(prompt) - 1 :][: len(result.tokens)]
        chosen = logits[np.arange(len(result.tokens)), result.tokens]
        assert np.all(logits.max(axis=1) - chosen < 0.05 * np.abs(logits).max())


def test_token_origins():
    assert token_origins([2, 0, 1], 6) == [True, True, False, False, True, False]
    assert token_origins([2, 3], 5) == [True, True, False, True, True]
    assert token_origins([], 0) == []
