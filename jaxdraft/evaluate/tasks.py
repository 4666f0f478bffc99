"""What a draft is measured on: prompts, and how the target is decoded there; the six tasks of the two papers.

    Evaluate("evaluate", drafts=("distill",), tasks=(tasks.dolly(limit=200), tasks.xsum(path="xsum/*.parquet")))

Direct Alignment (arXiv 2403.00858) measures on Dolly, XSum, CNN/DailyMail (section 3) and WMT18 (appendix A.5);
FastDraft (arXiv 2411.11055, section 4.3.2) on CNN/DailyMail, TinyStories, Dolly and HumanEval, each greedily and at
temperature 0.6 (section 5); both with 3 and 5 draft tokens per block. Neither says how many prompts there were and how
long, how they were worded, or how long answers might get. Here, unless a task says otherwise: the first 100 prompts
that fit the target's context, 128 new tokens at most; a user's turn in the target's chat template, since all targets of
the papers are chat models, and plain text for a target without one (``jaxdraft.data.catalogue`` has the words).

FastDraft names no top-p. Its decoding is ``top_p=1.0`` and each of ``temperature=0.0`` and ``temperature=0.6``.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxdraft.data.named import Corpus, Instructions
from jaxdraft.data.passages import Continuations, Passages
from jaxdraft.data.prompts import Prompt, PromptFile, read_prompts
from jaxdraft.errors import ConfigError, unknown_name
from jaxdraft.tokenizers import Tokenizer
from jaxdraft.user_code import user_module

PROMPTS = 100
_STORY = 4000  # characters: more than all but one story in a thousand has


@dataclass(frozen=True)
class Task:
    """A set of prompts with its decoding settings.

    Attributes:
      name: as it stands in results and figures.
      prompts: a ``PromptSource``: anything with ``prompts(tokenizer)``, such as a ``PromptFile``.
      temperature: 0 is greedy.
      top_p: nucleus, of draft and target alike.
      max_new_tokens: per answer.
      top_k: of draft and target alike, before top-p; 0 keeps all.
      max_prompt_tokens: a longer prompt is left out.
      limit: at most this many prompts, the first that fit.
    """

    name: str
    prompts: Any
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    top_k: int = 0
    max_prompt_tokens: int | None = None
    limit: int | None = None

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"task {self.name}: temperature and top_k must not be negative, and top_p must lie in (0, 1]"
            )
        for name in ("max_new_tokens", "max_prompt_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"task {self.name}: {name} is {value}: it must be positive")

    def check_room(self, max_positions: int) -> None:
        """Raises ConfigError where an answer alone does not fit into the target's positions."""
        if self.max_new_tokens >= max_positions:
            raise ConfigError(
                f"task {self.name}: max_new_tokens is {self.max_new_tokens}: the target has only {max_positions} "
                "positions, for prompt and answer together"
            )

    def read(self, tokenizer: Tokenizer, max_positions: int) -> list[Prompt]:
        """The prompts that are asked; how many are left out, and why, goes into the log.

        Args:
          tokenizer: the target's.
          max_positions: of the target: a prompt that leaves no room there for an answer is left out.

        Raises:
          ConfigError: none fits.
        """
        self.check_room(max_positions)

        def unfit(prompt: Prompt) -> str | None:
            if self.max_prompt_tokens is not None and len(prompt.tokens) > self.max_prompt_tokens:
                return f"more than {self.max_prompt_tokens} tokens"
            if len(prompt.tokens) + self.max_new_tokens > max_positions:
                return f"with an answer of {self.max_new_tokens} tokens past the target's {max_positions} positions"
            return None

        try:
            return read_prompts(self.prompts, tokenizer, unfit, self.limit, self.name)
        except ConfigError as error:
            raise ConfigError(f"task {self.name}: {error}") from error


def dolly(path: str | None = None, **settings: Any) -> Task:
    """Open-ended answers: instructions that people at Databricks wrote, some with a text they are about.

    Direct Alignment samples at temperature 0.6 with top-p 0.9, as here. Neither paper says which of the 15,011 rows
    were asked; there is one split.

    Args:
      path: read from here instead of the hub, as ``Instructions`` does.
      settings: fields of ``Task`` in place of those here, such as ``limit`` or ``name``.
    """
    prompts = Instructions("dolly", path, form="auto")
    return replace(Task("dolly", prompts, temperature=0.6, top_p=0.9, limit=PROMPTS), **settings)


def xsum(path: str | None = None, **settings: Any) -> Task:
    """One-sentence summaries of articles of the BBC: "Summarize: …", of the test split.

    Direct Alignment decodes greedily, as here; FastDraft names the task and leaves it out.

    Args:
      path: as of ``dolly``.
      settings: as of ``dolly``.
    """
    prompts = Instructions("xsum", path, form="auto")
    return replace(Task("xsum", prompts, limit=PROMPTS), **settings)


