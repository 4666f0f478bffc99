"""The loop of speculative decoding: blocks of a draft's tokens, each block one run of the target.

With p the draft's and q the target's distribution. The whole generation of a batch is one ``lax.while_loop`` over
blocks; nothing reaches the host in between, and rows advance independently.

Shapes: B batch, G block size (draft tokens of a block), K = G + 1, T tokens, L bucket, S tokens of prompt and answer,
N most blocks a row can need, V vocabulary, R draft vocabulary, E end tokens.
"""

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdraft.decode.driver import NO_LIMIT, all_finite, bounds, on_rows, with_room, write_on
from jaxdraft.decode.generate import prefill
from jaxdraft.decode.rules import Speculation, verify, verify_equal
from jaxdraft.decode.sampling import (
    ACCEPT,
    PROPOSE,
    REPLACE,
    SAMPLE,
    Draws,
    Sampling,
    draw,
    gumbel_argmax,
    gumbels,
    is_any,
    position_keys,
    probabilities,
    row_keys,
    uniforms,
)
from jaxdraft.decode.score import TopK, TopScores, keep_scores, room_for_scores
from jaxdraft.errors import ConfigError
from jaxdraft.models.cache import KVCache, slots
from jaxdraft.models.decoder import Decoder, Params, head_weight, logits, token_ids, widen
from jaxdraft.sharding import mesh_of

logger = logging.getLogger(__name__)


class WrittenInBlocks(NamedTuple):
    """Where a batch stands: as ``generate.Written``, with both caches, and of each block how many tokens were drafted,
    how many of them accepted, and the first one refused, -1 where none was."""

    tokens_BS: jax.Array
    length_B: jax.Array
    end_B: jax.Array
    target_cache: KVCache
    draft_cache: KVCache
    drafted_BN: jax.Array
    accepted_BN: jax.Array
    rejected_BN: jax.Array
    blocks_B: jax.Array
    cut_B: jax.Array
    target_finite_B: jax.Array
    draft_finite_B: jax.Array
    scores: TopScores | None = None

    @property
    def steps_B(self) -> jax.Array:
        return self.blocks_B

    @property
    def finite(self) -> dict[str, jax.Array]:
        return {"the target": self.target_finite_B, "the draft": self.draft_finite_B}


@dataclasses.dataclass(frozen=True, eq=False)
class WithDraft:
    """A target that a draft proposes to: a ``driver.Writer``.

    Attributes:
      target_decoder: with ``scan=False``.
      target_params: of ``for_decoding``.
      draft_decoder: with ``scan=False``.
      draft_params: of ``for_decoding``.
      speculation: how the draft proposes and the target verifies.
      eos_E: tokens that end an answer.
      drafter_invariant: write what the target writes alone, sampled too, in place of another text of the same law.
      keep: of the target's distributions.

    Raises:
      ConfigError: a value is out of range, the vocabularies differ, or the target has a draft vocabulary.
    """

    target_decoder: Decoder
    target_params: Params
    draft_decoder: Decoder
    draft_params: Params
    speculation: Speculation
    eos_E: np.ndarray
    drafter_invariant: bool = False
    keep: TopK | None = None

    def __post_init__(self):
        target, draft = self.target_decoder.config, self.draft_decoder.config
        target.check_target()
        if draft.vocabulary != target.vocabulary:
            raise ConfigError(
                f"the draft's vocabulary has {draft.vocabulary} rows, the target's {target.vocabulary}: "
                "they must share one tokenizer"
            )

    @property
    def mesh(self) -> Mesh:
        return mesh_of(self.target_params)

    def warn_of_length(self, longest: int) -> None:
        """Logs a warning where texts may outgrow what the draft is made for."""
        if longest > self.draft_decoder.config.max_positions:
            logger.warning(
                "texts of up to %d tokens, but the draft is made for %d: past them it will hardly be accepted",
                longest,
                self.draft_decoder.config.max_positions,
            )

    @property
    def models(self) -> tuple[Decoder, Params, Decoder, Params]:
        return self.target_decoder, self.target_params, self.draft_decoder, self.draft_params

    def start(self, tokens_BL: np.ndarray, length_B: np.ndarray, end_B: np.ndarray, size: int) -> WrittenInBlocks:
        return start_in_blocks(*self.models, tokens_BL, length_B, end_B, size, self.speculation.block_size, self.keep)

    def write(
        self,
        state: WrittenInBlocks,
        sampling: Sampling | None,
        draws: Draws | None,
        floor: int = 0,
        most: int | None = None,
    ) -> WrittenInBlocks:
        return write_in_blocks(
            *self.models,
            state,
            speculation=self.speculation,
            drafter_invariant=self.drafter_invariant,
            eos_E=self.eos_E,
            sampling=sampling,
            draws=draws,
            keep=self.keep,
            **bounds(floor, most),
        )


