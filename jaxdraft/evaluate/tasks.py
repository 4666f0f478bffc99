"""What a draft is measured on: prompts, and how the target is decoded there."""

import dataclasses
from typing import Any

from jaxdraft.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of prompts with its decoding settings.

    Attributes:
      name: as it stands in results and figures.
      prompts: anything with ``prompts(tokenizer) -> list[Prompt]``, such as a ``PromptFile``.
      temperature: 0 is greedy.
      top_p: nucleus, of draft and target alike.
      max_new_tokens: per answer.
      top_k: of draft and target alike, before top-p; 0 keeps all.
    """

    name: str
    prompts: Any
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    top_k: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise ConfigError(
                f"task {self.name}: temperature and top_k must not be negative, top_p lie in (0, 1], max_new_tokens be "
                "positive"
            )
