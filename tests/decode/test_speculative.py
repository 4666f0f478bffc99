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


def decode(pair, prompts, block_size=4, **settings):
    settings = {"max_new_tokens": LIMIT, "batch_size": 8} | settings
    return speculative_generate(*pair.models, prompts, speculation=Speculation(block_size), **settings)


def twins(pair):
    """The target as its own draft."""
    return type(pair)(pair.target, pair.target_params, pair.target, pair.target_params)


@pytest.fixture(scope="module")
def by_hand(tiny, prompts, greedy_by_hand):
    return greedy_by_hand(tiny.target, tiny.target_params, prompts, LIMIT)


ALL_SHAPES = [(block, batch) for block in range(1, 7) for batch in (1, 3, 8)]
QUICK_SHAPES = [(1, 3), (4, 8), (6, 1)]


@pytest.mark.parametrize(
    "block_size, batch_size",
    [pytest.param(*s, marks=() if s in QUICK_SHAPES else pytest.mark.slow) for s in ALL_SHAPES],
)
def test_greedy_writes_what_the_target_writes(block_size, batch_size, tiny, prompts, by_hand):
    for limit in (LIMIT, [LIMIT, *(1 + i % LIMIT for i in range(1, len(prompts)))]):
        results = decode(tiny, prompts, block_size, batch_size=batch_size, max_new_tokens=limit)
        limits = np.broadcast_to(limit, len(prompts))
        assert [r.tokens for r in results] == [text[:n] for text, n in zip(by_hand, limits, strict=True)]
        for result in results:
            check_counts(result, block_size)
    accepted = {a for result in results for a in result.accepted}
    assert {0, block_size} <= accepted <= set(range(block_size + 1))


def check_counts(result, block_size):
    """Blocks account for every token: complete ones for accepted + 1, a cut one for less, but for at least one."""
    assert all(0 <= a <= block_size for a in result.accepted)
    rest = len(result.tokens) - sum(a + 1 for a in result.complete)
    assert 0 < rest < result.accepted[-1] + 1 if result.cut else rest == 0


def test_end_tokens_at_every_place_of_a_block(tiny, prompts, by_hand):
    places = set()
    for end in sorted({token for text in by_hand for token in text}):
        results = decode(tiny, prompts, eos_ids=(end,))
        assert [r.tokens for r in results] == [t[: t.index(end) + 1] if end in t else t for t in by_hand]
        for result in results:
            check_counts(result, 4)
            if result.tokens[-1] == end and len(result.tokens) < LIMIT:
                place = len(result.tokens) - sum(a + 1 for a in result.accepted[:-1])
                places.add((place, result.cut))
    assert {place for place, _ in places} == {1, 2, 3, 4, 5}
    assert {cut for _, cut in places} == {True, False}


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_equal_to_the_target_is_always_accepted(settings, tiny, prompts):
    for result in decode(twins(tiny), prompts, **settings):
        assert result.accepted == [4] * 5
        assert not result.cut


def test_sampled_tokens_depend_on_seed_and_example_id_alone(tiny, prompts):
    ids = list(range(100, 100 + len(prompts)))
    results = decode(tiny, prompts, example_ids=ids, **SAMPLED)
    assert decode(tiny, prompts[::-1], example_ids=ids[::-1], **SAMPLED) == results[::-1]
    assert decode(tiny, prompts[2:3], example_ids=ids[2:3], **SAMPLED) == results[2:3]
    assert decode(tiny, prompts, example_ids=ids, batch_size=3, **SAMPLED) == results
    assert decode(tiny, prompts, example_ids=ids, seed=1, **SAMPLED) != results
    for result in results:
        check_counts(result, 4)


def test_rows_of_temperature_zero_are_greedy_beside_sampled_ones(tiny, prompts, by_hand):
    temperatures = [float(i % 2) for i in range(len(prompts))]
    texts = [r.tokens for r in decode(tiny, prompts, temperature=temperatures)]
    assert texts[::2] == by_hand[::2]
    assert texts[1::2] != by_hand[1::2]


@pytest.mark.parametrize("with_draft", [False, True])
def test_written_a_few_steps_at_a_time(with_draft, tiny, prompts):
    """The same text by the same program, whatever number of steps it is asked for."""
    eos_E = np.asarray((), np.int32)
    writer = WithDraft(*tiny.models, Speculation(4), eos_E) if with_draft else Alone(*tiny.models[:2], eos_E)
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
    before = write_in_blocks._cache_size()
    decode(tiny, prompts[:2], eos_ids=(3,))
    decode(twins(tiny), prompts[::-1], max_new_tokens=[LIMIT] + [2] * (len(prompts) - 1))
    list(
        speculative_batches(
            *tiny.models, prompts, speculation=Speculation(4), max_new_tokens=LIMIT, batch_size=8, repeats=3
        )
    )
    assert write_in_blocks._cache_size() == before


def test_batches_match_those_of_plain_generation_and_carry_times(tiny, prompts):
    batches = list(
        speculative_batches(*tiny.models, prompts, speculation=Speculation(4), max_new_tokens=LIMIT, batch_size=8)
    )
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
        decode(tiny, prompts, block_size=0)
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
    program = write_in_blocks.lower(
        *tiny.models, state, speculation=Speculation(4), eos_E=zeros, sampling=None, draws=None
    )
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
