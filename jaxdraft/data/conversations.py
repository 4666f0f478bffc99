"""Conversations in the words of the model's chat template: which tokens the assistant wrote, and where the user's go.

The tokens are those of the text that is served: the whole conversation rendered once and encoded once. Spans are
found by comparing ids, so that they hold for SentencePiece and byte-level BPE alike; a token that reaches over the
border between a turn's opening and its words counts as the words'.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxdraft.data.prompts import Message, is_message
from jaxdraft.data.quarantine import Rejected, first
from jaxdraft.data.readers import Row, files_fingerprint, local_file, read_jsonl
from jaxdraft.tokenizers import ChatTemplateError, Tokenizer, common_prefix

_WORDS = "It's  one\n(of TWO) <b>&amp;</b> möglich…x"  # what no template's own text holds and any change would show in
_FIRST = "Aa1(«è中"  # characters that words may begin with: some merge with a space before them, others do not


class Conversation(NamedTuple):
    """What was said by whom.

    Attributes:
      id: names the example.
      messages: the turns in order; a system prompt, where there is one, comes first.
    """

    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class ConversationFile:
    """Conversations from a JSONL file, plain or `.gz`: a line ``{"messages": [{"role", "content"}, ...]}`` each.

    Attributes:
      path: of the file, here or in a bucket.
      limit: at most this many, the first that fit.
    """

    path: str
    limit: int | None = None

    def conversations(self) -> Iterator[Conversation | Rejected]:
        return first(map(_conversation, read_jsonl(local_file(self.path, "conversations"))), self.limit)

    def fingerprint(self) -> str:
        return files_fingerprint([local_file(self.path, "conversations")])


def _conversation(row: Row | Rejected) -> Conversation | Rejected:
    if isinstance(row, Rejected):
        return row
    messages = row.value.get("messages") if isinstance(row.value, dict) else None
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        return Rejected(row.where, 'no "messages", each with "role" and "content" as text')
    return Conversation(str(row.value.get("id", row.number)), tuple(messages))


class UserTurn(NamedTuple):
    """What a chat template writes around a user's words.

    Attributes:
      prefix: the text before them, from the conversation's first character.
      tokens: ids of ``prefix`` as they stand whatever the words begin with: without a last space that would become
        part of the first word's token.
      suffix: the text after them, up to and with the opening of the reply.
    """

    prefix: str
    tokens: tuple[int, ...]
    suffix: str


def labelled(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    labels: Literal["assistant", "all"] = "assistant",
    *,
    eos_ids: Collection[int],
) -> tuple[list[int], list[int]]:
    """A conversation as an example to train on.

    Args:
      labels: "assistant" for what the assistant writes, each of its turns from its first token to its end token; "all"
        for every token but the first.
      eos_ids: the ids at which the model stops when it is served.
    Returns:
      tokens and loss_mask, of equal lengths; the mask is 1 on a token that is a label.
    Raises:
      ChatTemplateError: the template refuses the conversation, or what it renders is not what is served: it changes
        the assistant's words, rewrites earlier turns, or ends a turn with none of ``eos_ids``.
    """
    text = tokenizer.render(messages, reply=False)
    if labels == "all":
        tokens = tokenizer.encode(text, bos=False)
        return tokens, [0] + [1] * (len(tokens) - 1)
    tokens, mask = _assistant_turns(tokenizer, messages, text, eos_ids)
    if not any(mask):
        raise ChatTemplateError("the assistant says nothing in the conversation")
    return tokens, mask


def prompt_mask(tokenizer: Tokenizer, messages: Sequence[Message], *, eos_ids: Collection[int]) -> list[int]:
    """For a prompt that asks for a reply, 1 on the tokens of the assistant's earlier turns, as ``labelled`` finds them.

    Raises:
      ChatTemplateError: as ``labelled``.
    """
    return _assistant_turns(tokenizer, messages, tokenizer.render(messages), eos_ids)[1]


def user_turn(tokenizer: Tokenizer, system: str | None = None) -> UserTurn:
    """What the chat template writes around the words of a user who speaks first, after an optional system prompt.

    A model that continues ``tokens`` writes what a user might say: Magpie (arXiv 2406.08464).

    Raises:
      ChatTemplateError: the template takes no system prompt, or does not keep the user's words as they are.
    """
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    prefix, *rest = tokenizer.render([*before, {"role": "user", "content": _WORDS}]).split(_WORDS)
    if len(rest) != 1:
        raise ChatTemplateError("the chat template does not write the user's words once and as they are")
    tokens, *others = tokenizer.encode_batch([prefix + first + _WORDS for first in _FIRST], bos=False)
    shared = min(common_prefix(tokens, other) for other in others)
    return UserTurn(prefix, tuple(tokens[:shared]), rest[0])


def _assistant_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], text: str, eos_ids: Collection[int]
) -> tuple[list[int], list[int]]:
    """Ids of ``text``, the rendering of ``messages``, and a mask: 1 on those that the assistant writes when served."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if turns[:1] == [0]:
        raise ChatTemplateError("the assistant speaks first: there is no prompt that opens its turn")
    opened = [tokenizer.render(messages[:i]) for i in turns]
    closed = [tokenizer.render(messages[: i + 1], reply=False) for i in turns]
    texts = list(dict.fromkeys([text, *opened, *closed]))  # the last turn's is often the whole
    ids = dict(zip(texts, tokenizer.encode_batch(texts, bos=False), strict=True))
    tokens = ids[text]
    mask = [0] * len(tokens)
    for i, before, after in zip(turns, opened, closed, strict=True):
        if not after.startswith(before):
            raise ChatTemplateError("the chat template opens a reply otherwise than it writes one that was given")
        if not messages[i]["content"].strip():
            raise ChatTemplateError("the assistant's turn is empty")
        if messages[i]["content"].strip() not in after[len(before) :]:
            raise ChatTemplateError("the chat template changes the assistant's words")
        turn = ids[after]
        start = common_prefix(ids[before], turn)
        end = next((place + 1 for place in range(start, len(turn)) if turn[place] in eos_ids), None)
        if end is None:
            known = ", ".join(map(str, sorted(eos_ids)))
            raise ChatTemplateError(f"the chat template ends the assistant's turn with no end token ({known})")
        if turn[:end] != tokens[:end]:
            raise ChatTemplateError("the chat template rewrites earlier turns when the conversation goes on")
        mask[start:end] = [1] * (end - start)
    return tokens, mask
