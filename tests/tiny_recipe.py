"""A recipe of every kind of stage, small enough for a test: minutes of the quickstart in seconds."""

from jaxdraft.data.stdlib import PythonLibrary, PythonTask
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import CrossEntropy, TVDPlusPlus
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import DraftVocabulary, Evaluate, Export, Generate, Prepare, Recipe, TopK, Train, TrainTokenizer

TEXT = (PythonLibrary("text", limit=60),)


def recipe(*, steps: int = 6, questions: int = 6):
    prompts = PythonTask("open", split="eval", limit=3, max_tokens=100)
    return Recipe(
        title="Tiny",
        tokenizer="tokenizer",
        target="target",
        draft=ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1),
        stages=(
            TrainTokenizer("tokenizer", sources=TEXT, vocab_size=400),
            Prepare("corpus", sources=TEXT, length=64),
            Train(
                "target",
                model=ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2),
                data="corpus",
                loss=CrossEntropy(),
                steps=steps,
                batch_size=8,
                learning_rate=1e-2,
                save_every=2,
            ),
            Train("pretrain", data="corpus", loss=CrossEntropy(), steps=steps, batch_size=10, save_every=2),
            Generate(
                "responses",
                prompts=(PythonTask("open", split="seed", limit=questions, max_tokens=100),),
                length=64,
                temperatures=(0.0, 1.0),
                max_new_tokens=16,
                batch_size=4,
                shard_size=4,
                keep_logits=TopK(4),
            ),
            DraftVocabulary("vocabulary", data="responses", size=48),
            Train(
                "distill",
                init="pretrain",
                draft_vocabulary="vocabulary",
                data={"responses": 0.2, "corpus": 0.8},
                loss=TVDPlusPlus(),
                steps=steps,
                batch_size=10,
                save_every=2,
                keep_every=3,
                probe_every=4,
                probe_decode=2,
            ),
            Evaluate(
                "evaluate",
                drafts=("pretrain", "distill"),
                tasks=(
                    Task("open", prompts, temperature=0.6, top_p=0.9, max_new_tokens=12),
                    Task("greedy", prompts, max_new_tokens=12),
                ),
                block_sizes=(2,),
                repeats=1,
                predict_up_to=2,
                perplexity=PythonLibrary("text", split="eval", limit=1),
                over_checkpoints=True,
            ),
            Export("export", draft="distill", evaluation="evaluate", dtype="bfloat16"),
        ),
    )
