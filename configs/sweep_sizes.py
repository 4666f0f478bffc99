"""Drafts from 1 to 20 % of the target: which size is fastest? Open question 3 of Direct Alignment (arXiv 2403.00858).

    jaxdraft run sweep_sizes --workdir runs/sweep_sizes
    jaxdraft run sweep_sizes --workdir runs/sweep_sizes_babyllama --set pretrain_steps=1500 --set distil_steps=400 \\
        --set target.path=FOLDER/babyllama-tok361-hf --set text=TEXT.txt

A larger draft agrees with its target more often, so block efficiency τ grows with c, the draft's share of the target's
parameters; each of its γ runs in a block takes longer as well. If time goes by parameters the speed-up is MBSU,
τ / (c γ + 1); on a machine it is τ over the latencies that are measured there (FastDraft, arXiv 2411.11055, Eq. 2), of
which even the smallest draft has one. All sizes are pretrained and distilled alike (TVD++, stored targets), ``seeds``
times, and measured at batch 1. ``report/sizes.csv`` has c, τ, MBSU, measured and predicted speed-up at each draft's
best γ, and the report a table and a figure of them with the optimum. Run it with nothing else on the machine. The
second command does it for a target of a million parameters that somebody else trained; the sizes are then 3 to 50 % of
it. What both said stands in ``configs/RESULTS.md``.
"""

import _python as small
import _sweep as sweep

from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Evaluate, HFModel, Recipe

SIZES = ((32, 1), (64, 1), (96, 1), (128, 1), (192, 1))  # width and layers, from 1.5 % of the small target up


def shape(hidden_size: int, layers: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=5 * hidden_size // 2,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=2,
    )


def recipe(
    *,
    target: HFModel = small.TARGET,
    text: str | None = None,
    pretrain_steps: int = 800,
    distil_steps: int = 250,
    seeds: int = 3,
):
    ground = sweep.ground(text, limit=12)
    shapes = {"h{}l{}".format(*size): shape(*size) for size in SIZES}
    drafts = sweep.shaped(shapes, seeds, pretrain_steps, distil_steps)
    return Recipe(
        title="How large should a draft be?",
        description="Drafts from 1 to 20 % of the target, pretrained and distilled alike: speed-up against size.",
        target=target,
        draft=shape(*SIZES[0]),
        stages=(
            sweep.rows(ground.text),
            sweep.answers("responses", ground.prompts),
            *drafts,
            Evaluate(
                "evaluate",
                drafts=tuple(draft.name for draft in drafts if draft.init != "random"),
                tasks=ground.tasks[::2],  # "open" and "code"
                block_sizes=(1, 3, 5),
                repeats=3,
            ),
        ),
    )
