"""The small target that the quickstart and the small recipes accelerate: 5.2M parameters that know Python.

    jaxdraft run python_target --workdir runs/python-target

45 minutes on two cores (AMD EPYC), nothing downloaded. A Llama of six layers reads the standard library of the Python
that runs this as documentation, as code, and as instructions made from both. 4000 steps of 8 rows of 256 are 8.2M
tokens, 2.2 passes over 3.7M; the loss falls to 1.97, the mean of the last 100 steps. Perplexity over windows of 256
tokens is 8.1 on documentation, 3.8 on instructions and 7.6 on code that it has read; 24.6, 10.6 and 15.4 on modules
that it has not, such as `PythonTask` asks about.

Its weights are in `configs/targets/python-5m`, a copy of the stage `export`, so that nobody has to wait for them:
jaxdraft at c872d04 with this recipe, Python 3.11.7, jax 0.10.2. They are there for drafts to be made, measured and
tested with; what the model writes looks like Python's documentation and is often wrong.

    jaxdraft sample --target configs/targets/python-5m --prompt "def shorten(text, width):"
"""

from jaxdraft.data.stdlib import PythonLibrary
from jaxdraft.losses import CrossEntropy
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Export, Prepare, Recipe, Train, TrainTokenizer

CORPUS = (PythonLibrary("text"), PythonLibrary("instructions"), PythonLibrary("code"))
TARGET = ModelConfig(
    hidden_size=256, intermediate_size=768, num_layers=6, num_heads=4, num_kv_heads=2, max_positions=1024
)


def recipe(*, steps: int = 4000):
    return Recipe(
        title="A small target that knows Python's library",
        description=(
            "A language model that has read one thing, Python's standard library: its documentation, its code, and "
            "instructions made from them (describe a function, write a function's body, sum up a module or class in a "
            "line). It is small enough to be trained and run on two CPU cores, and is there for drafts to be made, "
            "measured and tested with. It writes what looks like Python and its documentation. Much of that is wrong, "
            "it knows nothing else, it was not aligned in any way and is no assistant. "
            "Made by `jaxdraft run python_target`."
        ),
        tokenizer="tokenizer",
        target="target",
        draft=TARGET,
        stages=(
            TrainTokenizer("tokenizer", sources=CORPUS, vocab_size=2048),
            Prepare("corpus", sources=CORPUS, length=256),
            Train(
                "target",
                model=TARGET,
                data="corpus",
                loss=CrossEntropy(),
                steps=steps,
                batch_size=8,
                learning_rate=2.5e-3,
                final_learning_rate=5e-5,
                warmup_steps=200,
                b2=0.98,
                weight_decay=0.05,
                save_every=100,
            ),
            Export("export", draft="target", dtype="bfloat16"),
        ),
    )
