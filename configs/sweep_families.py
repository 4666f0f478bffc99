"""Drafts of four families' shapes, with equally many parameters, for one target: open question 2 of Direct Alignment.

    jaxdraft run sweep_families --workdir runs/sweep_families
    jaxdraft run sweep_families --workdir runs/sweep_families_characters --set hidden_size=48 \\
        --set target.path=FOLDER/babyllama-tok361-hf --set text=TEXT.txt

It asks whether the framework (arXiv 2403.00858) carries over from Llama 2 to other families, and whether a draft should
be of its target's. Families of decoders differ in little: Llama 2 has as many key/value heads as query heads; Mistral
half of them here, and a sliding window; Qwen2 so many too, with biases on queries, keys and values and a larger rotary
base; Phi-3 is Llama with a window, its projections fused in files only. What grouped queries save, a wider MLP takes.
Encoders and encoder-decoders (BERT, T5) do not write token by token as targets of speculative decoding do.

Each is pretrained, distilled with TVD++ from stored targets and measured, ``seeds`` times. The second
command does it for a target that reads characters, of 361 tokens: there a token says less, and more are accepted.
``report/comparison.csv`` is the table: seeds pooled. What both said stands in ``configs/RESULTS.md``.
"""

from typing import Any

import _python as small
import _sweep as sweep

from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Evaluate, HFModel, Recipe

WINDOW = 64  # tokens, a third of a row


def shapes(hidden_size: int) -> dict[str, ModelConfig]:
    """One layer each: what half the key/value heads save, a third of the width, goes into the MLP."""
    all_heads: dict[str, Any] = {"intermediate_size": 5 * hidden_size // 2, "num_kv_heads": 2}
    grouped: dict[str, Any] = {"intermediate_size": 17 * hidden_size // 6, "num_kv_heads": 1}
    common: dict[str, Any] = {"hidden_size": hidden_size, "num_layers": 1, "num_heads": 2}
    return {
        "llama": ModelConfig(**common, **all_heads),
        "phi3": ModelConfig(**common, **all_heads, family="phi3", sliding_window=WINDOW),
        "mistral": ModelConfig(**common, **grouped, family="mistral", sliding_window=WINDOW),
        "qwen2": ModelConfig(**common, **grouped, family="qwen2", qkv_bias=True, rope_theta=1e6),
    }


def recipe(
    *,
    target: HFModel = small.TARGET,
    text: str | None = None,
    hidden_size: int = 96,
    pretrain_steps: int = 1000,
    distil_steps: int = 400,
    seeds: int = 3,
):
    ground, families = sweep.ground(text), shapes(hidden_size)
    drafts = sweep.shaped(families, seeds, pretrain_steps, distil_steps)
    return Recipe(
        title="Does the family of a draft matter?",
        description="Drafts of four families' shapes and of equally many parameters, pretrained and distilled alike.",
        target=target,
        draft=families["llama"],
        stages=(
            sweep.rows(ground.text),
            sweep.answers("responses", ground.prompts),
            *drafts,
            Evaluate(
                "evaluate",
                drafts=tuple(draft.name for draft in drafts if draft.init != "random"),
                tasks=ground.tasks,
                block_sizes=(3,),
                batch_sizes=(8,),
                repeats=1,
                predict_up_to=0,
            ),
        ),
    )