def cnn_dailymail(path: str | None = None, **settings: Any) -> Task:
    """Summaries in two or three sentences of articles of CNN and the Daily Mail, version 3.0.0, the test split.

    Direct Alignment decodes greedily, as here. Neither paper says which split or version.

    Args:
      path: as of ``dolly``.
      settings: as of ``dolly``.
    """
    prompts = Instructions("cnn-dailymail", path, form="auto")
    return replace(Task("cnn-dailymail", prompts, limit=PROMPTS), **settings)


def tinystories(path: str | None = None, **settings: Any) -> Task:
    """Stories to be gone on with, each "from a random position within", which its own words draw.

    FastDraft does not say from which split: here validation. Text to go on with has no turns, and no chat template.

    Args:
      path: read from here instead of the hub, as ``Corpus`` does. Text of more than 4,000 characters that nothing
        separates into stories is cut at line ends.
      settings: as of ``dolly``.
    """
    stories = Passages(Corpus("tinystories", path, split="validation"), "all", _STORY)
    return replace(Task("tinystories", Continuations(stories), limit=PROMPTS), **settings)


def humaneval(path: str | None = None, **settings: Any) -> Task:
    """Python functions to be completed from signature and docstring: all 164 that there are.

    FastDraft calls it code completion and does not say how a chat model was asked: here the target goes on with the
    code as it stands, in no chat template.

    Args:
      path: as of ``dolly``.
      settings: as of ``dolly``.
    """
    return replace(Task("humaneval", Instructions("humaneval", path, form="plain"), limit=164), **settings)


def wmt18_de_en(path: str | None = None, **settings: Any) -> Task:
    """Translations of news from German to English: the test split of WMT18.

    Direct Alignment's appendix A.5: the task unlike all that its drafts were distilled on. How it decodes there it does
    not say: here greedily, as all its tasks but Dolly.

    Args:
      path: as of ``dolly``.
      settings: as of ``dolly``.
    """
    prompts = Instructions("wmt18-de-en", path, form="auto")
    return replace(Task("wmt18-de-en", prompts, limit=PROMPTS), **settings)


TASKS: Mapping[str, Callable[..., Task]] = {
    "dolly": dolly,
    "xsum": xsum,
    "cnn-dailymail": cnn_dailymail,
    "tinystories": tinystories,
    "humaneval": humaneval,
    "wmt18-de-en": wmt18_de_en,
}


def named(name: str, path: str | None = None) -> Task:
    """The task behind ``"dolly"``, or behind ``"my_package.module:my_task"`` for one of the user's own.

    That is a function that returns a ``Task``, or a ``Task`` itself.

    Args:
      name: of the task.
      path: where its prompts are, for a function that takes a ``path``.

    Raises:
      ConfigError: no such task, with the nearest; or it takes no ``path``, or needs one, or is none.
    """
    module_name, _, attribute = name.rpartition(":")
    found = vars(user_module("task", name, module_name)) if module_name else TASKS
    value = found.get(attribute)
    make = (lambda: value) if isinstance(value, Task) else value
    if not callable(make):
        is_own = lambda value: isinstance(value, Task) or getattr(value, "__module__", "") == (module_name or __name__)
        known = [key for key, value in found.items() if is_own(value)]
        raise ConfigError(f"{unknown_name('task', attribute, known)}; your own: 'my_package.module:my_task'")
    settings = {} if path is None else {"path": path}
    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        raise ConfigError(f"task {name!r}: {error}") from None
    task = make(**settings)
    if not isinstance(task, Task):
        raise ConfigError(f"task {name!r} gives {type(task).__name__}, not a Task")
    return task


def asked_for(names: Sequence[str], files: Sequence[str], settings: Mapping[str, Any]) -> list[Task]:
    """The tasks of ``jaxdraft evaluate``.

    Args:
      names: of ``named``, each with ``=PATH`` or without. With a single file, what that is called.
      files: JSONL files of prompts; each is a task of the file's name.
      settings: fields of ``Task`` in place of the tasks' own.

    Raises:
      ConfigError: no such task, or names for several files.
    """
    if len(files) == len(names) == 1 and "=" not in names[0]:
        asked = [Task(names[0], PromptFile(files[0]))]
    elif files and names:
        raise ConfigError("--task names one file of --prompts: leave either out, or write your own task")
    else:
        parts = [name.partition("=") for name in names]
        asked = [named(name, path or None) for name, _, path in parts]
        asked += [Task(Path(file).stem, PromptFile(file)) for file in files]
    return [replace(task, **settings) for task in asked]
