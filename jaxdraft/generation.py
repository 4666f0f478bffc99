"""The Generate stage: questions -> answers in shards -> packed rows.

Where the model fits into each process's own devices, every process writes shards of its own; where it does not, all of
them write the same ones together. What an answer is depends on neither.
"""

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdraft import answers
from jaxdraft.answers import ACCOUNT, Shard
from jaxdraft.context import Context
from jaxdraft.data.conversations import prompt_mask
from jaxdraft.data.pipeline import pack_whole
from jaxdraft.data.prompts import Prompt
from jaxdraft.data.quarantine import Quarantine
from jaxdraft.data.records import Format
from jaxdraft.data.token_scores import TokenScores
from jaxdraft.data_stages import Outputs, write_packed
from jaxdraft.decode import Request, Usage, stream
from jaxdraft.distributed import is_lead, on_lead, together
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Model
from jaxdraft.files import write_json
from jaxdraft.models import compute_dtype
from jaxdraft.questions import Question, ask
from jaxdraft.recipe import TARGET, Generate
from jaxdraft.server import Question as Sent
from jaxdraft.server import Reply
from jaxdraft.server import ask as ask_server
from jaxdraft.settings import to_json
from jaxdraft.stopping import align, poll, poll_apart
from jaxdraft.stored_targets import check_space, scored, target_logits
from jaxdraft.tokenizers import Tokenizer
from jaxdraft.tracking import progress_bar, say

_HOPELESS = 100  # first answers of a server of which at least one has to be good

Line = dict[str, Any]  # of a shard
Place = tuple[int, int]  # a question's shard among those at hand, and its line there


def run_generate(stage: Generate, context: Context) -> Outputs:
    folder, quarantine = context.folder(stage.name), Quarantine()
    folder.mkdir(parents=True, exist_ok=True)  # also on a host that shares no disk with the lead's
    questions = together(lambda: ask(stage, context, quarantine))
    stored = None if stage.keep_logits is None else target_logits(stage.name, stage.keep_logits, context)
    as_written = Format(stage.length, context.tokenizer.vocab_size, stored) if stage.keeps_as_written else None
    if stored:
        tokens = sum(len(question.prompt.tokens) + question.max_new_tokens for question in questions)
        tokens *= 1 if as_written is None else 2  # beside the answers, and in the rows
        on_lead(lambda: check_space(stage.name, tokens, stored, context, packed=False))
    shards = answers.cut(questions, stage.shard_size, folder)
    writing = _Writing(
        stage,
        context,
        format=as_written,
        longest=max(question.max_new_tokens for question in questions),
        is_sampled=any(question.temperature > 0 for question in questions),
    )
    usage = _write_missing(writing, shards)
    if is_lead():
        context.home.fetch(stage.name)  # what other processes wrote
        account = answers.account(shards, quarantine.counts, _generator(stage, context))
        _check(stage.name, account, folder)
        write_json(folder / ACCOUNT, account)
        made = [*(path for shard in shards for path in shard.files), folder / ACCOUNT, *quarantine.write(folder)]

    counts: collections.Counter[str] = collections.Counter()
    eos_ids = context.target_config().eos_ids
    labels = lambda question: _prompt_labels(stage.labels, question.prompt, context.tokenizer, eos_ids)
    found = answers.examples(shards, labels, as_written) if is_lead() else ()
    rows: Iterator[Mapping[str, np.ndarray]] = pack_whole(found, stage.length, counts)
    if stored and as_written is None:
        rows = scored(stage.name, rows, stored, context)
    if not is_lead():
        collections.deque(rows, maxlen=0)  # takes part in the scoring, and writes nothing
        return [], {}
    files, summary = write_packed(stage.name, rows, stage.length, _source(stage, context), counts, context, stored)
    if as_written and counts["cut_examples"]:
        say(
            f"    {counts['cut_examples']} answers are cut, longer than length={stage.length} with their prompts: what "
            "is stored beside their later pieces was said with the whole text in sight"
        )
    return [*made, *files], {**_facts(account, usage), **summary}


