"""What a model says of a text: its most likely next tokens, and how likely the text's own was.

Of a text that lies there already, by one teacher-forced forward pass over packed rows: the output head is applied to a
few positions at a time, so that the logits of all of them never exist. Of a text that is being written, with each of
its tokens, from the logits that it is drawn from.

Shapes: B rows, T tokens, S slots, N = B · T positions of one device, C positions of a chunk, D hidden, V vocabulary,
K most likely tokens.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxdraft.backend import default_chunk
from jaxdraft.errors import ConfigError
from jaxdraft.models.decoder import Decoder, Head, Params, following
from jaxdraft.sharding import BATCH_AXES, position_axis


@dataclasses.dataclass(frozen=True)
class TopK:
    """How much of the target's distribution is stored beside every position of packed rows.

    The log-probabilities of the k most likely tokens, of the next token and of all the rest together; FastDraft (arXiv
    2411.11055) stores the most significant logits alone. For k = 32 that is 132 bytes a token, 196 where the vocabulary
    has more than 65,536.

    Attributes:
      k: tokens kept.
      temperature: of the softmax; losses that read it must have the same.
    """

    k: int
    temperature: float = 1.0

    def __post_init__(self):
        if self.k < 1:
            raise ConfigError(f"TopK: k is {self.k}: it must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"TopK: temperature is {self.temperature}: it must be positive")


class TopScores(NamedTuple):
    """A distribution over the next token, shortened to its K most likely tokens, the text's own and the rest.

    Attributes:
      ids_BTK: int32, most likely first.
      log_probs_BTS: float32, S = K + 2: log-probabilities of these tokens in the full softmax, never renormalised; of
        the row's next token, −inf where its segment has none; and of all tokens that are neither, −inf without any.
    """

    ids_BTK: jax.Array
    log_probs_BTS: jax.Array


def top_scores(
    decoder: Decoder,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    k: int,
    temperature: float,
    mesh: Mesh,
) -> TopScores:
    """The model's distribution after every position of packed rows, at one temperature.

    Args:
      decoder: with stacked layers, without a draft vocabulary.
      params: laid out on ``mesh``.
      tokens_BT: int32; as many rows as divide over the data-parallel devices of ``mesh``.
      positions_BT: of each token in its segment.
      segment_ids_BT: 0 is padding, whose scores mean nothing.
      k: how many of the most likely tokens, fewer than the vocabulary has.
      temperature: of the softmax.
      mesh: the devices.
    """
    with jax.set_mesh(mesh):
        return score_rows(decoder, params, tokens_BT, positions_BT, segment_ids_BT, k, temperature, mesh)


@functools.partial(jax.jit, static_argnames=("decoder", "k", "temperature", "mesh"))
def score_rows(decoder, params, tokens_BT, positions_BT, segment_ids_BT, k, temperature, mesh):
    """The program of ``top_scores``."""
    hidden_BTD = decoder.apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT)
    has_label_BT = (segment_ids_BT > 0) & (following(segment_ids_BT, 0) == segment_ids_BT)
    labels_BT = jnp.where(has_label_BT, following(tokens_BT, -1), -1)

    def local(hidden_BTD, head, labels_BT):
        chunk = min(default_chunk(head.size), labels_BT.size)
        score = lambda x: score_next(head(x[0][None])[0] / temperature, x[1], k)
        found = jax.lax.map(score, (_chunked(hidden_BTD, chunk), _chunked(labels_BT, chunk)))
        count = labels_BT.size
        return [x.reshape(-1, x.shape[-1])[:count].reshape(*labels_BT.shape, -1) for x in found]

    # Left to the partitioner, chunks over sharded rows would make it gather all rows to every device.
    rows = PartitionSpec(BATCH_AXES, position_axis(mesh, labels_BT.shape[1]))
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, PartitionSpec(), rows), out_specs=[rows, rows], check_vma=False
    )
    return TopScores(*sharded(hidden_BTD, Head.of(decoder, params), labels_BT))


def room_for_scores(keep: TopK | None, rows: int, size: int) -> TopScores | None:
    """For each of ``size`` slots of a text to be written, zeros."""
    if keep is None:
        return None
    return TopScores(jnp.zeros((rows, size, keep.k), jnp.int32), jnp.zeros((rows, size, keep.k + 2)))


def keep_scores(
    scores: TopScores | None, keep: TopK | None, logits_BTV: jax.Array, next_BT: jax.Array, slots_BT: jax.Array
) -> TopScores | None:
    """Puts what is said of the token after each slot into that slot; a slot outside keeps nothing."""
    if keep is None:
        return None
    found = score_next(logits_BTV.reshape(-1, logits_BTV.shape[-1]) / keep.temperature, next_BT.reshape(-1), keep.k)
    rows_B1 = jnp.arange(len(slots_BT))[:, None]
    put = lambda x, new: x.at[rows_B1, slots_BT].set(new.reshape(*slots_BT.shape, -1), mode="drop")
    return jax.tree.map(put, scores, found)


def score_next(logits_CV: jax.Array, labels_C: jax.Array, k: int) -> TopScores:
    """As ``TopScores`` says; a label of -1 is none."""
    total_C1 = jax.nn.logsumexp(logits_CV, axis=-1, keepdims=True)
    top_CK, ids_CK = jax.lax.top_k(logits_CV, k)
    own_C1 = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C, 0)[:, None], axis=-1)
    own_C1 = jnp.where(labels_C[:, None] < 0, -jnp.inf, own_C1)
    # The rest is summed, not taken from 1: what a confident model leaves would cancel.
    named_CL = jnp.concatenate([ids_CK, jnp.where(labels_C < 0, logits_CV.shape[1], labels_C)[:, None]], axis=-1)
    rest_CV = logits_CV.at[jnp.arange(len(labels_C))[:, None], named_CL].set(-jnp.inf, mode="drop")
    rest_C1 = jax.nn.logsumexp(rest_CV, axis=-1, keepdims=True)
    return TopScores(ids_CK, jnp.concatenate([top_CK, own_C1, rest_C1], axis=-1) - total_C1)


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """``[B, T, …]`` as ``[N / C, C, …]``, filled up with zeros."""
    flat = x.reshape(-1, *x.shape[2:])
    filler = [(0, -len(flat) % chunk), *[(0, 0)] * (flat.ndim - 1)]
    return jnp.pad(flat, filler).reshape(-1, chunk, *flat.shape[1:])
