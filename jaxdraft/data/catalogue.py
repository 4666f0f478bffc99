"""The data sets of the papers: where they are on the hub, at which commit, under which licence, and what is in a row.

Direct Alignment (arXiv 2403.00858) answers OIG-small-chip2 and OpenAssistant, and measures on Dolly, XSum,
CNN/DailyMail and WMT18; FastDraft (arXiv 2411.11055) trains on FineWeb and The Stack v2, answers Alpaca,
OIG-small-chip2 and Evol-Instruct, and measures on CNN/DailyMail, TinyStories, Dolly and HumanEval. Neither prints its
prompts: summaries are asked for in T0's words (arXiv 2110.08207), instructions without a chat template in Stanford
Alpaca's, and translations and functions in our own.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxdraft.data.prompts import Message
from jaxdraft.data.quarantine import Misfit
from jaxdraft.data.readers import text_of

RENDERED = ("prompt", "reference", "answer", "completion", "id")
"""Columns of rows that hold a prompt as text already, and perhaps its answer under one of three names."""

_ENGLISH = "en"
_TASK = "Below is an instruction that describes a task"


class Example(NamedTuple):
    """What a row asks, and the data set's own answer.

    Attributes:
      messages: the conversation so far; the last message is the user's.
      text: the same as plain text, in the form that the papers' field uses.
      answer: of the data set; None where it has none.
      id: the data set's own; None where it has none.
      is_whole: whether messages and answer are a conversation to train on: False where another example goes on from
        it, or has a better answer.
    """

    messages: tuple[Message, ...]
    text: str
    answer: str | None = None
    id: str | None = None
    is_whole: bool = True


@dataclass(frozen=True)
class DataSet:
    """An entry of the catalogue.

    Attributes:
      repository: on the Hugging Face hub.
      files: a glob for each split; the first is the one that is used when none is named.
      revision: the commit; None where none could be looked up.
      licence: as its card has it, an SPDX expression.
      reference: the paper that describes it.
      columns: what is read of a row.
      terms: what else there is to say of the licence.
    """

    repository: str
    files: Mapping[str, str]
    revision: str | None
    licence: str
    reference: str
    columns: tuple[str, ...]
    terms: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class TextSet(DataSet):
    """A data set of documents.

    Attributes:
      separator: between documents where they are given as plain text.
      lines: rows are the lines of articles, which begin at their titles.
      contents: where the documents of rows that hold ids alone are.
    """

    separator: str | None = None
    lines: bool = False
    contents: str | None = None


@dataclass(frozen=True)
class PromptSet(DataSet):
    """A data set of prompts: ``examples`` makes them of a row's value."""

    examples: Callable[[Any], Iterable[Example | Misfit]]


def instruction_text(messages: Iterable[Message], context: str = "") -> str:
    """Messages in Stanford Alpaca's template, which Dolly and WizardCoder use too; turns follow each other."""
    task = f"{_TASK}, paired with an input that provides further context" if context else _TASK
    parts = [f"{task}. Write a response that appropriately completes the request."]
    for message in messages:
        name = "Response" if message["role"] == "assistant" else "Instruction"
        parts.append(f"### {name}:\n{message['content']}")
    if context:
        parts.append(f"### Input:\n{context}")
    return "\n\n".join([*parts, "### Response:"])


def prompt_as_text(value: Any) -> Iterator[Example]:
    """The example in a row of the columns ``RENDERED``."""
    text = text_of(value, "prompt")
    answer = next((_optional(value, name) for name in RENDERED[1:4] if value.get(name)), None)
    yield Example(_user(text.strip()), text, answer, value.get("id"))


def _instruction(instruction: str, context: str | None, answer: str) -> Callable[[Any], Iterator[Example]]:
    def examples(value: Any) -> Iterator[Example]:
        asked = text_of(value, instruction).strip()
        given = ((context and _optional(value, context)) or "").strip()
        content = f"{asked}\n\n{given}" if given else asked
        yield Example(_user(content), instruction_text(_user(asked), given), _optional(value, answer))

    return examples


def _summary(before: str, document: str, summary: str) -> Callable[[Any], Iterator[Example]]:
    def examples(value: Any) -> Iterator[Example]:
        text = text_of(value, document)
        yield Example(_user(before + text.strip()), f"{before}{text}\n", _optional(value, summary), value.get("id"))

    return examples


def _function(value: Any) -> Iterator[Example]:
    text = text_of(value, "prompt")
    asked = f"Complete the following Python function.\n\n```python\n{text.rstrip()}\n```"
    yield Example(_user(asked), text, _optional(value, "canonical_solution"), text_of(value, "task_id"))


