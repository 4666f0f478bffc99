"""Decoding: a model alone, a target with a draft, and what a draft would bring without decoding at all."""

from jaxdraft.decode.driver import Seconds
from jaxdraft.decode.generate import GeneratedBatch, generate, generate_batches
from jaxdraft.decode.latency import step_latency
from jaxdraft.decode.offline import (
    Acceptance,
    acceptance,
    acceptance_ratios,
    block_efficiency,
    expected_blocks,
    token_probabilities,
)
from jaxdraft.decode.rules import Speculation, verify
from jaxdraft.decode.sampling import Sampling, draw, probabilities
from jaxdraft.decode.score import TopK, TopScores, top_scores
from jaxdraft.decode.speculative import (
    SpeculativeBatch,
    SpeculativeResult,
    speculative_batches,
    speculative_generate,
    token_origins,
)
from jaxdraft.decode.stream import Finished, Request, Usage, stream

__all__ = [
    "Acceptance",
    "Finished",
    "GeneratedBatch",
    "Request",
    "Sampling",
    "Seconds",
    "Speculation",
    "SpeculativeBatch",
    "SpeculativeResult",
    "TopK",
    "TopScores",
    "Usage",
    "acceptance",
    "acceptance_ratios",
    "block_efficiency",
    "draw",
    "expected_blocks",
    "generate",
    "generate_batches",
    "probabilities",
    "speculative_batches",
    "speculative_generate",
    "step_latency",
    "stream",
    "token_origins",
    "token_probabilities",
    "top_scores",
    "verify",
]
