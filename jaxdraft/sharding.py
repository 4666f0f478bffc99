"""The only place that builds a mesh, and the rules that lay logical axes onto it.

Training cuts weights over ``fsdp`` and ``tensor`` and rows over ``data`` and ``fsdp``. Decoding reads every weight for
every token: there the weights are cut over ``tensor`` alone, so that none has to travel, and rows go over ``data``.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdraft.distributed import on_lead
from jaxdraft.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The table's embed axis stays whole: sharded on both axes, its gather makes XLA rematerialise the table.
RULES: Mapping[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "batch": BATCH_AXES,
    "layers": None,
    "norm": None,
    "embed": "fsdp",
    "embed_table": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}
CACHE = ("batch", "kv_heads", None, None)  # keys or values of one layer, [B, K, S, H]

# Bytes of devices that do not say how many they have: those that programs are only compiled for, and CPUs.
_MEMORY = {"TPU v4": 32 * 2**30, "TPU v5": 95 * 2**30, "TPU v6 lite": 32 * 2**30}
_OTHER_MEMORY = 16 * 2**30


@dataclasses.dataclass(frozen=True)
class Load:
    """What the devices have to take.

    Attributes:
      bytes: of weights, gradients and moments where none of them is cut.
      rows: of every batch; ``None`` where any number will do.
      heads: numbers of attention heads, which ``tensor`` has to divide.
    """

    bytes: int = 0
    rows: int | None = None
    heads: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; what is ``None`` is chosen to fit the models, the batch and the devices.

    Attributes:
      data: replicas of the parameters, each with its own rows of the batch; slices of a pod go here. Chosen: all that
        is left, where the models fit into half of a device's memory.
      fsdp: shards of the parameters, each with its own rows of the batch. Chosen: all that is left, where they do not.
      tensor: shards of heads, MLP and vocabulary. Chosen: as few as make the rows of a batch divide over the rest; 1
        where no number does, and batches are filled up with empty rows.
      decode_tensor: the same while text is written, which never cuts over ``fsdp``. Chosen: as few as the models fit
        with.
    """

    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None
    decode_tensor: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ConfigError(f"mesh.{field.name} is {value}: it must be positive, or None for what fits")

    def build(self, load: Load = Load(), devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh for training.

        Raises:
          ConfigError: the axes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        slices = _slices(devices)
        choices = self._tensors("tensor", len(devices) // slices, load)
        choices = [tensor for tensor in choices if self._leaves(len(devices) // tensor)] or choices
        divides = lambda tensor: load.rows is None or load.rows % (len(devices) // tensor) == 0
        tensor = next(filter(divides, choices), choices[0])
        rest, fits = len(devices) // tensor, load.bytes / tensor <= _memory(devices) / 2
        data, fsdp = self._data_and_fsdp(rest, slices, fits)
        if data * fsdp != rest or data % slices:
            asked = ", ".join(f"mesh.{name}={n}" for name in MESH_AXES if (n := getattr(self, name)) is not None)
            several = f" in {slices} slices, which go on data" if slices > 1 else ""
            raise ConfigError(
                f"{asked} does not fit {len(devices)} devices{several}: the product of the axes is their number; "
                "what is left out is chosen"
            )
        return _mesh((data, fsdp, tensor), devices, slices)

    def for_decoding(self, mesh: Mesh, load: Load) -> Mesh:
        """The devices of the training mesh, in its order, for writing text: ``data`` × 1 × ``tensor``.

        Raises:
          ConfigError: ``decode_tensor`` does not divide the number of devices, or of heads.
        """
        devices = list(mesh.devices.flat)
        choices, memory = self._tensors("decode_tensor", len(devices) // _slices(devices), load), _memory(devices)
        fitting = [tensor for tensor in choices if load.bytes / tensor <= memory / 2]
        tensor = fitting[0] if fitting else choices[-1]
        return Mesh(mesh.devices.reshape(-1, 1, tensor), MESH_AXES, axis_types=mesh.axis_types)

    def _tensors(self, name: str, devices: int, load: Load) -> list[int]:
        """What the field of that name may be for so many devices, ascending."""
        fixed = getattr(self, name)
        choices = range(1, devices + 1) if fixed is None else [fixed]
        found = [t for t in choices if not any(count % t for count in (devices, *load.heads))]
        if not found:
            heads = f" and the numbers of heads, {sorted(set(load.heads))}" if load.heads else ""
            raise ConfigError(f"mesh.{name} is {fixed}: it must divide {devices} devices{heads}")
        return found

    def _leaves(self, rest: int) -> bool:
        """Whether ``data`` and ``fsdp``, as far as they are given, go into so many devices."""
        given = [size for size in (self.data, self.fsdp) if size is not None]
        return math.prod(given) == rest if len(given) == 2 else rest % math.prod(given) == 0

    def _data_and_fsdp(self, rest: int, slices: int, fits: bool) -> tuple[int, int]:
        data, fsdp = self.data, self.fsdp
        if data is None and fsdp is None:
            data = rest if fits else slices
        if data is None:
            data = rest // (fsdp or 1)
        if fsdp is None:
            fsdp = rest // data
        return data, fsdp


def param_shardings(mesh: Mesh | AbstractMesh, boxed: Any) -> Any:
    """A NamedSharding for every parameter of a tree boxed with logical axes (``models.decoder.init_boxed``).

    An axis that its mesh axis does not divide stays whole: a few key/value heads on many devices.
    """
    shapes, axes = nn.unbox(boxed), nn.get_partition_spec(boxed)
    return jax.tree.map(lambda x, a: NamedSharding(mesh, spec(mesh, a, x.shape)), shapes, axes)


def spec(mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Where the logical axes of an array of this shape lie."""
    fits = lambda axis, size: axis is not None and size % _ways(mesh, axis) == 0
    places = [RULES[name] for name in axes]
    return PartitionSpec(*(axis if fits(axis, size) else None for axis, size in zip(places, shape, strict=True)))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Inside ``jit``, lays ``x`` out over the mesh of ``jax.set_mesh``; without one it is left alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over every data-parallel device."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_groups(mesh: Mesh) -> int:
    """How many groups of devices take rows of a batch."""
    return _ways(mesh, BATCH_AXES)


def position_axis(mesh: Mesh, length: int) -> str | None:
    """The axis whose devices, which hold the same rows, can share the positions of rows of this length; or none."""
    shards = mesh.shape["tensor"]
    return "tensor" if shards > 1 and length % shards == 0 else None


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(params: Any) -> Mesh:
    """The mesh that parameters lie on; of those on one device, a mesh of that device."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return _mesh((1, 1, 1), list(sharding.device_set), 1)


def place(mesh: Mesh, tree: Any, *, rows: bool) -> Any:
    """Fresh global arrays from values that every process has whole: cut by rows where those divide, or replicated."""

    # A copy: a program that the array is donated to would write into the caller's memory.
    part = lambda x: lambda index: np.array(x[index])

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        cut = rows and x.ndim > 0 and x.shape[0] % row_groups(mesh) == 0
        return jax.make_array_from_callback(x.shape, batch_sharding(mesh) if cut else replicated(mesh), part(x))

    return jax.tree.map(one, tree)


def _ways(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))


def _mesh(sizes: Sequence[int], devices: Sequence[Any], slices: int) -> Mesh:
    types = (AxisType.Auto,) * len(MESH_AXES)
    if slices == 1:
        return jax.make_mesh(sizes, MESH_AXES, devices=devices, axis_types=types)
    data, *inside = sizes
    grid = mesh_utils.create_hybrid_device_mesh((data // slices, *inside), (slices, 1, 1), devices=devices)
    return Mesh(grid, MESH_AXES, axis_types=types)


def _slices(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", None) for device in devices})


def _memory(devices: Sequence[Any]) -> int:
    """Bytes of a device's memory, as the lead is told of its own: other processes' devices do not say."""

    def of_own() -> int:
        device = next((d for d in devices if d.process_index == jax.process_index()), devices[0])
        try:
            stats = device.memory_stats()
        except jax.errors.JaxRuntimeError:  # a device that programs are only compiled for
            stats = None
        return (stats or {}).get("bytes_limit") or _MEMORY.get(device.device_kind, _OTHER_MEMORY)

    return on_lead(of_own)
