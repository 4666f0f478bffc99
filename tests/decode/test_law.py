"""The law of what the loops really write: χ² on 200,000 draws, and the same test failing for planted mistakes."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from scipy.stats import chi2

from jaxdraft.decode import Sampling, Speculation, agreement, blocks, rules
from jaxdraft.decode.blocks import WithDraft
from jaxdraft.decode.generate import Alone
from jaxdraft.decode.sampling import Draws
from jaxdraft.models import Decoder, ModelConfig, for_decoding
from tests.decode import mistakes

V, NEW, DRAWS, ROWS = 4, 3, 200_000, 20_000
PROMPT = [1, 3, 0]
SAMPLINGS = {
    "whole": {"temperature": 0.9},
    "top-p": {"temperature": 0.9, "top_p": 0.9},
    "top-k": {"temperature": 1.3, "top_k": 2},
    "top-k and top-p": {"temperature": 1.1, "top_k": 3, "top_p": 0.8},
}
TOKEN = Speculation(2)
BLOCK = Speculation(2, verification="block")
GREEDY = Speculation(2, drafting="greedy")
ADAPTIVE = Speculation(2, stop_below=0.28)


@pytest.fixture(scope="module")
def models(lively_params):
    config = ModelConfig(8, 8, 1, 1, 1, vocab_size=V, tie_embeddings=False, max_positions=32)
    decoder = Decoder(config, scan=False)
    target, draft = (for_decoding(config, lively_params(config, seed=seed, std=0.5)) for seed in (3, 8))
    return decoder, target, decoder, draft


@pytest.fixture(scope="module")
def law(models, plain_forward):
    """``law(sampling)``: probability of every ``NEW`` tokens after the prompt, without cache or sampling code."""
    texts = np.asarray(list(itertools.product(range(V), repeat=NEW)))
    tokens = np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1)
    logits = np.asarray(plain_forward(*models[:2], tokens), np.float64)[:, len(PROMPT) - 1 : -1]

    def of(temperature, top_p=1.0, top_k=V):
        probs = np.exp(logits / temperature)
        ordered = -np.sort(-probs, axis=-1)[..., :top_k]
        mass = np.cumsum(ordered, axis=-1) / ordered.sum(axis=-1, keepdims=True)
        last = np.minimum((mass < top_p).sum(axis=-1, keepdims=True), top_k - 1)
        probs = np.where(probs >= np.take_along_axis(ordered, last, axis=-1), probs, 0)
        probs /= probs.sum(axis=-1, keepdims=True)
        assert (probs == 0).any() == (top_p < 1 or top_k < V)
        return np.take_along_axis(probs, texts[..., None], axis=-1)[..., 0].prod(axis=1)

    return of


def write(writer, temperature, top_p=1.0, top_k=0):
    """``NEW`` tokens after the prompt, ``DRAWS`` times, and the last state."""
    every = lambda value, kind: np.full(ROWS, value, kind)
    sampling = Sampling(every(temperature, np.float32), every(top_p, np.float32), every(top_k, np.int32))
    size = len(PROMPT) + NEW
    prompts = np.tile(np.asarray(PROMPT, np.int32), (ROWS, 1))
    answers = []
    with jax.set_mesh(writer.mesh):
        for first in range(0, DRAWS, ROWS):
            state = writer.start(prompts, every(len(PROMPT), np.int32), every(size, np.int32), size)
            draws = Draws(np.int32(0), np.arange(first, first + ROWS, dtype=np.uint32))
            state = writer.write(state, sampling, draws)
            answers.append(np.asarray(state.tokens_BS)[:, len(PROMPT) :])
    return np.concatenate(answers), state


def speculate(models, speculation, sampling):
    return write(WithDraft(*models, speculation, np.zeros(0, np.int32)), **SAMPLINGS[sampling])


def pvalue(answers, law):
    """χ² of the counts of every text against its expected count; 0 where the impossible happened."""
    codes = answers @ (V ** np.arange(NEW)[::-1])
    counts, expected = np.bincount(codes, minlength=V**NEW), law * len(answers)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_plain_sampling_follows_the_targets_law(sampling, models, law):
    answers, _ = write(Alone(*models[:2], np.zeros(0, np.int32)), **SAMPLINGS[sampling])
    assert pvalue(answers, law(**SAMPLINGS[sampling])) > 1e-6


SPECULATIONS = {
    "token by token": TOKEN,
    "block verification": BLOCK,
    "greedy drafting": GREEDY,
    "adaptive": ADAPTIVE,
    "all three": Speculation(3, "block", "greedy", 0.33),
    "block verification, adaptive": Speculation(3, "block", stop_below=0.28),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", SPECULATIONS)
def test_speculative_sampling_follows_the_targets_law(name, sampling, models, law):
    speculation = SPECULATIONS[name]
    answers, state = speculate(models, speculation, sampling)
    assert pvalue(answers, law(**SAMPLINGS[sampling])) > 1e-6
    drafted = {
        count
        for row, blocks in zip(state.drafted_BN.tolist(), state.blocks_B.tolist(), strict=True)
        for count in row[:blocks]
    }
    assert (len(drafted) > 1) == (speculation.stop_below > 0)


MISTAKES = {
    **{name: (TOKEN, "top-p", {(agreement, "verify"): rule}) for name, rule in mistakes.TOKEN_RULE.items()},
    **{name: (BLOCK, "top-p", {(agreement, "verify_block"): rule}) for name, rule in mistakes.BLOCK_RULE.items()},
    "target before top-p": (TOKEN, "top-p", {(agreement, "probabilities"): mistakes.target_without(top_p_B=1)}),
    "target before top-k": (TOKEN, "top-k", {(agreement, "probabilities"): mistakes.target_without(top_k_B=0)}),
    "one key to propose and to accept": (TOKEN, "top-p", {(agreement, "ACCEPT"): agreement.PROPOSE}),
    "one key to propose and to replace": (TOKEN, "top-p", {(agreement, "REPLACE"): agreement.PROPOSE}),
    "cache off by one": (
        TOKEN,
        "top-p",
        {(blocks, "prefill"): lambda *given: blocks_prefill(*given[:3], given[3] - 1, *given[4:])},
    ),
    "draws of one block used by the next": (TOKEN, "whole", {(agreement, "verify"): rules.verify_block}),
    "greedy drafts verified as drawn ones": (GREEDY, "whole", {(agreement, "sampled"): mistakes.law_of_sampled_drafts}),
    "the unsure token dropped": (ADAPTIVE, "whole", {(agreement, "sampled"): mistakes.unsure_token_dropped}),
}
blocks_prefill = blocks.prefill
QUICK = ("cache off by one",)


@pytest.mark.parametrize("mistake", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MISTAKES])
def test_the_same_test_fails_for(mistake, models, law, monkeypatch):
    speculation, sampling, wrong = MISTAKES[mistake]
    for (module, name), value in wrong.items():
        monkeypatch.setattr(module, name, value)
    # Another config is another static argument: the mistake is traced, and no other test meets its program.
    config = dataclasses.replace(models[0].config, max_positions=100 + list(MISTAKES).index(mistake))
    answers, _ = speculate((Decoder(config, scan=False), *models[1:]), speculation, sampling)
    assert pvalue(answers, law(**SAMPLINGS[sampling])) < 1e-6
