"""``config.json`` of a Hugging Face folder, read and written in the dialects of transformers 4 and 5."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdraft.errors import ConfigError
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.rope import Llama3Scaling, LongRope, Scaling, longrope_attention

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_ORIGINAL = "original_max_position_embeddings"


def _whole(value: Any) -> bool:
    return type(value) is int


def _size(value: Any) -> bool:
    return _whole(value) and value > 0


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


# What is wanted, the test for it, and of which keys: at the top level, and in the rope settings.
_KINDS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "true or false",
        lambda value: isinstance(value, bool),
        ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"),
    ),
    ("a whole number above 0", _size, (*_NEEDED, "max_position_embeddings", _ORIGINAL)),
    ("a whole number above 0, or null", _or_null(_size), ("num_key_value_heads", "head_dim", "sliding_window")),
    ("a whole number or null", _or_null(_whole), ("bos_token_id",)),
    (
        "a whole number, a list of them, or null",
        _or_null(lambda value: _whole(value) or _list_of(_whole)(value)),
        ("eos_token_id",),
    ),
    ("a number above 0", _positive, ("rms_norm_eps",)),
    (
        "a number above 0, or null",
        _or_null(_positive),
        ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
    ),
    ("a list of numbers above 0", _list_of(_positive), ("short_factor", "long_factor")),
    ("an object or null", _or_null(lambda value: isinstance(value, dict)), ("rope_scaling", "rope_parameters")),
)


def load_config(folder: str | Path) -> ModelConfig:
    """Reads ``config.json``, and the end tokens of ``generation_config.json`` where it names any.

    Raises:
      ConfigError: there is none, a value in it is of the wrong type, it is of another family, its two dialects
        contradict each other, or it asks for something the decoder does not do.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in tuple(ARCHITECTURES):
        raise ConfigError(f"{path}: model_type {family!r} is not supported; known are {', '.join(ARCHITECTURES)}")
    _check_kinds(path, raw)
    for name in ("rope_scaling", "rope_parameters"):
        _check_kinds(path, raw.get(name) or {}, f"{name}.")
    if missing := [key for key in _NEEDED if key not in raw]:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rotary = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    unsupported = {
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        f"partial_rotary_factor {rotary}": rotary != 1.0,
        "use_sliding_window": raw.get("use_sliding_window", False),
        "quantization_config": raw.get("quantization_config") is not None,
    }
    if found := [what for what, present in unsupported.items() if present]:
        raise ConfigError(f"{path}: {', '.join(found)} is not supported by this version of jaxdraft")
    eos = _end_tokens(folder, raw)
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=None if family == "phi3" else raw.get("head_dim"),
        rope_theta=_theta(path, raw),
        rope_scaling=_scaling(path, raw, rope),
        sliding_window=raw.get("sliding_window") if family in ("mistral", "phi3") else None,
        qkv_bias=family == "qwen2",
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5 if family == "phi3" else 1e-6),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=raw.get("max_position_embeddings", 2048),
        bos_id=raw.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Both dialects at once: read by transformers 4.44, a theta that stands only in the new one becomes 10000."""
    old, new = _scaling_json(config)
    original = config.max_positions
    if config.rope_scaling is not None:
        original = config.rope_scaling.original_max_positions
    own: dict[str, dict[str, Any]] = {
        "llama": {"head_dim": config.head_size, "attention_bias": False, "mlp_bias": False},
        "phi3": {
            "original_max_position_embeddings": original,
            "sliding_window": config.sliding_window,
            "pad_token_id": None,
        },
        "mistral": {"head_dim": config.head_size, "sliding_window": config.sliding_window},
        "qwen2": {"head_dim": config.head_size, "use_sliding_window": False},
    }
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": old,
        "rope_parameters": {**new, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_json(config),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **own[config.family],
    }


def eos_json(config: ModelConfig) -> int | list[int] | None:
    """End tokens as Hugging Face files hold them: one number, a list, or null."""
    return config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file of a model folder holds.

    Raises:
      ConfigError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give a Hugging Face model folder") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value


def _check_kinds(path: Path, holder: dict[str, Any], prefix: str = "") -> None:
    for wanted, fits, keys in _KINDS:
        for key in keys:
            if key in holder and not fits(holder[key]):
                raise ConfigError(f"{path}: {prefix}{key} is {json.dumps(holder[key]):.80}, but must be {wanted}")


def _theta(path: Path, raw: dict[str, Any]) -> float:
    new, old = (raw.get("rope_parameters") or {}).get("rope_theta"), raw.get("rope_theta")
    if new is not None and old is not None and new != old:
        raise ConfigError(f"{path}: rope_theta is {old}, but {new} in rope_parameters: which one was it trained with?")
    return float(new or old or 10000.0)


def _scaling(path: Path, raw: dict[str, Any], rope: dict[str, Any]) -> Scaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        if kind == "default":
            return None
        if kind == "llama3":
            factors = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
            return Llama3Scaling(*factors, rope["original_max_position_embeddings"])
        if kind in ("longrope", "su"):
            original = {**rope, **raw}["original_max_position_embeddings"]
            short, long = (tuple(rope[name]) for name in ("short_factor", "long_factor"))
            attention = rope.get("attention_factor")
            if attention is None and rope.get("factor") is not None:
                attention = longrope_attention(rope["factor"], original)
            return LongRope(short, long, original, attention)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: rope scaling {kind!r} lacks a value or holds a wrong one ({error})") from None
    raise ConfigError(f"{path}: rope scaling {kind!r} is not supported by this version of jaxdraft")


def _scaling_json(config: ModelConfig) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """``rope_scaling`` of transformers 4 and ``rope_parameters`` of transformers 5."""
    scaling = config.rope_scaling
    if scaling is None:
        return None, {"rope_type": "default"}
    if isinstance(scaling, Llama3Scaling):
        both = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
        return both, both
    if scaling.attention_factor is not None:
        # transformers 5 lets rope_scaling replace rope_parameters, and 4.44 takes no fourth key in it.
        raise ConfigError("a longrope with an attention_factor of its own has no config.json that both read alike")
    factors = {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
    new = {"rope_type": "longrope", **factors, "original_max_position_embeddings": scaling.original_max_positions}
    # transformers 4.44 refuses a longrope of more than these three keys.
    return {"type": "longrope", **factors}, new


def _end_tokens(folder: str | Path, raw: dict[str, Any]) -> Any:
    generation = Path(folder) / "generation_config.json"
    chosen = read_json(generation).get("eos_token_id") if generation.exists() else None
    _check_kinds(generation, {"eos_token_id": chosen})
    return raw.get("eos_token_id") if chosen is None else chosen
