"""Every loss on one pretrained draft of a target that somebody else trained, three seeds, dense and stored targets.

    jaxdraft run loss_comparison --workdir runs/loss_comparison \\
        --set target.path=FOLDER_OF_THE_TARGET --set text.path=TEXT.txt

Pretrains a draft on the text, lets the target write from held-out passages at temperatures 0 and 1, distils the same
draft with every loss, each with the target in the loop ("live") and from its 8 and 32 most likely tokens ("top8",
"top32"), and measures all of them at both temperatures. ``report/comparison.csv`` is the table: seeds pooled, intervals
over prompts and seeds.

The draft's default shape (41,632 parameters with a vocabulary of 512) fits Karpathy's stories260K. For the
character-level target of a million parameters of the README: ``--set draft.hidden_size=48 --set
draft.intermediate_size=128 --set steps=100``. Each takes about an hour on one core.
"""

from jaxdraft.data.passages import Beginnings, Passages
from jaxdraft.data.sources import Text
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import (
    DPACE,
    JSD,
    KL,
    TVD,
    AdaSPEC,
    CrossEntropy,
    LKHybrid,
    LogAcceptance,
    Mixture,
    ReverseKL,
    TVDPlusPlus,
    TVDPlusPlusGlobal,
    TVDPlusPlusLiteral,
    TVDPlusPlusSampled,
)
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Evaluate, Generate, HFModel, Prepare, Recipe, Reproduction, Score, TopK, Train

LENGTH = 128
LOSSES = {
    "ce": CrossEntropy(),
    "kl": KL(),
    "reverse_kl": ReverseKL(),
    "jsd": JSD(),
    "tvd": TVD(),
    "tvdpp": TVDPlusPlus(),
    "tvdpp_global": TVDPlusPlusGlobal(),
    "tvdpp_literal": TVDPlusPlusLiteral(),
    "tvdpp_sampled": TVDPlusPlusSampled(),
    "log_acceptance": LogAcceptance(),
    "lk_hybrid": LKHybrid(),
    "ce_kl": Mixture(terms=((0.5, CrossEntropy()), (0.5, KL()))),
    "ce_tvd": Mixture(terms=((0.5, CrossEntropy()), (0.5, TVD()))),
    "tvd_kl": Mixture(terms=((1.0, TVD()), (0.1, KL()))),
    "tvdpp_dpace": TVDPlusPlus(weights=DPACE()),
    "kl_adaspec": KL(weights=AdaSPEC()),
}
# Its losses, and the first seed of those here: the report pools all seeds.
TABLE_3 = {
    "CE": "ce-live-0",
    "0.5 CE + 0.5 KL": "ce_kl-top32-0",
    "0.5 CE + 0.5 TVD": "ce_tvd-top32-0",
    "KL": "kl-top32-0",
    "TVD": "tvd-top32-0",
}
STORED = {"top8": TopK(8), "top32": TopK(32)}


def distil(name: str, kept: str, seed: int, steps: int) -> Train:
    return Train(
        f"{name}-{kept}-{seed}",
        init="pretrain",
        data="responses" if kept == "live" else kept,
        target_logits="live" if kept == "live" else "stored",
        reference=f"kl-{kept}-{seed}" if name == "kl_adaspec" else None,
        loss=LOSSES[name],
        seed=seed,
        steps=steps,
        batch_size=16,
        learning_rate=2e-3,
        final_learning_rate=2e-4,
        warmup_steps=steps // 20,
        save_every=steps,
        probe="probe",
        probe_every=steps,
    )


def recipe(*, target: HFModel, text: Text, steps: int = 200, seeds: int = 3):
    held_out = Beginnings(Passages(text, split="eval"), limit=32)
    drafts = tuple(
        distil(name, kept, seed, steps)
        for seed in range(seeds)
        for kept in ("live", *STORED)
        for name, loss in LOSSES.items()
        if kept == "live" or loss.needs_target
    )
    return Recipe(
        title="Every loss, one draft",
        description="The same pretrained draft, distilled from the same answers of the target with every loss.",
        target=target,
        reproduces=(
            Reproduction("fastdraft", "Table 3", rows=TABLE_3, tasks={"tinystories": ("story", "story, sampled")}),
        ),
        draft=ModelConfig(hidden_size=32, intermediate_size=88, num_layers=2, num_heads=4, num_kv_heads=4),
        stages=(
            Prepare("corpus", sources=(Passages(text),), length=LENGTH),
            Train(
                "pretrain",
                data="corpus",
                loss=CrossEntropy(),
                steps=600,
                batch_size=16,
                learning_rate=3e-3,
                final_learning_rate=3e-4,
                warmup_steps=30,
                save_every=600,
            ),
            Generate(
                "responses",
                prompts=(Beginnings(Passages(text, split="seed"), limit=512),),
                temperatures=(0.0, 1.0),
                top_p=1.0,
                max_new_tokens=112,
                length=LENGTH,
                batch_size=64,
            ),
            Generate(
                "probe",
                prompts=(held_out,),
                temperatures=(0.0, 1.0),
                top_p=1.0,
                max_new_tokens=96,
                length=LENGTH,
            ),
            *(Score(name, data="responses", keep_logits=keep) for name, keep in STORED.items()),
            *drafts,
            Evaluate(
                "evaluate",
                drafts=("pretrain", *(draft.name for draft in drafts)),
                tasks=(
                    Task("story", held_out, max_new_tokens=96),
                    Task("story, sampled", held_out, temperature=1.0, max_new_tokens=96),
                ),
                block_sizes=(3, 5),
                batch_sizes=(32,),
                repeats=1,
            ),
        ),
    )
