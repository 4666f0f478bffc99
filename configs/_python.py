"""What the recipes of the papers run on where ``scale=small``: a small target, its text, its questions, all at hand.

The target is `python_target`'s, whose weights lie beside it. What stands for what in the papers:

- FineWeb is documentation (Python's, numpy's, scipy's and jax's) and questions with answers, of which a third are
  bodies of functions; The Stack is the code of Python's library.
- OIG-small-chip2, Alpaca and the like are instructions made from its modules; every module belongs to one split, so
  what a task asks was in no training text, nor in the target's where Python is 3.11 as its was. Passages of
  documentation may repeat others.
- Dolly is "open" (a function's description from its signature), XSum or CNN/DailyMail is "summary" (a line on a
  class or module), HumanEval is "code" (a body from signature and docstring), TinyStories is "text" (a passage of
  documentation gone on with), WMT18 is "translate" (German to English: unlike all that target and drafts have seen).
"""

from pathlib import Path
from typing import Literal

from jaxdraft.data.passages import Continuations, Passages
from jaxdraft.data.prompts import PromptFile
from jaxdraft.data.stdlib import PythonLibrary, PythonTask
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.tasks import Task
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import HFModel

# Characters of a passage: of documentation and of the code that it stands in, none is the same.
PASSAGES: dict[Literal["text", "code"], int] = {"text": 500, "code": 700}
HERE = Path(__file__).parent
TARGET = HFModel(str(HERE / "targets" / "python-5m"))
TEXT = (
    PythonLibrary("text"),
    PythonLibrary("instructions"),
    PythonLibrary(
        "text",
        packages=("numpy", "scipy", "jax"),
        licence="BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0 AND Apache-2.0",
    ),
)
CODE = (PythonLibrary("code"),)
CORPUS = (PythonLibrary("text"), PythonLibrary("instructions"), *CODE)  # the target's own
LENGTH = 192
PROMPT, ANSWER = 112, 64  # tokens
# 6 and 9 % of the target
SMALL = ModelConfig(hidden_size=96, intermediate_size=256, num_layers=1, num_heads=2, num_kv_heads=2)
LARGE = ModelConfig(hidden_size=128, intermediate_size=352, num_layers=1, num_heads=2, num_kv_heads=2)
# What the target is asked for a distillation set, of modules that no training text has: instructions, and passages of
# documentation and of code to go on with, whose answers are long.
PROMPTS = (
    PythonTask("all", split="seed", limit=600, max_tokens=PROMPT),
    *(
        Continuations(Passages(PythonLibrary(part, split="seed"), "all", characters), 250, max_tokens=48)
        for part, characters in PASSAGES.items()
    ),
)


def seeds_of(seeds: int | None, default: int = 1) -> range:
    """0, 1, … of every draft.

    Raises:
      ConfigError: none.
    """
    if seeds is not None and seeds < 1:
        raise ConfigError(f"seeds is {seeds}: at least one of every draft is trained")
    return range(default if seeds is None else seeds)


def task(kind: str, limit: int = 24, **decoding) -> Task:
    """Held-out prompts of a kind."""
    prompts = {
        "text": Continuations(Passages(PythonLibrary("text", split="eval"), "all", 600), limit, max_tokens=PROMPT),
        "translate": PromptFile(str(HERE / "prompts" / "translate.jsonl"), limit=limit),
    }.get(kind) or PythonTask(kind, split="eval", limit=limit, max_tokens=PROMPT)  # type: ignore[arg-type]
    return Task(kind, prompts, max_new_tokens=ANSWER, **decoding)
