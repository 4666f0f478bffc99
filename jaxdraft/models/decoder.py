"""The decoder: one Flax Linen module for Llama and Phi-3, used as a pure function.

Training runs one scanned block over stacked layers; decoding runs the same block once per layer over unstacked
weights, so that the while-loop around it reads every weight and every cache where it lies. Weights lie as inputs x
outputs; for decoding on a CPU the wide ones lie as outputs x inputs: see ``products``.

Shapes: B batch, T tokens, S cache slots, D hidden, N query heads, K key/value heads, H head size, F intermediate,
V vocabulary, R rows of a draft vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import AbstractMesh, Mesh

from jaxdraft.backend import platform
from jaxdraft.models.attention import attend, attention, seen
from jaxdraft.models.cache import KVCache, slots, write
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.products import by_rows, lies_by_rows, merge, project, turned
from jaxdraft.models.rope import rope_angles, rotate
from jaxdraft.sharding import constrain, param_shardings

Params = Mapping[str, Any]


def compute_dtype() -> jnp.dtype:
    """bfloat16 on accelerators; float32 on CPU, where one-row bfloat16 matmuls run at a tenth of the speed."""
    return jnp.dtype(jnp.float32 if platform() == "cpu" else jnp.bfloat16)


class Block(nn.Module):
    """Attention and gated MLP, each behind an RMSNorm and a residual connection.

    Attributes:
      config: the shape.
      dtype: of activations and of the weights where they are used.
      decoding: whether the weights are those of ``for_decoding``.
    """

    config: ModelConfig
    dtype: Any
    decoding: bool = False

    @nn.compact
    def __call__(self, x_BTD, cos, sin, segment_ids_BT=None, cache=None, positions_BT=None, mask_BTS=None):
        """The block's output, ``[B, T, D]``, and its cache; positions and mask are of the cache, segments of rows."""
        c = self.config
        D, N, K, H, F = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_size, c.intermediate_size

        h_BTD = rms_norm(x_BTD, self._weight("attn_norm", (D,), ("norm",)), c.rms_norm_eps)
        q_BTNH = self._product(project, h_BTD, "wq", (N, H), ("embed", "heads", None))
        k_BTKH = self._product(project, h_BTD, "wk", (K, H), ("embed", "kv_heads", None))
        v_BTKH = self._product(project, h_BTD, "wv", (K, H), ("embed", "kv_heads", None))
        if c.qkv_bias:
            q_BTNH += self._weight("bq", (N, H), ("heads", None), nn.initializers.zeros)
            k_BTKH += self._weight("bk", (K, H), ("kv_heads", None), nn.initializers.zeros)
            v_BTKH += self._weight("bv", (K, H), ("kv_heads", None), nn.initializers.zeros)
        q_BTNH, k_BTKH = rotate(q_BTNH, cos, sin), rotate(k_BTKH, cos, sin)
        if cache is None:
            o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, c.sliding_window)
        else:
            cache = write(cache[0], k_BTKH, positions_BT), write(cache[1], v_BTKH, positions_BT)
            o_BTNH = attend(q_BTNH, cache[0], cache[1], mask_BTS)
        x_BTD += self._product(merge, o_BTNH, "wo", (D,), ("heads", None, "embed"))

        h_BTD = rms_norm(x_BTD, self._weight("mlp_norm", (D,), ("norm",)), c.rms_norm_eps)
        gate_BTF = self._product(project, h_BTD, "w_gate", (F,), ("embed", "mlp"))
        up_BTF = self._product(project, h_BTD, "w_up", (F,), ("embed", "mlp"))
        x_BTD += self._product(merge, gated(gate_BTF, up_BTF), "w_down", (D,), ("mlp", "embed"))
        return constrain(x_BTD, ("batch", None, None)), cache

    def _product(self, multiply, x: jax.Array, name: str, outputs: tuple[int, ...], axes: tuple[str | None, ...]):
        """x times a weight over all axes of x but the first two: by ``multiply``, or by rows."""
        inputs = x.shape[2:]
        if self.decoding and lies_by_rows(inputs):
            turned = axes[len(inputs) :] + axes[: len(inputs)]
            return by_rows(x, self._weight(name, outputs + inputs, turned))
        return multiply(x, self._weight(name, inputs + outputs, axes))

    def _weight(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Any = None) -> jax.Array:
        init = init or (nn.initializers.ones if len(shape) == 1 else _matrix_init(self.config, name))
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32).astype(self.dtype)


