import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.decode import Sampling, generate, generate_batches, step_latency
from jaxdraft.decode.generate import start, write
from jaxdraft.errors import ConfigError
from jaxdraft.models import Decoder, for_decoding
from jaxdraft.models.hf import load_model

LIMIT = 12


def written(tiny, prompts, **settings):
    settings = {"max_new_tokens": LIMIT, "batch_size": 4} | settings
    return generate(tiny.target, tiny.target_params, prompts, **settings)


@pytest.fixture(scope="module")
def by_hand(tiny, prompts, greedy_by_hand):
    return greedy_by_hand(tiny.target, tiny.target_params, prompts, LIMIT)


@pytest.mark.parametrize("name", ["stories260K-hf", "llama2xs-hf", "babyllama-tok361-hf"])
def test_golden_greedy_tokens_of_real_models(name, shared_data):
    config, params = load_model(shared_data / "models" / name)
    golden = np.load(shared_data / "models" / name / "golden.npz")
    prompt, expected = golden["prompt"].tolist(), golden["greedy"].tolist()
    (got,) = generate(
        Decoder(config, scan=False, dtype=jnp.float32),
        for_decoding(config, params, jnp.float32),
        [prompt],
        max_new_tokens=len(expected) - len(prompt),
        eos_ids=(),
        batch_size=1,
    )
    assert prompt + got == expected


def test_greedy_is_the_argmax_of_a_plain_forward_pass(tiny, prompts, by_hand):
    assert written(tiny, prompts) == by_hand


def test_limits_and_end_tokens_cut_the_same_text(tiny, prompts, by_hand):
    limits = [LIMIT, *(1 + i % LIMIT for i in range(1, len(prompts)))]
    assert written(tiny, prompts, max_new_tokens=limits) == [t[:n] for t, n in zip(by_hand, limits, strict=True)]
    for end in sorted({token for text in by_hand for token in text})[:5]:
        expected = [text[: text.index(end) + 1] if end in text else text for text in by_hand]
        assert written(tiny, prompts, eos_ids=(end,)) == expected


def test_sampled_tokens_depend_on_seed_and_example_id_alone(tiny, prompts):
    how = {"temperature": 1.0, "top_p": 0.95}
    ids = list(range(100, 100 + len(prompts)))
    texts = written(tiny, prompts, example_ids=ids, **how)
    assert written(tiny, prompts[::-1], example_ids=ids[::-1], **how) == texts[::-1]
    assert written(tiny, prompts[2:3], example_ids=ids[2:3], **how) == texts[2:3]
    assert written(tiny, prompts, example_ids=ids, batch_size=3, **how) == texts
    assert written(tiny, prompts, example_ids=ids, seed=1, **how) != texts
    alike = written(tiny, [prompts[3]] * 4, **how)
    assert len({tuple(text) for text in alike}) > 1


def test_rows_of_temperature_zero_are_greedy_beside_sampled_ones(tiny, prompts, by_hand):
    temperatures = [float(i % 2) for i in range(len(prompts))]
    texts = written(tiny, prompts, temperature=temperatures)
    assert texts[::2] == by_hand[::2]
    assert texts[1::2] != by_hand[1::2]


def test_batches_come_one_by_one_with_times(tiny, prompts):
    batches = list(
        generate_batches(tiny.target, tiny.target_params, prompts, max_new_tokens=LIMIT, batch_size=4, repeats=2)
    )
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(prompts)))
    assert all(batch.seconds.decode > 0 and batch.seconds.prefill > 0 for batch in batches)
    assert [batch.seconds.compile > 0 for batch in batches] == [True, False, False]


def test_one_compilation_per_bucket(tiny, prompts):
    def compiled():
        return write._cache_size(), start._cache_size()

    written(tiny, prompts)
    before = compiled()
    written(tiny, prompts[:3])
    written(tiny, prompts[::-1], max_new_tokens=[LIMIT] + [3] * (len(prompts) - 1))
    assert compiled() == before
    written(tiny, [[1] * 129])
    assert compiled() == tuple(n + 1 for n in before)


def test_long_prompts_are_read_in_chunks(tiny, plain_forward):
    config = dataclasses.replace(tiny.target.config, max_positions=400)
    decoder = Decoder(config, scan=False)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocabulary, size).tolist() for size in (130, 257, 300)]
    texts = generate(decoder, tiny.target_params, prompts, max_new_tokens=2, batch_size=3)
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = np.zeros((1, 302), np.int32)
        tokens[0, : len(prompt) + 2] = prompt + text
        best = np.argmax(plain_forward(decoder, tiny.target_params, tokens), axis=-1)[0]
        assert best[len(prompt) - 1 : len(prompt) + 1].tolist() == text


def test_broken_weights_are_an_error_that_names_the_prompts(tiny, prompts):
    broken = jax.tree.map(lambda x: x, tiny.target_params)
    broken["head"] = broken["head"].at[0, 3].set(jnp.nan)
    with pytest.raises(FloatingPointError, match=r"the model .* prompts \[0, 1, 2\]"):
        generate(tiny.target, broken, prompts[:3], max_new_tokens=LIMIT, batch_size=4)


def test_repeats_must_be_positive(tiny, prompts):
    with pytest.raises(ConfigError, match="repeats"):
        written(tiny, prompts, repeats=0)


def test_step_latency_is_a_time(tiny):
    sampling = Sampling(*(np.full(2, value, kind) for value, kind in ((0.6, "f"), (0.9, "f"), (0, "i"))))
    for how in ({}, {"sampling": sampling}, {"last_only": True}):
        assert 0 < step_latency(tiny.target, tiny.target_params, batch=2, width=3, slots=13, **how) < 10
