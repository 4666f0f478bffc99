"""What a Generate stage asks: every prompt at every temperature, with its system prompt, its limits and its writer.

A question's id, and with it all that is drawn for it, depends on the prompt's id and the temperature alone; which of
several writers and system prompts it gets, on its id and the seed.
"""

import bisect
import collections
import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxdraft.context import Context
from jaxdraft.data.conversations import prompt_mask, user_turn
from jaxdraft.data.prompts import Message, Prompt, example_id
from jaxdraft.data.quarantine import Quarantine, Rejected
from jaxdraft.decode.batching import bucket_length
from jaxdraft.errors import ConfigError
from jaxdraft.recipe import TARGET, Generate, Train, Written
from jaxdraft.tokenizers import ChatTemplateError, Tokenizer
from jaxdraft.tracking import read_jsonl


@dataclass(frozen=True)
class Question:
    """One answer to be written.

    Attributes:
      number: its place among all questions of the stage.
      id: names the answer.
      prompt: what is continued, its system prompt included.
      temperature, top_p, max_new_tokens: how.
      writer: the model that does, by its name in the recipe.
    """

    number: int
    id: str
    prompt: Prompt
    temperature: float
    top_p: float
    max_new_tokens: int
    writer: str

    @property
    def example_id(self) -> int:
        return example_id(self.id)

    @property
    def bucket(self) -> int:
        return bucket_length(len(self.prompt.tokens))


def ask(stage: Generate, context: Context, quarantine: Quarantine) -> list[Question]:
    """All questions of a stage, in the order of its prompts; what gives none goes to the quarantine.

    Raises:
      ConfigError: two have the same id, there are none, or nothing of a source fits.
    """
    positions = {name: _positions(name, context) for name in stage.writers}
    eos_ids = context.target_config().eos_ids
    questions: list[Question] = []
    for source in stage.prompts:
        for asked in quarantine.accepted(
            prompt if isinstance(prompt, Rejected) else _asked(stage, context, prompt, positions, eos_ids)
            for prompt in _prompts(source, context)
        ):
            questions += [replace(question, number=len(questions) + i) for i, question in enumerate(asked)]
    if repeated := [id for id, count in collections.Counter(q.id for q in questions).items() if count > 1]:
        raise ConfigError(
            f"{stage.name}: two answers would have the id {repeated[0]!r}: give prompts ids of their own "
            "(each Magpie a name=)"
        )
    if not questions:
        raise ConfigError(f"{stage.name}: no prompts")
    return questions


def _asked(
    stage: Generate, context: Context, prompt: Prompt, positions: Mapping[str, int], eos_ids: Collection[int]
) -> list[Question] | Rejected:
    """A prompt's questions, numbered from 0; none of them where one cannot be asked."""
    seed, given, found = context.recipe.seed, prompt.temperature, list[Question]()
    checked: Prompt | None = None
    for temperature in stage.temperatures if given is None else (given,):
        name, asked = f"{prompt.id}@{temperature:g}", prompt
        try:
            if any(stage.system_prompts):
                system = choice(f"{seed}/system/{name}", dict.fromkeys(stage.system_prompts, 1.0))
                asked = with_system(context.tokenizer, prompt, system)
            if stage.labels == "assistant" and asked.messages is not None and asked is not checked:
                prompt_mask(context.tokenizer, asked.messages, eos_ids=eos_ids)  # not only when all is answered
                checked = asked
        except ChatTemplateError as error:
            return Rejected(f"prompt {prompt.id}", str(error))
        writer = choice(f"{seed}/writer/{name}", stage.writers)
        limit = prompt.max_new_tokens or stage.max_new_tokens
        if len(asked.tokens) + limit > positions[writer]:
            return Rejected(
                f"prompt {prompt.id}", f"with its answer longer than the {positions[writer]} positions of {writer}"
            )
        found.append(
            Question(
                number=len(found),
                id=name,
                prompt=asked,
                temperature=temperature,
                top_p=prompt.top_p or stage.top_p,
                max_new_tokens=limit,
                writer=writer,
            )
        )
    return found


