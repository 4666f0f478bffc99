import numpy as np
import pytest

from jaxdraft.decode import (
    Speculation,
    acceptance,
    acceptance_ratios,
    block_efficiency,
    expected_blocks,
    generate,
    speculative_generate,
    token_probabilities,
)
from jaxdraft.errors import ConfigError
from jaxdraft.models import Decoder
from jaxdraft.models.hf import load_model

LIMIT = 25


def padded(tokens, size=48):
    return np.pad(np.asarray([tokens]), ((0, 0), (0, size - len(tokens))))


def simulate(accept, block_size, rng):
    """Blocks of one run of the loop in which draft j is accepted with probability ``accept[j]``."""
    t = blocks = 0
    while t < len(accept):
        blocks += 1
        passed = rng.random(block_size) < np.pad(accept[t : t + block_size], (0, block_size))[:block_size]
        t += 1 + int(np.cumprod(passed).sum())
    return blocks


@pytest.mark.parametrize("block_size", [1, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_expected_blocks_is_the_mean_of_simulated_loops(block_size, count):
    rng = np.random.default_rng(0)
    accept = rng.random(count) ** 0.5
    runs = [simulate(accept, block_size, rng) for _ in range(4000)]
    error = 4 * np.std(runs) / 4000**0.5 + 1e-9
    assert expected_blocks(accept, block_size) == pytest.approx(np.mean(runs), abs=error)


def test_expected_blocks_of_block_verification():
    """By hand: a block started at 0 ends after 0 or 2 drafts, with 0.5 each. One started at 1 ends after 2 as a block,
    whose products are 3 and 1.5; token by token after 1 or 2, whose a_j are 1 and 0.5."""
    ratio = np.asarray([0.5, 3.0, 0.5, 2.0])
    assert expected_blocks(ratio, 2, "block") == 1 + 0.5 + 0.5
    assert expected_blocks(ratio, 2) == 1 + 0.5 + (0.5 + 0.25)


def test_expected_blocks_of_a_draft_that_stops():
    ones, every_third = np.ones(12), np.asarray([True, False, False] * 4)
    assert expected_blocks(ones, 3, last_N=np.zeros(12, bool)) == 3
    assert expected_blocks(ones, 3, last_N=np.ones(12, bool)) == 6
    assert expected_blocks(ones, 3, last_N=every_third) == 5  # from 0, 2, 5, 8, 11
    assert expected_blocks(np.zeros(12), 3, last_N=every_third) == 12


def test_expected_blocks_of_certain_outcomes():
    assert expected_blocks(np.ones(12), 3) == 3
    assert expected_blocks(np.ones(13), 3) == 4
    assert expected_blocks(np.zeros(12), 3) == 12
    assert expected_blocks(np.asarray([1, 0, 1, 1, 1, 0.0]), 2) == 3
    assert block_efficiency([np.ones(12), np.zeros(4)], 3) == 16 / 7
    assert np.isnan(block_efficiency([], 3))


@pytest.mark.parametrize("stop_below", [0, 0.08])
@pytest.mark.parametrize("end", [(24,), (6,)])
def test_greedy_counts_equal_the_loops(end, stop_below, tiny, prompts):
    speculation = Speculation(4, stop_below=stop_below)
    how = {"max_new_tokens": LIMIT, "batch_size": 8, "eos_ids": end}
    results = speculative_generate(*tiny.models, prompts, speculation=speculation, **how)
    ratios = acceptance_ratios(*tiny.models, prompts, [r.tokens for r in results])
    for result, ratio in zip(results, ratios, strict=True):
        assert set(ratio.accept_N.tolist()) <= {0, 1}
        assert ratio.expected_blocks(speculation) == len(result.accepted)
        assert expected_blocks(ratio.accept_N, 4) <= len(result.accepted)


@pytest.mark.parametrize("stop_below", [0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_greedy_counts_equal_the_loops_on_real_models(stop_below, stories):
    prompts, speculation = [[1], [1, 403], [1, 410, 300, 280]], Speculation(4, stop_below=stop_below)
    answers = generate(stories.target, stories.target_params, prompts, max_new_tokens=60, batch_size=3)
    results = speculative_generate(*stories.models, prompts, speculation=speculation, max_new_tokens=60, batch_size=3)
    ratios = acceptance_ratios(*stories.models, prompts, answers)
    assert [r.expected_blocks(speculation) for r in ratios] == [len(r.accepted) for r in results]


SPECULATIONS = {
    "token by token": lambda _: Speculation(4),
    "block verification": lambda _: Speculation(4, "block"),
    "greedy drafting": lambda _: Speculation(4, drafting="greedy"),
    "adaptive": lambda stop_below: Speculation(4, stop_below=stop_below),
    "block verification, adaptive": lambda stop_below: Speculation(4, "block", stop_below=stop_below),
    "all three": lambda stop_below: Speculation(4, "block", "greedy", stop_below),
}
QUICK = "token by token", "block verification, adaptive"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SPECULATIONS])
def test_sampled_counts_equal_the_loops(name, pair):
    """Of each text that the loop wrote, the blocks it took, within three standard errors of those expected for it."""
    pair, stop_below = pair
    speculation, how = SPECULATIONS[name](stop_below), {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
    prompts = [[i % 24, i // 24] for i in range(256)]
    how["max_new_tokens"] = LIMIT
    results = speculative_generate(*pair.models, prompts, speculation=speculation, batch_size=64, **how)
    ratios = acceptance_ratios(*pair.models, prompts, [r.tokens for r in results], batch_size=64, **how)
    offline = np.asarray([r.expected_blocks(speculation) for r in ratios])
    online = np.asarray([len(r.accepted) for r in results])
    if speculation.drafting == "greedy":  # the text says it all
        np.testing.assert_allclose(online, offline)
    error = (online - offline).std() / len(prompts) ** 0.5
    assert error < 0.02 * online.mean()
    assert abs(np.mean(online - offline)) <= 3 * error
    plain = np.mean([r.expected_blocks(Speculation(4)) for r in ratios])
    assert (speculation == Speculation(4)) == (abs(offline.mean() - plain) <= 3 * error)


@pytest.fixture(params=[("tiny", 0.06), pytest.param(("stories", 0.4), marks=pytest.mark.slow)], ids=lambda x: x[0])
def pair(request):
    """Two models, and a probability that about half of the draft's tokens have less than."""
    name, stop_below = request.param
    return request.getfixturevalue(name), stop_below


def test_overlap_and_acceptance_are_those_of_the_distributions(tiny, prompts, plain_forward):
    answers = generate(tiny.target, tiny.target_params, prompts, max_new_tokens=LIMIT, temperature=0.7)
    ratios = acceptance_ratios(*tiny.models, prompts, answers, temperature=0.7)
    for prompt, answer, ratio in zip(prompts, answers, ratios, strict=True):
        laws = []
        for decoder, params in (tiny.models[:2], tiny.models[2:]):
            logits = np.asarray(plain_forward(decoder, params, padded(prompt + answer)), np.float64)
            weights = np.exp(logits[0, len(prompt) - 1 :][: len(answer)] / 0.7)
            laws.append(weights / weights.sum(axis=1, keepdims=True))
        q, p = laws
        rows = np.arange(len(answer))
        np.testing.assert_allclose(ratio.overlap_N, np.minimum(p, q).sum(axis=1), rtol=1e-4)
        np.testing.assert_allclose(ratio.accept_N, np.minimum(1, p[rows, answer] / q[rows, answer]), rtol=1e-3)


def test_each_model_alone_gives_the_same_acceptance(tiny, prompts):
    """Mixed temperatures in one batch, as while a draft learns, against one temperature for all."""
    count = len(prompts)
    how = {"temperature": [0.0] * count + [0.8] * count, "top_p": [1.0] * count + [0.9] * count}
    answers = generate(tiny.target, tiny.target_params, prompts * 2, max_new_tokens=LIMIT, **how)
    q, p = (
        token_probabilities(decoder, params, prompts * 2, answers, **how)
        for decoder, params in (tiny.models[:2], tiny.models[2:])
    )
    for rows, one in ((slice(count), {}), (slice(count, None), {"temperature": 0.8, "top_p": 0.9})):
        expected = acceptance_ratios(*tiny.models, prompts, answers[rows], **one)
        for p_N, q_N, whole in zip(p[rows], q[rows], expected, strict=True):
            np.testing.assert_allclose(acceptance(p_N, q_N), whole.accept_N, rtol=1e-4)
    assert all((q_N == 1).all() for q_N in q[:count])
    assert 0.02 < np.mean(np.concatenate([acceptance(*pair) for pair in zip(p, q, strict=True)]) < 1) < 0.98


def test_acceptance_of_certain_probabilities():
    p_N, q_N = np.asarray([0.1, 0.4, 0.0, 0.0, 0.3]), np.asarray([0.4, 0.1, 0.5, 0.0, 0.3])
    assert acceptance(p_N, q_N).tolist() == [0.25, 1, 0, 1, 1]


@pytest.mark.slow
def test_stacked_parameters_give_the_same_ratios(stories, shared_data):
    loaded = [load_model(shared_data / "models" / name) for name in ("stories260K-hf", "llama2xs-hf")]
    stacked = [x for config, params in loaded for x in (Decoder(config), params)]
    text = [[1]], [list(range(300, 320))]
    (a,), (b,) = (acceptance_ratios(*models, *text, temperature=1.0) for models in (stories.models, stacked))
    np.testing.assert_allclose(a.accept_N, b.accept_N, rtol=1e-3)


def test_broken_weights_are_an_error(tiny):
    broken = dict(tiny.draft_params)
    broken["head"] = broken["head"].at[0, 3].set(np.nan)
    with pytest.raises(FloatingPointError, match="prompt 0"):
        acceptance_ratios(tiny.target, tiny.target_params, tiny.draft, broken, [[1, 2]], [[3]])


def test_answers_must_fit_the_prompts(tiny):
    with pytest.raises(ConfigError, match="2 prompts, 1 answers"):
        acceptance_ratios(*tiny.models, [[1], [2]], [[3]])


def test_a_greedy_answer_counts_alike_beside_a_sampled_one(tiny):
    """As the target's most likely text, whatever the rounding of this pass makes of it."""
    texts = [[1], [1]], [[3, 4, 5], [3, 4, 5]]
    mixed, greedy = (acceptance_ratios(*tiny.models, *texts, temperature=t)[0] for t in ([0.0, 1.0], 0.0))
    np.testing.assert_array_equal(mixed.ratio_N, greedy.ratio_N)


def test_an_empty_answer_has_no_tokens(tiny):
    assert [len(q_N) for q_N in token_probabilities(tiny.target, tiny.target_params, [[1, 2]], [[]])] == [0]
