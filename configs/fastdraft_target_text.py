"""Fine-tuning on the target's own answers or on the data set's: Table 2 of FastDraft (arXiv 2411.11055, 5.4).

    jaxdraft run fastdraft_target_text --workdir runs/fastdraft_target_text-full
    jaxdraft run fastdraft_target_text --workdir runs/fastdraft_target_text --set scale=small

What it takes: 1.4 hours on eight H100, by `jaxdraft plan fastdraft_target_text --hardware 8xH100`: 1.3 for the answers
at most, 0.11 to pretrain, under 0.01 for each fine-tuning, 0.05 to evaluate; storage 32 GB.

The draft pretrained on 5 B tokens, fine-tuned with cross-entropy on OIG-small-chip2 as it is, and on what the target
answers to its questions at T 0.6; as many updates of both. The paper's numbers, acceptance at γ 3, greedy, for none,
original and target: CNN/DailyMail 0.350, 0.357, 0.378; TinyStories 0.295, 0.282, 0.296; Dolly 0.259, 0.328, 0.370. What
differs is what `fastdraft_phi3_50m` says; small, "original" is what Python's authors wrote at the same places, as much
of it as a row holds.
"""

import _fastdraft as fd
import _python as small

from jaxdraft.recipe import Recipe, Train

DATA = {"Original": "originals", "Target": "responses"}


def recipe(*, scale: fd.Scale = "full", seeds: int | None = None):
    size = fd.size_of(scale)
    drafts: list[Train] = []
    for seed in small.seeds_of(seeds, size.seeds):
        drafts.append(fd.train(size, "pretrain", seed, "text", billions=5))
        drafts += [
            fd.finetune(size, f"on-{data}", seed, data, size.finetune_steps, f"pretrain-{seed}")
            for data in DATA.values()
        ]
    rows = {"None": "pretrain", **{row: f"on-{data}" for row, data in DATA.items()}}
    return Recipe(
        title="FastDraft: whose answers",
        description="arXiv 2411.11055, section 5.4: fine-tuning on original answers or on the target's.",
        target=size.target,
        draft=size.drafts["50M"],
        reproduces=(fd.shown(size, "Table 2", rows, fd.LANGUAGE),),
        stages=(
            fd.rows(size, "text", 5),
            size.originals,
            fd.answers(size, "responses", size.oig, (0.6,)),
            *drafts,
            fd.evaluate(size, drafts, fd.LANGUAGE),
        ),
    )
