"""Small random models, made so that a draft agrees with its target often but not always."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.models import Decoder, ModelConfig, for_decoding, head_weight, init_params, logits
from jaxdraft.models.hf import load_model

VOCAB = 24
WINDOW = 144


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A target and a draft ready for decoding; ``pair.models`` is how the functions under test take them."""

    target: Decoder
    target_params: dict
    draft: Decoder
    draft_params: dict

    @property
    def models(self):
        return self.target, self.target_params, self.draft, self.draft_params


def lively(config, seed, std=0.35):
    """Random parameters of which every layer, and the order of the tokens, changes what comes next."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: std * rng.standard_normal(x.shape, np.float32), shapes)


def near(params, noise, seed):
    """``params`` with normal noise of this size relative to each tensor's own."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + noise * x.std() * rng.standard_normal(x.shape, np.float32), params)


@pytest.fixture(scope="session")
def tiny() -> Pair:
    config = ModelConfig(
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        vocab_size=VOCAB,
        tie_embeddings=False,
        max_positions=WINDOW,
        eos_ids=(VOCAB,),  # never comes
    )
    params = lively(config, seed=0)
    decoder = Decoder(config, scan=False)
    return Pair(decoder, for_decoding(config, params), decoder, for_decoding(config, near(params, 0.05, seed=1)))


@pytest.fixture(scope="session")
def stories(shared_data) -> Pair:
    """stories260K with llama2xs as its draft: real models with the same 512 tokens."""
    models = []
    for name in ("stories260K-hf", "llama2xs-hf"):
        config, params = load_model(shared_data / "models" / name)
        models += [Decoder(config, scan=False), for_decoding(config, params)]
    return Pair(*models)


@functools.partial(jax.jit, static_argnames="decoder")
def cache_free_logits(decoder, params, tokens_BT):
    """Logits ``[B, T, V]`` of a plain forward pass: the oracle for everything that uses a cache."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD = decoder.apply({"params": params}, tokens_BT, positions_BT)
    return logits(hidden_BTD, head_weight(decoder.config, params))


@pytest.fixture(scope="session")
def greedy_by_hand():
    """``write(decoder, params, prompts, count)``: greedy decoding by one plain forward pass per token."""

    def write(decoder, params, prompts, count):
        tokens = np.zeros((len(prompts), WINDOW), np.int32)
        lengths = np.asarray([len(prompt) for prompt in prompts])
        rows = np.arange(len(prompts))
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        for i in range(count):
            best = np.argmax(cache_free_logits(decoder, params, tokens), axis=-1)
            tokens[rows, lengths + i] = best[rows, lengths + i - 1]
        return [tokens[row, lengths[row] : lengths[row] + count].tolist() for row in rows]

    return write


@pytest.fixture(scope="session")
def lively_params():
    return lively


@pytest.fixture(scope="session")
def plain_forward():
    return cache_free_logits


@pytest.fixture(scope="session")
def prompts():
    """Ragged prompts from one token upward, in one bucket."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, size=size).tolist() for size in (1, 2, 5, 16, 3, 9, 1, 12, 7, 4, 15)]
