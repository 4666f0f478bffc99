"""Block efficiency, acceptance, MBSU and their intervals, from counts per prompt.

Definitions: Direct Alignment (arXiv 2403.00858, section 4) and FastDraft (arXiv 2411.11055, section 2). Everything is
pooled over prompts. Intervals are 95 % percentile bootstraps over prompts, the same resamples for every metric.

Shapes: P prompts, N resamples, W = 1 + N: what all prompts give, then what each resample does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdraft.decode import Acceptance, SpeculativeResult, expected_blocks

RESAMPLES = 1000


def resampled(values_P: Sequence[float] | np.ndarray) -> np.ndarray:
    """Sums over all prompts and over N draws of P prompts with repetition, ``float64[W]``.

    The draws depend on P alone: of two counts of the same prompts they are the same, so that ratios and differences of
    sums have the right spread. A single prompt says nothing about others: all its sums are equal.
    """
    column_P = np.asarray(values_P, np.float64)
    count = max(1, len(column_P))
    draws_NP = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return np.concatenate([[column_P.sum()], draws_NP[:, : len(column_P)] @ column_P])


def ratio_of_sums(above_P: Sequence[float] | np.ndarray, below_P: Sequence[float] | np.ndarray) -> np.ndarray:
    """Σ above / Σ below, ``float64[W]``; nan where there is nothing below."""
    above_W, below_W = resampled(above_P), resampled(below_P)
    return np.divide(above_W, below_W, out=np.full_like(above_W, np.nan), where=below_W != 0)


def with_interval(name: str, values_W: np.ndarray, digits: int = 6) -> dict[str, Any]:
    """``{name: value, name_ci95: [low, high]}``, with so many digits after the point."""
    value, draws_N = values_W[0], values_W[1:]
    finite = draws_N[np.isfinite(draws_N)]
    low, high = np.percentile(finite if finite.size else [value], [2.5, 97.5])
    return {name: plain(value, digits), f"{name}_ci95": [plain(low, digits), plain(high, digits)]}


def mbsu(block_efficiency: Any, ratio: float, drafted: Any) -> Any:
    """Memory-bound speed-up: τ / (c γ + 1), c = parameters of the draft / of the target.

    Direct Alignment (section 4) prints c τ / (c γ + 1); with its own figures that is 0.04. The c above is a slip.

    Args:
      block_efficiency: τ.
      ratio: c; of anything else that a step costs, such as bytes read, it gives the speed-up that this would allow.
      drafted: γ, or the mean draft tokens of a block where their number adapts.
    """
    return block_efficiency / (ratio * drafted + 1)


def acceptance_metrics(results: Sequence[SpeculativeResult], block_size: int, ratio: float) -> dict[str, Any]:
    """What the accepted counts of a decoding run say.

    A block is complete if nothing of it was cut by an end token or the limit; the rates are of complete blocks.

    Args:
      results: one per prompt.
      block_size: γ.
      ratio: c, parameters of the draft / of the target.
    """
    tokens, blocks = [len(r.tokens) for r in results], [len(r.accepted) for r in results]
    complete, accepted = [len(r.complete) for r in results], [sum(r.complete) for r in results]
    proposed = [sum(r.drafted[: len(r.complete)]) for r in results]
    efficiency_W = ratio_of_sums(tokens, blocks)
    drafted_W = ratio_of_sums([sum(r.drafted) for r in results], blocks)
    positions = [
        with_interval("share", ratio_of_sums([sum(a >= i for a in r.complete) for r in results], complete))
        for i in range(1, block_size + 1)
    ]
    return {
        "prompts": len(results),
        "tokens": sum(tokens),
        "blocks": sum(blocks),
        **with_interval("acceptance_rate", ratio_of_sums(accepted, proposed)),
        **with_interval("block_efficiency", efficiency_W),
        **with_interval("block_efficiency_full", 1 + ratio_of_sums(accepted, complete)),
        **with_interval("mbsu", mbsu(efficiency_W, ratio, drafted_W)),
        "acceptance_by_position": [found["share"] for found in positions],
        "acceptance_by_position_ci95": [found["share_ci95"] for found in positions],
    }


def offline_metrics(accepts: Sequence[np.ndarray], block_size: int) -> dict[str, Any]:
    """The exact expected block efficiency on the target's own text, without decoding, from each answer's a_j."""
    return with_interval("block_efficiency_offline", offline_efficiency(accepts, block_size))


def offline_efficiency(accepts: Sequence[np.ndarray], block_size: int) -> np.ndarray:
    """Σ tokens / Σ expected blocks, ``float64[W]``."""
    tokens = [len(accept_N) for accept_N in accepts]
    return ratio_of_sums(tokens, [expected_blocks(accept_N, block_size) for accept_N in accepts])


def overlap_metrics(acceptances: Sequence[Acceptance]) -> dict[str, Any]:
    """Mean 1 − TVD over the positions of the target's own text."""
    sums = [a.overlap_N.sum() for a in acceptances]
    return with_interval("overlap", ratio_of_sums(sums, [len(a.overlap_N) for a in acceptances]))


def plain(value: float, digits: int = 6) -> float | None:
    """JSON has no nan: what cannot be said is null."""
    return round(float(value), digits) if np.isfinite(value) else None