class _Writing(NamedTuple):
    """What all shards of a stage have in common.

    Attributes:
      format: of the rows, where they store what the target says as it writes.
      longest: how many tokens an answer may have at most.
      is_sampled: whether any is sampled.
    """

    stage: Generate
    context: Context
    format: Format | None
    longest: int
    is_sampled: bool


def _write_missing(writing: _Writing, shards: Sequence[Shard]) -> Usage:
    """Writes the shards that are not there yet, this process its part of them."""
    stage, context = writing.stage, writing.context
    generator = _generator(stage, context)
    todo = [shards[i] for i in on_lead(lambda: answers.missing(shards, generator, say))]
    mesh, alone = context.decode_mesh, True
    if jax.process_count() > 1:
        own = context.own_decode_mesh
        mesh, alone = own or mesh, own is not None or stage.server is not None
        todo = todo[jax.process_index() :: jax.process_count()] if alone else todo
    usage = Usage()

    def write() -> None:
        with progress_bar(sum(len(shard.questions) for shard in todo), stage.name, "answer") as bar:

            def advance(answers: int) -> None:
                bar.update(answers)
                (poll_apart if alone else poll)()

            for shard, lines, scores in _whole_shards(writing, todo, mesh, usage, advance):
                if alone or is_lead():
                    files = answers.commit(shard, lines, generator, scores, writing.format)
                    context.home.keep_own(*files)

    together(write)
    align()  # a process with fewer answers has asked less often
    return usage


def _whole_shards(
    writing: _Writing, shards: Sequence[Shard], mesh: Mesh, usage: Usage, advance: Callable[[int], Any]
) -> Iterator[tuple[Shard, list[Line], list[TokenScores]]]:
    """Each shard with its lines, and what the target said of them where that is kept, as soon as it is whole."""
    for writer, group in itertools.groupby(shards, key=lambda shard: shard.writer):
        members = list(group)
        found: dict[int, dict[int, tuple[Line, TokenScores | None]]] = {i: {} for i in range(len(members))}
        asked = {
            (i, place): question for i, shard in enumerate(members) for place, question in enumerate(shard.questions)
        }
        for (i, place), line, scores in _lines(writing, writer, asked, mesh, usage):
            found[i][place] = line, scores
            advance(1)
            if len(found[i]) == len(members[i].questions):
                whole = [answer for _, answer in sorted(found.pop(i).items(), key=lambda item: item[0])]
                yield members[i], [line for line, _ in whole], [said for _, said in whole if said is not None]


def _lines(
    writing: _Writing, writer: str, asked: Mapping[Place, Question], mesh: Mesh, usage: Usage
) -> Iterator[tuple[Place, Line, TokenScores | None]]:
    """The line of each question, in the order in which they are answered."""
    stage, context = writing.stage, writing.context
    if stage.server is not None:
        sent = (
            Sent(
                key=place,
                prompt=question.prompt,
                temperature=question.temperature,
                top_p=question.top_p,
                max_new_tokens=question.max_new_tokens,
                seed=(context.recipe.seed + question.example_id) % 2**31,
            )
            for place, question in asked.items()
        )
        replies = ask_server(stage.server, sent, context.tokenizer, context.target_config().eos_ids)
        errors = 0
        for number, reply in enumerate(replies, start=1):
            errors += reply.error is not None
            if errors == number == _HOPELESS:
                raise ConfigError(
                    f"{stage.name}: {stage.server.url} answered none of {number} questions: {reply.error}"
                )
            yield reply.key, _line(asked[reply.key], reply, context), None
        return
    model = Model.load(context.target_folder if writer == TARGET else context.model_folder(writer), mesh)
    draft = None if stage.draft is None else Model.load(context.model_folder(stage.draft), mesh)
    places = {question.id: place for place, question in asked.items()}  # an error names questions by their ids
    requests = (
        Request(
            key=question.id,
            tokens=question.prompt.tokens,
            max_new_tokens=question.max_new_tokens,
            temperature=question.temperature,
            top_p=question.top_p,
            example_id=question.example_id,
        )
        for question in asked.values()
    )
    for finished in stream(
        model.decoder,
        model.params,
        requests,
        batch_size=stage.batch_size,
        longest=writing.longest,
        seed=context.recipe.seed,
        sampled=writing.is_sampled,
        draft=None if draft is None else (draft.decoder, draft.params),
        block_size=stage.block_size,
        keep=stage.keep_logits if stage.keeps_as_written else None,
        usage=usage,
    ):
        place, tokens = places[finished.request.key], finished.tokens
        question = asked[place]
        if max(tokens) >= context.tokenizer.vocab_size:  # a model may have rows to spare
            reply = Reply(place, error="the writer drew a token id that the tokenizer does not have")
            yield place, _line(question, reply, context), None
            continue
        finish = "eos" if tokens[-1] in model.decoder.config.eos_ids else "length"
        text = context.tokenizer.continuation(question.prompt.tokens, tokens)
        scores = finished.scores and TokenScores(*map(np.asarray, finished.scores))
        yield place, _line(question, Reply(place, tuple(tokens), text, finish), context), scores


