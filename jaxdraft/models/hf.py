"""Hugging Face folders in and out: one name table per family, used in both directions.

Weights lie as ``[out, in]`` in safetensors and as ``[in…, out…]`` here; the rotary layout is the half-split one on both
sides, so nothing is permuted.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jaxdraft.errors import ConfigError
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.decoder import Params, init_params

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM"}


class Row(NamedTuple):
    """One tensor of the folder: its name, what it holds (several are fused along ``out``), how many axes are ``in``."""

    name: str
    ours: tuple[str, ...]
    in_axes: int | None  # None: stored as it is (tables and norms)


_SHARED_LAYER = (
    Row("input_layernorm.weight", ("attn_norm",), None),
    Row("self_attn.o_proj.weight", ("wo",), 2),
    Row("post_attention_layernorm.weight", ("mlp_norm",), None),
    Row("mlp.down_proj.weight", ("w_down",), 1),
)
LAYER_TABLE = {
    "llama": (
        *_SHARED_LAYER,
        Row("self_attn.q_proj.weight", ("wq",), 1),
        Row("self_attn.k_proj.weight", ("wk",), 1),
        Row("self_attn.v_proj.weight", ("wv",), 1),
        Row("mlp.gate_proj.weight", ("w_gate",), 1),
        Row("mlp.up_proj.weight", ("w_up",), 1),
    ),
    "phi3": (
        *_SHARED_LAYER,
        Row("self_attn.qkv_proj.weight", ("wq", "wk", "wv"), 1),
        Row("mlp.gate_up_proj.weight", ("w_gate", "w_up"), 1),
    ),
}


def load_config(folder: str | Path) -> ModelConfig:
    """Reads ``config.json`` in the dialects of transformers 4 and 5.

    Raises:
      ConfigError: there is none, it is of another family, or it asks for something the decoder does not do.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    family = raw.get("model_type")
    if family not in LAYER_TABLE:
        raise ConfigError(f"{path}: model_type {family!r} is not supported; known are {', '.join(LAYER_TABLE)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    max_positions = raw.get("max_position_embeddings", 2048)
    if window := raw.get("sliding_window"):
        # Within the window, attention is the full one.
        max_positions = min(max_positions, window)
    rotary = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    unsupported = {
        f"rope scaling {scaling!r}": scaling != "default",
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        f"partial_rotary_factor {rotary}": rotary != 1.0,
    }
    if found := [what for what, present in unsupported.items() if present]:
        raise ConfigError(f"{path}: {', '.join(found)} is not supported by this version of jaxdraft")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if key not in raw]
    if missing:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}")
    eos = _generation_eos(folder, raw)
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=None if family == "phi3" else raw.get("head_dim"),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6 if family == "llama" else 1e-5),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=max_positions,
        bos_id=raw.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def load_model(folder: str | Path) -> tuple[ModelConfig, Params]:
    """Shape and float32 parameters (stacked layers) of a Hugging Face folder.

    Raises:
      ConfigError: a tensor is missing, unknown, stored twice or of another shape than ``config.json`` says; a shard
        named by the index lies outside the folder or is no safetensors file.
    """
    config = load_config(folder)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    # Old checkpoints store the rotary frequencies, which follow from theta.
    stored = {name: x for name, x in _tensors(Path(folder)) if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        stored.pop("lm_head.weight", None)

    def take(row: Row, names: tuple[str, ...], shapes: dict[str, Any]) -> dict[str, np.ndarray]:
        if row.name not in stored:
            raise ConfigError(f"{folder}: tensor {row.name} is missing")
        tensor = stored.pop(row.name)
        parts = {name: shapes[name].shape for name in names}
        want = _stored_shape(row, list(parts.values()))
        if tensor.shape != want:
            raise ConfigError(f"{folder}: tensor {row.name} has shape {tensor.shape}; config.json implies {want}")
        if row.in_axes is None:
            return {names[0]: tensor}
        splits = np.cumsum([np.prod(shape[row.in_axes :]) for shape in parts.values()])[:-1]
        pieces = np.split(tensor, splits.astype(int), axis=0)
        return {name: piece.T.reshape(shape) for (name, shape), piece in zip(parts.items(), pieces, strict=True)}

    params: dict[str, Any] = {}
    for row in _outer_table(config):
        params |= take(row, row.ours, shapes)
    layer_shapes = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in shapes["layers"].items()}
    layers: list[dict[str, np.ndarray]] = []
    for i in range(config.num_layers):
        layers.append({})
        for row in LAYER_TABLE[config.family]:
            layers[-1] |= take(row._replace(name=f"model.layers.{i}.{row.name}"), row.ours, layer_shapes)
    if stored:
        raise ConfigError(f"{folder}: unknown tensors {', '.join(sorted(stored)[:5])} ({len(stored)} in all)")
    params["layers"] = {k: np.stack([layer[k] for layer in layers]) for k in layer_shapes}
    return config, jax.tree.map(jnp.asarray, params)