class _Keys(NamedTuple):
    sample_B: jax.Array
    propose_B: jax.Array
    accept_B: jax.Array
    replace_B: jax.Array


@functools.partial(jax.jit, static_argnames=("target_decoder", "draft_decoder", "size", "block_size", "keep"))
def start_in_blocks(
    target_decoder, target_params, draft_decoder, draft_params, tokens_BL, length_B, end_B, size, block_size, keep=None
):
    """A ``WrittenInBlocks`` of rows whose prompts both models have read, as ``generate.start`` makes a ``Written``."""
    prompts, slots = (tokens_BL, length_B, end_B), size + block_size + 1
    zeros_B, ones_B = jnp.zeros_like(length_B), jnp.ones_like(length_B, bool)
    zeros_BN = jnp.zeros((len(tokens_BL), size - tokens_BL.shape[1]), jnp.int32)
    state = WrittenInBlocks(
        tokens_BS=with_room(tokens_BL, size),
        length_B=length_B,
        end_B=end_B,
        target_cache=prefill(target_decoder, target_params, *prompts, slots),
        draft_cache=prefill(draft_decoder, draft_params, *prompts, slots),
        drafted_BN=zeros_BN,
        accepted_BN=zeros_BN,
        rejected_BN=zeros_BN,
        blocks_B=zeros_B,
        cut_B=~ones_B,
        target_finite_B=ones_B,
        draft_finite_B=ones_B,
        scores=room_for_scores(keep, len(tokens_BL), size),
    )
    return on_rows(state)


