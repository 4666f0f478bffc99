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

from jaxdraft.decode import agreement
from jaxdraft.decode.drafting import propose
from jaxdraft.decode.driver import NO_LIMIT, all_finite, bounds, on_rows, with_room, write_on
from jaxdraft.decode.generate import prefill
from jaxdraft.decode.rules import Speculation
from jaxdraft.decode.sampling import Draws, Sampling, is_any
from jaxdraft.decode.score import TopK, TopScores, keep_scores, room_for_scores
from jaxdraft.errors import ConfigError
from jaxdraft.models.cache import KVCache, slots
from jaxdraft.models.decoder import Decoder, Head, Params
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
      ConfigError: the vocabularies differ, the target has a draft vocabulary, or block verification is to be
        drafter-invariant.
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
        if self.drafter_invariant and self.speculation.verification != "token":
            raise ConfigError("drafter_invariant text is verified token by token: leave verification at 'token'")
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

    Greedy without ``sampling`` and ``draws``. Sampled, drafts stand by the rule of ``verify`` or ``verify_block``; or,
    drafter-invariant, while they equal what the target draws with the noise of ``generate.write``, which the draft
    draws with too.
    """
    target, draft = target_decoder.config, draft_decoder.config
    target_head, draft_head = Head.of(target_decoder, target_params), Head.of(draft_decoder, draft_params)
    keys: Any = None if draws is None else agreement.keys_of(draws)
    G, nowhere = speculation.block_size, slots(state.target_cache)
    rows_B1, order_K = jnp.arange(state.tokens_BS.shape[0])[:, None], jnp.arange(G + 1)

    def agreed(length_B):
        if sampling is None:
            return agreement.greedy(draft)
        if drafter_invariant:
            return agreement.drafter_invariant(draft, speculation, sampling, keys, length_B, target.vocabulary)
        return agreement.sampled(draft, speculation, sampling, keys, length_B)

    def read(tokens_BT, slots_BT, cache):
        hidden_BTD, cache = draft_decoder.apply({"params": draft_params}, tokens_BT, slots_BT, cache=cache)
        return draft_head(hidden_BTD[:, -1:])[:, 0], cache

    def block(state: WrittenInBlocks) -> WrittenInBlocks:
        n_B, live_B = state.length_B, state.length_B < state.end_B
        choose, settle = agreed(n_B)
        texts = state.tokens_BS, n_B, live_B
        drafts = propose(draft, speculation, read, choose, *texts, state.draft_cache, state.draft_finite_B)
        drafts_BG, drafted_B = drafts.tokens_BG, drafts.count_B

        last_B1 = state.tokens_BS[rows_B1, n_B[:, None] - 1]
        slots_BK = jnp.where(live_B[:, None], n_B[:, None] - 1 + order_K, nowhere)
        hidden_BKD, target_cache = target_decoder.apply(
            {"params": target_params}, jnp.concatenate([last_B1, drafts_BG], 1), slots_BK, cache=state.target_cache
        )
        logits_BKV = target_head(hidden_BKD)
        accepted_B, next_B = settle(drafts, logits_BKV)

        count_B = accepted_B + 1
        padded_BK = jnp.pad(drafts_BG, ((0, 0), (0, 1)))
        rejected_B = jnp.where(accepted_B < drafted_B, padded_BK[rows_B1[:, 0], accepted_B], -1)
        emitted_BK = jnp.where(order_K < accepted_B[:, None], padded_BK, next_B[:, None])
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
            draft_cache=drafts.cache,
            drafted_BN=record(state.drafted_BN, drafted_B),
            accepted_BN=record(state.accepted_BN, accepted_B),
            rejected_BN=record(state.rejected_BN, rejected_B),
            blocks_B=state.blocks_B + live_B,
            cut_B=jnp.where(live_B, kept_B < count_B, state.cut_B),
            target_finite_B=state.target_finite_B & (~live_B | jnp.all(all_finite(logits_BKV), axis=1)),
            draft_finite_B=drafts.finite_B,
            scores=keep_scores(state.scores, keep, logits_BKV, emitted_BK, jnp.where(kept_BK, slots_BK, nowhere)),
        )

    return write_on(block, state, floor, most)