def _line(question: Question, reply: Reply, context: Context) -> Line:
    prompt = question.prompt
    written: dict[str, Any] = {"error": reply.error}
    if reply.error is None:
        written = {"finish": reply.finish, "prompt_tokens": list(prompt.tokens), "tokens": list(reply.tokens)}
    conversation = {} if prompt.messages is None else {"messages": [dict(message) for message in prompt.messages]}
    return {
        "id": question.id,
        "number": question.number,
        "writer": question.writer,
        "temperature": question.temperature,
        "top_p": question.top_p,
        "seed": context.recipe.seed,
        **written,
        "prompt": prompt.text,
        **conversation,
        "text": reply.text,
    }


def _prompt_labels(labels: str, prompt: Prompt, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> Sequence[int]:
    """Which tokens of a prompt count as labels too."""
    if labels == "assistant" and prompt.messages is not None:
        return prompt_mask(tokenizer, prompt.messages, eos_ids=eos_ids)
    return [int(labels == "all")] * len(prompt.tokens)


def _generator(stage: Generate, context: Context) -> dict[str, Any]:
    """What a shard's bytes depend on besides its questions, and another machine might have otherwise."""
    if stage.server is not None:
        return {"server": to_json(stage.server)}
    rounding = {} if compute_dtype().itemsize == 4 else {"batch_size": stage.batch_size}
    return {"dtype": compute_dtype().name, **rounding}


def _source(stage: Generate, context: Context) -> dict[str, Any]:
    """What the manifest of the rows says of who wrote them."""
    source: dict[str, Any] = {"target": to_json(context.recipe.target)} if stage.uses_target else {}
    if stage.server is not None:
        source["server"] = to_json(stage.server)
    if stage.writer != TARGET:
        source["writer"] = stage.writer
    if known := [prompts.provenance() for prompts in stage.prompts if hasattr(prompts, "provenance")]:
        source["prompts"] = known
    return source


def _check(name: str, account: Mapping[str, Any], folder: Path) -> None:
    found = account["answers"]
    if found["asked"] != found["written"] + sum(found["errors"].values()):
        raise AssertionError(f"{name}: {found} does not add up")
    if not found["written"]:
        reasons = ", ".join(f"{count} times {reason}" for reason, count in found["errors"].items())
        raise ConfigError(
            f"{name}: not one of {found['asked']} questions was answered: {reasons}; see to that, then delete {folder} "
            "to ask again"
        )


def _facts(account: Mapping[str, Any], usage: Usage) -> dict[str, Any]:
    """For the stage's record and the report."""
    found, skipped = account["answers"], account["prompts"]["skipped"]
    listed = lambda counts: ", ".join(f"{count} {reason}" for reason, count in counts.items())
    facts = {"answers": found["written"], "ended by EOS": f"{account['finish'].get('eos', 0) / found['written']:.0%}"}
    if found["errors"]:
        facts["errors"] = listed(found["errors"])
    if skipped:
        facts["skipped prompts"] = listed(skipped)
    if len(account["writers"]) > 1 or TARGET not in account["writers"]:
        facts["written by"] = ", ".join(f"{name} {count}" for name, count in account["writers"].items())
    if account["duplicates"]:
        facts["duplicates"] = account["duplicates"]
    if usage.slots:
        facts["slots busy"] = f"{usage.busy:.0%}"
    return facts
