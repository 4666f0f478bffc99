"""Operations counted from shapes: by hand, against XLA's count, and against the rule of six per parameter and token."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxdraft.losses import KL, CrossEntropy, TVDPlusPlus, TVDPlusPlusGlobal
from jaxdraft.models import Decoder, ModelConfig, for_decoding, head_weight, init_params, presets
from jaxdraft.models.decoder import logits
from jaxdraft.plan.flops import block_flops, cache_bytes, forward_flops, head_flops, matrix_parameters, mean_context
from jaxdraft.plan.stages import kept_checkpoints, train_flops
from jaxdraft.plan.work import expected_block
from jaxdraft.recipe import Train

SMALL = ModelConfig(
    hidden_size=8, intermediate_size=12, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=20, tie_embeddings=False
)


def train(**settings):
    return Train("train", data="text", steps=10, **{"loss": CrossEntropy(), "batch_size": 2, **settings})


def test_by_hand():
    # wq 8×8, wk and wv 8×4, wo 8×8, gate, up and down 8×12
    assert matrix_parameters(SMALL) == 3 * (64 + 32 + 32 + 64 + 3 * 96)
    # with 5 keys in sight: 4 heads of 2, once for the scores and once for the values
    assert block_flops(SMALL, 5) == 2 * 3 * 480 + 3 * 2 * 2 * 4 * 2 * 5
    assert head_flops(SMALL) == 2 * 8 * 20
    assert head_flops(dataclasses.replace(SMALL, head_ids=(1, 2, 3))) == 2 * 8 * 3
    assert cache_bytes(SMALL, 2) == 2 * 3 * 2 * 2 * 2


@pytest.mark.parametrize(
    "length, window, keys", [(1, None, [1]), (4, None, [1, 2, 3, 4]), (5, 2, [1, 2, 2, 2, 2]), (3, 9, [1, 2, 3])]
)
def test_a_query_sees_itself_and_what_is_before_it(length, window, keys):
    assert mean_context(length, window) == sum(keys) / len(keys)


def test_xla_counts_the_same_products():
    """XLA counts softmax, norms and rotations too, and the masked half of attention."""
    config = dataclasses.replace(
        SMALL, hidden_size=64, intermediate_size=192, num_heads=4, num_kv_heads=2, vocab_size=512
    )
    length, decoder = 32, Decoder(config, dtype=jnp.float32, scan=False)
    tokens = jnp.zeros((2, length), jnp.int32)
    params = jax.eval_shape(lambda: for_decoding(config, init_params(config, jax.random.key(0)), jnp.float32))

    def forward(params, tokens):
        hidden = decoder.apply({"params": params}, tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape))
        return logits(hidden, head_weight(config, params))

    counted = jax.jit(forward).lower(params, tokens).compile().cost_analysis()["flops"]
    expected = 2 * length * (block_flops(config, length) + head_flops(config))
    assert expected < counted < 1.1 * expected


@pytest.mark.parametrize("config", presets.PRESETS.values(), ids=presets.PRESETS)
def test_six_per_parameter_and_token(config):
    """But for the embedding table, the norms and attention, which the rule leaves out or takes for products."""
    length = 2048
    stage = train(batch_size=1)
    rule = 6 * config.num_parameters * length
    table, norms = config.vocabulary * config.hidden_size, (2 * config.num_layers + 1) * config.hidden_size
    attention = (
        12 * config.num_layers * config.num_heads * config.head_size * mean_context(length, config.sliding_window)
    )
    assert train_flops(config, None, stage, length) == pytest.approx(
        rule - 6 * length * (table + norms) + length * attention, rel=1e-12
    )


def test_a_frozen_target_runs_forward_only():
    draft, target = SMALL, dataclasses.replace(SMALL, hidden_size=16, num_layers=5)
    alone, distilled = (
        train_flops(draft, t, train(loss=loss), 64) for t, loss in ((None, CrossEntropy()), (target, KL()))
    )
    assert distilled - alone == 2 * forward_flops(target, 64)


def test_remat_repeats_the_blocks():
    once = train_flops(SMALL, None, train(), 64)
    assert train_flops(SMALL, None, train(remat="full"), 64) - once == 2 * 64 * block_flops(SMALL, mean_context(64))
    attention = block_flops(SMALL, mean_context(64)) - block_flops(SMALL, 0)
    assert train_flops(SMALL, None, train(remat="dots"), 64) - once == 2 * 64 * attention


def test_statistics_of_the_batch_take_a_pass():
    assert not TVDPlusPlus().has_statistics
    loss, micro = TVDPlusPlusGlobal(), {"batch_size": 4, "accumulate": 2}
    heads = train_flops(SMALL, SMALL, train(loss=loss), 64) - train_flops(SMALL, SMALL, train(loss=KL()), 64)
    assert heads == 2 * 64 * 2 * head_flops(SMALL)
    twice = train_flops(SMALL, SMALL, train(loss=loss, **micro), 64)
    assert twice - train_flops(SMALL, SMALL, train(loss=KL(), **micro), 64) == 2 * 4 * forward_flops(SMALL, 64)


def test_expected_tokens_per_block():
    assert expected_block(3, 0.5) == 1 + 0.5 + 0.25 + 0.125


@pytest.mark.parametrize(
    "steps, save, keep, kept",
    [
        (10, 100, None, [10]),
        (10, 4, None, [8, 10]),
        (10, 4, 3, [3, 6, 9, 10]),
        (9, 3, 3, [3, 6, 9]),
        (10, 5, 10, [5, 10]),
    ],
)
def test_checkpoints_that_are_left(steps, save, keep, kept):
    stage = Train("t", data="x", loss=CrossEntropy(), batch_size=1, steps=steps, save_every=save, keep_every=keep)
    assert kept_checkpoints(stage) == len(kept)
