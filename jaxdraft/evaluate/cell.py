"""One line of ``results.json`` and its samples: a draft, a task, a batch size, a block size.

Shapes: W what all batches give, then what each resample of them does (``metrics``).
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdraft.decode import Acceptance, Speculation, SpeculativeResult
from jaxdraft.evaluate.measure import Baseline, Model, Timed, Work
from jaxdraft.evaluate.metrics import (
    acceptance_metrics,
    mbsu,
    offline_efficiency,
    overlap_metrics,
    plain,
    ratio_of_sums,
    resampled,
    with_interval,
)
from jaxdraft.evaluate.token_classes import acceptance_by_class
from jaxdraft.evaluate.tpot import Latencies, predicted_speedup

logger = logging.getLogger(__name__)

_FAR = 4.0  # standard errors that are worth a warning
_ROUNDED = 1e-4  # a standard error below it is rounding: of a single prompt, of a draft that is never refused


class Cell(NamedTuple):
    """What is measured at once.

    Attributes:
      target: the model that is accelerated.
      draft: the model that proposes.
      work: what is decoded.
      speculation: how.
    """

    target: Model
    draft: Model
    work: Work
    speculation: Speculation

    def __str__(self) -> str:
        work, gamma = self.work, self.speculation.block_size
        return f"{work.task.name} at T {work.task.temperature:g}, batch {work.batch_size}, γ {gamma}"

    @property
    def settings(self) -> dict[str, Any]:
        """As every line names them, options only where they are not the default."""
        work, block_size = self.work, self.speculation.block_size
        named = {"task": work.task.name, "block_size": block_size, **work.sampling, "batch_size": work.batch_size}
        return named | options_of(self.speculation)


def options_of(speculation: Speculation) -> dict[str, Any]:
    """What is not as it is by default, the block size apart."""
    default = vars(Speculation(speculation.block_size))
    return {name: value for name, value in vars(speculation).items() if value != default[name]}


def run_line(
    cell: Cell,
    results: Sequence[SpeculativeResult],
    batches: Sequence[Timed],
    baseline: Baseline,
    acceptances: Sequence[Acceptance],
    latencies: Latencies,
    classes: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """An entry of ``runs`` in ``results.json``.

    Args:
      cell: what was measured.
      results: what was written with the draft, one per prompt.
      batches: their times.
      baseline: what the target wrote alone.
      acceptances: of its answers.
      latencies: of single steps.
      classes: of each token of ``results``.
    """
    target, draft, work, speculation = cell
    block_size = speculation.block_size
    counted = acceptance_metrics(results, block_size, draft.num_parameters / target.num_parameters)
    efficiency = counted["block_efficiency"]
    drafted = sum(sum(result.drafted) for result in results) / counted["blocks"]
    speeds = _speeds(work, results, batches, baseline)
    l_draft, l_target, l_block = latencies.draft(block_size), latencies.target(1), latencies.target(block_size + 1)
    predicted = predicted_speedup(efficiency, drafted, l_draft, l_target, l_block)
    end_tokens = target.decoder.config.eos_ids
    return {
        **cell.settings,
        "max_new_tokens": work.task.max_new_tokens,
        **counted,
        "mbsu_by_bytes": plain(mbsu(efficiency, draft.num_parameters_read / target.num_parameters_read, drafted)),
        "mbsu_by_time": plain(mbsu(efficiency, l_draft / l_target, drafted)),
        "ended_by_eos": plain(float(np.mean([result.tokens[-1] in end_tokens for result in results]))),
        "acceptance_by_class": acceptance_by_class(results, classes),
        **_losslessness(cell, results, baseline, acceptances),
        **overlap_metrics(acceptances),
        **speeds,
        "draft_latency": l_draft,
        "target_latency_1": l_target,
        "target_latency_block": l_block,
        "predicted_speedup": plain(predicted),
        "measured_over_predicted": plain(speeds["measured_speedup"] / predicted),
    }


def sample_lines(
    cell: Cell,
    results: Sequence[SpeculativeResult],
    acceptances: Sequence[Acceptance],
) -> list[dict[str, Any]]:
    """Each prompt's answer, and what it adds to the sums: of the text that the target wrote alone, its tokens, the
    blocks expected for them and their overlap."""
    lines = []
    for prompt, result, acceptance in zip(cell.work.prompts, results, acceptances, strict=True):
        line = {
            "id": prompt.id,
            **cell.settings,
            "prompt_tokens": list(prompt.tokens),
            "tokens": result.tokens,
            "accepted": result.accepted,
            "rejected": result.rejected,
        }
        if cell.speculation.stop_below:
            line["drafted"] = result.drafted
        lines.append(
            {
                **line,
                "target_tokens": len(acceptance.ratio_N),
                "expected_blocks": round(acceptance.expected_blocks(cell.speculation), 6),
                "overlap_sum": round(float(acceptance.overlap_N.sum()), 6),
            }
        )
    return lines


def _losslessness(
    cell: Cell, results: Sequence[SpeculativeResult], baseline: Baseline, acceptances: Sequence[Acceptance]
) -> dict[str, Any]:
    """What a reader needs to believe that the draft changed nothing but the speed.

    Greedy, answers have to be the target's own, and each has the blocks that the offline pass counts. Sampled, they are
    another draw from the same law, so that block efficiency and the offline one, which is exact for the text that the
    target drew alone, differ by chance only: ``offline_deviation`` is by how many standard errors, with the bootstrap's
    standard error of their difference over prompts.
    """
    exact_W = offline_efficiency(acceptances, cell.speculation)
    found = with_interval("block_efficiency_offline", exact_W)
    if cell.work.task.temperature == 0:
        expected = [round(acceptance.expected_blocks(cell.speculation)) for acceptance in acceptances]
        equal = sum(result.tokens == answer for result, answer in zip(results, baseline.answers, strict=True))
        counted = sum(len(result.accepted) == count for result, count in zip(results, expected, strict=True))
        found |= {"identical_to_target": equal, "blocks_as_offline": counted}
        if equal < len(results):
            rounds = "" if cell.draft.dtype == np.float32 else " (bfloat16 rounds differently for other shapes)"
            amount = len(results) - equal, len(results)
            logger.warning("%s: %d of %d greedy answers differ from the target's own%s", cell, *amount, rounds)
        return found
    efficiency_W = ratio_of_sums([len(r.tokens) for r in results], [len(r.accepted) for r in results])
    difference_W = efficiency_W - exact_W
    spread = float(np.std(difference_W[1:]))
    deviation = plain(difference_W[0] / spread) if spread > _ROUNDED else None
    if deviation is not None and abs(deviation) > _FAR:
        logger.warning("%s: block efficiency is %.1f standard errors from what it must be", cell, deviation)
    return found | {"offline_deviation": deviation}


def _speeds(
    work: Work, results: Sequence[SpeculativeResult], batches: Sequence[Timed], baseline: Baseline
) -> dict[str, Any]:
    """Times with the draft and without, over the same batches; prefill and compilation are outside, and beside.

    A batch is decoded until its last row is done. Tokens per second are of whole batches, so rows that wait for others
    lower them; ``tpot`` is of the steps that a row takes part in (``tpot``). ``rows_busy`` is what connects the two.
    """
    of = lambda batches, count: [[count(i) for i in batch.prompts] for batch in batches]
    tokens = of(batches, lambda i: len(results[i].tokens))
    blocks = of(batches, lambda i: len(results[i].accepted))
    alone = of(baseline.batches, lambda i: len(baseline.answers[i]))
    with_draft = _Rates(tokens, blocks, [batch.seconds.decode for batch in batches], work.batch_size)
    without = _Rates(alone, alone, [batch.seconds.decode for batch in baseline.batches], work.batch_size)
    total = lambda batches, part: round(sum(getattr(batch.seconds, part) for batch in batches), 4)
    return {
        **with_interval("tokens_per_second", with_draft.per_second_W),
        **with_interval("tokens_per_second_autoregressive", without.per_second_W),
        **with_interval("token_rate_ratio", with_draft.per_second_W / without.per_second_W),
        **with_interval("tpot", with_draft.tpot_W, digits=9),
        **with_interval("tpot_autoregressive", without.tpot_W, digits=9),
        **with_interval("measured_speedup", without.tpot_W / with_draft.tpot_W),
        "rows_busy": plain(with_draft.rows_busy),
        "rows_busy_autoregressive": plain(without.rows_busy),
        "seconds": total(batches, "decode"),
        "prefill_seconds": total(batches, "prefill"),
        "compile_seconds": total(batches, "compile"),
        "seconds_autoregressive": total(baseline.batches, "decode"),
        "prefill_seconds_autoregressive": total(baseline.batches, "prefill"),
        "compile_seconds_autoregressive": total(baseline.batches, "compile"),
    }


class _Rates:
    """Of batches with the tokens and the steps of their rows: alone a step writes one token, with a draft a block."""

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        steps: Sequence[Sequence[int]],
        seconds: Sequence[float],
        batch_size: int,
    ):
        tokens_W, row_steps_W = resampled(list(map(sum, tokens))), resampled(list(map(sum, steps)))
        steps_W, seconds_W = resampled(list(map(max, steps))), resampled(seconds)
        self.per_second_W = tokens_W / seconds_W
        self.tpot_W = seconds_W / steps_W * row_steps_W / tokens_W
        self.rows_busy = row_steps_W[0] / (batch_size * steps_W[0])
