"""Parameters cut out of a target: the identity, zeros that change nothing, a real model, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.models import Decoder, ModelConfig, head_weight, init_params, logits
from jaxdraft.models.hf import load_model
from jaxdraft.models.subclone import importance, kept_layers, project_embedding, rotary_pairs, subclone
from jaxdraft.tokenizers import load_tokenizer

SMALL = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
BIASED = dataclasses.replace(SMALL, family="qwen2", qkv_bias=True, tie_embeddings=False)
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 61)


def random_params(config, seed=0):
    """Far from zero, and no vector left at its first value, so that mistakes show."""
    params = init_params(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    leaves = [2 * x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def all_logits(config, params, tokens_BT=TOKENS):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden = Decoder(config).apply({"params": params}, tokens_BT, positions_BT)
    return logits(hidden, head_weight(config, params))


def next_token_loss(config, params, tokens_BT):
    log_probs = jax.nn.log_softmax(all_logits(config, params, tokens_BT)[:, :-1])
    return -float(jnp.take_along_axis(log_probs, tokens_BT[:, 1:, None], axis=2).mean())


def assert_same_sums(ours, reference):
    """The same float32 sums in another order: some 20 roundings follow each other through three layers, and attention
    multiplies them a little (measured: 3 to 8 of the largest logit's)."""
    bound = 64 * np.finfo(np.float32).eps * np.abs(reference).max()
    np.testing.assert_allclose(ours, reference, atol=bound, rtol=0)


def shapes(params):
    return jax.tree.map(lambda x: (x.shape, x.dtype), dict(params))


def spread(x, axis, size, at):
    """``x`` at the places ``at`` of a longer axis of zeros."""
    index = [slice(None)] * x.ndim
    index[axis] = np.asarray(at)
    shape = list(x.shape)
    shape[axis] = size
    return jnp.zeros(shape, x.dtype).at[tuple(index)].set(x)


@pytest.mark.parametrize("config", [SMALL, BIASED], ids=["tied", "biased"])
def test_the_same_shape_is_the_target(config):
    params = random_params(config)
    cut = subclone(config, params, config, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, dict(cut), dict(params))
    np.testing.assert_array_equal(all_logits(config, cut), all_logits(config, params))


@pytest.mark.parametrize("config", [SMALL, BIASED], ids=["tied", "biased"])
def test_zeros_around_a_model_are_what_is_left_out(config):
    """A model of 4 times the dimensions, the same stream: the larger model's normed activations are twice as large,
    and its eps, next to a mean square of a quarter, a quarter."""
    small = random_params(config)
    big = dataclasses.replace(
        config,
        hidden_size=128,
        intermediate_size=100,
        num_layers=5,
        num_heads=12,
        num_kv_heads=3,
        rms_norm_eps=config.rms_norm_eps / 4,
    )
    random = np.random.default_rng(0)
    dims, neurons = np.sort(random.permutation(128)[:32]), np.sort(random.permutation(100)[:48])
    kv, query = [0, 2], [1, 3, 8, 10]
    at = {"D": (128, dims), "F": (100, neurons), "K": (3, kv), "N": (12, query), "L": (5, [0, 2, 4])}
    axes = {
        "attn_norm": "LD", "wq": "LDN", "wk": "LDK", "wv": "LDK", "wo": "LN D", "bq": "LN", "bk": "LK", "bv": "LK",
        "mlp_norm": "LD", "w_gate": "LDF", "w_up": "LDF", "w_down": "LFD",
        "embed": " D", "final_norm": "D", "head": "D",
    }  # fmt: skip

    def pad(name, x):
        for axis, letter in enumerate(axes[name]):
            if letter != " ":
                x = spread(x, axis, *at[letter])
        return x / 2 if name.endswith("norm") else x

    target = {name: pad(name, x) for name, x in small.items() if name != "layers"}
    target["layers"] = {name: pad(name, x) for name, x in small["layers"].items()}
    assert shapes(target) == shapes(init_params(big, jax.random.key(0)))
    assert_same_sums(all_logits(big, target), all_logits(config, small))

    cut = subclone(big, target, config, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, dict(cut), dict(small))
    unscaled = jax.tree_util.tree_map_with_path(lambda path, x: x / 2 if path[-1].key.endswith("norm") else x, cut)
    assert np.abs(all_logits(config, unscaled) - all_logits(config, small)).max() > 0.1


def test_larger_groups_repeat_query_heads_without_changing_the_sum():
    wide = dataclasses.replace(SMALL, num_heads=4, num_kv_heads=4)
    params = random_params(wide)
    draft = dataclasses.replace(wide, num_kv_heads=2)
    cut = subclone(wide, params, draft, TOKENS)
    assert shapes(cut) == shapes(init_params(draft, jax.random.key(0)))
    wq, wo = cut["layers"]["wq"], cut["layers"]["wo"]
    np.testing.assert_array_equal(wq[:, :, 0::2], wq[:, :, 1::2])
    assert not np.any(wo[:, 1::2])
    assert np.all(np.any(wo[:, 0::2], axis=(2, 3)))
    one = dataclasses.replace(wide, num_heads=2, num_kv_heads=2)
    assert_same_sums(all_logits(draft, cut), all_logits(one, subclone(wide, params, one, TOKENS)))


def test_query_heads_stay_with_their_key_and_value_head():
    target = dataclasses.replace(SMALL, num_heads=12, num_kv_heads=3)
    params = random_params(target)
    draft = dataclasses.replace(SMALL, num_heads=4, num_kv_heads=2)
    cut, whole = subclone(target, params, draft, TOKENS)["layers"], params["layers"]
    for layer in range(3):
        for n in range(4):
            source = next(i for i in range(12) if np.array_equal(whole["wq"][layer, :, i], cut["wq"][layer, :, n]))
            np.testing.assert_array_equal(cut["wo"][layer, n], whole["wo"][layer, source])
            for name in ("wk", "wv"):
                np.testing.assert_array_equal(cut[name][layer, :, n // 2], whole[name][layer, :, source // 4])


def test_importance_is_that_of_the_truncated_target():
    params = random_params(SMALL)
    positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
    ours = importance(SMALL, params, TOKENS, jnp.ones(TOKENS.shape, bool))
    padded, text = jnp.pad(TOKENS, ((0, 0), (0, 5))), jnp.pad(jnp.ones(TOKENS.shape, bool), ((0, 0), (0, 5)))
    np.testing.assert_allclose(importance(SMALL, params, padded, text), ours, rtol=1e-5)
    for l in range(1, 4):
        cut = {
            "embed": params["embed"],
            "final_norm": jnp.ones(32),
            "layers": jax.tree.map(lambda x, l=l: x[:l], params["layers"]),
        }
        config = dataclasses.replace(SMALL, num_layers=l)
        hidden = Decoder(config).apply({"params": cut}, TOKENS, positions)
        np.testing.assert_allclose(ours[l - 1], jnp.abs(hidden).mean((0, 1)), rtol=1e-5)


def test_layers_and_rotary_pairs():
    assert [kept_layers(12, n).tolist() for n in (1, 2, 4)] == [[0], [0, 11], [0, 4, 7, 11]]
    assert kept_layers(5, 5).tolist() == [0, 1, 2, 3, 4]
    of = lambda size, theta=1e4: dataclasses.replace(SMALL, head_dim=size, rope_theta=theta)
    assert rotary_pairs(of(32), of(8)).tolist() == [0, 4, 8, 12]
    assert rotary_pairs(of(8), of(8, 5e5)).tolist() == [0, 1, 2, 3]
    assert rotary_pairs(of(12), of(8)).tolist() == [0, 2, 3, 4]
    assert rotary_pairs(of(32), of(8, 5e5)).tolist() == [0, 6, 11, 15]


@pytest.mark.parametrize(
    ("target_tied", "draft_tied", "target_bias", "draft_bias"),
    [(True, False, True, False), (False, True, False, True), (False, False, True, True), (True, True, False, False)],
)
def test_every_pairing_gives_the_shape_of_the_draft(target_tied, draft_tied, target_bias, draft_bias):
    family = lambda bias: {"family": "qwen2" if bias else "llama", "qkv_bias": bias}
    target = dataclasses.replace(SMALL, tie_embeddings=target_tied, **family(target_bias))
    draft = dataclasses.replace(
        SMALL,
        hidden_size=16,
        intermediate_size=20,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        tie_embeddings=draft_tied,
        **family(draft_bias),
    )
    params = random_params(target)
    cut, fresh = subclone(target, params, draft, TOKENS), init_params(draft, jax.random.key(0))
    assert shapes(cut) == shapes(fresh)
    assert shapes(project_embedding(target, params, draft, fresh)) == shapes(fresh)
    columns = {tuple(c) for c in np.asarray(params["embed"]).T.tolist()}
    assert {tuple(c) for c in np.asarray(cut["embed"]).T.tolist()} < columns
    if not draft_tied and target_tied:
        np.testing.assert_array_equal(cut["head"], cut["embed"].T)
    if draft_bias and not target_bias:
        assert not any(np.any(cut["layers"][name]) for name in ("bq", "bk", "bv"))


def test_a_real_target_gives_a_better_start_than_random_weights(shared_data):
    config, params = load_model(shared_data / "models" / "stories260K-hf")
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K-hf")
    ids = tokenizer.encode((shared_data / "corpora" / "tinystories_head.txt").read_text()[:40_000])
    rows = jnp.asarray(ids[: 32 * 256]).reshape(32, 256)
    calibration, held_out = rows[:16], rows[16:]
    draft = dataclasses.replace(config, hidden_size=56, num_layers=3, intermediate_size=160)

    def reinitialised(x, key):
        """The same entries in another order: a control with exactly their sizes."""
        return jax.random.permutation(key, x.reshape(-1)).reshape(x.shape)

    cut = subclone(config, params, draft, calibration)
    leaves, tree = jax.tree.flatten(cut)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    shuffled = jax.tree.unflatten(tree, [reinitialised(x, key) for x, key in zip(leaves, keys, strict=True)])
    random = init_params(draft, jax.random.key(0))
    loss = lambda params: next_token_loss(draft, params, held_out)
    assert next_token_loss(config, params, held_out) < loss(cut)
    assert loss(cut) < min(loss(random), loss(shuffled), math.log(config.vocabulary)) - 0.5


def test_embedding_is_copied_or_projected():
    target, draft = dataclasses.replace(SMALL, tie_embeddings=False), dataclasses.replace(SMALL, tie_embeddings=False)
    params, fresh = random_params(target), init_params(draft, jax.random.key(3))
    same = project_embedding(target, params, draft, fresh)
    np.testing.assert_array_equal(same["embed"], params["embed"])
    np.testing.assert_array_equal(same["head"], params["head"])
    jax.tree.map(np.testing.assert_array_equal, same["layers"], fresh["layers"])

    narrow = dataclasses.replace(draft, hidden_size=16)
    table = np.asarray(params["embed"])
    ours = np.asarray(project_embedding(target, params, narrow, init_params(narrow, jax.random.key(3)))["embed"])
    norms = lambda x: np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(norms(ours).mean(), norms(table).mean(), rtol=1e-5)
    u, s, _ = np.linalg.svd(table, full_matrices=False)
    best = (u[:, :16] * s[:16]) @ (u[:, :16] * s[:16]).T
    gram = ours @ ours.T * (np.trace(best) / np.trace(ours @ ours.T))
    np.testing.assert_allclose(gram, best, atol=1e-4 * np.abs(best).max())


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hidden_size": 64}, "hidden_size is 64, larger than the target's 32"),
        ({"intermediate_size": 64}, "intermediate_size"),
        ({"num_layers": 4}, "num_layers"),
        ({"num_heads": 8}, "num_heads"),
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"head_dim": 16}, "head_size"),
        ({"vocab_size": 62}, "vocab_size is 62, the target's 61"),
    ],
)
def test_a_larger_draft_is_refused(change, named):
    draft = dataclasses.replace(SMALL, **change)
    params = init_params(SMALL, jax.random.key(0))
    with pytest.raises(ConfigError, match=named):
        subclone(SMALL, params, draft, TOKENS)
    if change.keys() & {"hidden_size", "vocab_size"}:
        with pytest.raises(ConfigError, match=named):
            project_embedding(SMALL, params, draft, init_params(draft, jax.random.key(0)))
