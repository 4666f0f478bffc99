"""Magpie (Xu et al. 2024, arXiv 2406.08464): an aligned model that is given nothing but the beginning of a user's turn
writes what a user would.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxdraft.data.conversations import user_turn
from jaxdraft.data.prompts import Prompt
from jaxdraft.errors import ConfigError
from jaxdraft.tokenizers import Tokenizer


@dataclass(frozen=True)
class Magpie:
    """The bare beginning of a user's turn, as often as asked. What a Generate stage writes after it are instructions,
    which a later one answers as ``Written("the first one's name")``.

    FastDraft (arXiv 2411.11055, section 5.1) makes a part of its prompts so.

    Attributes:
      count: instructions to be written. Each is drawn anew, so the temperature must be above 0.
      system: a system prompt before the turn, which steers what is asked (Magpie, section 2.2).
      name: begins its prompts' ids; two in one stage need two.
    """

    count: int
    system: str | None = None
    name: str = "magpie"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"Magpie: count is {self.count}: it must be at least 1")

    def prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt]:
        turn = user_turn(tokenizer, self.system)
        for number in range(self.count):
            yield Prompt(f"{self.name}:{number}", turn.tokens, turn.prefix)
