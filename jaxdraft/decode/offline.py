"""Block efficiency without decoding: exact, from one teacher-forced pass of both models over the target's own text.

Given text x that the target wrote, speculative decoding behaves as if each draft position it reaches were accepted
independently with probability a_j = min(1, p(x_j) / q(x_j)), p the draft's and q the target's distribution. The
expected number of blocks follows from a small dynamic program, for every block size from the same a_j. The other ways
to speculate have formulas like it, given at ``expected_blocks``; only drafter-invariant text has none.

Shapes: B batch, T tokens, N new tokens, C positions of a chunk, D hidden, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.decode.batching import per_prompt
from jaxdraft.decode.rules import Speculation, Verification
from jaxdraft.decode.sampling import Sampling, probabilities
from jaxdraft.distributed import fetch
from jaxdraft.errors import ConfigError
from jaxdraft.models.cache import long_rows
from jaxdraft.models.decoder import Decoder, Head, Params, token_ids, widen
from jaxdraft.sharding import mesh_of, place

_CHUNK = 16
_LENGTH_STEP = 64


class Acceptance(NamedTuple):
    """One prompt's answer, seen by both models.

    Attributes:
      ratio_N: p(x_j) / q(x_j) of every token, float64; 0 or 1 where the temperature is 0.
      overlap_N: Σ min(p, q) = 1 - TVD at every position, float64.
      likeliest_N: whether x_j is the draft's most likely token, which a greedy draft proposes.
      sure_N: what the draft's softmax, of temperature 1, gives x_j, which ``stop_below`` is compared with.
    """

    ratio_N: np.ndarray
    overlap_N: np.ndarray
    likeliest_N: np.ndarray
    sure_N: np.ndarray

    @property
    def accept_N(self) -> np.ndarray:
        """a_j of every token."""
        return np.minimum(self.ratio_N, 1)

    def expected_blocks(self, speculation: Speculation) -> float:
        """Expected number of blocks that write the answer, exact for every ``Speculation``."""
        ratio_N = self.likeliest_N if speculation.drafting == "greedy" else self.ratio_N
        last_N = self.sure_N < speculation.stop_below
        return expected_blocks(ratio_N, speculation.block_size, speculation.verification, last_N)


def acceptance_ratios(
    target_decoder: Decoder,
    target_params: Params,
    draft_decoder: Decoder,
    draft_params: Params,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    temperature: float | Sequence[float] = 0.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    max_new_tokens: int | Sequence[int] = 0,
    batch_size: int = 8,
) -> list[Acceptance]:
    """Acceptance probabilities of every answer's tokens, in the caller's order.

    No cache is used, so the decoders may be of either kind, ``scan=True`` over stacked parameters included.

    Args:
      target_decoder: and ``target_params``: the model that wrote the answers.
      target_params: its parameters.
      draft_decoder: and ``draft_params``: the model that would propose.
      draft_params: its parameters.
      prompts: token ids, at least one each.
      answers: what the target wrote after each prompt, with this temperature, top-p and top-k.
      temperature: for all prompts or per prompt.
      top_p: for all prompts or per prompt.
      top_k: for all prompts or per prompt; 0 keeps every token.
      max_new_tokens: the limit under which the answers were written, which LongRoPE's factors were chosen by.
      batch_size: rows of every batch.

    Raises:
      ConfigError: a prompt is empty, there are not as many answers as prompts, or the target has a draft vocabulary.
      FloatingPointError: a model gave logits that are not finite.
    """
    target_decoder.config.check_target()
    found = _teacher_forced(
        _compare,
        [(target_decoder, target_params), (draft_decoder, draft_params)],
        prompts,
        answers,
        temperature,
        top_p,
        top_k,
        max_new_tokens,
        batch_size,
    )
    return [
        Acceptance(_ratio(p_N, q_N), overlap_N, likeliest_N == 1, sure_N)
        for p_N, q_N, likeliest_N, sure_N, overlap_N in found
    ]


def token_probabilities(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    temperature: float | Sequence[float] = 0.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    max_new_tokens: int | Sequence[int] = 0,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """What one model gives every token of the answers: q(x_j) of the target that wrote them, p(x_j) of a draft.

    A target does not change while a draft learns: with its q kept, each look at the draft is a pass of the draft alone.

    Args:
      decoder: of either kind.
      params: its parameters.
      prompts: as of ``acceptance_ratios``, and so are the others.
      answers: what the target wrote.
      temperature: for all prompts or per prompt.
      top_p: for all prompts or per prompt.
      top_k: for all prompts or per prompt; 0 keeps every token.
      max_new_tokens: the limit under which the answers were written.
      batch_size: rows of every batch.

    Returns:
      float64 arrays in the caller's order; where the temperature is 0, 1 for the most likely token and 0 for others.

    Raises:
      ConfigError: a prompt is empty, or there are not as many answers as prompts.
      FloatingPointError: the model gave logits that are not finite.
    """
    models = [(decoder, params)]
    found = _teacher_forced(_chosen, models, prompts, answers, temperature, top_p, top_k, max_new_tokens, batch_size)
    return [p_N for (p_N,) in found]


def token_log_probs(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    advance: Callable[[int], Any] = lambda _: None,
) -> list[np.ndarray]:
    """ln p(x_j) of every token of the answers, at temperature 1: what perplexity is made of.

    Args:
      decoder: of either kind.
      params: its parameters.
      prompts: token ids, at least one each.
      answers: any text that goes on from each prompt.
      batch_size: rows of every batch.
      advance: called with a number of prompts whenever they are done.

    Returns:
      float64 arrays in the caller's order; −inf for a token that the model's head does not propose.

    Raises:
      ConfigError: a prompt is empty, or there are not as many answers as prompts.
      FloatingPointError: the model gave logits that are not finite.
    """
    models = [(decoder, params)]
    found = _teacher_forced(_log_prob, models, prompts, answers, 1.0, 1.0, 0, 0, batch_size, advance)
    return [log_p_N for log_p_N, _ in found]


def acceptance(p_N: np.ndarray, q_N: np.ndarray) -> np.ndarray:
    """a_j = min(1, p(x_j) / q(x_j)); 1 where rounding left nothing of q."""
    return np.minimum(_ratio(p_N, q_N), 1)


def _ratio(p_N: np.ndarray, q_N: np.ndarray) -> np.ndarray:
    return np.divide(p_N, q_N, out=np.ones_like(q_N), where=q_N > 0)


def _teacher_forced(
    look, models, prompts, answers, temperature, top_p, top_k, max_new_tokens, batch_size, advance=lambda _: None
) -> list[tuple[np.ndarray, ...]]:
    """What ``look`` sees at every token of each answer; the last of what it returns is finite if all logits are."""
    if len(answers) != len(prompts) or not all(map(len, prompts)):
        raise ConfigError(f"{len(prompts)} prompts, {len(answers)} answers: give one per prompt, and no empty prompt")
    temperatures = per_prompt("temperature", temperature, len(prompts), np.float32)
    top_ps = per_prompt("top_p", top_p, len(prompts), np.float32)
    top_ks = per_prompt("top_k", top_k, len(prompts), np.int32)
    limits = per_prompt("max_new_tokens", max_new_tokens, len(prompts), np.int32)
    greedy = not np.any(temperatures)
    decoders, params = zip(*models, strict=True)
    mesh = mesh_of(params)
    new = -(-max([1, *map(len, answers)]) // _CHUNK) * _CHUNK
    found: list[tuple[np.ndarray, ...]] = []
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    total = -(-max(lengths, default=1) // _LENGTH_STEP) * _LENGTH_STEP
    for begin in range(0, len(prompts), batch_size):
        indices = list(range(begin, min(begin + batch_size, len(prompts))))
        rows = indices + indices[:1] * (batch_size - len(indices))
        tokens_BT = np.zeros((batch_size, total), np.int32)
        for row, i in enumerate(rows):
            text = [*prompts[i], *answers[i]]
            tokens_BT[row, : len(text)] = text
        starts_B = np.asarray([len(prompts[i]) for i in rows], np.int32)
        ends_B = np.asarray([len(prompts[i]) + max(len(answers[i]), limits[i]) for i in rows], np.int32)
        sampling = None if greedy else Sampling(temperatures[rows], top_ps[rows], top_ks[rows])
        given = place(mesh, (tokens_BT, starts_B, ends_B, sampling), rows=True)
        with jax.set_mesh(mesh):
            seen = _look_at_batch(look, decoders, params, *given, new)
        seen = [x.astype(np.float64) for x in fetch(seen)]
        for row, i in enumerate(indices):
            found.append(tuple(x[row, : len(answers[i])] for x in seen))
            if not np.all(np.isfinite(found[i][-1])):
                raise FloatingPointError(f"logits that are not finite for prompt {i}: are the weights damaged?")
        advance(len(indices))
    return found


@functools.partial(jax.jit, static_argnames=("look", "decoders", "new"))
def _look_at_batch(look, decoders, params, tokens_BT, start_B, end_B, sampling, new):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    written_BN = jnp.minimum(start_B[:, None] + jnp.arange(new), tokens_BT.shape[1] - 1)

    def before_written(decoder, params):
        long_B = long_rows(decoder.config, end_B)
        hidden_BTD = decoder.apply({"params": params}, tokens_BT, positions_BT, long_B=long_B)
        return jnp.take_along_axis(hidden_BTD, written_BN[..., None] - 1, axis=1)

    def in_chunks(x):
        return jnp.moveaxis(x.reshape(x.shape[0], new // _CHUNK, _CHUNK, *x.shape[2:]), 1, 0)

    configs = [decoder.config for decoder in decoders]
    heads = list(map(Head.of, decoders, params))

    def look_at_chunk(chunk):
        labels_BC, hidden = chunk
        logits = [head(x) for head, x in zip(heads, hidden, strict=True)]
        return look(sampling, labels_BC, *zip(configs, logits, strict=True))

    hidden = [in_chunks(before_written(*model)) for model in zip(decoders, params, strict=True)]
    labels = in_chunks(jnp.take_along_axis(tokens_BT, written_BN, axis=1))
    return [jnp.moveaxis(x, 0, 1).reshape(-1, new) for x in jax.lax.map(look_at_chunk, (labels, hidden))]


def _chosen(sampling, labels_BC, model):
    """``p(x_j)`` of one model."""
    config, logits_BCV = model
    if sampling is None:
        return ((_likeliest(config, logits_BCV) == labels_BC) + _nan_where_broken(logits_BCV),)
    probs_BCV = widen(config, probabilities(logits_BCV, sampling))
    return (_at(probs_BCV, labels_BC) + _nan_where_broken(logits_BCV),)


def _log_prob(sampling, labels_BC, model):
    """``ln p(x_j)`` of one model."""
    config, logits_BCV = model
    log_p_BCV = widen(config, jax.nn.log_softmax(logits_BCV), absent=-jnp.inf)
    return _at(log_p_BCV, labels_BC), _nan_where_broken(logits_BCV)


def _compare(sampling, labels_BC, target, draft):
    """p(x_j), q(x_j), what else ``Acceptance`` has of p, and Σ min(p, q); greedy text is the target's most likely, so
    that q is 1."""
    (target_config, q_BCV), (draft_config, p_BCV) = target, draft
    nan_BC = _nan_where_broken(q_BCV) + _nan_where_broken(p_BCV)
    guess_BC = _likeliest(draft_config, p_BCV)
    of_draft = guess_BC == labels_BC, _at(widen(draft_config, jax.nn.softmax(p_BCV, axis=-1)), labels_BC)
    if sampling is None:
        agree_BC = guess_BC == _likeliest(target_config, q_BCV)
        return of_draft[0], jnp.ones(labels_BC.shape), *of_draft, agree_BC + nan_BC
    q_BCV, p_BCV = probabilities(q_BCV, sampling), widen(draft_config, probabilities(p_BCV, sampling))
    overlap_BC = jnp.sum(jnp.minimum(p_BCV, q_BCV), axis=-1)
    own_BC = jnp.where(sampling.temperature_B[:, None] > 0, _at(q_BCV, labels_BC), 1.0)
    return _at(p_BCV, labels_BC), own_BC, *of_draft, overlap_BC + nan_BC


def _likeliest(config, logits_BCV):
    return token_ids(config, jnp.argmax(logits_BCV, axis=-1))


def _at(probs_BCV, labels_BC):
    return jnp.take_along_axis(probs_BCV, labels_BC[..., None], axis=-1)[..., 0]


def _nan_where_broken(logits_BCV):
    return jnp.where(jnp.isfinite(jnp.max(logits_BCV, axis=-1)), 0.0, jnp.nan)


def expected_blocks(
    ratio_N: np.ndarray, block_size: int, verification: Verification = "token", last_N: np.ndarray | None = None
) -> float:
    """Expected number of blocks that write one answer; at temperature 0 exactly the loop's count.

    Position t starts a block with probability s_t: s_0 = 1, and a block started at t ends after i drafts, with
    probability r_i - r_{i+1} (r_G for i = G), and starts the next one at t + i + 1. Verified token by token,
    r_i = Π_{j<=i} a_{t+j-1}; as a block, r_i = min over k <= i of min(1, Π_{j<=k} p/q), for the i tokens pass with
    probability Pᵢ where the draft wrote them (``verify_block``). Past a token that the draft stops at, r is 0. A greedy
    draft's tokens stand where the text has them, so that the ratios are 0 and 1.

    Args:
      ratio_N: p(x_j) / q(x_j) of each token; cut at 1 it will do too where tokens are verified one by one.
      block_size: draft tokens per block, G.
      verification: as of ``Speculation``.
      last_N: the tokens that a draft stops at; ``None`` is none of them.
    """
    count = len(ratio_N)
    start = np.zeros(count + block_size + 1)
    start[0] = 1.0
    for t in range(count):
        ratio = np.asarray(ratio_N[t : t + block_size], np.float64)
        products = np.cumprod(np.minimum(ratio, 1) if verification == "token" else ratio)
        reach = np.minimum.accumulate(np.minimum(products, 1))
        if last_N is not None:
            reach[1:] *= np.cumprod(~last_N[t : t + len(reach) - 1])
        reach = np.concatenate([[1.0], reach, [0.0]])
        start[t + 1 : t + len(reach)] += start[t] * (reach[:-1] - reach[1:])
    return float(start[:count].sum())


def block_efficiency(accepts: Sequence[np.ndarray], block_size: int) -> float:
    """Tokens per run of the target, pooled over answers: Σ N / Σ expected blocks; nan without any token."""
    blocks = sum(expected_blocks(accept_N, block_size) for accept_N in accepts)
    return sum(map(len, accepts)) / blocks if blocks else float("nan")