class Decoder(nn.Module):
    """A Llama or Phi-3 decoder without its output head.

    The module is hashable and holds no array: pass it to ``jax.jit`` as a static argument and its parameters as a
    traced one.

    Attributes:
      config: the shape.
      dtype: of activations and of the weights where they are used; ``None`` takes ``compute_dtype()``.
      scan: run one scanned block over stacked layers (``params["layers"]``), or every block by itself over the
        parameters that ``for_decoding`` unstacks. A cache needs ``scan=False``.
      remat: what the backward pass computes again instead of keeping it: ``"none"``; ``"dots"``, all but the products
        with weights; ``"full"``, each block from its input.
    """

    config: ModelConfig
    dtype: Any = None
    scan: bool = True
    remat: Literal["none", "dots", "full"] = "none"

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        long_B: jax.Array | None = None,
    ) -> Any:
        """Hidden states after the last norm, ``[B, T, D]``; with a cache, ``(hidden, cache)``.

        Args:
          tokens_BT: token ids.
          positions_BT: of each token in its document. Without a cache they only turn the rotary embedding, and
            attention is causal in the order of the row. With a cache they are also the slots written to.
          segment_ids_BT: without a cache, tokens attend only within their own segment; ``None`` is one segment.
          cache: keys and values seen so far.
          long_B: without a cache, rows that LongRoPE turns by its long factors; ``None`` takes those with a position
            past its original context. A cache knows its own.

        Raises:
          ValueError: a cache with ``scan=True``.
        """
        c, dtype = self.config, self.dtype or compute_dtype()
        if cache is not None and self.scan:
            raise ValueError("a cache needs Decoder(config, scan=False) and the parameters of for_decoding()")
        table = self.param(
            "embed",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed_table")),
            (c.vocabulary, c.hidden_size),
            jnp.float32,
        )
        if not c.tie_embeddings:
            shape, axes = (c.hidden_size, c.vocabulary), ("embed", "vocab")
            if not self.scan and lies_by_rows(shape[:1]):
                shape, axes = shape[::-1], axes[::-1]
            self.param("head", nn.with_logical_partitioning(nn.initializers.normal(0.02), axes), shape, jnp.float32)
        x_BTD = constrain(jnp.take(table, tokens_BT, axis=0).astype(dtype), ("batch", None, None))
        long_B = long_B if cache is None else cache.long_B
        cos, sin = rope_angles(positions_BT, c.head_size, c.rope_theta, c.rope_scaling, c.max_positions, long_B)
        if self.scan:
            x_BTD, _ = self._scanned(dtype)(x_BTD, cos, sin, segment_ids_BT)
        elif cache is None:
            for i in range(c.num_layers):
                x_BTD, _ = Block(c, dtype, decoding=True, name=f"layers_{i}")(x_BTD, cos, sin, segment_ids_BT)
        else:
            mask_BTS = seen(positions_BT[:, :, None], jnp.arange(slots(cache)), c.sliding_window)
            layers = []
            for i, layer in enumerate(zip(cache.k, cache.v, strict=True)):
                block = Block(c, dtype, decoding=True, name=f"layers_{i}")
                x_BTD, layer = block(x_BTD, cos, sin, None, layer, positions_BT, mask_BTS)
                layers.append(layer)
            k, v = zip(*layers, strict=True)
            cache = cache.replace(k=k, v=v)

        norm_init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        norm = self.param("final_norm", norm_init, (c.hidden_size,), jnp.float32)
        x_BTD = rms_norm(x_BTD, norm.astype(dtype), c.rms_norm_eps)
        return x_BTD if cache is None else (x_BTD, cache)

    def _scanned(self, dtype):
        policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=policies[self.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
            in_axes=nn.broadcast,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(self.config, dtype, name="layers")


# What follows is a few operations for each number it reads: to compute it again in the backward pass takes less time
# than to write down and read what it came by.
_again = functools.partial(jax.checkpoint, prevent_cse=False)


@_again
def gated(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """SwiGLU: SiLU(gate) · up (Shazeer, arXiv 2002.05202)."""
    return jax.nn.silu(gate_BTF) * up_BTF


@functools.partial(_again, static_argnums=2)
def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · scale, the statistics in float32 (Zhang & Sennrich, arXiv 1910.07467)."""
    x32 = x_BTD.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x_BTD.dtype) * scale_D


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters with stacked layers: normal(0.02), output projections scaled by 1/sqrt(2·layers)."""
    return nn.unbox(init_boxed(config, key))


def init_boxed(config: ModelConfig, key: jax.Array, scan: bool = True) -> Any:
    """Parameters boxed with their logical axes, as ``sharding.param_shardings`` wants them."""
    one = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config, dtype=jnp.float32, scan=scan).init(key, one, one)["params"]


def model_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh, scan: bool = True) -> Any:
    """A NamedSharding for every parameter, of stacked layers or of ``layers_0``, ``layers_1``, …"""
    return param_shardings(mesh, jax.eval_shape(lambda: init_boxed(config, jax.random.key(0), scan)))


