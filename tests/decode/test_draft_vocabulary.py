"""A draft that can propose a part of the vocabulary only: what it proposes, and that the text stays the target's."""

import dataclasses

import numpy as np
import pytest

from jaxdraft.decode import Speculation, acceptance_ratios, expected_blocks, generate, speculative_generate
from jaxdraft.models import Decoder

IDS = (1, 2, 5, 6, 7, 11, 12, 13, 15, 18, 19, 22, 23)
LIMIT = 25


@pytest.fixture(scope="module")
def narrow(tiny):
    config = dataclasses.replace(tiny.draft.config, head_ids=IDS)
    return dataclasses.replace(tiny, draft=Decoder(config, scan=False))


def test_greedy_text_and_counts(tiny, narrow, prompts):
    own = generate(tiny.target, tiny.target_params, prompts, max_new_tokens=LIMIT)
    results = speculative_generate(*narrow.models, prompts, speculation=Speculation(3), max_new_tokens=LIMIT)
    assert [result.tokens for result in results] == own
    ratios = acceptance_ratios(*narrow.models, prompts, own)
    assert [expected_blocks(r.accept_N, 3) for r in ratios] == [len(r.accepted) for r in results]
    # A token outside is never accepted, one inside often.
    outside = np.concatenate([~np.isin(tokens, IDS) for tokens in own])
    accepted = np.concatenate([r.accept_N for r in ratios])
    assert 0.2 < outside.mean() < 0.8
    assert not accepted[outside].any()
    assert accepted[~outside].mean() > 0.5


def test_the_draft_alone_writes_its_vocabulary_only(narrow, prompts):
    for how in ({}, {"temperature": 1.5, "seed": 3}):
        written = generate(narrow.draft, narrow.draft_params, prompts, max_new_tokens=LIMIT, **how)
        assert set().union(*written) <= set(IDS)


def test_acceptance_is_that_of_logits_masked_outside(tiny, narrow, plain_forward):
    prompt, temperature = [3, 9], 0.8
    (answer,) = generate(tiny.target, tiny.target_params, [prompt], max_new_tokens=LIMIT, temperature=temperature)
    (found,) = acceptance_ratios(*narrow.models, [prompt], [answer], temperature=temperature)
    tokens = np.asarray([[*prompt, *answer]])
    places = np.arange(len(prompt) - 1, tokens.shape[1] - 1)

    def law(decoder, params, kept):
        logits = np.asarray(plain_forward(decoder, params, tokens), np.float64)[0, places] / temperature
        weights = np.exp(logits) * np.isin(np.arange(logits.shape[1]), kept)
        return weights / weights.sum(-1, keepdims=True)

    q, p = law(tiny.target, tiny.target_params, np.arange(24)), law(tiny.draft, tiny.draft_params, IDS)
    rows = np.arange(len(answer))
    # Both sides are float32 softmaxes of logits up to 10: a few roundings of 1e-6.
    np.testing.assert_allclose(found.overlap_N, np.minimum(p, q).sum(-1), atol=1e-5)
    np.testing.assert_allclose(found.accept_N, np.minimum(1, p[rows, answer] / q[rows, answer]), rtol=1e-4)
