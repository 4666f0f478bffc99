"""A draft for a target that somebody else trained: any Hugging Face folder, and any text it feels at home in.

    jaxdraft run tinystories --workdir runs/stories \\
        --set target.path=FOLDER_OF_THE_TARGET --set text.path=TEXT.txt

Pretrains a draft on the text, lets the target go on from passages the draft has not seen, distils with four losses
from the same start while block efficiency on held-out passages is logged, measures them, exports the last.

The draft's default shape (41,632 parameters with a vocabulary of 512) fits Karpathy's stories260K, for which this takes
two and a half minutes on two cores. Block efficiency there at γ 5 (seed 0, TinyStories' first megabyte), greedy and at
T 0.6: pretrained 1.82 and 1.64; with cross-entropy 3.05 and 2.26, KL 2.91 and 2.25, TVD 2.79 and 2.28, TVD++ 2.89 and
2.35. For a larger target make it larger, up to about a tenth of the target:
``--set draft.hidden_size=512 --set draft.intermediate_size=1408 --set draft.num_layers=4 --set draft.num_heads=8
--set draft.num_kv_heads=8``.
"""

from jaxdraft.data.passages import Beginnings, Passages
from jaxdraft.data.sources import Text
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import KL, TVD, CrossEntropy, TVDPlusPlus
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Evaluate, Export, Generate, HFModel, Prepare, Recipe, Reproduction, Train

LENGTH = 128
LOSSES = {"distill-ce": CrossEntropy(), "distill-kl": KL(), "distill-tvd": TVD(), "distill-tvdpp": TVDPlusPlus()}


def distil(name, loss):
    return Train(
        name,
        init="pretrain",
        data={"responses": 0.9, "corpus": 0.1},
        loss=loss,
        steps=400,
        batch_size=20,
        learning_rate=2e-3,
        final_learning_rate=2e-4,
        warmup_steps=20,
        save_every=200,
        keep_every=100,
        probe="probe",
    )


def recipe(*, target: HFModel, text: Text):
    held_out = Beginnings(Passages(text, split="eval"), limit=32)
    return Recipe(
        title="A draft for a target of TinyStories' size",
        description="The target is somebody else's; the draft is pretrained on the text given and distilled from it.",
        target=target,
        reproduces=(
            Reproduction(
                "fastdraft",
                "Table 3",
                rows={"CE": "distill-ce", "KL": "distill-kl", "TVD": "distill-tvd"},
                tasks={"tinystories": ("story", "story, sampled")},
            ),
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
                save_every=200,
            ),
            Generate(
                "responses",
                prompts=(Beginnings(Passages(text, split="seed"), limit=256),),
                temperatures=(0.0, 0.3, 0.7, 1.0),
                top_p=0.95,
                max_new_tokens=112,
                length=LENGTH,
                batch_size=64,
                shard_size=256,
            ),
            Generate(  # held out, at the temperatures of the tasks below
                "probe",
                prompts=(held_out,),
                temperatures=(0.0, 0.6),
                top_p=0.9,
                max_new_tokens=96,
                length=LENGTH,
                batch_size=64,
            ),
            *(distil(name, loss) for name, loss in LOSSES.items()),
            Evaluate(
                "evaluate",
                drafts=("pretrain", *LOSSES),
                tasks=(
                    Task("story", held_out, max_new_tokens=96),
                    Task("story, sampled", held_out, temperature=0.6, top_p=0.9, max_new_tokens=96),
                ),
                block_sizes=(3, 5),
                over_checkpoints=True,
            ),
            Export("export", draft="distill-tvdpp", evaluation="evaluate"),
        ),
    )
