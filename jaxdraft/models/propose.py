"""A draft's shape for any target: shallow, because a draft's latency is that of its layers one after another, and of
sizes that every engine and every quantisation takes."""

import dataclasses
import itertools
import math

from jaxdraft.errors import ConfigError
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.rope import LongRope

_LAYERS = range(1, 25)
_HIDDEN = (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # 1, 2, 4 heads, and multiples of 8
_CLOSE = 0.05  # of the number of parameters: within it, the better shape goes before the nearer number
_WIDTH_PER_LAYER = 128  # of the papers' drafts: 256, 85, 64 and 85


def propose_draft(target: ModelConfig, parameters: int | None = None, *, tie_embeddings: bool = False) -> ModelConfig:
    """A draft of about ``parameters`` for ``target``.

    Head size 64 (128 from a width of 2048 on), intermediate size a multiple of 256 near 2.75 widths, and 8 key/value
    heads, which divide by the usual tensor-parallel sizes; fewer only where there are not 8 heads. Vocabulary, special
    tokens, context and rotary embedding are the target's; LongRoPE's factors, which belong to the target's head size,
    are left out.

    Args:
      target: the model to be accelerated.
      parameters: of the draft; ``None`` is a fiftieth of the target's, or the fewest this vocabulary allows.
      tie_embeddings: use the embedding table as head; both papers' drafts do not.

    Raises:
      ConfigError: as many parameters as the target has, or fewer than the smallest shape, or more than the largest.
    """
    shapes = [
        _shape(target, layers, hidden, tie_embeddings)
        for layers, hidden in itertools.product(_LAYERS, _HIDDEN)
        if hidden <= max(target.hidden_size, _HIDDEN[0])
    ]
    limit = target.num_parameters
    smallest = min(shape.num_parameters for shape in shapes)
    if smallest >= limit:
        raise ConfigError(
            f"the target has {limit:,} parameters: the smallest draft for its vocabulary has {smallest:,}"
        )
    shapes = [shape for shape in shapes if shape.num_parameters < limit]
    largest = max(shape.num_parameters for shape in shapes)
    if parameters is None:
        parameters = min(max(limit // 50, smallest), largest)
    if parameters >= limit:
        raise ConfigError(
            f"parameters is {parameters:,}, the target has {limit:,}: a draft has to be smaller, by far to be of use"
        )
    if smallest > parameters * (1 + _CLOSE):
        raise ConfigError(f"parameters is {parameters:,}: the smallest draft for this vocabulary has {smallest:,}")
    if parameters > largest * (1 + _CLOSE):
        raise ConfigError(f"parameters is {parameters:,}: the largest draft for this target has {largest:,}")

    def miss(shape: ModelConfig) -> float:
        return abs(math.log(shape.num_parameters / parameters))

    nearest = min(map(miss, shapes))
    close = [shape for shape in shapes if miss(shape) <= max(nearest, _CLOSE)]
    return min(close, key=lambda s: (abs(math.log(s.hidden_size / s.num_layers / _WIDTH_PER_LAYER)), miss(s)))


def _shape(target: ModelConfig, layers: int, hidden: int, tie_embeddings: bool) -> ModelConfig:
    head_dim = 128 if hidden >= 2048 else 64
    heads = hidden // head_dim
    return dataclasses.replace(
        target,
        family="phi3" if target.family == "phi3" else "llama",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=max(1, round(2.75 * hidden / 256)) * 256,
        num_heads=heads,
        num_kv_heads=min(heads, 8),
        head_dim=None,
        rope_scaling=None if isinstance(target.rope_scaling, LongRope) else target.rope_scaling,
        sliding_window=None,
        qkv_bias=False,
        tie_embeddings=tie_embeddings,
    )