def _translation(value: Any) -> Iterator[Example]:
    """`{"translation": {"de", "en"}}`, or `{"source", "reference"}`, as translations are passed around in files."""
    pair = value.get("translation", value)
    if not isinstance(pair, dict):
        raise Misfit(f"field 'translation' is {type(pair).__name__}, not an object")
    source, target = ("source", "reference") if "source" in pair else ("de", "en")
    text = text_of(pair, source).strip()
    asked = f"Translate the following sentence from German to English:\n\n{text}"
    yield Example(_user(asked), f"German: {text}\nEnglish:", _optional(pair, target))


def _tree(value: Any) -> Iterator[Example | Misfit]:
    """Of an OpenAssistant tree: every turn of a prompter, with what was said before it.

    The answer is the one that was ranked first. The tree's whole conversation follows the best replies from its root.
    """
    return _turns(value.get("prompt"), (), None, True)


def _turns(
    message: Any, before: tuple[Message, ...], unfit: str | None, on_best_path: bool
) -> Iterator[Example | Misfit]:
    unfit = unfit or _unfit(message)
    replies, best = _replies(message), _best_reply(message)
    by_prompter = message.get("role") == "prompter"
    role = "user" if by_prompter else "assistant"
    messages = (*before, {"role": role, "content": text_of(message, "text").strip()})
    if by_prompter and unfit:
        yield Misfit(unfit, text_of(message, "message_id"))
    elif by_prompter:
        following = best and _best_reply(best)
        yield Example(
            messages,
            instruction_text(messages),
            best and text_of(best, "text").strip(),
            text_of(message, "message_id"),
            is_whole=on_best_path and bool(best or not before) and not (following and _best_reply(following)),
        )
    for reply in replies:
        yield from _turns(reply, messages, unfit, on_best_path and reply is best)


def _unfit(message: Any) -> str | None:
    if not isinstance(message, dict):
        raise Misfit("not a message tree")
    if message.get("deleted"):
        return "deleted"
    if message.get("review_result") is False:
        return "failed its review"
    if isinstance(message.get("text"), str) and not message["text"].strip():
        return "blank"
    return None if message.get("lang") == _ENGLISH else "not in English"


def _replies(message: Any) -> list[Any]:
    replies = message.get("replies") or []
    if not isinstance(replies, list):
        raise Misfit("not a message tree")
    return replies


def _best_reply(message: Any) -> Any:
    """The reply that fits and was ranked first, or came first where none was ranked; None where there is none."""
    fit = [reply for reply in _replies(message) if not _unfit(reply)]
    ranks = [reply["rank"] if isinstance(reply.get("rank"), int) else math.inf for reply in fit]
    return fit[ranks.index(min(ranks))] if fit else None


def _user(content: str) -> tuple[Message, ...]:
    if not content:
        raise Misfit("blank")
    return ({"role": "user", "content": content},)


def _optional(value: Any, field: str) -> str | None:
    """The text in a column; None where there is none, or only blanks."""
    if value.get(field) is None:
        return None
    text = text_of(value, field)
    return text if text.strip() else None


CORPORA: Mapping[str, TextSet] = {
    "fineweb": TextSet(
        repository="HuggingFaceFW/fineweb",
        files={"train": "sample/10BT/*.parquet"},  # 14.9 million pages, 10 billion tokens of GPT-2's
        revision="9bb295ddab0e05d785b879661af7260fed5140fc",  # its tag v1.4.0
        licence="ODC-By-1.0",
        reference="arXiv 2406.17557",
        columns=("text",),
    ),
    "stack-v2-smol": TextSet(
        repository="bigcode/the-stack-v2-train-smol-ids",  # gated
        files={"train": "data/*.parquet"},
        revision="d54939b9c178ca392f68fae3612ab20c15c673ac",
        licence="LicenseRef-the-stack-v2",
        terms="each file under its own licence; see the terms of use of The Stack v2",
        reference="arXiv 2402.19173",
        columns=("files",),
        contents="s3://softwareheritage/content",
    ),
    "tinystories": TextSet(
        repository="roneneldan/TinyStories",
        files={"train": "data/train-*.parquet", "validation": "data/validation-*.parquet"},
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        licence="CDLA-Sharing-1.0",
        reference="arXiv 2305.07759",
        columns=("text",),
        separator="<|endoftext|>",  # in its .txt files
    ),
    "wikitext-2": TextSet(
        repository="Salesforce/wikitext",
        files={split: f"wikitext-2-raw-v1/{split}-*.parquet" for split in ("train", "validation", "test")},
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        licence="CC-BY-SA-3.0",
        reference="arXiv 1609.07843",
        columns=("text",),
        lines=True,
    ),
    "c4": TextSet(
        repository="allenai/c4",
        # 1,024 files of 300 MB; as many are downloaded as are read
        files={"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"},
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        licence="ODC-By-1.0",
        reference="arXiv 1910.10683",
        columns=("text",),
    ),
}

