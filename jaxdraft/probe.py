"""Block efficiency while a draft learns: exact and without decoding, on what the target wrote.

The target's text, and with it q(x_j), stays the same while the draft changes: the target reads it once, and each
measurement is a pass of the draft alone (``jaxdraft.decode.offline``).

Shapes: N new tokens.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdraft.context import Context
from jaxdraft.decode import acceptance, token_probabilities
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.metrics import offline_metrics
from jaxdraft.evaluate.words import decoding
from jaxdraft.models import Decoder, ModelConfig
from jaxdraft.models.decoder import Params
from jaxdraft.recipe import TARGET, Generate, Train
from jaxdraft.tracking import read_jsonl


def probe(
    stage: Train, context: Context, target: tuple[ModelConfig, Params], draft: Decoder
) -> Callable[[Params], list[dict[str, Any]]] | None:
    """What measures the draft's parameters: a line for each temperature and block size.

    Args:
      stage: the stage in which the draft learns.
      context: recipe and run directory.
      target: the model that wrote the answers, stacked; it is not kept.
      draft: the model that learns, of either kind.

    Returns:
      ``None`` where the stage measures nothing.

    Raises:
      ConfigError: the target wrote none of the answers of the stage that ``probe`` names.
    """
    generate = context.recipe.probe(stage)
    if generate is None:
        return None
    lines = first_answers(context.folder(generate.name), generate, stage.probe_limit)
    if not lines:
        if stage.probe is None:
            return None
        raise ConfigError(f"{stage.name}: the target wrote no answer of {stage.probe!r}: name another stage as probe")
    given: dict[str, Any] = {
        "prompts": [line["prompt_tokens"] for line in lines],
        "answers": [line["tokens"] for line in lines],
        "temperature": [line["temperature"] for line in lines],
        "top_p": [line["top_p"] for line in lines],
        "max_new_tokens": generate.max_new_tokens,
    }
    config, target_params = target
    found = token_probabilities(Decoder(config), target_params, **given)
    # Greedy text is the target's most likely whatever the rounding of this pass makes of it.
    q = [q_N if line["temperature"] else np.ones_like(q_N) for line, q_N in zip(lines, found, strict=True)]
    groups: dict[tuple[float, float], list[int]] = {}
    for i, line in enumerate(lines):
        groups.setdefault((line["temperature"], line["top_p"]), []).append(i)

    def measure(params: Params) -> list[dict[str, Any]]:
        accepts = list(map(acceptance, token_probabilities(draft, params, **given), q))
        return [
            {
                "temperature": temperature,
                "top_p": top_p,
                "block_size": block_size,
                **offline_metrics([accepts[i] for i in rows], block_size),
                "prompts": len(rows),
                "tokens": sum(len(accepts[i]) for i in rows),
            }
            for (temperature, top_p), rows in groups.items()
            for block_size in stage.probe_block_sizes
        ]

    return measure


def first_answers(folder: Path, generate: Generate, limit: int) -> list[dict[str, Any]]:
    """The target's answers to the first questions, ``limit`` of each temperature; files are in another order."""
    found: dict[float, list[dict[str, Any]]] = {temperature: [] for temperature in generate.temperatures}
    for path in sorted(folder.glob("responses-*.jsonl")):
        for line in read_jsonl(path):
            if line["writer"] == TARGET and "error" not in line:
                found.setdefault(line["temperature"], []).append(line)
        found = {key: heapq.nsmallest(limit, lines, lambda line: line["number"]) for key, lines in found.items()}
    return [line for lines in found.values() for line in lines]


def efficiency_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The last block efficiency at the largest block size, for the stage's record; empty where none was measured."""
    if not lines:
        return {}
    last, largest = lines[-1]["step"], max(line["block_size"] for line in lines)
    shown = [line for line in lines if (line["step"], line["block_size"]) == (last, largest)]
    values = [f"{line['block_efficiency_offline']:.2f} ({decoding(line)})" for line in shown]
    return {f"block efficiency at γ {largest}": ", ".join(values)}
