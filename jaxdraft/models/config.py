"""The shape of a decoder. Llama and Phi-3 differ in numbers and in the names of their files, not in classes."""

import dataclasses
import itertools
import math
from typing import Literal

from jaxdraft.errors import ConfigError
from jaxdraft.models.rope import LongRope, Scaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a Llama- or Phi-3-style decoder.

    Attributes:
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP.
      num_layers: number of blocks.
      num_heads: query heads.
      num_kv_heads: key/value heads; a divisor of ``num_heads`` (grouped-query attention).
      vocab_size: rows of the embedding table. ``None`` in a draft's shape means "the target's".
      head_dim: width of one head; ``None`` means ``hidden_size // num_heads``.
      family: decides the names and the fusing of weights in a Hugging Face folder.
      rope_theta: base of the rotary embedding.
      rope_scaling: how it is stretched to longer texts: Llama 3's, Phi-3's LongRoPE, or not at all.
      sliding_window: tokens that a token sees, itself included; ``None`` is all before it.
      qkv_bias: biases on the query, key and value projections, as in Qwen2.
      rms_norm_eps: added to the mean square in RMSNorm.
      tie_embeddings: the output head is the embedding table.
      max_positions: longest sequence the model is meant for, prompt and answer together.
      bos_id: token that starts a document, if any.
      eos_ids: tokens that end a text.
      head_ids: the draft vocabulary, ascending: the tokens that the output head can propose; ``None`` is all. The
        parameters keep a row for every token, from which ``decoder.head_weight`` selects.

    Raises:
      ConfigError: a size or constant is not positive, or heads do not divide.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int | None = None
    head_dim: int | None = None
    family: Literal["llama", "phi3", "mistral", "qwen2"] = "llama"
    rope_theta: float = 10000.0
    rope_scaling: Scaling = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_positions: int = 2048
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    head_ids: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "max_positions"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be positive")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be positive and finite")
        if self.vocab_size is not None and self.vocab_size <= 0:
            raise ConfigError(f"vocab_size is {self.vocab_size}: it must be positive, or None for the target's")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads}), or set head_dim"
            )
        if self.head_size % 2:
            raise ConfigError(f"head_dim ({self.head_size}) must be even: rotary embeddings turn pairs")
        if self.family == "phi3" and self.head_size * self.num_heads != self.hidden_size:
            raise ConfigError("family phi3 has no key for head_dim: it must be hidden_size / num_heads")
        if self.sliding_window is not None and (self.sliding_window < 1 or self.family == "llama"):
            raise ConfigError(
                f"sliding_window is {self.sliding_window}: it must be positive, of a family that has one: not llama"
            )
        if self.qkv_bias != (self.family == "qwen2"):
            raise ConfigError("qkv_bias belongs to family qwen2, and to no other")
        if self.head_ids is not None:
            ids = self.head_ids
            if not ids or any(a >= b for a, b in itertools.pairwise(ids)) or ids[0] < 0 or ids[-1] >= self.vocabulary:
                raise ConfigError("head_ids must be ids of the vocabulary in ascending order, each once, at least one")
        if isinstance(self.rope_scaling, LongRope):
            if self.family != "phi3":
                raise ConfigError("longrope belongs to family phi3")
            if len(self.rope_scaling.short_factor) != self.head_size // 2:
                raise ConfigError(
                    f"longrope has {len(self.rope_scaling.short_factor)} factors, a head of {self.head_size} needs "
                    f"{self.head_size // 2}"
                )

    @staticmethod
    def for_target(target: "ModelConfig", parameters: int | None = None, **options: bool) -> "ModelConfig":
        """A draft's shape for any target: see ``jaxdraft.models.propose.propose_draft``."""
        from jaxdraft.models.propose import propose_draft

        return propose_draft(target, parameters, **options)

    def check_target(self) -> None:
        """Raises ConfigError where this is no target: one that proposes a part of its vocabulary only."""
        if self.head_ids is not None:
            raise ConfigError(
                f"the target proposes only {len(self.head_ids)} of its {self.vocabulary} tokens: a draft vocabulary is "
                "for drafts; export it with --vocabulary full"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def vocabulary(self) -> int:
        """``vocab_size``, once it is known.

        Raises:
          ConfigError: the shape still waits for its target's vocabulary.
        """
        if self.vocab_size is None:
            raise ConfigError("vocab_size is not set: take the target's with dataclasses.replace(config, vocab_size=…)")
        return self.vocab_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; a tied table counts once, an untied head with its draft vocabulary's rows."""
        attention = self.hidden_size * self.head_size * (2 * self.num_heads + 2 * self.num_kv_heads)
        if self.qkv_bias:
            attention += self.head_size * (self.num_heads + 2 * self.num_kv_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        head = 0 if self.tie_embeddings else len(self.head_ids or range(self.vocabulary))
        tables = (self.vocabulary + head) * self.hidden_size
        return tables + self.num_layers * block + self.hidden_size