PROMPTS: Mapping[str, PromptSet] = {
    "oig-small-chip2": PromptSet(
        repository="0-hero/OIG-small-chip2",  # 210,289 rows
        files={"train": "data/train-*.parquet"},
        revision="f2d1e907669887ff24427de6fc32103e17137a7a",
        licence="Apache-2.0",  # LAION's for OIG; this copy's card names none
        reference="LAION, The OIG dataset, 2023",
        columns=("user", "chip2"),
        examples=_instruction("user", None, "chip2"),
    ),
    "oasst1": PromptSet(
        repository="OpenAssistant/oasst1",  # 10,364 trees, of which those in English are used
        files={"train": "2023-04-12_oasst_ready.trees.jsonl.gz"},
        revision="fdf72ae0827c1cda404aff25b6603abec9e3399b",
        licence="Apache-2.0",
        reference="arXiv 2304.07327",
        columns=("prompt",),
        examples=_tree,
    ),
    "alpaca": PromptSet(
        repository="tatsu-lab/alpaca",  # 52,002 rows
        files={"train": "data/train-*.parquet"},
        revision="dce01c9b08f87459cf36a430d809084718273017",
        licence="CC-BY-NC-4.0",
        reference="Taori et al., Stanford Alpaca, 2023",
        columns=("instruction", "input", "output"),
        examples=_instruction("instruction", "input", "output"),
    ),
    "evol-instruct": PromptSet(
        repository="nickrosh/Evol-Instruct-Code-80k-v1",  # a replication: WizardCoder, which FastDraft cites, gave none
        files={"train": "EvolInstruct-Code-80k.json"},
        revision="3ae930c20d5496e2c8386872d5628c45f6957db4",
        licence="CC-BY-NC-SA-4.0",
        reference="arXiv 2306.08568",
        columns=("instruction", "output"),
        examples=_instruction("instruction", None, "output"),
    ),
    "dolly": PromptSet(
        repository="databricks/databricks-dolly-15k",  # 15,011 rows
        files={"train": "databricks-dolly-15k.jsonl"},
        revision="bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
        licence="CC-BY-SA-3.0",
        reference="Conover et al., Free Dolly, 2023",
        columns=("instruction", "context", "response"),
        examples=_instruction("instruction", "context", "response"),
    ),
    "xsum": PromptSet(
        repository="EdinburghNLP/xsum",
        files={split: f"data/{split}-*.parquet" for split in ("test", "validation", "train")},
        revision="7d4d486c2f8ef850b1a11aead99b894ff3dd7da9",
        licence="NOASSERTION",
        terms="articles of the BBC, for research",
        reference="Narayan et al., EMNLP 2018",
        columns=("document", "summary", "id"),
        examples=_summary("Summarize: ", "document", "summary"),
    ),
    "cnn-dailymail": PromptSet(
        repository="abisee/cnn_dailymail",
        files={split: f"3.0.0/{split}-*.parquet" for split in ("test", "validation", "train")},
        revision="96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
        licence="Apache-2.0",
        reference="arXiv 1506.03340, 1704.04368",
        columns=("article", "highlights", "id"),
        examples=_summary(
            "In 2 or 3 sentences, what are the main points one should remember from this news article?\n\nArticle: ",
            "article",
            "highlights",
        ),
    ),
    "humaneval": PromptSet(
        repository="openai/openai_humaneval",  # 164 rows
        files={"test": "openai_humaneval/test-*.parquet"},
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        licence="MIT",
        reference="arXiv 2107.03374",
        columns=("task_id", "prompt", "canonical_solution"),
        examples=_function,
    ),
    "wmt18-de-en": PromptSet(
        repository="wmt/wmt18",
        files={split: f"de-en/{split}-*.parquet" for split in ("test", "validation", "train")},
        revision="0efe4a9205e5b9500c1f5d53afc8fd0d712e6b87",  # of its pull request 7, which main merged
        licence="NOASSERTION",
        terms="free for research",
        reference="Bojar et al., WMT 2018",
        columns=("translation",),
        examples=_translation,
    ),
}
