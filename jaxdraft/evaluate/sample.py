"""``jaxdraft sample``: what a target writes, live, with the draft's tokens coloured; and how fast, with and without.

The text goes to standard output, all that is said about it to standard error.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdraft.data.prompts import example_id
from jaxdraft.decode import Speculation, SpeculativeResult, token_origins
from jaxdraft.decode.batching import PromptBatch, prompt_batches
from jaxdraft.decode.blocks import WithDraft
from jaxdraft.decode.driver import Writer, end_tokens
from jaxdraft.decode.generate import Alone
from jaxdraft.decode.live import Progress, compile_live, write_live
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.command import shared_tokenizer
from jaxdraft.evaluate.measure import Model
from jaxdraft.evaluate.terminal import DRAFTED, FAINT, HEADING, REFUSED, Fragments, Screen, waiting
from jaxdraft.tokenizers import Tokenizer, load_tokenizer

_NOT_UTF8 = "the prompt is not text in UTF-8: convert it, with iconv for one ({})"
_BAR = 24
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_NAMES = {Alone: "target alone", WithDraft: "with the draft"}


@dataclasses.dataclass(frozen=True)
class Appearance:
    """What is shown.

    Attributes:
      colour: on terminals that have it.
      rejected: also the first refused token of each block, struck out.
      compare: also what the target writes alone, before.
    """

    colour: bool = True
    rejected: bool = False
    compare: bool = True


def sample(
    *,
    target: Path,
    draft: Path | None,
    prompt: str | None,
    speculation: Speculation,
    decoding: Mapping[str, Any],
    seed: int = 0,
    chat: bool | None = None,
    system: str | None = None,
    appearance: Appearance = Appearance(),
) -> None:
    """Writes what the target does after ``prompt``, and says how fast.

    Args:
      target: a Hugging Face folder.
      draft: another one; ``None`` shows the target alone.
      prompt: ``"-"`` is read from standard input; ``None`` asks a person for one after another.
      speculation: how the draft proposes and the target verifies.
      decoding: ``max_new_tokens``, ``temperature``, ``top_p`` and ``top_k``, as of ``generate_batches``.
      seed: of all randomness.
      chat: whether prompts are turns of a conversation, in the words of the target's chat template; ``None``: if it
        has one.
      system: the conversation's system prompt.
      appearance: what is shown.

    Raises:
      ConfigError: a folder or a setting is wrong, the two models' tokenizers differ, or there is no prompt.
      FloatingPointError: a model gave logits that are not finite.
    """
    if prompt is None and not sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt TEXT, or --prompt - to read it from standard input")
    try:
        if prompt == "-":
            prompt = sys.stdin.read().removesuffix("\n")
        for text in (prompt, system):
            (text or "").encode()  # what Python could not read it hides in surrogates, which no tokenizer takes
    except UnicodeError as error:
        raise ConfigError(_NOT_UTF8.format(error)) from error
    tokenizer = load_tokenizer(target) if draft is None else shared_tokenizer(target, draft)
    if chat is None:
        chat = system is not None or tokenizer.template_fingerprint() is not None
    elif system is not None and not chat:
        raise ConfigError("system is a part of a conversation: leave out --no-chat")
    conversation = Conversation(tokenizer, system) if chat else None
    if conversation is not None:
        conversation.prompt("Hello")  # what the template refuses is told before it is waited for
    with waiting(f"loading {target}" + ("" if draft is None else f" and {draft}")):
        models = [Model.load(folder) for folder in (target, draft) if folder is not None]
        demonstration = Demonstration(tokenizer, models, speculation, decoding, seed, appearance)
    if prompt is not None:
        demonstration.show(*_read(prompt, tokenizer, conversation))
        return
    demonstration.ready()
    print("A prompt on each line; Ctrl-D ends.", file=sys.stderr)
    while (line := _ask()) is not None:
        try:
            answer = demonstration.show(*_read(line, tokenizer, conversation))
        except ConfigError as error:
            print(error, file=sys.stderr)
            if conversation is not None and conversation.turns:
                conversation.turns.clear()
                print("the conversation begins anew", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
        else:
            if conversation is not None:
                conversation.turns += [("user", line), ("assistant", answer)]


@dataclasses.dataclass
class Conversation:
    """What was said so far, ``(role, content)``, and the template that makes a prompt of it."""

    tokenizer: Tokenizer
    system: str | None
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def prompt(self, line: str) -> list[int]:
        """The tokens of all of it and what the user says next, with the reply opened."""
        system = [] if self.system is None else [("system", self.system)]
        said = [*system, *self.turns, ("user", line)]
        text = self.tokenizer.render([{"role": role, "content": content} for role, content in said])
        return self.tokenizer.encode(text, bos=False)


def _read(line: str, tokenizer: Tokenizer, conversation: Conversation | None) -> tuple[list[int], str]:
    """The tokens to go on from, and how they are shown: a text is continued, what was asked stands there already."""
    if conversation is not None:
        return conversation.prompt(line), ""
    tokens = tokenizer.encode(line)
    return tokens, tokenizer.decode(tokens)


def _ask() -> str | None:
    """The next line that is not empty; ``None`` at the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and earlier ones come back
    print(file=sys.stderr)
    mark = "> "
    while True:
        if not sys.stdout.isatty():  # the text goes there, and nothing else
            print(mark, end="", file=sys.stderr, flush=True)
        try:
            line = input(mark if sys.stdout.isatty() else "").strip()
            line.encode()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return None
        except UnicodeError as error:
            print(_NOT_UTF8.format(error), file=sys.stderr)
            continue
        if line:
            return line


