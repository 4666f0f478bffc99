"""A draft's first parameters cut out of its target's: Weight Subcloning (Samragh et al., arXiv 2312.09299).

Shapes: B batch, T tokens, L layers, D hidden, N query heads, K key/value heads, G = N / K query heads of a group,
H head size, F intermediate, V vocabulary. Index arrays bear the axis they select from.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.errors import ConfigError
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.decoder import Block, Params, compute_dtype, head_weight, rms_norm
from jaxdraft.models.rope import rope_angles

SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size")


def subclone(
    target: ModelConfig,
    target_params: Params,
    draft: ModelConfig,
    tokens_BT: jax.Array | np.ndarray,
    is_text_BT: jax.Array | np.ndarray | None = None,
) -> Params:
    """Float32 parameters of the draft's shape, with stacked layers, cut out of the target's.

    - Hidden dimensions: those of the largest mean |activation| in the residual stream after each layer over the
      calibration batch, one choice for the whole stream. Each token is first divided by its RMS, so that early
      layers, whose activations are small, count as much as late ones and no token with huge activations decides.
    - Layers: the first, the last, and others evenly between; a draft of one layer gets the first.
    - MLP neurons, per layer: the largest product of the norms of their gate, up and down weights.
    - Heads, per layer: key/value heads by the product of the norms of wk and wv, and in each kept group the query
      heads by that of wq and wo. A draft with larger groups than the target's repeats the query heads of a group;
      repeats start with wo = 0, which keeps the function and lets training tell them apart.
    - Head size: queries and keys keep the rotary pairs of the nearest frequencies, ``rotary_pairs``; values, which
      are not turned, keep the dimensions of the largest norm product of wv and wo.
    - Head: the target's. A tied draft takes the embedding; an untied draft of a tied target a copy of the table.
    - Biases are cut like their matrices; zero where only the draft has them, dropped where only the target has.

    Scale: a matrix that reads D_draft instead of D_target dimensions of unit mean square sums fewer terms, so its
    outputs shrink in standard deviation by sqrt(D_draft / D_target). The paper multiplies the weights by the inverse,
    s = sqrt(D_target / D_draft). Here s goes into the three RMSNorm weights in front of all these matrices: the same
    function (biases are not scaled either way), and a tied head's table is left alone. Where the dropped
    dimensions are zero, s is also exactly what undoes the normalisation over fewer dimensions (up to ``rms_norm_eps``).
    RMSNorm makes the size of the stream itself redundant, so embedding, wo and w_down, which write to it, need no
    common factor and get none.

    On Karpathy's stories260K, a draft of 16 % (2 of 5 layers, half the width) trained for 400 steps of 16 x 128 tokens
    came from a loss of 7.79 to 2.81 nats with it, from 6.24 to 3.41 from random weights, from 8.27 to 3.28 with
    ``project_embedding`` (without the scale of the norms: 6.53 to 2.86).

    Deviations from the paper: it ranks MLP neurons and heads by activations too, where weight norms are used here (no
    further pass over the target); it knows neither grouped heads nor rotary pairs nor the gate; the sums over fewer
    neurons and heads are not scaled up, since those with the largest products are what is kept.

    Args:
      target: the shape cut from.
      target_params: its parameters with stacked layers, of any dtype.
      draft: the shape wanted.
      tokens_BT: calibration batch, each row read as one text; it decides the hidden dimensions and nothing else.
      is_text_BT: bool, which tokens are no padding; ``None`` is all.

    Raises:
      ConfigError: a dimension of the draft is larger than the target's, or the vocabularies differ.
    """
    check_sizes(target, draft)
    _check_vocabularies(target, draft)
    is_text_BT = jnp.ones(tokens_BT.shape, bool) if is_text_BT is None else is_text_BT
    return _subclone(target, draft, target_params, tokens_BT, is_text_BT)


def project_embedding(target: ModelConfig, target_params: Params, draft: ModelConfig, params: Params) -> Params:
    """``params`` with the embedding (and an untied draft's head) taken from the target.

    Copied where the widths are equal. Else both tables are projected on the directions in which the target's embedding
    E is largest, the top eigenvectors of EᵀE, one basis for both since both belong to the same stream; each is then
    scaled to the mean row norm that it has in the target.

    Args:
      target: the shape taken from.
      target_params: its parameters.
      draft: the shape of ``params``.
      params: of the draft, with stacked layers; not changed.

    Raises:
      ConfigError: the draft is wider than the target, or the vocabularies differ.
    """
    check_sizes(target, draft, ("hidden_size",))
    _check_vocabularies(target, draft)
    embed_VD = jnp.asarray(target_params["embed"], jnp.float32)
    head_VD = jnp.asarray(head_weight(target, target_params).T, jnp.float32)
    if draft.hidden_size != target.hidden_size:
        _, ascending_DD = jnp.linalg.eigh(embed_VD.T @ embed_VD)
        basis_DD = ascending_DD[:, ::-1][:, : draft.hidden_size]
        embed_VD, head_VD = _project(embed_VD, basis_DD), _project(head_VD, basis_DD)
    return {**params, "embed": embed_VD} | ({} if draft.tie_embeddings else {"head": head_VD.T})


def check_sizes(target: ModelConfig, draft: ModelConfig, names: tuple[str, ...] = SIZES) -> None:
    """Whether weights can be cut out; asked before a run spends hours on the stages before.

    Raises:
      ConfigError: one of the draft's sizes is larger than the target's.
    """
    for name in names:
        if getattr(draft, name) > getattr(target, name):
            raise ConfigError(
                f"{name} is {getattr(draft, name)}, larger than the target's {getattr(target, name)}: weights can be "
                "taken only by a draft that is nowhere larger"
            )


def importance(config: ModelConfig, params: Params, tokens_BT: jax.Array, is_text_BT: jax.Array) -> jax.Array:
    """Mean |activation| of every hidden dimension after every layer, ``[L, D]``, each token divided by its RMS.

    One pass, row by row: the state after layer l is what the model cut to its first l layers gives before its last
    norm.

    Args:
      config: the shape.
      params: its parameters with stacked layers.
      tokens_BT: token ids, each row one text.
      is_text_BT: bool, which of them count.
    """
    c, dtype = config, compute_dtype()
    order_T = jnp.arange(tokens_BT.shape[1])
    cos, sin = rope_angles(order_T[None], c.head_size, c.rope_theta, c.rope_scaling, c.max_positions)
    block, ones_D = Block(c, dtype), jnp.ones(c.hidden_size)

    def row(text):
        tokens_T, is_text_T = text

        def layer_of_row(x_1TD, layer):
            x_1TD, _ = block.apply({"params": layer}, x_1TD, cos, sin)
            size_TD = jnp.abs(rms_norm(x_1TD[0].astype(jnp.float32), ones_D, c.rms_norm_eps))
            return x_1TD, jnp.sum(size_TD * is_text_T[:, None], axis=0)

        return jax.lax.scan(layer_of_row, params["embed"][tokens_T][None].astype(dtype), params["layers"])[1]

    return jax.lax.map(row, (tokens_BT, is_text_BT)).sum(0) / jnp.sum(is_text_BT)


def kept_layers(target: int, draft: int) -> np.ndarray:
    """Which of ``target`` layers a model of ``draft`` layers keeps: the first, the last, and others evenly between."""
    return np.round(np.linspace(0, target - 1, draft)).astype(int)


def rotary_pairs(target: ModelConfig, draft: ModelConfig) -> np.ndarray:
    """For every rotary pair of the draft's head, the target's pair of the nearest frequency, each at most once.

    Pair i of a head of size H turns by theta^(-2i/H): for one theta and H_target = r · H_draft it is every r-th pair,
    of exactly the same frequency (stretched alike by Llama 3's scaling; LongRoPE's factors are left out of account).
    """
    count, wanted = target.head_size // 2, draft.head_size // 2
    step = target.head_size / draft.head_size * math.log(draft.rope_theta) / math.log(target.rope_theta)
    pairs: list[int] = []
    for j in range(wanted):
        free = pairs[-1] + 1 if pairs else 0
        pairs.append(min(max(round(j * step), free), count - wanted + j))
    return np.array(pairs)


def _check_vocabularies(target: ModelConfig, draft: ModelConfig) -> None:
    if draft.vocabulary != target.vocabulary:
        raise ConfigError(f"vocab_size is {draft.vocabulary}, the target's {target.vocabulary}: they must be equal")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _subclone(
    target: ModelConfig, draft: ModelConfig, params: Params, tokens_BT: jax.Array, is_text_BT: jax.Array
) -> Params:
    dims_D = _top(importance(target, params, tokens_BT, is_text_BT).mean(0), draft.hidden_size)
    layers_L = kept_layers(target.num_layers, draft.num_layers)
    scale = math.sqrt(target.hidden_size / draft.hidden_size)
    layers = jax.tree.map(lambda x: x[layers_L].astype(jnp.float32), dict(params["layers"]))
    cut = {
        "embed": params["embed"][:, dims_D].astype(jnp.float32),
        "final_norm": params["final_norm"][dims_D].astype(jnp.float32) * scale,
        "layers": jax.vmap(lambda layer: _layer(target, draft, layer, dims_D, scale))(layers),
    }
    return cut if draft.tie_embeddings else cut | {"head": head_weight(target, params)[dims_D].astype(jnp.float32)}


def _layer(target: ModelConfig, draft: ModelConfig, layer: Params, dims_D: jax.Array, scale: float) -> Params:
    norms = {name: layer[name][dims_D] * scale for name in ("attn_norm", "mlp_norm")}
    return norms | _mlp(draft, layer, dims_D) | _attention(target, draft, layer, dims_D)


def _mlp(draft: ModelConfig, layer: Params, dims_D: jax.Array) -> dict[str, jax.Array]:
    gate_DF, up_DF, down_FD = layer["w_gate"][dims_D], layer["w_up"][dims_D], layer["w_down"][:, dims_D]
    score_F = _norm(gate_DF, 0) * _norm(up_DF, 0) * _norm(down_FD, 1)
    kept_F = _top(score_F, draft.intermediate_size)
    return {"w_gate": gate_DF[:, kept_F], "w_up": up_DF[:, kept_F], "w_down": down_FD[kept_F]}


def _attention(target: ModelConfig, draft: ModelConfig, layer: Params, dims_D: jax.Array) -> dict[str, jax.Array]:
    K, G = target.num_kv_heads, target.num_heads // target.num_kv_heads
    draft_G = draft.num_heads // draft.num_kv_heads
    wq_DNH, wk_DKH, wv_DKH = (layer[name][dims_D] for name in ("wq", "wk", "wv"))
    wo_NHD = layer["wo"][:, :, dims_D]

    kv_K = _top(_norm(wk_DKH, (0, 2)) * _norm(wv_DKH, (0, 2)), draft.num_kv_heads)
    score_KG = (_norm(wq_DNH, (0, 2)) * _norm(wo_NHD, (1, 2))).reshape(K, G)
    in_group_KG = jax.vmap(lambda score_G: _top(score_G, min(G, draft_G)))(score_KG[kv_K])
    in_group_KG = in_group_KG[:, np.arange(draft_G) % G]
    query_N = (kv_K[:, None] * G + in_group_KG).reshape(-1)
    first_N11 = np.tile(np.arange(draft_G) < G, draft.num_kv_heads)[:, None, None]

    value_KH = _norm(wv_DKH, 0) * _norm(wo_NHD.reshape(K, G, *wo_NHD.shape[1:]), (1, 3))
    value_KH = jax.vmap(lambda score_H: _top(score_H, draft.head_size))(value_KH[kv_K])
    value_NH = jnp.repeat(value_KH, draft_G, axis=0)
    pairs = rotary_pairs(target, draft)
    turned_H = np.concatenate([pairs, pairs + target.head_size // 2])
    cut = {
        "wq": wq_DNH[:, query_N][..., turned_H],
        "wk": wk_DKH[:, kv_K][..., turned_H],
        "wv": jnp.take_along_axis(wv_DKH[:, kv_K], value_KH[None], axis=2),
        "wo": jnp.take_along_axis(wo_NHD[query_N], value_NH[..., None], axis=1) * first_N11,
    }
    if not draft.qkv_bias:
        return cut
    if not target.qkv_bias:
        return cut | {bias: jnp.zeros(cut[matrix].shape[1:]) for bias, matrix in zip(_BIASES, cut, strict=False)}
    return cut | {
        "bq": layer["bq"][query_N][:, turned_H],
        "bk": layer["bk"][kv_K][:, turned_H],
        "bv": jnp.take_along_axis(layer["bv"][kv_K], value_KH, axis=1),
    }


_BIASES = ("bq", "bk", "bv")


def _norm(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum(axis))


def _top(score: jax.Array, count: int) -> jax.Array:
    """Indices of the ``count`` largest scores, in ascending order of index; of equal ones the first."""
    return jnp.sort(jnp.argsort(-score)[:count])


def _project(table_VD: jax.Array, basis_DD: jax.Array) -> jax.Array:
    projected_VD = table_VD @ basis_DD
    return projected_VD * (_norm(table_VD, 1).mean() / _norm(projected_VD, 1).mean())
