"""A small target that chats, on somebody else's tokenizer: to try a recipe before its real target is at hand.

    jaxdraft run chat_target --workdir runs/chat --set tokenizer.path=FOLDER --set eos_ids=32000,32007 \\
        --set alpaca.path=INSTRUCTIONS.json --set oasst.path=TREES.jsonl --set text.path=TEXT.txt

Trained on text and on conversations in the tokenizer's chat template, so that it takes a turn, answers and ends; what
it says is not worth reading. ``eos_ids`` are the tokens that end a turn or a text, the tokenizer's own among them: here
Phi-3's ``<|endoftext|>`` and ``<|end|>``. Other recipes take it as ``--set target.path=runs/chat/target/model``. Three
minutes on two cores with a vocabulary of 32,000.
"""

from jaxdraft.data.named import Instructions
from jaxdraft.data.sources import Text
from jaxdraft.losses import CrossEntropy
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import HFModel, Prepare, Recipe, Train

LENGTH = 256


def recipe(
    *,
    tokenizer: HFModel,
    text: Text,
    alpaca: Instructions = Instructions("alpaca", limit=2000),  # noqa: B008 (immutable)
    oasst: Instructions = Instructions("oasst1", limit=2000),  # noqa: B008
    eos_ids: tuple[int, ...] = (2,),
    steps: int = 300,
):
    model = ModelConfig(
        hidden_size=96,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        max_positions=4096,
        eos_ids=eos_ids,
    )
    return Recipe(
        title="A small target that chats",
        tokenizer=tokenizer,
        target="target",
        draft=ModelConfig(hidden_size=32, intermediate_size=88, num_layers=1, num_heads=2, num_kv_heads=2),
        stages=(
            Prepare("corpus", sources=(text,), length=LENGTH),
            Prepare("conversations", sources=(alpaca, oasst), length=LENGTH, labels="assistant"),
            Train(
                "target",
                model=model,
                data={"conversations": 0.75, "corpus": 0.25},
                loss=CrossEntropy(),
                steps=steps,
                batch_size=8,
                learning_rate=4e-3,
                final_learning_rate=4e-4,
                warmup_steps=20,
            ),
        ),
    )