class Demonstration:
    """A target, perhaps with a draft, that writes one text after another; its programs are compiled once.

    Args:
      tokenizer: the target's.
      models: the target, or the target and its draft.
      speculation: how the draft proposes and the target verifies.
      decoding: how a text is sampled.
      seed: of all randomness.
      appearance: what is shown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        models: Sequence[Model],
        speculation: Speculation,
        decoding: Mapping[str, Any],
        seed: int,
        appearance: Appearance,
    ):
        target, *drafts = models
        self._tokenizer, self._target, self._decoding, self._appearance = tokenizer, target, decoding, appearance
        self._how: dict[str, Any] = {"seed": seed, "greedy": decoding["temperature"] == 0}
        self._text, self._notes = (Screen(stream, appearance.colour) for stream in (sys.stdout, sys.stderr))
        eos_E = end_tokens(target.decoder.config, None)
        self._writers: list[Writer] = []
        if appearance.compare or not drafts:
            self._writers.append(Alone(target.decoder, target.params, eos_E))
        for draft in drafts:
            pair = target.decoder, target.params, draft.decoder, draft.params
            self._writers.append(WithDraft(*pair, speculation, eos_E))
        self._compiled: set[int] = set()

    def ready(self) -> None:
        """Compiles for short prompts, before one is asked for."""
        self._compile(self._batch([0, 0]))

    def show(self, prompt: Sequence[int], before: str) -> str:
        """Writes after a prompt, with what is shown before the answer; returns the answer.

        Raises:
          ConfigError: the prompt is empty, or leaves no room for ``max_new_tokens``.
        """
        batch = self._batch(prompt)
        for writer in self._writers:
            if isinstance(writer, WithDraft):
                writer.warn_of_length(int(batch.end_B[0]))
        compiling, done = self._compile(batch), []
        for writer in self._writers:
            is_last = writer is self._writers[-1]
            if len(self._writers) > 1 and self._text.is_watched:
                self._head(writer)
            show = self._text.write if is_last or self._text.is_watched else lambda *_: None
            show(before, FAINT)
            done.append(self._write(writer, batch, prompt, show))
        self._say(done, compiling)
        return self._tokenizer.continuation(prompt, done[-1].result.tokens)

    def _batch(self, prompt: Sequence[int]) -> PromptBatch:
        config = self._target.decoder.config
        (batch,) = prompt_batches(
            [prompt],
            **self._decoding,
            example_ids=[example_id(self._tokenizer.decode(prompt, skip_special=False))],
            batch_size=1,
            vocab_size=config.vocabulary,
            max_positions=config.max_positions,
        )
        return batch

    def _compile(self, batch: PromptBatch) -> float:
        """Compiles for a batch's bucket where that is new; returns the seconds."""
        if batch.bucket in self._compiled:
            return 0.0
        with waiting(f"compiling for prompts of up to {batch.bucket} tokens"):
            seconds = sum(compile_live(writer, batch, **self._how) for writer in self._writers)
        self._compiled.add(batch.bucket)
        return seconds

    def _write(self, writer: Writer, batch: PromptBatch, prompt: Sequence[int], show: Callable[..., None]) -> Progress:
        """Shows an answer while it is written; returns where it stood at the end."""
        fragments, count = Fragments(self._tokenizer, prompt), 0
        for progress in write_live(writer, batch, **self._how):
            for token, is_drafted, refused in origins(progress.result)[count:]:
                if refused >= 0 and self._appearance.rejected:
                    self._strike(show, fragments.instead(refused))
                show(fragments.add(token), DRAFTED if is_drafted else "")
            count = len(progress.result.tokens)
        show(fragments.rest() + "\n")
        return progress

    @staticmethod
    def _strike(show: Callable[..., None], text: str) -> None:
        word = text.lstrip(" ")
        show(text[: len(text) - len(word)])
        show(word.replace("\n", "↵"), REFUSED)

    def _head(self, writer: Writer) -> None:
        say = self._notes.write
        say("\n")
        say(_NAMES[type(writer)], HEADING)
        if self._notes.has_colour and isinstance(writer, WithDraft):
            say(": accepted", DRAFTED)
            if self._appearance.rejected:
                self._strike(say, " refused")
        say("\n")

    def _say(self, done: Sequence[Progress], compiling: float) -> None:
        """The speeds, of the loops alone, and what came of the draft."""
        say, rates = self._notes.write, [len(each.result.tokens) / each.decode for each in done]
        say("\n")
        for number, (writer, rate) in enumerate(zip(self._writers, rates, strict=True)):
            say(f"{_NAMES[type(writer)]:<16}")
            if self._notes.is_watched and len(rates) > 1:
                say(_bar(rate / max(rates)), DRAFTED if isinstance(writer, WithDraft) else "")
            say(f"{rate:10,.1f} tokens/s {done[number].decode:8.3f} s")
            if number:
                say(f"   {rate / rates[0]:.2f}×", HEADING)
            say("\n")
        last, facts = done[-1].result, []
        if isinstance(self._writers[-1], WithDraft):
            tokens, blocks = len(last.tokens), len(last.accepted)
            facts.append(f"{tokens} tokens in {blocks} runs of the target, {tokens / blocks:.2f} a run")
            if proposed := sum(last.drafted[: len(last.complete)]):
                facts[-1] += f"; {sum(last.complete) / proposed:.0%} of the draft's tokens accepted"
        if len(done) > 1 and self._how["greedy"]:
            same = last.tokens == done[0].result.tokens
            rounding = "" if self._target.dtype == np.float32 else ", as bfloat16 rounds differently for other shapes"
            facts.append("the same text, token for token" if same else f"not the same text{rounding}")
        compiled = f", compiled in {compiling:.1f} s" if compiling else ""
        facts.append(f"before: prompt read in {done[-1].prefill:.3f} s{compiled}")
        say("\n".join(facts) + "\n", FAINT)


def _bar(share: float) -> str:
    whole, eighths = divmod(round(share * _BAR * 8), 8)
    return ("█" * whole + _EIGHTHS[eighths]).ljust(_BAR)[:_BAR]


def origins(result: SpeculativeResult) -> list[tuple[int, bool, int]]:
    """Each token, whether it is the draft's, and the draft's token that it stands in place of; -1 where of none."""
    drafted = token_origins(result.accepted, len(result.tokens))
    refused = [id for count, id in zip(result.accepted, result.rejected, strict=True) for id in [-1] * count + [id]]
    return list(zip(result.tokens, drafted, refused, strict=False))
