"""Speculative decoding: a draft proposes, the target verifies, the output is distributed as the target's own.

Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318). The loop is in ``blocks``; here is the
host driver over whole batches, and what it counts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxdraft.decode.batching import PromptBatch, prompt_batches
from jaxdraft.decode.blocks import WithDraft, WrittenInBlocks
from jaxdraft.decode.driver import Seconds, end_tokens, new_tokens, write_batches
from jaxdraft.decode.rules import Speculation
from jaxdraft.distributed import fetch
from jaxdraft.models.decoder import Decoder, Params


@dataclasses.dataclass(frozen=True)
class SpeculativeResult:
    """What was written for one prompt.

    Attributes:
      tokens: new tokens, an end token included.
      accepted: draft tokens accepted in each block, before any cut.
      cut: the last block lost tokens to an end token inside it or to the limit; all other blocks are complete.
      drafted: draft tokens proposed in each block.
      rejected: the first refused draft token of each block, -1 where all were accepted.
    """

    tokens: list[int]
    accepted: list[int]
    cut: bool
    drafted: list[int]
    rejected: list[int]

    @property
    def complete(self) -> list[int]:
        """``accepted`` of the blocks that were not cut."""
        return self.accepted[:-1] if self.cut else self.accepted


class SpeculativeBatch(NamedTuple):
    """What one batch wrote: positions of its prompts in the caller's list, their results, and what it took."""

    indices: list[int]
    results: list[SpeculativeResult]
    seconds: Seconds


def speculative_generate(
    target_decoder: Decoder,
    target_params: Params,
    draft_decoder: Decoder,
    draft_params: Params,
    prompts: Sequence[Sequence[int]],
    **settings: Any,
) -> list[SpeculativeResult]:
    """Results in the caller's order. The settings and errors are those of ``speculative_batches``."""
    found: dict[int, SpeculativeResult] = {}
    for batch in speculative_batches(target_decoder, target_params, draft_decoder, draft_params, prompts, **settings):
        found.update(zip(batch.indices, batch.results, strict=True))
    return [found[i] for i in range(len(prompts))]


def speculative_batches(
    target_decoder: Decoder,
    target_params: Params,
    draft_decoder: Decoder,
    draft_params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    speculation: Speculation,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float] = 0.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    seed: int = 0,
    example_ids: Sequence[int] | None = None,
    eos_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    repeats: int = 1,
) -> Iterator[SpeculativeBatch]:
    """Decodes speculatively, batch by batch; batches are those of ``generate_batches`` with the same settings.

    Greedy in float32, the tokens are those the target writes alone. Sampled, they are another draw from the same law.

    Args:
      target_decoder: with ``scan=False``.
      target_params: of ``for_decoding``.
      draft_decoder: with ``scan=False`` and the target's vocabulary; it may propose a part of it only.
      draft_params: of ``for_decoding``.
      prompts: token ids, at least one each.
      speculation: how many tokens the draft proposes per run of the target, how, and how the target verifies.
      max_new_tokens: for all prompts or per prompt.
      temperature: for all prompts or per prompt; 0 is greedy, and all 0 leaves sampling out of the program.
      top_p: for all prompts or per prompt.
      top_k: for all prompts or per prompt; 0 keeps every token.
      seed: of all randomness.
      example_ids: integers in [0, 2**32) naming each prompt's randomness; ``None`` numbers the prompts.
      eos_ids: tokens that end an answer; ``None`` takes the target's.
      batch_size: rows of every batch.
      repeats: run each batch so often, with the same keys, and report the best times.

    Raises:
      ConfigError: a value is out of range, the vocabularies differ, or the target has a draft vocabulary.
      FloatingPointError: a model gave logits that are not finite.
    """
    config = target_decoder.config
    models = target_decoder, target_params, draft_decoder, draft_params
    writer = WithDraft(*models, speculation, end_tokens(config, eos_ids))
    batches = prompt_batches(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        example_ids=example_ids,
        batch_size=batch_size,
        vocab_size=config.vocabulary,
        max_positions=config.max_positions,
    )
    writer.warn_of_length(max((int(batch.end_B.max()) for batch in batches), default=0))
    for batch, state, seconds in write_batches(writer, batches, seed, repeats):
        yield SpeculativeBatch(batch.indices, _results(batch, state), seconds)


def _results(batch: PromptBatch, state: WrittenInBlocks) -> list[SpeculativeResult]:
    tokens = new_tokens(batch, state)
    of_blocks = state.accepted_BN, state.drafted_BN, state.rejected_BN
    of_blocks, blocks, cut = fetch((of_blocks, state.blocks_B, state.cut_B))
    results = []
    for row in range(len(batch.indices)):
        accepted, drafted, rejected = (x_BN[row, : blocks[row]].tolist() for x_BN in of_blocks)
        results.append(SpeculativeResult(tokens[row], accepted, bool(cut[row]), drafted, rejected))
    return results


def token_origins(accepted: Sequence[int], total: int) -> list[bool]:
    """For each of ``total`` tokens, whether it is an accepted draft; the last of each uncut block is the target's."""
    origins = [origin for count in accepted for origin in [True] * count + [False]]
    return origins[:total]