@functools.partial(
    jax.jit,
    static_argnames=("target_decoder", "draft_decoder", "speculation", "drafter_invariant", "keep"),
    donate_argnames=("state",),
)
def write_in_blocks(
    target_decoder,
    target_params,
    draft_decoder,
    draft_params,
    state,
    *,
    speculation,
    eos_E,
    sampling,
    draws,
    floor=0,
    most=NO_LIMIT,
    drafter_invariant=False,
    keep=None,
):
    """Goes on with a ``WrittenInBlocks`` until at most ``floor`` rows are live, or for ``most`` blocks.

    Greedy without ``sampling`` and ``draws``. Sampled, drafts stand by the rule of ``verify``; or, drafter-invariant,
    while they equal what the target draws with the noise of ``generate.write``, which the draft draws with too.
    """
    target_head_DV = head_weight(target_decoder.config, target_params)
    draft_head_DR = head_weight(draft_decoder.config, draft_params)
    keys: Any = None
    if draws is not None:
        purposes = SAMPLE, PROPOSE, ACCEPT, REPLACE
        keys = _Keys(*(row_keys(draws.seed, purpose, draws.example_ids_B) for purpose in purposes))
    G, nowhere = speculation.block_size, slots(state.target_cache)
    rows_B1, order_K = jnp.arange(state.tokens_BS.shape[0])[:, None], jnp.arange(G + 1)

    def propose(state, live_B, noise_BKV):
        n_B = state.length_B

        def step(carry, tokens_BT, positions_BT, i):
            cache, finite_B = carry
            slots_BT = jnp.where(live_B[:, None], positions_BT, nowhere)
            hidden_BTD, cache = draft_decoder.apply({"params": draft_params}, tokens_BT, slots_BT, cache=cache)
            logits_BR = logits(hidden_BTD[:, -1:], draft_head_DR)[:, 0]
            finite_B &= ~live_B | all_finite(logits_BR)
            if sampling is None:
                best_B = jnp.argmax(logits_BR, axis=-1).astype(jnp.int32)
                return (cache, finite_B), (token_ids(draft_decoder.config, best_B), None)
            probs_BR = probabilities(logits_BR, sampling)
            probs_BV = widen(draft_decoder.config, probs_BR)
            if noise_BKV is not None:
                return (cache, finite_B), (gumbel_argmax(probs_BV, noise_BKV[:, i]), None)
            drawn_B = token_ids(draft_decoder.config, draw(position_keys(keys.propose_B, n_B + i), probs_BR))
            return (cache, finite_B), (drawn_B, probs_BV)

        def next_step(carry, i):
            carry, last_B = carry
            carry, drawn = step(carry, last_B[:, None], (n_B + i - 1)[:, None], i)
            return (carry, drawn[0]), drawn

        # The first step reads the last two tokens: after a block accepted in full the cache lacks the first of them.
        positions_B2 = jnp.stack([jnp.maximum(n_B - 2, 0), n_B - 1], axis=1)
        carry = state.draft_cache, state.draft_finite_B
        carry, first = step(carry, state.tokens_BS[rows_B1, positions_B2], positions_B2, 0)
        (carry, _), others = jax.lax.scan(next_step, (carry, first[0]), jnp.arange(1, G))
        drawn = jax.tree.map(lambda x, xs: jnp.moveaxis(jnp.concatenate([x[None], xs]), 0, 1), first, others)
        return *drawn, *carry

    def block(state: WrittenInBlocks) -> WrittenInBlocks:
        n_B, live_B = state.length_B, state.length_B < state.end_B
        noise_BKV = None
        if drafter_invariant and sampling is not None:
            noise = lambda i: gumbels(position_keys(keys.sample_B, n_B + i), target_decoder.config.vocabulary)
            noise_BKV = jax.vmap(noise, out_axes=1)(order_K)
        drafts_BG, draft_probs_BGV, draft_cache, draft_finite_B = propose(state, live_B, noise_BKV)

        last_B1 = state.tokens_BS[rows_B1, n_B[:, None] - 1]
        slots_BK = jnp.where(live_B[:, None], n_B[:, None] - 1 + order_K, nowhere)
        hidden_BKD, target_cache = target_decoder.apply(
            {"params": target_params}, jnp.concatenate([last_B1, drafts_BG], 1), slots_BK, cache=state.target_cache
        )
        logits_BKV = logits(hidden_BKD, target_head_DV)
        if sampling is None:
            accepted_B, next_B = verify_equal(drafts_BG, jnp.argmax(logits_BKV, axis=-1).astype(jnp.int32))
        elif noise_BKV is not None:
            own_BK = gumbel_argmax(probabilities(logits_BKV, sampling), noise_BKV)
            accepted_B, next_B = verify_equal(drafts_BG, own_BK)
        else:
            u_BG = uniforms(keys.accept_B, n_B[:, None] + jnp.arange(G))
            target_probs_BKV = probabilities(logits_BKV, sampling)
            accepted_B, next_probs_BV = verify(drafts_BG, draft_probs_BGV, target_probs_BKV, u_BG)
            next_B = draw(position_keys(keys.replace_B, n_B + accepted_B), next_probs_BV)

        count_B = accepted_B + 1
        rejected_B = jnp.pad(drafts_BG, ((0, 0), (0, 1)), constant_values=-1)[rows_B1[:, 0], accepted_B]
        emitted_BK = jnp.where(order_K < accepted_B[:, None], jnp.pad(drafts_BG, ((0, 0), (0, 1))), next_B[:, None])
        ends_BK = is_any(emitted_BK, eos_E) & (order_K < count_B[:, None])
        until_end_B = jnp.where(jnp.any(ends_BK, axis=1), jnp.argmax(ends_BK, axis=1) + 1, count_B)
        kept_B = jnp.where(live_B, jnp.minimum(until_end_B, state.end_B - n_B), 0)
        kept_BK = order_K < kept_B[:, None]
        written_BK = jnp.where(kept_BK, n_B[:, None] + order_K, nowhere)
        length_B = n_B + kept_B
        block_B1 = jnp.where(live_B, state.blocks_B, nowhere)[:, None]
        record = lambda x_BN, x_B: x_BN.at[rows_B1, block_B1].set(x_B[:, None], mode="drop")
        return WrittenInBlocks(
            tokens_BS=state.tokens_BS.at[rows_B1, written_BK].set(emitted_BK, mode="drop"),
            length_B=length_B,
            end_B=jnp.where(jnp.any(ends_BK & kept_BK, axis=1), length_B, state.end_B),
            target_cache=target_cache,
            draft_cache=draft_cache,
            drafted_BN=record(state.drafted_BN, jnp.full_like(n_B, G)),
            accepted_BN=record(state.accepted_BN, accepted_B),
            rejected_BN=record(state.rejected_BN, rejected_B),
            blocks_B=state.blocks_B + live_B,
            cut_B=jnp.where(live_B, kept_B < count_B, state.cut_B),
            target_finite_B=state.target_finite_B & (~live_B | jnp.all(all_finite(logits_BKV), axis=1)),
            draft_finite_B=draft_finite_B,
            scores=keep_scores(state.scores, keep, logits_BKV, emitted_BK, jnp.where(kept_BK, slots_BK, nowhere)),
        )

    return write_on(block, state, floor, most)