class Head(struct.PyTreeNode):
    """What turns hidden states into logits, in the form in which it lies.

    Attributes:
      weight: ``[D, V]``, ``[D, R]``, or the reverse.
      by_rows: whether it is the reverse.
    """

    weight: jax.Array
    by_rows: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, decoder: Decoder, params: Params) -> "Head":
        """The head of any decoder; a tied table lies by rows."""
        config = decoder.config
        tied = config.tie_embeddings and platform() == "cpu"
        if not tied and (config.tie_embeddings or decoder.scan or not lies_by_rows((config.hidden_size,))):
            return cls(head_weight(config, params))
        rows = params["embed" if tied else "head"]
        return cls(rows if config.head_ids is None else rows[np.asarray(config.head_ids)], by_rows=True)

    @property
    def size(self) -> int:
        """V or R."""
        return self.weight.shape[0 if self.by_rows else 1]

    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits as of ``logits``."""
        if not self.by_rows:
            return logits(hidden_BTD, self.weight)
        return by_rows(hidden_BTD, self.weight.astype(hidden_BTD.dtype), jnp.float32)


def head_weight(config: ModelConfig, params: Params) -> jax.Array:
    """The output head of stacked parameters, ``[D, V]`` or ``[D, R]``: the transposed table where they are tied."""
    if config.head_ids is None:
        return params["embed"].T if config.tie_embeddings else params["head"]
    ids_R = np.asarray(config.head_ids)
    return params["embed"][ids_R].T if config.tie_embeddings else params["head"][:, ids_R]


def token_ids(config: ModelConfig, rows: jax.Array) -> jax.Array:
    """The tokens that columns of the head stand for."""
    return rows if config.head_ids is None else jnp.asarray(config.head_ids, rows.dtype)[rows]


def widen(config: ModelConfig, probs_BTR: jax.Array, absent: float = 0.0) -> jax.Array:
    """Probabilities over the whole vocabulary, ``[…, V]``: ``absent`` for every token that the head does not propose.

    Of log-probabilities ``absent`` is −inf.
    """
    if config.head_ids is None:
        return probs_BTR
    row_V = np.full(config.vocabulary, len(config.head_ids))
    row_V[np.asarray(config.head_ids)] = np.arange(len(config.head_ids))
    return jnp.take(probs_BTR, row_V, axis=-1, mode="fill", fill_value=absent)


def logits(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """``[B, T, V]`` in float32: rounding logits to bfloat16 makes ties."""
    return jnp.einsum("btd,dv->btv", hidden_BTD, head_DV.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)


def for_decoding(config: ModelConfig, params: Params, dtype: Any = None) -> dict[str, Any]:
    """Parameters with ``layers`` unstacked into ``layers_0``, ``layers_1``, … for ``Decoder(config, scan=False)``.

    Args:
      config: the shape.
      params: with stacked layers.
      dtype: cast to it; ``None`` takes ``compute_dtype()``.
    """
    dtype = dtype or compute_dtype()
    cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), dict(params))
    layers = cast.pop("layers")
    unstacked = {f"layers_{i}": turned({name: x[i] for name, x in layers.items()}) for i in range(config.num_layers)}
    return turned(cast) | unstacked


def _matrix_init(config: ModelConfig, name: str):
    scale = 0.02 / (2 * config.num_layers) ** 0.5 if name in ("wo", "w_down") else 0.02
    return nn.initializers.normal(scale)


def following(x_BT: jax.Array, last: float) -> jax.Array:
    """Each token's successor in its row, and ``last`` after the last one.

    Not by a write into the last column: cut over the row's tokens, XLA (CPU, jax 0.10) writes into that of every part.
    """
    T = x_BT.shape[1]
    return jnp.where(jnp.arange(T) < T - 1, jnp.roll(x_BT, -1, axis=1), last)
