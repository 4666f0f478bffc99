"""The training state and the optimizer that moves it."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from jaxdraft.errors import ConfigError
from jaxdraft.models import ModelConfig
from jaxdraft.models.decoder import Params, init_params, model_shardings
from jaxdraft.sharding import replicated


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and decay, as both papers train.

    Direct Alignment (A.3) pretrains from 1e-4 to 1e-6 after 5000 warm-up steps; FastDraft (A.3) uses Adam at
    1e-4, betas .9/.999, weight decay .01, 5 % warm-up and linear decay.

    Attributes:
      steps: updates in all.
      learning_rate: at the end of the warm-up.
      final_learning_rate: where the decay ends, one update after the last.
      warmup_steps: updates over which the rate grows linearly from 0.
      decay: shape of the way from ``learning_rate`` to ``final_learning_rate``.
      b1: decay of AdamW's first moment.
      b2: decay of AdamW's second moment.
      weight_decay: decoupled decay of matrices and tables; norms and biases are left alone.
      clip_norm: largest global norm of a gradient.

    Raises:
      ConfigError: a value is out of range.
    """

    steps: int
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    warmup_steps: int = 0
    decay: Literal["linear", "cosine"] = "linear"
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}: it must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}: it must lie in 0..steps-1 = {self.steps - 1}")
        if not 0 <= self.final_learning_rate <= self.learning_rate < math.inf or self.learning_rate == 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate} and final_learning_rate {self.final_learning_rate}: "
                "0 <= final <= learning_rate and 0 < learning_rate < inf must hold"
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ConfigError(f"b1 and b2 are {self.b1} and {self.b2}: they must lie in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay is {self.weight_decay}: it must be finite and not negative")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm is {self.clip_norm}: it must be positive, inf for no clipping")

    def schedule(self) -> optax.Schedule:
        """Learning rate of the update that follows ``count`` finished updates."""
        rest = self.steps - self.warmup_steps
        if self.decay == "cosine":
            after = optax.cosine_decay_schedule(
                self.learning_rate, rest, alpha=self.final_learning_rate / self.learning_rate
            )
        else:
            after = optax.linear_schedule(self.learning_rate, self.final_learning_rate, rest)
        if not self.warmup_steps:
            return after
        # The first update already moves: its rate is learning_rate / warmup_steps.
        first = self.learning_rate / self.warmup_steps
        warmup = optax.linear_schedule(first, self.learning_rate, self.warmup_steps - 1)
        return optax.join_schedules([warmup, after], [self.warmup_steps])

    def build(self) -> optax.GradientTransformation:
        """The optax chain: clip, then AdamW."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(self.schedule(), self.b1, self.b2, weight_decay=self.weight_decay, mask=_decayed),
        )


class TrainState(struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: batches seen, int32 scalar; so many updates were made but for those that were skipped.
      params: float32 parameters with stacked layers.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def updates_made(state: TrainState) -> jax.Array:
    """How many updates the optimizer has made: where the learning rate stands."""
    return optax.tree.get_all_with_path(state.opt_state, "count")[0][1]


def state_shardings(config: ModelConfig, optimizer: OptimizerSettings, mesh: Mesh) -> TrainState:
    """A NamedSharding for every leaf of the state: moments lie where their parameters lie."""
    params = model_shardings(config, mesh)
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tx = optimizer.build()
    opt_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, abstract),
        params,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(step=replicated(mesh), params=params, opt_state=opt_state)


def create_state(optimizer: OptimizerSettings, params: Params, shardings: TrainState) -> TrainState:
    """A fresh state around ``params``, laid out over the mesh."""

    def create(params):
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.build().init(params))

    return jax.jit(create, out_shardings=shardings)(params)


def abstract_state(optimizer: OptimizerSettings, config: ModelConfig, shardings: TrainState) -> Any:
    """Shapes, dtypes and shardings of a state, for a restore."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.eval_shape(optimizer.build().init, params))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _decayed(params: Params) -> Any:
    kept = lambda name: "norm" in name or name in ("bq", "bk", "bv")
    return jax.tree_util.tree_map_with_path(lambda path, _: not kept(path[-1].key), params)
