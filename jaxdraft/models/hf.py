"""Weights of Hugging Face folders in and out: one strict name table per family, used in both directions.

Weights lie as ``[out, in]`` in safetensors and as ``[in…, out…]`` here; the rotary layout is the half-split one on both
sides, so nothing is permuted. Both ways go one tensor, or one file, at a time: beside the arrays themselves the host
never holds more.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdraft.errors import ConfigError
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.decoder import Params, head_weight, init_boxed, model_shardings
from jaxdraft.models.folder import D2T, INDEX, WEIGHTS, opened, weight_files, weight_map
from jaxdraft.models.hf_config import config_json, load_config
from jaxdraft.models.products import turned
from jaxdraft.sharding import param_shardings

SHARD_BYTES = 5 * 10**9
_DTYPES = ("F32", "BF16", "F16")


class Row(NamedTuple):
    """One tensor of the folder: its name, what it holds (several are fused along ``out``), how many axes are ``in``."""

    name: str
    ours: tuple[str, ...]
    in_axes: int | None  # None: stored as it is (tables and norms)


_EMBED = Row("model.embed_tokens.weight", ("embed",), None)
_HEAD = Row("lm_head.weight", ("head",), 1)
_SHARED = (
    Row("input_layernorm.weight", ("attn_norm",), None),
    Row("self_attn.o_proj.weight", ("wo",), 2),
    Row("post_attention_layernorm.weight", ("mlp_norm",), None),
    Row("mlp.down_proj.weight", ("w_down",), 1),
)
_LLAMA = (
    *_SHARED,
    Row("self_attn.q_proj.weight", ("wq",), 1),
    Row("self_attn.k_proj.weight", ("wk",), 1),
    Row("self_attn.v_proj.weight", ("wv",), 1),
    Row("mlp.gate_proj.weight", ("w_gate",), 1),
    Row("mlp.up_proj.weight", ("w_up",), 1),
)
LAYER_TABLE = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": (
        *_LLAMA,
        Row("self_attn.q_proj.bias", ("bq",), 0),
        Row("self_attn.k_proj.bias", ("bk",), 0),
        Row("self_attn.v_proj.bias", ("bv",), 0),
    ),
    "phi3": (
        *_SHARED,
        Row("self_attn.qkv_proj.weight", ("wq", "wk", "wv"), 1),
        Row("mlp.gate_up_proj.weight", ("w_gate", "w_up"), 1),
    ),
}


class _Stored(NamedTuple):
    file: Path
    shape: tuple[int, ...]


def load_model(
    folder: str | Path, *, mesh: Mesh | None = None, dtype: Any = jnp.float32, scan: bool = True
) -> tuple[ModelConfig, Params]:
    """Shape and parameters of a Hugging Face folder, read one tensor at a time straight to where they belong.

    Every name and shape is checked before the first weight is read. Each process reads only what its devices hold.

    Args:
      folder: ``config.json`` and safetensors of float32, bfloat16 or float16, in one file or several.
      mesh: where the parameters are laid out by the rules of ``sharding``; ``None`` is the first device.
      dtype: of the parameters.
      scan: stacked layers, or ``layers_0``, ``layers_1``, … for ``Decoder(config, scan=False)``.

    Raises:
      ConfigError: a tensor is missing, unknown, stored twice, of another shape than ``config.json`` says or of a
        dtype that holds no plain weights; the index does not fit its shards, or names one outside the folder.

    A head stored with its draft vocabulary's rows only is read into a whole one, 0 elsewhere.
    """
    config = load_config(folder)
    boxed = jax.eval_shape(lambda: init_boxed(config, jax.random.key(0)))
    shapes = jax.tree.map(lambda x: x.shape, nn.unbox(boxed))
    shardings: Any
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes, is_leaf=_is_shape)
    else:
        shardings = param_shardings(mesh, boxed)
    layer_shapes = {name: s[1:] for name, s in shapes["layers"].items()}
    layer_shardings = {
        name: to if mesh is None else NamedSharding(mesh, PartitionSpec(*to.spec[1:]))
        for name, to in shardings["layers"].items()
    }
    stored = _checked_tensors(Path(folder), config, shapes, layer_shapes)

    def parts(row: Row, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Callable[[Any], np.ndarray]]]:
        offset = 0
        for name in row.ours:
            shape = shapes[name]
            yield name, functools.partial(_read, stored[row.name].file, row, shape, offset, np.dtype(dtype))
            offset += math.prod(shape[row.in_axes or 0 :])

    place = jax.make_array_from_callback
    params: dict[str, Any] = {}
    for row in _outer_table(config):
        for name, read in parts(row, shapes):
            if row == _HEAD and _is_narrow(config, stored):
                read = functools.partial(_read_narrow_head, stored[row.name], config, np.dtype(dtype))
            params[name] = place(shapes[name], shardings[name], read)
    if not scan:
        params = turned(params)
        to = None if mesh is None else model_shardings(config, mesh, scan=False)
        turn = jax.jit(turned, out_shardings=to and to["layers_0"], donate_argnums=0)
        for i in range(config.num_layers):
            params[f"layers_{i}"] = turn(
                {
                    name: place(layer_shapes[name], layer_shardings[name], read)
                    for row in _layer_rows(config, i)
                    for name, read in parts(row, layer_shapes)
                }
            )
        return config, params
    stacks = {name: jnp.zeros(shapes["layers"][name], dtype, device=to) for name, to in shardings["layers"].items()}
    put = {name: jax.jit(_put_layer, donate_argnums=0, out_shardings=to) for name, to in shardings["layers"].items()}
    for i in range(config.num_layers):
        for row in _layer_rows(config, i):
            for name, read in parts(row, layer_shapes):
                stacks[name] = put[name](stacks[name], place(layer_shapes[name], layer_shardings[name], read), i)
    params["layers"] = stacks
    return config, params


def check_weights(folder: str | Path) -> None:
    """Looks at every tensor's name, shape and place as ``load_model`` does, and raises what it raises."""
    config = load_config(folder)
    shapes = jax.eval_shape(lambda: nn.unbox(init_boxed(config, jax.random.key(0))))
    layer = {name: x.shape[1:] for name, x in shapes["layers"].items()}
    outer = {name: x.shape for name, x in shapes.items() if name != "layers"}
    _checked_tensors(Path(folder), config, outer, layer)


