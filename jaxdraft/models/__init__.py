"""The decoder that serves as draft and as target: its shape, its forward pass, its cache, its files."""

from jaxdraft.models.cache import KVCache, init_cache
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.decoder import Decoder, compute_dtype, for_decoding, head_weight, init_params, logits

__all__ = [
    "Decoder",
    "KVCache",
    "ModelConfig",
    "compute_dtype",
    "for_decoding",
    "head_weight",
    "init_cache",
    "init_params",
    "logits",
]
