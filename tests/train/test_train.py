"""The train step and the loop: one step's arithmetic, its splits, and resuming to the bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdraft.errors import ConfigError, Interrupted
from jaxdraft.losses import KL, TVD, CrossEntropy, TVDPlusPlus
from jaxdraft.models import Decoder, ModelConfig, head_weight, init_params, logits
from jaxdraft.models.decoder import model_shardings
from jaxdraft.sharding import MeshShape
from jaxdraft.train import OptimizerSettings, train
from jaxdraft.train.state import create_state, state_shardings
from jaxdraft.train.step import build_step, next_tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")

DRAFT = ModelConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1)
TARGET = dataclasses.replace(DRAFT, hidden_size=32, tie_embeddings=False)
OPTIMIZER = OptimizerSettings(steps=6, learning_rate=1e-2, warmup_steps=2)
ROWS, LENGTH = 4, 12


class RandomRows:
    """Batches as a function of the step, without files."""

    def __len__(self):
        return ROWS

    def __getitem__(self, step):
        return self.part(step, slice(None))

    def rows(self, step):
        return [("random", ROWS * step + i) for i in range(ROWS)]

    def part(self, step, part):
        assert part in (slice(None), slice(0, ROWS))
        rng = np.random.default_rng(step)
        segment_ids = np.repeat([[1] * 7 + [2] * 4 + [0]], ROWS, 0)
        positions = np.repeat([[*range(7), *range(4), 0]], ROWS, 0)
        mask = np.asarray((positions > 0) & (segment_ids > 0), np.float32)
        tokens = rng.integers(0, 48, (ROWS, LENGTH))
        return {
            "tokens": tokens.astype(np.int32),
            "segment_ids": segment_ids.astype(np.int32),
            "positions": positions.astype(np.int32),
            "loss_mask": mask,
        }


@pytest.fixture(scope="module")
def mesh():
    return MeshShape().build()


@pytest.fixture(scope="module")
def models():
    return init_params(DRAFT, jax.random.key(0)), init_params(TARGET, jax.random.key(1))


def one_step(mesh, models, loss, accumulate=1, draft=DRAFT):
    shardings = state_shardings(draft, OPTIMIZER, mesh)
    frozen = {"target": Decoder(TARGET)} if loss.needs_target else {}
    frozen_shardings = {name: model_shardings(TARGET, mesh) for name in frozen}
    step = build_step(Decoder(draft), frozen, loss, OPTIMIZER, mesh, shardings, frozen_shardings, accumulate)
    state = create_state(OPTIMIZER, jax.tree.map(jnp.copy, models[0]), shardings)
    return step(state, dict.fromkeys(frozen, models[1]), jax.tree.map(jnp.asarray, RandomRows()[0]))


def plain_loss(loss, params, target_params, batch):
    """The same loss with full logits and a mean over labels."""

    def run(config, params):
        hidden = Decoder(config).apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
        return logits(hidden, head_weight(config, params))[:, :-1]

    log_p = jax.nn.log_softmax(run(DRAFT, params))
    weights = batch["loss_mask"][:, 1:]
    if isinstance(loss, CrossEntropy):
        rows = -jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], -1)[..., 0]
    else:
        log_q = jax.nn.log_softmax(run(TARGET, target_params))
        rows = jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1)
    return jnp.sum(rows * weights) / jnp.sum(weights)


@pytest.mark.parametrize("loss", [CrossEntropy(), KL()], ids=["next-token", "distillation"])
def test_one_step_is_adamw_on_the_mean_loss(mesh, models, loss):
    batch = jax.tree.map(jnp.asarray, RandomRows()[0])
    value, grads = jax.value_and_grad(lambda p: plain_loss(loss, p, models[1], batch))(models[0])
    clipped = jax.tree.map(lambda g: g * jnp.minimum(1, OPTIMIZER.clip_norm / optax.tree.norm(grads)), grads)
    state, metrics = one_step(mesh, models, loss)
    assert metrics["tokens"] == ROWS * 9
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert ("acceptance" in metrics) == loss.needs_target
    # Adam's first update is lr · sign(g), decay apart: compare the moment, which is linear in the gradient.
    first_moment = state.opt_state[1][0].mu
    jax.tree.map(
        lambda m, g: np.testing.assert_allclose(m, (1 - OPTIMIZER.b1) * g, rtol=2e-3, atol=2e-7), first_moment, clipped
    )


def test_a_draft_vocabulary_is_learned_as_the_tokens_it_stands_for(mesh, models):
    ids = np.asarray([0, 3, *range(20, 41), 47])
    draft = dataclasses.replace(DRAFT, head_ids=tuple(ids.tolist()))
    batch, loss = RandomRows()[0], TVD()
    _, metrics = one_step(mesh, models, loss, draft=draft)

    def laws(config, params):
        hidden = Decoder(config).apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
        return np.asarray(logits(hidden, head_weight(config, params))[:, :-1], np.float64)

    p, q = (np.exp(x) for x in (laws(DRAFT, models[0])[..., ids], laws(TARGET, models[1])))
    p, q = p / p.sum(-1, keepdims=True), (q / q.sum(-1, keepdims=True))[..., ids]
    weights = batch["loss_mask"][:, 1:]
    acceptance = (np.minimum(p, q).sum(-1) * weights).sum() / weights.sum()
    np.testing.assert_allclose(metrics["acceptance"], acceptance, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 1 - acceptance, rtol=1e-5)
    label_is_known = np.isin(batch["tokens"][:, 1:], ids)
    _, next_token = one_step(mesh, models, CrossEntropy(), draft=draft)
    places = np.searchsorted(ids, batch["tokens"][:, 1:]) % len(ids)
    known = -np.log(np.take_along_axis(p, places[..., None], -1)[..., 0]) * label_is_known
    np.testing.assert_allclose(next_token["loss"], (known * weights).sum() / weights.sum(), rtol=1e-5)


def test_accumulation_changes_nothing_but_the_order_of_sums(mesh, models):
    (whole, a), (split, b) = (one_step(mesh, models, TVDPlusPlus(), n) for n in (1, 2))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-7),
        whole.opt_state[1][0].mu,
        split.opt_state[1][0].mu,
    )


def test_the_last_position_and_padding_have_no_label():
    batch = RandomRows()[0]
    labels, weights = next_tokens(batch)
    assert (labels[:, :-1] == batch["tokens"][:, 1:]).all()
    assert weights[0].tolist() == [1] * 6 + [0] + [1] * 3 + [0, 0]


def test_schedules_of_the_papers():
    linear = OptimizerSettings(steps=10, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4)
    rates = [float(linear.schedule()(i)) for i in range(11)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(np.diff(rates[4:]), -0.15, rtol=1e-5)
    cosine = dataclasses.replace(linear, decay="cosine")
    np.testing.assert_allclose([float(cosine.schedule()(i)) for i in (4, 7, 10)], [1.0, 0.55, 0.1], rtol=1e-5)


def test_norms_do_not_decay(mesh, models):
    heavy = dataclasses.replace(OPTIMIZER, weight_decay=10.0)
    tx = heavy.build()
    zero = jax.tree.map(jnp.zeros_like, models[0])
    updates, _ = tx.update(zero, tx.init(models[0]), models[0])
    assert jnp.all(updates["final_norm"] == 0)
    assert jnp.all(updates["layers"]["attn_norm"] == 0)
    assert jnp.any(updates["embed"] != 0)
    assert jnp.any(updates["layers"]["wq"] != 0)


def run(folder, mesh, models, batches=None, **settings):
    folder.mkdir(exist_ok=True)
    return train(
        folder,
        draft=Decoder(DRAFT),
        params=models[0],
        loss=TVDPlusPlus(),
        batches=batches or RandomRows(),
        optimizer=OPTIMIZER,
        mesh=mesh,
        frozen={"target": (Decoder(TARGET), models[1])},
        **{"save_every": 2, "keep_every": 3, "measure": measured, "measure_every": 4, **settings},
    )


def measured(params):
    return [
        {"block_size": block_size, "block_efficiency_offline": float(params["embed"][block_size].sum())}
        for block_size in (3, 5)
    ]


class StopsAt(RandomRows):
    def __init__(self, step):
        self.step = step

    def part(self, step, part):
        if step == self.step:
            raise Interrupted("stopped")
        return super().part(step, part)


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, mesh, models):
    whole = run(tmp_path / "whole", mesh, models)
    for stop in (1, 3, 5):
        with pytest.raises(Interrupted):
            run(tmp_path / "cut", mesh, models, StopsAt(stop))
    cut = run(tmp_path / "cut", mesh, models)
    jax.tree.map(np.testing.assert_array_equal, cut, whole)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    lines = [json.loads(line) for line in metrics[0].splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "acceptance", "agreement", "learning_rate", "grad_norm", "tokens"} <= lines[0].keys()
    measured = [(tmp_path / name / "block_efficiency.jsonl").read_bytes() for name in ("whole", "cut")]
    assert measured[0] == measured[1]
    lines = [json.loads(line) for line in measured[0].splitlines()]
    steps_and_sizes = [(line["step"], line["block_size"]) for line in lines]
    assert steps_and_sizes == [(step, block_size) for step in (0, 4, 6) for block_size in (3, 5)]
    assert lines[-1]["block_efficiency_offline"] == float(whole["embed"][5].sum())


def test_a_measurement_that_ends_the_process_loses_no_step(tmp_path, mesh, models):
    seen = []

    def measure(params):
        if seen:
            raise SystemExit
        seen.append(params)
        return measured(params)

    with pytest.raises(SystemExit):
        run(tmp_path / "run", mesh, models, save_every=100, keep_every=None, measure=measure, measure_every=5)
    assert (tmp_path / "run" / "checkpoints" / "5" / "meta").is_dir()


def test_a_finished_run_is_not_trained_again(tmp_path, mesh, models):
    first = run(tmp_path / "run", mesh, models)
    again = run(tmp_path / "run", mesh, models, StopsAt(0))
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"mesh\.data=2, mesh\.fsdp=2 does not fit 1 devices"):
        MeshShape(data=2, fsdp=2).build()
    with pytest.raises(ConfigError, match=r"mesh\.tensor is 2: it must divide 1 devices"):
        MeshShape(tensor=2).build()
    with pytest.raises(ConfigError, match=r"mesh\.data is 0"):
        MeshShape(data=0)