def _positions(writer: str, context: Context) -> int:
    """The longest text that a writer of answers takes."""
    if writer == TARGET:
        return context.target_shape.max_positions
    stage = context.recipe.stage(writer)
    assert isinstance(stage, Train)
    return context.trained_config(stage).max_positions


def choice(name: str, shares: Mapping[str, float]) -> str:
    """One of the options with their shares, in whatever order, that belongs to a name."""
    point = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") / 2**64 * sum(shares.values())
    options = sorted(shares)
    ends = list(itertools.accumulate(shares[option] for option in options))
    return options[min(bisect.bisect(ends, point), len(options) - 1)]


def with_system(tokenizer: Tokenizer, prompt: Prompt, system: str) -> Prompt:
    """The prompt with a system prompt before it; unchanged where that is empty, or where it brings its own.

    Raises:
      ConfigError: the prompt is no conversation.
      ChatTemplateError: the template takes no system prompt.
    """
    if prompt.messages is None:
        raise ConfigError(
            f"prompt {prompt.id}: system_prompts need prompts given as messages "
            "(Magpie takes a system prompt as system=)"
        )
    if not system:
        return prompt
    if prompt.messages[0]["role"] == "system":
        return prompt
    messages = ({"role": "system", "content": system}, *prompt.messages)
    return replace(prompt, **rendered(tokenizer, messages))


def rendered(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> dict[str, Any]:
    """The fields of a Prompt that follow from its messages."""
    text = tokenizer.render(messages)
    return {"messages": messages, "text": text, "tokens": tuple(tokenizer.encode(text, bos=False))}


def _prompts(source: Any, context: Context) -> Iterable[Prompt | Rejected]:
    if isinstance(source, Written):
        return written(source, read_answers(context, source.stage), context.tokenizer)
    found: Iterable[Prompt | Rejected] = source.prompts(context.tokenizer)
    return found


def read_answers(context: Context, stage: str) -> Iterator[dict[str, Any]]:
    """The lines that a Generate stage wrote, in the order of its files."""
    for path in sorted(context.folder(stage).glob("responses-*.jsonl")):
        yield from read_jsonl(path)


def written(source: Written, lines: Iterable[Mapping[str, Any]], tokenizer: Tokenizer) -> Iterator[Prompt | Rejected]:
    """The instructions among what a model wrote from a bare user turn: whole ones, each once (Magpie, section 2.1).

    A turn is whole where the model ended it, by an end token or by what the chat template puts after a user's words.
    """
    closing = next(iter(user_turn(tokenizer).suffix.split()), "")
    seen: set[str] = set()
    taken = 0
    for line in lines:
        if source.limit is not None and taken == source.limit:
            return
        where = f"{source.stage}: {line['id']}"
        if "error" in line:
            yield Rejected(where, "was not written")
            continue
        is_closed = line["finish"] == "eos"
        said = line["tokens"][: len(line["tokens"]) - is_closed]  # a template's tokens are no part of the line's text
        text = tokenizer.continuation(line["prompt_tokens"], said, skip_special=False)
        if closing and closing in text:
            text, is_closed = text[: text.index(closing)], True
        text, words = text.strip(), " ".join(text.lower().split())
        own = tokenizer.encode(text, bos=False)
        if not is_closed:
            yield Rejected(where, "did not end")
        elif not text:
            yield Rejected(where, "empty")
        elif tokenizer.decode(own) != tokenizer.decode(own, skip_special=False):
            yield Rejected(where, "holds tokens of the chat template")
        elif words in seen:
            yield Rejected(where, "duplicate")
        else:
            seen.add(words)
            prompt = Prompt(f"{source.stage}:{line['id']}", **rendered(tokenizer, ({"role": "user", "content": text},)))
            if source.max_tokens is not None and len(prompt.tokens) > source.max_tokens:
                yield Rejected(where, f"more than {source.max_tokens} tokens")
            else:
                taken += 1
                yield prompt