def save_model(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    dtype: Any = jnp.float32,
    shard_bytes: int = SHARD_BYTES,
    narrow_head: bool = False,
) -> list[Path]:
    """Writes ``config.json`` and safetensors such that transformers 4 and 5 and engines read the same model.

    Args:
      folder: made if it does not exist; weights of an earlier model in it are deleted.
      config: the shape.
      params: with stacked layers.
      dtype: of the stored weights.
      shard_bytes: weights of more than this go into several files with an index.
      narrow_head: store an untied head with its draft vocabulary's rows only.

    Returns:
      The files written.

    Raises:
      ConfigError: a weight is too large for ``dtype`` (float16 ends at 65504), or no ``config.json`` tells the shape
        to transformers 4 and 5 alike.
      OSError: a file cannot be written.
    """
    folder, described = Path(folder), config_json(config, np.dtype(dtype).name)
    folder.mkdir(parents=True, exist_ok=True)
    if narrow_head and not config.tie_embeddings:
        params = {**params, "head": head_weight(config, params)}
    for old in [*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX]:
        old.unlink(missing_ok=True)
    rows: list[tuple[Row, Callable[[str], jax.Array]]] = [(row, params.__getitem__) for row in _outer_table(config)]
    for i in range(config.num_layers):
        rows += [(row, functools.partial(_layer_part, params["layers"], i)) for row in _layer_rows(config, i)]
    itemsize = np.dtype(dtype).itemsize
    shards: list[list[tuple[Row, Callable[[str], jax.Array]]]] = [[]]
    size = total = 0
    for row, part in rows:
        nbytes = itemsize * sum(_size(params, row, name) for name in row.ours)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((row, part))
        size, total = size + nbytes, total + nbytes
    written: list[Path] = []
    names: dict[str, str] = {}
    maps: dict[str, np.ndarray] = {}
    if config.head_ids is not None:
        maps[D2T] = np.asarray(config.head_ids, np.int64) - np.arange(len(config.head_ids))
        total += maps[D2T].nbytes
    for n, shard in enumerate(shards, start=1):
        path = folder / (WEIGHTS if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors")
        tensors = {row.name: _to_stored(row, part, np.dtype(dtype)) for row, part in shard} | maps
        maps = {}
        names |= dict.fromkeys(tensors, path.name)
        # transformers 4.44 crashes on a file without this entry.
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{path}: {error}") from error
        written.append(path)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        written.append(folder / INDEX)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    for path in written:
        shutil.copymode(folder / "config.json", path)  # safetensors writes for the owner's eyes only
    return [folder / "config.json", *written]


def _headers(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the folder: where it is, and its shape; nothing is read but the headers."""
    stored: dict[str, _Stored] = {}
    for path in weight_files(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                if name in stored:
                    raise ConfigError(f"{path}: tensor {name} is also stored in {stored[name].file.name}")
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old checkpoints store the rotary frequencies, which follow from theta
                if part.get_dtype() not in _DTYPES and name != D2T:
                    raise ConfigError(
                        f"{path}: tensor {name} is of dtype {part.get_dtype()}: give weights of float32, bfloat16 "
                        "or float16, not quantised ones"
                    )
                stored[name] = _Stored(path, tuple(part.get_shape()))
    if not (folder / WEIGHTS).is_file():
        for name, file in weight_map(folder).items():
            if name in stored and stored[name].file.name != file:
                raise ConfigError(f"{folder / INDEX}: tensor {name} is in {stored[name].file.name}, not in {file}")
    return stored


def _checked_tensors(folder: Path, config: ModelConfig, outer: Any, layer: Any) -> dict[str, _Stored]:
    stored = _headers(folder)
    if config.head_ids is not None:
        del stored[D2T]
    head = stored.pop(_HEAD.name, None) if config.tie_embeddings else None
    _check_table(folder, config, stored, outer, layer)
    if head and not _same_tensor(head, _HEAD.name, stored[_EMBED.name], _EMBED.name):
        raise ConfigError(
            f"{folder}: config.json ties the head to the embedding, but tensor {_HEAD.name} differs from it: "
            "set tie_word_embeddings to false, or remove that tensor"
        )
    return stored


def _same_tensor(one: _Stored, name: str, other: _Stored, other_name: str, rows: int = 8192) -> bool:
    if one.shape != other.shape:
        return False
    with safe_open(one.file, framework="numpy") as first, safe_open(other.file, framework="numpy") as second:
        a, b = first.get_slice(name), second.get_slice(other_name)
        parts = [slice(i, min(i + rows, one.shape[0])) for i in range(0, one.shape[0], rows)]
        return all(np.array_equal(a[part], b[part]) for part in parts)


def _check_table(folder: Path, config: ModelConfig, stored: dict[str, _Stored], outer: Any, layer: Any) -> None:
    wanted = {row.name: _stored_shape(row, outer) for row in _outer_table(config)}
    # A config.json may ask for any number of layers: those that could be there, and one more, tell what is missing.
    for i in range(min(config.num_layers, len(stored) + 1)):
        wanted |= {row.name: _stored_shape(row, layer) for row in _layer_rows(config, i)}
    if missing := [name for name in wanted if name not in stored]:
        raise ConfigError(f"{folder}: tensor {missing[0]} is missing{_and_more(missing)}")
    if unknown := [name for name in stored if name not in wanted]:
        raise ConfigError(f"{folder}: unknown tensors {', '.join(sorted(unknown)[:5])} ({len(unknown)} in all)")
    if _is_narrow(config, stored):
        wanted[_HEAD.name] = len(config.head_ids or ()), config.hidden_size
    for name, want in wanted.items():
        if stored[name].shape != want:
            raise ConfigError(f"{folder}: tensor {name} has shape {stored[name].shape}; config.json implies {want}")


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _read(file: Path, row: Row, shape: tuple[int, ...], offset: int, dtype: np.dtype, index: Any) -> np.ndarray:
    """One device's part of one parameter; of the axes before and after ``in_axes`` only the first may be cut.

    The file is opened anew for each part: what a mapping has once touched stays in memory until it is closed.
    """
    spans = [range(size)[part] for size, part in zip(shape, index, strict=True)]
    local = [len(span) for span in spans]
    with safe_open(file, framework="numpy") as tensors:
        tensor = tensors.get_slice(row.name)
        if row.in_axes is None:
            return tensor[tuple(slice(s.start, s.stop) for s in spans)].astype(dtype)
        columns, rows = (
            slice(begin + spans[axis].start * inner, begin + spans[axis].stop * inner)
            for axis, inner, begin in (
                (0, math.prod(shape[1 : row.in_axes]), 0),
                (row.in_axes, math.prod(shape[row.in_axes + 1 :]), offset),
            )
        )
        part = (tensor[rows] if row.in_axes == 0 else tensor[rows, columns]).astype(dtype)
    return np.ascontiguousarray(part.T.reshape(local))


def _is_narrow(config: ModelConfig, stored: dict[str, _Stored]) -> bool:
    if config.head_ids is None or config.tie_embeddings:
        return False
    return stored[_HEAD.name].shape[0] == len(config.head_ids)


def _read_narrow_head(stored: _Stored, config: ModelConfig, dtype: np.dtype, index: Any) -> np.ndarray:
    dims, tokens = range(config.hidden_size)[index[0]], range(config.vocabulary)[index[1]]
    with safe_open(stored.file, framework="numpy") as tensors:
        rows_RD = tensors.get_slice(_HEAD.name)[:, dims.start : dims.stop].astype(dtype)
    part_DV = np.zeros((len(dims), len(tokens)), dtype)
    ids_R = np.asarray(config.head_ids) - tokens.start
    here_R = (ids_R >= 0) & (ids_R < len(tokens))
    part_DV[:, ids_R[here_R]] = rows_RD[here_R].T
    return part_DV


def _layer_part(layers: Params, i: int, name: str) -> jax.Array:
    return layers[name][i]


def _put_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def _to_stored(row: Row, part: Callable[[str], jax.Array], dtype: np.dtype) -> np.ndarray:
    pieces = []
    for name in row.ours:
        whole = np.asarray(part(name))
        if row.in_axes is not None:
            whole = whole.reshape(math.prod(whole.shape[: row.in_axes]), -1).T if row.in_axes else whole.reshape(-1)
        with np.errstate(over="ignore"):
            pieces.append(whole.astype(dtype))
        if np.isfinite(whole).all() and not np.isfinite(pieces[-1]).all():
            raise ConfigError(f"tensor {row.name} does not fit into {dtype.name}: export bfloat16 or float32")
    return np.ascontiguousarray(np.concatenate(pieces))


def _outer_table(config: ModelConfig) -> tuple[Row, ...]:
    rows = (_EMBED, Row("model.norm.weight", ("final_norm",), None))
    return rows if config.tie_embeddings else (*rows, _HEAD)


def _layer_rows(config: ModelConfig, layer: int) -> list[Row]:
    return [row._replace(name=f"model.layers.{layer}.{row.name}") for row in LAYER_TABLE[config.family]]


def _stored_shape(row: Row, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    ours = [shapes[name] for name in row.ours]
    if row.in_axes is None:
        return ours[0]
    out = sum(math.prod(shape[row.in_axes :]) for shape in ours)
    return (out, math.prod(ours[0][: row.in_axes])) if row.in_axes else (out,)


def _size(params: Params, row: Row, name: str) -> int:
    return params[name].size if name in params else math.prod(params["layers"][name].shape[1:])


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple)
