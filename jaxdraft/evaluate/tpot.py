"""Time per output token as FastDraft models it: latencies of single steps, and the speed-up they foretell.

FastDraft (arXiv 2411.11055, equations 1 and 2): TPOT_SD = (γ l_D + l_T(γ + 1)) / τ, TPOT_AR = l_T(1), and the speed-up
is TPOT_AR / TPOT_SD. The steps are timed as the decoders take them: with a cache of the same size, and, where a task is
sampled, with the distribution and the draw.

What is measured beside it, ``tpot`` and ``tpot_autoregressive``, is of the decoders' own loops, prefill and compilation
outside: seconds of a step of the loop / tokens that a row gets from it. It is what an answer waits for each of its
tokens while it is written, however long others in its batch take. At batch size 1 it is the reciprocal of tokens per
second.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdraft.decode import Sampling, step_latency
from jaxdraft.decode.batching import bucket_length
from jaxdraft.evaluate.measure import Model, Work
from jaxdraft.evaluate.metrics import plain

Recall = Callable[[Mapping[str, Any], Callable[[], Any]], Any]
"""What was found before for a description, or what the function finds now."""


def predicted_speedup(
    block_efficiency: float, drafted: float, draft: float, target_1: float, target_block: float
) -> float:
    """FastDraft's equation 2: τ / (γ l_D / l_T(1) + l_T(γ + 1) / l_T(1)), latencies in any one unit.

    Args:
      block_efficiency: τ.
      drafted: γ, or the mean draft tokens of a block where their number adapts.
      draft: l_D.
      target_1: l_T(1).
      target_block: l_T(γ + 1).
    """
    return block_efficiency / (drafted * draft / target_1 + target_block / target_1)


@dataclasses.dataclass(frozen=True, eq=False)
class Latencies:
    """Seconds of the steps of one pair, each timed when it is first asked for, and then kept.

    Attributes:
      target_model: the target.
      draft_model: the draft.
      work: what is decoded: its batch size, its sampling, and the size of a cache for most of its prompts.
      recall: keeps what was found.
    """

    target_model: Model
    draft_model: Model
    work: Work
    recall: Recall

    def target(self, width: int) -> float:
        """l_T(width): the target reads ``width`` tokens of each row, and makes logits at all of them."""
        return self._step(self.target_model, width, last_only=False)

    def draft(self, block_size: int) -> float:
        """l_D: what a block's proposals take, for each of them.

        The first step reads two tokens, because a block accepted in full leaves the last of its drafts unread; the
        others read one. All make logits for one token. So this is (l(2) + (γ - 1) l(1)) / γ.
        """
        first = self._step(self.draft_model, 2, last_only=True)
        others = self._step(self.draft_model, 1, last_only=True) if block_size > 1 else 0.0
        return (first + (block_size - 1) * others) / block_size

    def predict(self, block_efficiency: float, block_size: int) -> float:
        """The speed-up of equation 2."""
        latencies = self.draft(block_size), self.target(1), self.target(block_size + 1)
        return predicted_speedup(block_efficiency, block_size, *latencies)

    def _step(self, model: Model, width: int, last_only: bool) -> float:
        batch, task, config = self.work.batch_size, self.work.task, model.decoder.config
        buckets = [bucket_length(len(prompt.tokens)) for prompt in self.work.prompts]
        slots = max(set(buckets), key=lambda size: (buckets.count(size), size)) + task.max_new_tokens
        of = {
            "kind": "latency",
            "model": hashlib.sha256(repr(config).encode()).hexdigest()[:16],
            "batch_size": batch,
            "width": width,
            "slots": slots,
            "last_only": last_only and width > 1,
            **({} if task.temperature == 0 else self.work.sampling),
        }
        sampling = None
        if task.temperature:
            kinds = {"temperature": np.float32, "top_p": np.float32, "top_k": np.int32}
            sampling = Sampling(*(np.full(batch, getattr(task, name), kind) for name, kind in kinds.items()))
        shape = {"batch": batch, "width": width, "slots": slots, "sampling": sampling, "last_only": of["last_only"]}
        return float(self.recall(of, lambda: step_latency(model.decoder, model.params, **shape)))


def curve(latencies: Latencies, efficiency: Callable[[int], float], block_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The predicted speed-up over block sizes; 0 is the target alone.

    Args:
      latencies: of the pair.
      efficiency: block efficiency at each block size, such as the offline one, which costs no decoding.
      block_sizes: γ.
    """
    points: list[dict[str, Any]] = [{"block_size": 0, "block_efficiency": 1.0, "predicted_speedup": 1.0}]
    for block_size in block_sizes:
        found = efficiency(block_size)
        points.append(
            {
                "block_size": block_size,
                "block_efficiency": plain(found),
                "predicted_speedup": plain(latencies.predict(found, block_size)),
            }
        )
    return points
