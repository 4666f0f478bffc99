"""Cross-entropy on the target's text, or its distribution as well: Table 3 of FastDraft (arXiv 2411.11055, 5.5).

    jaxdraft run fastdraft_losses --workdir runs/fastdraft_losses-full
    jaxdraft run fastdraft_losses --workdir runs/fastdraft_losses --set scale=small

What it takes: 1.5 hours on eight H100, by `jaxdraft plan fastdraft_losses --hardware 8xH100`: 1.3 for the answers at
most, 0.11 to pretrain, under 0.01 for each of five fine-tunings, 0.09 to evaluate; storage 77 GB, 43 of them logits.

The draft pretrained on 5 B tokens, fine-tuned on what the target answers to OIG-small-chip2 at T 0.6, with
cross-entropy, KL, TVD and halves of each with cross-entropy, from the target's 32 most likely tokens stored beside the
text ("a small subset", which the paper does not number); what they leave is one more token's. The paper's numbers,
acceptance on Dolly at γ 3, greedy, for CE, CE + KL, CE + TVD, KL and TVD: 0.370, 0.368, 0.370, 0.371, 0.362; at T 0.6:
0.352, 0.346, 0.347, 0.343, 0.344. What differs is what `fastdraft_phi3_50m` says. `loss_comparison` has every loss
there is.
"""

import _fastdraft as fd
import _python as small

from jaxdraft.losses import KL, TVD, CrossEntropy, Mixture
from jaxdraft.recipe import Recipe, TopK, Train

LOSSES = {
    "CE": ("ce", CrossEntropy()),
    "0.5 CE + 0.5 KL": ("ce_kl", Mixture(terms=((0.5, CrossEntropy()), (0.5, KL())))),
    "0.5 CE + 0.5 TVD": ("ce_tvd", Mixture(terms=((0.5, CrossEntropy()), (0.5, TVD())))),
    "KL": ("kl", KL()),
    "TVD": ("tvd", TVD()),
}


def recipe(*, scale: fd.Scale = "full", seeds: int | None = None):
    size = fd.size_of(scale)
    drafts: list[Train] = []
    for seed in small.seeds_of(seeds, size.seeds):
        drafts.append(fd.train(size, "pretrain", seed, "text", billions=5))
        drafts += [
            fd.finetune(
                size,
                name,
                seed,
                "responses",
                size.finetune_steps,
                f"pretrain-{seed}",
                loss,
                target_logits="stored" if loss.needs_target else "live",
            )
            for name, loss in LOSSES.values()
        ]
    rows = {row: name for row, (name, _) in LOSSES.items()}
    return Recipe(
        title="FastDraft: cross-entropy or distributions",
        description="arXiv 2411.11055, section 5.5: sequence-level against token-level distillation.",
        target=size.target,
        draft=size.drafts["50M"],
        reproduces=(fd.shown(size, "Table 3", rows, fd.LANGUAGE),),
        stages=(
            fd.rows(size, "text", 5),
            fd.answers(size, "responses", size.oig, (0.6,), keep=TopK(32)),
            *drafts,
            fd.evaluate(size, drafts, fd.LANGUAGE),
        ),
    )
