"""Block efficiency while a draft learns: exact and without decoding, on what the target wrote; and by decoding.

The target's text, and with it q(x_j), stays the same while the draft changes: the target reads it once, and each
measurement is a pass of the draft alone (``jaxdraft.decode.offline``). A few of the same questions may be answered anew
by speculative decoding, with the draft as it is: what was said about it, seen to happen.

Shapes: N new tokens.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdraft.context import Context
from jaxdraft.data.prompts import example_id
from jaxdraft.decode import Speculation, SpeculativeResult, acceptance, speculative_generate, token_probabilities
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Model
from jaxdraft.evaluate.metrics import offline_metrics, ratio_of_sums, with_interval
from jaxdraft.evaluate.words import decoding
from jaxdraft.models import Decoder, ModelConfig
from jaxdraft.models.decoder import Params
from jaxdraft.recipe import TARGET, Generate, Train
from jaxdraft.tracking import read_jsonl

Line = dict[str, Any]


def probe(
    stage: Train, context: Context, target: tuple[ModelConfig, Params], draft: Decoder
) -> Callable[[Params], list[Line]] | None:
    """What measures the draft's parameters: a line for each temperature and block size.

    Args:
      stage: the stage in which the draft learns.
      context: recipe and run directory.
      target: the model that wrote the answers, stacked; it is kept only to decode with.
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
    again = {i: lines[i] for rows in groups.values() for i in rows[: stage.probe_decode]}
    decode = _decoding(stage, context, generate, target, draft, again)

    def measure(params: Params) -> list[Line]:
        accepts = list(map(acceptance, token_probabilities(draft, params, **given), q))
        results = decode(params)
        return [
            {
                "temperature": temperature,
                "top_p": top_p,
                "block_size": block_size,
                **offline_metrics([accepts[i] for i in rows], block_size),
                "prompts": len(rows),
                "tokens": sum(len(accepts[i]) for i in rows),
                **_decoded([results[block_size, i] for i in rows[: stage.probe_decode]]),
            }
            for (temperature, top_p), rows in groups.items()
            for block_size in stage.probe_block_sizes
        ]

    return measure


def _decoding(
    stage: Train,
    context: Context,
    generate: Generate,
    target: tuple[ModelConfig, Params],
    draft: Decoder,
    lines: Mapping[int, Line],
) -> Callable[[Params], dict[tuple[int, int], SpeculativeResult]]:
    """What answers the questions of ``lines`` anew with the draft's parameters: by block size and key of the line.

    On the mesh that trains, whose weights stay where they are: both models are unstacked for the time of a look. With
    the same random numbers every time, so that from one look to the next only the draft differs.
    """
    if not lines:
        return lambda params: {}
    config, target_params = target
    asked = lines.values()
    prompts = [line["prompt_tokens"] for line in asked]
    settings: dict[str, Any] = {
        "max_new_tokens": [_limit(line, generate.max_new_tokens, config.max_positions) for line in asked],
        "temperature": [line["temperature"] for line in asked],
        "top_p": [line["top_p"] for line in asked],
        "seed": context.seed(stage),
        "example_ids": [example_id(line["id"]) for line in asked],
        "batch_size": min(len(lines), generate.batch_size),
    }

    def decode(params: Params) -> dict[tuple[int, int], SpeculativeResult]:
        big = Model.create("target", config, target_params, context.mesh)
        small = Model.create("draft", draft.config, params, context.mesh)
        models, found = (big.decoder, big.params, small.decoder, small.params), {}
        for block_size in stage.probe_block_sizes:
            results = speculative_generate(*models, prompts, speculation=Speculation(block_size), **settings)
            found.update({(block_size, i): result for i, result in zip(lines, results, strict=True)})
        return found

    return decode


def _limit(line: Line, usual: int, positions: int) -> int:
    """The new tokens that an answer was allowed; its prompt may have had a limit of its own, which no line tells."""
    written = len(line["tokens"])
    return written if line["finish"] == "length" else max(written, min(usual, positions - len(line["prompt_tokens"])))


def _decoded(results: Sequence[SpeculativeResult]) -> Line:
    """Tokens per run of the target with their interval, and what they were counted on; empty without results."""
    if not results:
        return {}
    tokens, blocks = [len(r.tokens) for r in results], [len(r.accepted) for r in results]
    return {
        **with_interval("block_efficiency", ratio_of_sums(tokens, blocks)),
        "decoded_prompts": len(results),
        "decoded_tokens": sum(tokens),
        "decoded_blocks": sum(blocks),
    }


def first_answers(folder: Path, generate: Generate, limit: int) -> list[dict[str, Any]]:
    """The target's answers to the first questions, ``limit`` of each temperature; files are in another order."""
    found: dict[float, list[dict[str, Any]]] = {temperature: [] for temperature in generate.temperatures}
    for path in sorted(folder.glob("responses-*.jsonl")):
        for line in read_jsonl(path):
            if line["writer"] == TARGET and "error" not in line:
                found.setdefault(line["temperature"], []).append(line)
        found = {key: heapq.nsmallest(limit, lines, lambda line: line["number"]) for key, lines in found.items()}
    return [line for lines in found.values() for line in lines]


def efficiency_summary(lines: Sequence[Line]) -> dict[str, str]:
    """The last block efficiency at the largest block size, for the stage's record; empty where none was measured."""
    if not lines:
        return {}
    last, largest = lines[-1]["step"], max(line["block_size"] for line in lines)
    shown = [line for line in lines if (line["step"], line["block_size"]) == (last, largest)]
    names = {"block efficiency": "block_efficiency_offline", "decoded block efficiency": "block_efficiency"}
    return {
        f"{name} at γ {largest}": ", ".join(f"{line[key]:.2f} ({decoding(line)})" for line in shown)
        for name, key in names.items()
        if key in shown[0]
    }
