"""Conversations whose answers are known, to be trained on as they are."""

from typing import NamedTuple

from jaxdraft.data.prompts import Message


class Conversation(NamedTuple):
    """Messages in turn, the last of them the assistant's.

    Attributes:
      id: names the example.
      messages: ``{"role", "content"}`` each.
    """

    id: str
    messages: tuple[Message, ...]
