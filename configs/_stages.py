"""The stages of FastDraft (arXiv 2411.11055, section 6): pretraining, continued pretraining, fine-tuning."""

import _fastdraft as fd
import _python as small

from jaxdraft.data.magpie import Magpie
from jaxdraft.recipe import Export, Recipe, Reproduction, Train, Written


def stages_of(size: fd.Size, draft: str, title: str, reproduces: tuple[Reproduction, ...], seeds: int | None) -> Recipe:
    """5 BT of text; 5 BT of code with 2.5 BT of text; cross-entropy on what the target answers."""
    written = (fd.answers(size, "instructions", (Magpie(size.magpie),), (1.0,)),) if size.magpie else ()
    prompts = (*size.alignment, *(Written("instructions") for _ in written))
    drafts: list[Train] = []
    for seed in small.seeds_of(seeds, size.seeds):
        mixed = fd.mix(size, {"code": 5, "text-2500M": 2.5})
        mixing = size._replace(batch_size=size.mixed_batch_size)
        drafts += [
            fd.train(size, "pretrain", seed, "text", billions=5),
            fd.train(mixing, "continue", seed, mixed, billions=7.5, init=f"pretrain-{seed}"),
            fd.finetune(size, "finetune", seed, "responses", size.align_steps, f"continue-{seed}"),
        ]
    return Recipe(
        title=title,
        description="arXiv 2411.11055: pretrained on text, then on code with text, then on the target's own answers.",
        target=size.target,
        draft=size.drafts[draft],
        reproduces=reproduces,
        stages=(
            fd.rows(size, "text", 5),
            fd.rows(size, "code", 5),
            fd.sample(size, "text", 2.5),
            *written,
            fd.answers(size, "responses", prompts, (0.0, 0.6, 0.8, 1.0)),
            *drafts,
            fd.evaluate(size, drafts, perplexity=size.perplexity),
            Export("export", draft="finetune-0", dtype="bfloat16", evaluation="evaluate"),
        ),
    )


def of_tables(size: fd.Size, prefix: str) -> tuple[Reproduction, ...]:
    """Tables 4 and 14, the stages of one draft."""
    rows = {f"{prefix}, PT": "pretrain", f"{prefix}, CP": "continue", f"{prefix}, FT": "finetune"}
    return fd.shown(size, "Table 4", rows), fd.shown(size, "Table 14", rows)
