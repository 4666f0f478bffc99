"""Memory: value and gradient of every loss take a few chunks' logits and the head's gradient, never all logits."""

import jax
import jax.numpy as jnp
import pytest

from jaxdraft.losses import (
    DPACE,
    JSD,
    KL,
    TVD,
    AdaSPEC,
    CrossEntropy,
    LKHybrid,
    LogAcceptance,
    Mixture,
    ReverseKL,
    TVDPlusPlus,
    TVDPlusPlusGlobal,
    TVDPlusPlusLiteral,
    TVDPlusPlusSampled,
)
from jaxdraft.sharding import MeshShape
from jaxdraft.train.step import Work, sharded_loss, sharded_statistics

ROWS, LENGTH, HIDDEN, STORED = 8, 256, 512, 32
CEILINGS = {32000: 100e6, 128256: 330e6}
LOSSES = {
    "CrossEntropy": CrossEntropy(),
    "KL": KL(),
    "ReverseKL": ReverseKL(),
    "JSD": JSD(),
    "TVD": TVD(),
    "TVDPlusPlus": TVDPlusPlus(),
    "LogAcceptance": LogAcceptance(),
    "LKHybrid": LKHybrid(),
    "0.5 CE + 0.5 KL": Mixture(terms=((0.5, CrossEntropy()), (0.5, KL()))),
    "TVD + 0.1 KL": Mixture(terms=((1.0, TVD()), (0.1, KL()))),
    "TVDPlusPlus DPACE": TVDPlusPlus(weights=DPACE()),
    "KL AdaSPEC": KL(weights=AdaSPEC()),
    "TVDPlusPlus stored": TVDPlusPlus(),
    "TVDPlusPlusGlobal": TVDPlusPlusGlobal(),
    "TVDPlusPlusLiteral": TVDPlusPlusLiteral(),
    "TVDPlusPlusSampled": TVDPlusPlusSampled(),
}


def shapes(name, vocabulary):
    """What the named loss is computed from, as shapes: no hidden states that it does not read."""
    loss, stored = LOSSES[name], name.endswith("stored")
    array = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    rows = lambda *dims, dtype=jnp.float32: array(ROWS, LENGTH, *dims, dtype=dtype)
    models = ["draft"]
    if loss.needs_target and not stored:
        models.append("target")
    if loss.weights is not None and loss.weights.needs_reference:
        models.append("reference")
    return Work(
        hidden={model: rows(HIDDEN) for model in models},
        heads={model: array(HIDDEN, vocabulary) for model in models},
        labels_BT=rows(dtype=jnp.int32),
        weights_BT=rows(),
        stored=(rows(STORED, dtype=jnp.int32), rows(STORED + 2)) if stored else None,
        draw_ids_BT=rows(dtype=jnp.int32) if loss.draws else None,
    )


def value_and_gradient(loss, mesh, work):
    """The loss, and its gradient with respect to the draft's hidden states and head, as a train step computes them."""
    key, means = jax.random.key(0), None
    if loss.has_statistics:
        sums = sharded_statistics(loss, mesh, work, None, key)
        tokens = sums.pop("tokens")
        means = {name: value / tokens for name, value in sums.items()}

    def total(hidden, head):
        of_draft = {"hidden": {**work.hidden, "draft": hidden}, "heads": {**work.heads, "draft": head}}
        return sharded_loss(loss, mesh, work._replace(**of_draft), None, key, means)

    (value, sums), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(work.hidden["draft"], work.heads["draft"])
    return (value / sums["weight"], sums), jax.tree.map(lambda grad: grad / sums["weight"], grads)


@pytest.mark.parametrize("vocabulary", CEILINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_temporary_memory(name, vocabulary):
    run = jax.jit(value_and_gradient, static_argnums=(0, 1))
    program = run.lower(LOSSES[name], MeshShape().build(), shapes(name, vocabulary)).compile()
    assert program.memory_analysis().temp_size_in_bytes <= CEILINGS[vocabulary]
