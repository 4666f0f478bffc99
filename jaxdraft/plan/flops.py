"""Floating-point operations of a model, counted from its shape: 2·m·k·n for every product of matrices.

Norms, rotary embeddings, softmax and the optimizer are left out: they are bound by memory and below one in a hundred.
Attention counts the keys that a query may see; a kernel that computes the masked half too does more.
"""

from jaxdraft.models import ModelConfig

FORWARD, BACKWARD = 1, 2  # a product's gradient is two products of its size


def mean_context(length: int, window: int | None = None) -> float:
    """Keys that a query of a row of ``length`` tokens sees on average, itself included."""
    seen = min(length, window or length)
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters of all blocks that take part in products: everything but norms and biases."""
    attention = config.hidden_size * config.head_size * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def block_flops(config: ModelConfig, context: float) -> float:
    """A token's way through all blocks, forward, where it sees ``context`` keys."""
    attention = 4 * config.num_layers * config.num_heads * config.head_size * context  # scores, and values by them
    return 2 * matrix_parameters(config) + attention


def head_flops(config: ModelConfig) -> float:
    """A token's logits."""
    return 2 * config.hidden_size * len(config.head_ids or range(config.vocabulary))


def forward_flops(config: ModelConfig, length: int) -> float:
    """A row of ``length`` tokens, forward, with logits of every token."""
    return length * (block_flops(config, mean_context(length, config.sliding_window)) + head_flops(config))


def cache_bytes(config: ModelConfig, itemsize: int) -> int:
    """Keys and values of one token."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * itemsize
