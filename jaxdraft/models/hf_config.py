"""``config.json`` of a Hugging Face folder, read and written in the dialects of transformers 4 and 5."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdraft.errors import ConfigError
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.folder import head_ids, read_json
from jaxdraft.models.rope import Llama3Scaling, LongRope, Scaling, longrope_attention

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# What transformers takes where the key is missing.
_WINDOW = {"mistral": 4096}
_POSITIONS = {"llama": 2048, "phi3": 4096, "mistral": 131072, "qwen2": 32768}
_ORIGINAL = "original_max_position_embeddings"
_PHI3_ORIGINAL = 4096  # what transformers takes where the key is missing
_END = 1 << 31  # of whole numbers
_PARAMETERS = 10**13  # more than any model has


def _whole(value: Any) -> bool:
    return type(value) is int and -_END < value < _END


def _size(value: Any) -> bool:
    return _whole(value) and value > 0


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < (1 << 63 if type(value) is int else math.inf)


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
    (
        "a whole number above 0, or null",
        _or_null(_size),
        ("num_key_value_heads", "head_dim", "sliding_window", "draft_vocab_size"),
    ),
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
        code = "; code in model folders, which its auto_map asks for, is never run" if "auto_map" in raw else ""
        raise ConfigError(
            f"{path}: model_type {family!r:.80} is not supported; known are {', '.join(ARCHITECTURES)}{code}"
        )
    _check_kinds(path, raw)
    # In transformers' order: where there is a rope_scaling, it reads nothing of rope_parameters.
    ropes: dict[str, dict[str, Any]] = {
        name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)
    }
    for name, rope in ropes.items():
        _check_kinds(path, rope, f"{name}.")
    if missing := [key for key in _NEEDED if key not in raw]:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}")
    rotaries = [place.get("partial_rotary_factor", 1.0) for place in (raw, *ropes.values())]
    rotary = next((share for share in rotaries if share != 1.0), 1.0)
    unsupported = {
        f"hidden_act {raw.get('hidden_act')!r:.80}": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        f"partial_rotary_factor {rotary}": rotary != 1.0,
        "use_sliding_window": raw.get("use_sliding_window", False),
        "quantization_config": raw.get("quantization_config") is not None,
    }
    if found := [what for what, present in unsupported.items() if present]:
        raise ConfigError(f"{path}: {', '.join(found)} is not supported by this version of jaxdraft")
    eos, rows = _end_tokens(folder, raw), raw.get("draft_vocab_size")
    config = ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=None if family == "phi3" else raw.get("head_dim"),
        rope_theta=_theta(path, raw, ropes),
        rope_scaling=_agreed_scaling(path, raw, ropes),
        sliding_window=raw.get("sliding_window", _WINDOW.get(family)) if family in ("mistral", "phi3") else None,
        qkv_bias=family == "qwen2",
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-5 if family == "phi3" else 1e-6)),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=raw.get("max_position_embeddings", _POSITIONS[family]),
        bos_id=raw.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        head_ids=None if rows is None else head_ids(Path(folder), rows),
    )
    if config.num_parameters > _PARAMETERS:
        raise ConfigError(f"{path}: describes {config.num_parameters:.3g} parameters, more than any model has")
    return config


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
        **({} if config.head_ids is None else {"draft_vocab_size": len(config.head_ids)}),
    }


def eos_json(config: ModelConfig) -> int | list[int] | None:
    """End tokens as Hugging Face files hold them: one number, a list, or null."""
    return config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None


def _check_kinds(path: Path, holder: dict[str, Any], prefix: str = "") -> None:
    for wanted, fits, keys in _KINDS:
        for key in keys:
            if key in holder and not fits(holder[key]):
                raise ConfigError(f"{path}: {prefix}{key} is {json.dumps(holder[key]):.80}, but must be {wanted}")


def _theta(path: Path, raw: dict[str, Any], ropes: dict[str, dict[str, Any]]) -> float:
    places = {"": raw} | {f" in {name}": rope for name, rope in ropes.items()}
    said = {where: place["rope_theta"] for where, place in places.items() if place.get("rope_theta") is not None}
    if list(said) == [" in rope_parameters"] and "rope_scaling" in ropes:
        said = {" by default": 10000.0} | said
    if len(set(said.values())) > 1:
        listed = ", but ".join(f"{theta}{where}" for where, theta in said.items())
        raise ConfigError(f"{path}: rope_theta is {listed}: keep the one it was trained with, as rope_theta")
    return float(next(iter(said.values()), 10000.0))


def _agreed_scaling(path: Path, raw: dict[str, Any], ropes: dict[str, dict[str, Any]]) -> Scaling:
    read = [_scaling(path, raw, rope) for rope in ropes.values()]
    if len(read) == 2 and read[0] != read[1]:
        old, new = (
            {"rope_type": _rope_type(rope)} | (vars(scaling) if scaling else {})
            for rope, scaling in zip(ropes.values(), read, strict=True)
        )
        key = next(key for key in old | new if old.get(key) != new.get(key))
        raise ConfigError(
            f"{path}: {key} is {old.get(key)} by rope_scaling, but {new.get(key)} by rope_parameters: "
            "remove the one it was not trained with"
        )
    return read[0] if read else None


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(path: Path, raw: dict[str, Any], rope: dict[str, Any]) -> Scaling:
    kind = _rope_type(rope)
    try:
        if kind == "default":
            return None
        if kind == "llama3":
            factors = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
            return Llama3Scaling(*factors, _original(path, raw, rope, default=rope[_ORIGINAL]))
        if kind in ("longrope", "su"):
            short, long = (tuple(rope[name]) for name in ("short_factor", "long_factor"))
            scaling = LongRope(short, long, _original(path, raw, rope, default=_PHI3_ORIGINAL))
            attention = rope.get("attention_factor")
            if attention is None and rope.get("factor") is not None:
                attention = longrope_attention(rope["factor"], scaling.original_max_positions)
            return dataclasses.replace(scaling, attention_factor=attention)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: rope scaling {kind!r} lacks a value or holds a wrong one ({error})") from None
    raise ConfigError(f"{path}: rope scaling {kind!r} is not supported by this version of jaxdraft")


def _original(path: Path, raw: dict[str, Any], rope: dict[str, Any], default: int) -> int:
    """The context before the stretching: transformers lets the top level's replace the one in the rope settings."""
    top: int = raw.get(_ORIGINAL, default)
    if rope.get(_ORIGINAL, top) != top:
        by_default = "" if _ORIGINAL in raw else " by default"
        raise ConfigError(
            f"{path}: {_ORIGINAL} is {top}{by_default}, but {rope[_ORIGINAL]} in the rope settings: "
            "write the one it was trained with at the top level"
        )
    return top


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
