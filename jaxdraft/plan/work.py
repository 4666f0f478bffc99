"""How long steps take, and what decoding moves: phases of equal steps, and batches that are written together."""

import math
from typing import Any, NamedTuple

from jaxdraft.data.magpie import Magpie
from jaxdraft.decode.batching import bucket_length
from jaxdraft.models import ModelConfig
from jaxdraft.plan import flops
from jaxdraft.plan.hardware import Hardware
from jaxdraft.plan.shapes import PlannedContext
from jaxdraft.recipe import Generate, Recipe, Written

MFU = 0.4
MBU = 0.6
ACCEPTANCE = 0.6
PROMPT_TOKENS = 512
WEIGHT = 2  # bytes of a weight, an activation or a cached value in bfloat16


class Phase(NamedTuple):
    """Equal steps.

    Attributes:
      name: what they do.
      steps: how many.
      flops: of one step, all chips together.
      bytes: of one step, that one chip moves between its memory and itself.
    """

    name: str
    steps: float
    flops: float
    bytes: float

    def seconds(self, hardware: Hardware) -> tuple[float, float]:
        """Of one step: by its products, by its bytes."""
        chip = hardware.rates
        return self.flops / (hardware.chips * chip.flops * MFU), self.bytes / (chip.bandwidth * MBU)


class Prompts(NamedTuple):
    """How many prompts a source gives, ``None`` where only reading it says, and tokens of each at most."""

    total: int | None
    tokens: int
    notes: list[str]


def prompts_of(source: Any, recipe: Recipe, limit: int | None = None, max_tokens: int | None = None) -> Prompts:
    """What a source of prompts says of itself in ``limit`` and ``max_tokens`` (of ``Beginnings``, ``tokens``).

    Args:
      source: of a Generate stage or a task.
      recipe: that it stands in.
      limit: a task's own.
      max_tokens: a task's own.
    """
    if isinstance(source, Magpie):
        return Prompts(source.count, bucket_length(1), [])
    if isinstance(source, Written):
        return _written(source, recipe)
    count = _least(limit, getattr(source, "limit", None))
    tokens = _least(max_tokens, getattr(source, "max_tokens", None), getattr(source, "tokens", None))
    where = getattr(source, "path", None) or getattr(source, "name", type(source).__name__)
    notes = []
    if count is None:
        notes.append(f"prompts unknown: reads {where}; its limit would say how many at most")
    if tokens is None:
        notes.append(f"{where}: prompts of {PROMPT_TOKENS} tokens assumed; its max_tokens would say")
    return Prompts(count, tokens or PROMPT_TOKENS, notes)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _written(source: Written, recipe: Recipe) -> Prompts:
    made = recipe.stage(source.stage)
    assert isinstance(made, Generate)
    totals = [prompts_of(source, recipe).total for source in made.prompts]
    total = None if None in totals else len(made.temperatures) * sum(n for n in totals if n is not None)
    return Prompts(_least(total, source.limit), source.max_tokens or made.max_new_tokens, [])


def expected_block(block_size: int, acceptance: float = ACCEPTANCE) -> float:
    """Tokens per run of the target where every draft token is accepted with one probability (Leviathan, equation 1)."""
    return (1 - acceptance ** (block_size + 1)) / (1 - acceptance)


def decode_layout(context: PlannedContext, hardware: Hardware) -> tuple[int, int]:
    """Groups of chips that write rows of their own, and chips of a group: as ``MeshShape.for_decoding`` lays them."""
    recipe, target = context.recipe, context.target_shape
    heads = (target.num_heads, recipe.draft.num_heads)
    bytes = WEIGHT * (target.num_parameters + context.draft_config().num_parameters)
    fitting = [
        tensor
        for tensor in range(1, hardware.chips + 1)
        if not any(count % tensor for count in (hardware.chips, *heads)) and bytes / tensor <= hardware.rates.memory / 2
    ]
    tensor = recipe.mesh.decode_tensor or (fitting[0] if fitting else math.gcd(hardware.chips, *heads))
    return max(1, hardware.chips // tensor), tensor


class Decoding(NamedTuple):
    """A batch that is written together: rows, tokens of prompt and answer, and the chips it is spread over."""

    rows: int
    prompt: int
    new: int
    groups: int
    tensor: int

    @property
    def own_rows(self) -> int:
        """Rows of one group: all of them where they do not divide over the groups."""
        return self.rows if self.rows % self.groups else self.rows // self.groups

    @property
    def slots(self) -> int:
        return bucket_length(self.prompt) + self.new

    def prefill(self, config: ModelConfig, batches: float, what: str) -> Phase:
        context = flops.mean_context(self.prompt, config.sliding_window)
        chunks = math.ceil(max(1, self.prompt - 1) / 128)
        bytes = chunks * self._weights(config) + self._cache(config)
        work = self.rows * self.prompt * flops.block_flops(config, context)
        return Phase(f"{what} reads prompts", batches, work * self._repeated, bytes)

    def step(self, config: ModelConfig, width: int = 1) -> tuple[float, float]:
        """(flops, bytes a chip moves) of one cached step that reads ``width`` tokens a row; all slots are looked at."""
        context = min(self.slots, config.sliding_window or self.slots)
        work = self.rows * width * (flops.block_flops(config, context) + flops.head_flops(config))
        return work * self._repeated, self._weights(config) + self._cache(config)

    def resident(self, *configs: ModelConfig) -> float:
        """Bytes of a chip that models and their caches take together."""
        weights = sum(WEIGHT * config.num_parameters / self.tensor for config in configs)
        return weights + sum(map(self._cache, configs))

    @property
    def _repeated(self) -> float:
        return self.own_rows * self.groups / self.rows

    def _weights(self, config: ModelConfig) -> float:
        table = 0 if config.tie_embeddings else config.vocabulary * config.hidden_size  # read a row at a time
        return WEIGHT * (config.num_parameters - table) / self.tensor

    def _cache(self, config: ModelConfig) -> float:
        return (
            self.own_rows * self.slots * flops.cache_bytes(config, WEIGHT) / math.gcd(self.tensor, config.num_kv_heads)
        )