def save_model(folder: str | Path, config: ModelConfig, params: Params, dtype: Any = jnp.float32) -> None:
    """Writes ``config.json`` and ``model.safetensors`` such that transformers 4 and 5 and engines read the same model.

    Args:
      folder: made if it does not exist.
      config: the shape.
      params: with stacked layers.
      dtype: of the stored weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, jax.Array] = {}

    def put(row: Row, source: Params) -> None:
        if row.in_axes is None:
            tensors[row.name] = jnp.asarray(source[row.ours[0]], dtype)
            return
        flat = [source[name].reshape(int(np.prod(source[name].shape[: row.in_axes])), -1) for name in row.ours]
        tensors[row.name] = jnp.asarray(jnp.concatenate(flat, axis=1).T, dtype)

    for row in _outer_table(config):
        put(row, params)
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for row in LAYER_TABLE[config.family]:
            put(row._replace(name=f"model.layers.{i}.{row.name}"), layer)
    # transformers 4.44 crashes on a file without this entry.
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config_json(config, jnp.dtype(dtype).name), indent=2) + "\n")


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder, in name order.

    Raises:
      ConfigError: there is none, or the index names a path instead of a file beside it.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        names = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
        if bad := [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]:
            raise ConfigError(f"{folder / INDEX}: shard {bad[0]!r} is not a safetensors file of this folder")
    else:
        names = [WEIGHTS]
    files = [folder / name for name in names]
    if missing := [f for f in files if not f.is_file()]:
        raise ConfigError(f"{missing[0]} does not exist: a model folder holds {WEIGHTS}, or shards and {INDEX}")
    return files


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    seen: set[str] = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="flax") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name in seen:
                        raise ConfigError(f"{path}: tensor {name} is stored twice")
                    seen.add(name)
                    yield name, np.asarray(file.get_tensor(name), np.float32)
        except SafetensorError as error:
            raise ConfigError(f"{path}: not a readable safetensors file ({error})") from error


def _outer_table(config: ModelConfig) -> tuple[Row, ...]:
    rows = (Row("model.embed_tokens.weight", ("embed",), None), Row("model.norm.weight", ("final_norm",), None))
    return rows if config.tie_embeddings else (*rows, Row("lm_head.weight", ("head",), 1))


def _stored_shape(row: Row, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    if row.in_axes is None:
        return shapes[0]
    out = sum(int(np.prod(shape[row.in_axes :])) for shape in shapes)
    return out, int(np.prod(shapes[0][: row.in_axes]))


def _config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Both dialects at once: read by transformers 4.44, a theta that stands only in the new one becomes 10000."""
    extra: dict[str, Any] = (
        {"head_dim": config.head_size, "attention_bias": False, "mlp_bias": False}
        if config.family == "llama"
        else {
            "original_max_position_embeddings": config.max_positions,
            "sliding_window": None,
            "pad_token_id": None,
        }
    )
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
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **extra,
    }


def _generation_eos(folder: str | Path, raw: dict[str, Any]) -> Any:
    generation = Path(folder) / "generation_config.json"
    chosen = _read_json(generation).get("eos_token_id") if generation.exists() else None
    return raw.get("eos_token_id") if chosen is None else chosen


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
