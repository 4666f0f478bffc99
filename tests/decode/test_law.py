"""The law of what the loops really write: χ² on 200,000 draws, and the same test failing for planted mistakes."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from jaxdraft.decode import Speculation, blocks, generate_batches, speculative_batches
from jaxdraft.models import Decoder, ModelConfig, for_decoding

V, NEW, DRAWS, ROWS = 4, 3, 200_000, 50_000
PROMPT = [1, 3, 0]
HOW = {
    "max_new_tokens": NEW,
    "temperature": 0.9,
    "top_p": 0.9,
    "batch_size": ROWS,
    "eos_ids": (),
}


@pytest.fixture(scope="module")
def models(lively_params):
    config = ModelConfig(8, 8, 1, 1, 1, vocab_size=V, tie_embeddings=False, max_positions=32)
    decoder = Decoder(config, scan=False)
    target, draft = (for_decoding(config, lively_params(config, seed=seed, std=0.5)) for seed in (3, 8))
    return decoder, target, decoder, draft


@pytest.fixture(scope="module")
def law(models, plain_forward):
    """Probability of every ``NEW`` tokens after the prompt under the target, without cache or sampling code."""
    texts = np.asarray(list(itertools.product(range(V), repeat=NEW)))
    tokens = np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1)
    logits = np.asarray(plain_forward(*models[:2], tokens), np.float64)[:, len(PROMPT) - 1 : -1] / HOW["temperature"]
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    ordered = -np.sort(-probs, axis=-1)
    kept = np.argmax(np.cumsum(ordered, axis=-1) >= HOW["top_p"], axis=-1)
    probs = np.where(probs >= np.take_along_axis(ordered, kept[..., None], axis=-1), probs, 0)
    probs /= probs.sum(axis=-1, keepdims=True)
    assert (probs == 0).any()
    return np.take_along_axis(probs, texts[..., None], axis=-1)[..., 0].prod(axis=1)


def pvalue(answers, law):
    """χ² of the counts of every text against its expected count; 0 where the impossible happened."""
    codes = np.asarray(answers) @ (V ** np.arange(NEW)[::-1])
    counts, expected = np.bincount(codes, minlength=V**NEW), law * len(answers)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


def speculate(models):
    batches = speculative_batches(*models, [PROMPT] * DRAWS, speculation=Speculation(2), **HOW)
    return [result.tokens for batch in batches for result in batch.results]


def test_plain_sampling_follows_the_targets_law(models, law):
    answers = [t for batch in generate_batches(*models[:2], [PROMPT] * DRAWS, **HOW) for t in batch.tokens]
    assert pvalue(answers, law) > 1e-6


def test_speculative_sampling_follows_the_targets_law(models, law):
    assert pvalue(speculate(models), law) > 1e-6


def test_a_draft_that_knows_only_some_tokens_leaves_the_law_as_it_is(models, law):
    target, target_params, draft, draft_params = models
    narrow = Decoder(dataclasses.replace(draft.config, head_ids=(0, 3)), scan=False)
    assert pvalue(speculate((target, target_params, narrow, draft_params)), law) > 1e-6


verify, probabilities, prefill = blocks.verify, blocks.probabilities, blocks.prefill


def swapped(drafts, p, q, u):
    G = drafts.shape[1]
    accepted, _ = verify(drafts, q[:, :G], jnp.concatenate([p, q[:, G:]], axis=1), u)
    return accepted, verify(drafts, p, q, jnp.where(jnp.arange(G) < accepted[:, None], -1.0, 2.0))[1]


def no_residual(drafts, p, q, u):
    accepted, _ = verify(drafts, p, q, u)
    return accepted, q[jnp.arange(len(drafts)), accepted]


def bonus_from_draft(drafts, p, q, u):
    accepted, following = verify(drafts, p, q, u)
    return accepted, jnp.where(accepted[:, None] == drafts.shape[1], p[:, -1], following)


def target_without_top_p(logits, sampling):
    return probabilities(logits, sampling._replace(top_p_B=sampling.top_p_B ** (logits.ndim == 2)))


MISTAKES = {
    "acceptance inflated by 5 %": {"verify": lambda drafts, p, q, u: verify(drafts, p, q, u / 1.05)},
    "ratio swapped": {"verify": swapped},
    "residual skipped": {"verify": no_residual},
    "bonus from the draft": {"verify": bonus_from_draft},
    "target before top-p": {"probabilities": target_without_top_p},
    "one key to propose and to accept": {"ACCEPT": blocks.PROPOSE},
    "one key to propose and to replace": {"REPLACE": blocks.PROPOSE},
    "cache off by one": {
        "prefill": lambda decoder, params, tokens, n, end, size: prefill(decoder, params, tokens, n - 1, end, size)
    },
}


QUICK = ("cache off by one",)


@pytest.mark.parametrize("mistake", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MISTAKES])
def test_the_same_test_fails_for(mistake, models, law, monkeypatch):
    for name, wrong in MISTAKES[mistake].items():
        monkeypatch.setattr(blocks, name, wrong)
    # Another config is another static argument: the mistake is traced, and no other test meets its program.
    config = dataclasses.replace(models[0].config, max_positions=100 + list(MISTAKES).index(mistake))
    assert pvalue(speculate((Decoder(config, scan=False), *models[1:])), law) < 1e-6
