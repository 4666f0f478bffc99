"""The only place that builds a mesh, and the rules that lay logical axes onto it."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdraft.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The table's embed axis stays whole: sharded on both axes, its gather makes XLA rematerialise the table.
RULES = (
    ("batch", BATCH_AXES),
    ("layers", None),
    ("norm", None),
    ("embed", "fsdp"),
    ("embed_table", None),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; one of them may be -1, "all that are left".

    Attributes:
      data: replicas of the parameters, each with its own rows of the batch.
      fsdp: shards of the parameters, each with its own rows of the batch.
      tensor: shards of heads, MLP and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def build(self) -> Mesh:
        """The mesh over all devices.

        Raises:
          ConfigError: the axes do not multiply to the number of devices.
        """
        sizes, devices = [self.data, self.fsdp, self.tensor], jax.device_count()
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ConfigError(f"mesh {sizes}: sizes are positive, and one of them may be -1")
        fixed = -1 * _product(sizes) if -1 in sizes else _product(sizes)
        if -1 in sizes and devices % fixed == 0:
            sizes[sizes.index(-1)] = devices // fixed
        if _product(sizes) != devices:
            raise ConfigError(f"mesh data×fsdp×tensor = {sizes} does not fit {devices} devices")
        return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """A NamedSharding for every parameter of a tree boxed with logical axes (``models.decoder.init_boxed``)."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over every data-parallel device."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
