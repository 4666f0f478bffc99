"""The drafts and targets of the two papers, by name. Parameters are counted with the head untied, as given."""

from typing import Any

from jaxdraft.errors import ConfigError, unknown_name
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.rope import Llama3Scaling

_LLAMA2: dict[str, Any] = {
    "vocab_size": 32000,
    "max_positions": 4096,
    "bos_id": 1,
    "eos_ids": (2,),
    "tie_embeddings": False,
}
_PHI3: dict[str, Any] = {
    "family": "phi3",
    "vocab_size": 32064,
    "max_positions": 4096,
    "bos_id": 1,
    "eos_ids": (32000, 32001, 32007),
    "tie_embeddings": False,
}
_LLAMA31: dict[str, Any] = {
    "vocab_size": 128256,
    "max_positions": 131072,
    "bos_id": 128000,
    "eos_ids": (128001, 128008, 128009),
    "tie_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192),
}


def _shape(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, family: dict[str, Any]
) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        **family,
    )


llama2_chat_drafter_115m = _shape(4, 1024, 2816, 8, 8, _LLAMA2)
"""116,925,440 parameters: the draft of Direct Alignment (arXiv 2403.00858, table 1), which calls it 115M."""

fastdraft_phi3_50m = _shape(6, 512, 1408, 8, 8, _PHI3)
"""52,107,776 parameters: FastDraft's (arXiv 2411.11055, table 5) draft for Phi-3-mini, called 50M."""

fastdraft_phi3_120m = _shape(12, 768, 2048, 12, 12, _PHI3)
"""134,204,160 parameters: FastDraft's (table 5) second draft for Phi-3-mini. The paper's 120M is neither this count nor
that with a tied head (109,579,008)."""

fastdraft_llama31_150m = _shape(6, 512, 1792, 8, 8, _LLAMA31)
"""154,147,328 parameters: FastDraft's (table 5) draft for Llama-3.1-8B, called 150M."""

llama2_7b = _shape(32, 4096, 11008, 32, 32, _LLAMA2)
"""6,738,415,616 parameters: Direct Alignment's target. Its table 1 prints a hidden size of 2048: a slip for 4096."""

phi3_mini_4k = _shape(32, 3072, 8192, 32, 32, _PHI3 | {"sliding_window": 2047})
"""3,821,079,552 parameters: FastDraft's first target, Phi-3-mini-4k-instruct."""

llama31_8b = _shape(32, 4096, 14336, 32, 8, _LLAMA31)
"""8,030,261,248 parameters: FastDraft's second target, Llama-3.1-8B-Instruct."""

PRESETS = {name: value for name, value in globals().items() if isinstance(value, ModelConfig)}


def preset(name: str) -> ModelConfig:
    """The preset of that name.

    Raises:
      ConfigError: there is none; the nearest is suggested.
    """
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, list(PRESETS)))
    return PRESETS[name]
