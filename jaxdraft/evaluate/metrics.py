"""Block efficiency, acceptance, MBSU and their intervals, from counts per prompt.

Definitions: Direct Alignment (arXiv 2403.00858, section 4) and FastDraft (arXiv 2411.11055, section 2). Intervals are
percentile bootstraps over prompts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdraft.decode import Acceptance, SpeculativeResult, expected_blocks

RESAMPLES = 1000


def with_interval(name: str, statistic: Callable[[np.ndarray], float], count: int) -> dict[str, Any]:
    """``{name: value, name_ci95: [low, high]}`` of a statistic over prompts.

    Args:
      name: of the metric.
      statistic: maps indices of prompts, with repetition, to the metric pooled over them.
      count: of prompts. A single prompt says nothing about others: its interval is the value itself.
    """
    rng = np.random.default_rng(0)
    draws = [statistic(rng.integers(0, count, count)) for _ in range(RESAMPLES)] if count > 1 else []
    value = statistic(np.arange(count))
    finite = [draw for draw in draws if np.isfinite(draw)] or [value]
    low, high = np.percentile(finite, [2.5, 97.5])
    return {name: plain(value), f"{name}_ci95": [plain(low), plain(high)]}


def ratio_of_sums(above: Sequence[float], below: Sequence[float]) -> Callable[[np.ndarray], float]:
    """The statistic Σ above / Σ below; nan where the prompts have nothing below."""
    top, bottom = np.asarray(above, float), np.asarray(below, float)

    def statistic(chosen: np.ndarray) -> float:
        total = bottom[chosen].sum()
        return float(top[chosen].sum() / total) if total else float("nan")

    return statistic


def mbsu(block_efficiency: float, ratio: float, block_size: int) -> float:
    """Memory-bound speed-up: τ / (c γ + 1), c = parameters of the draft / of the target.

    Direct Alignment (section 4) prints c τ / (c γ + 1); with its own figures that is 0.04. The c above is a slip.
    """
    return block_efficiency / (ratio * block_size + 1)


def predicted_speedup(
    block_efficiency: float, block_size: int, draft: float, target_1: float, target_block: float
) -> float:
    """FastDraft's equation 2: τ / (γ l_D / l_T(1) + l_T(γ + 1) / l_T(1)), latencies in any one unit."""
    return block_efficiency / (block_size * draft / target_1 + target_block / target_1)


def acceptance_metrics(results: Sequence[SpeculativeResult], block_size: int, ratio: float) -> dict[str, Any]:
    """What the accepted counts of a decoding run say, pooled over prompts.

    Args:
      results: one per prompt.
      block_size: γ.
      ratio: c, parameters of the draft / of the target.
    """
    tokens = [len(r.tokens) for r in results]
    blocks = [len(r.accepted) for r in results]
    complete = [len(r.complete) for r in results]
    accepted = [sum(r.complete) for r in results]
    count = len(results)
    efficiency = ratio_of_sums(tokens, blocks)
    per_block = ratio_of_sums(accepted, complete)
    everything = np.asarray([a for r in results for a in r.complete])
    return {
        "prompts": count,
        "tokens": sum(tokens),
        "blocks": sum(blocks),
        **with_interval("acceptance_rate", lambda i: per_block(i) / block_size, count),
        **with_interval("block_efficiency", efficiency, count),
        **with_interval("block_efficiency_full", lambda i: 1 + per_block(i), count),
        **with_interval("mbsu", lambda i: mbsu(efficiency(i), ratio, block_size), count),
        "acceptance_by_position": [
            plain(float(np.mean(everything >= i))) if everything.size else None for i in range(1, block_size + 1)
        ],
    }


def offline_metrics(accepts: Sequence[np.ndarray], block_size: int) -> dict[str, Any]:
    """The exact expected block efficiency on the target's own text, without decoding, from each answer's a_j."""
    tokens = [len(accept_N) for accept_N in accepts]
    blocks = [expected_blocks(accept_N, block_size) for accept_N in accepts]
    return with_interval("block_efficiency_offline", ratio_of_sums(tokens, blocks), len(tokens))


def overlap_metrics(acceptances: Sequence[Acceptance]) -> dict[str, Any]:
    """Mean 1 − TVD over the positions of the target's own text."""
    sums = [a.overlap_N.sum() for a in acceptances]
    return with_interval("overlap", ratio_of_sums(sums, [len(a.overlap_N) for a in acceptances]), len(sums))


def plain(value: float) -> float | None:
    """JSON has no nan: what cannot be said is null."""
    return round(float(value), 6) if np.isfinite(value) else None
