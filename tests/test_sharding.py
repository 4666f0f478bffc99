"""Where every parameter and every cache of the papers' models lies, held against golden files.

python -m tests.test_sharding      # writes them anew, for a change that was meant
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, PartitionSpec

from jaxdraft.backend import assumed
from jaxdraft.errors import ConfigError
from jaxdraft.models.cache import init_cache
from jaxdraft.models.decoder import init_boxed, model_shardings
from jaxdraft.models.presets import PRESETS
from jaxdraft.sharding import CACHE, MESH_AXES, Load, MeshShape, constrain, param_shardings, spec

GOLDEN = Path(__file__).with_name("golden") / "shardings"
TRAINING, DECODING = AbstractMesh((2, 4, 2), MESH_AXES), AbstractMesh((4, 1, 4), MESH_AXES)
ROWS, SLOTS = 8, 256


def layout(config):
    """A line for each parameter, stacked on the training mesh and not on that for decoding, and for a layer's cache."""
    lines = []
    for name, mesh, scan in (("train", TRAINING, True), ("decode", DECODING, False)):
        shardings = jax.tree_util.tree_leaves_with_path(model_shardings(config, mesh, scan))
        shapes = jax.tree.leaves(
            nn.unbox(jax.eval_shape(lambda scan=scan: init_boxed(config, jax.random.key(0), scan)))
        )
        for (path, sharding), x in zip(shardings, shapes, strict=True):
            key = "/".join(part.key for part in path)
            if scan or not key.startswith("layers_") or key.startswith("layers_0/"):
                lines.append(line(f"{name} {key}", x.shape, sharding.spec))
    cache = jax.eval_shape(lambda: init_cache(dataclasses.replace(config, num_layers=1), ROWS, SLOTS, jnp.bfloat16))
    lines.append(line("decode cache", cache.k[0].shape, spec(DECODING, CACHE, cache.k[0].shape)))
    return "\n".join(lines) + "\n"


def line(name, shape, places):
    sizes = "×".join(map(str, shape))
    return f"{name:<28} {sizes:<20} {' '.join('+'.join(p) if isinstance(p, tuple) else p or '-' for p in places)}"


@pytest.mark.parametrize("name", PRESETS)
def test_every_weight_and_cache_lies_where_it_did(name):
    with assumed("tpu"):
        found = layout(PRESETS[name])
    assert found == (GOLDEN / f"{name}.txt").read_text("utf-8")


def test_an_axis_that_does_not_divide_stays_whole():
    assert spec(AbstractMesh((1, 1, 16), MESH_AXES), CACHE, (4, 8, 64, 128)) == PartitionSpec(
        *[("data", "fsdp")], *[None] * 3
    )
    assert spec(AbstractMesh((1, 4, 2), MESH_AXES), ("embed", "mlp"), (6, 64)) == PartitionSpec(None, "tensor")


def test_a_parameter_without_axes_is_refused():
    with pytest.raises(ValueError, match="zip"):
        param_shardings(TRAINING, {"embed": jax.ShapeDtypeStruct((8, 8), jnp.float32)})


def test_without_a_mesh_a_constraint_is_nothing():
    x = jnp.ones((3, 5))
    assert constrain(x, ("batch", None)) is x


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as the choice of a mesh looks at."""

    id: int
    slice_index: int = 0
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    process_index: int = 0

    def memory_stats(self):
        return None


GB = 10**9


@pytest.mark.parametrize(
    "shape, load, expected",
    [
        (MeshShape(), Load(), (8, 1, 1)),  # what fits into half of 16 GiB is whole everywhere
        (MeshShape(), Load(8 * GB), (8, 1, 1)),
        (MeshShape(), Load(9 * GB), (1, 8, 1)),
        (MeshShape(), Load(9 * GB, rows=40, heads=(32, 8)), (1, 8, 1)),
        (MeshShape(), Load(9 * GB, rows=20, heads=(32, 8)), (4, 1, 2)),  # two shards fit
        (MeshShape(), Load(20 * GB, rows=20, heads=(32, 8)), (1, 4, 2)),
        (MeshShape(), Load(rows=10, heads=(2, 4)), (8, 1, 1)),  # 4 shards would divide, 2 heads do not let them
        (MeshShape(), Load(rows=10, heads=(12,)), (2, 1, 4)),
        (MeshShape(data=8), Load(rows=20, heads=(32,)), (8, 1, 1)),  # what is asked for counts, rows are filled up
        (MeshShape(data=2, fsdp=2), Load(), (2, 2, 2)),
        (MeshShape(fsdp=4), Load(), (2, 4, 1)),
        (MeshShape(data=2), Load(), (2, 4, 1)),
        (MeshShape(tensor=2), Load(), (4, 1, 2)),
        (MeshShape(data=2, fsdp=2, tensor=2), Load(), (2, 2, 2)),
    ],
)
def test_the_mesh_fits_models_and_rows(shape, load, expected, monkeypatch):
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, *_, **__: sizes)
    assert shape.build(load, [Device(i) for i in range(8)]) == expected


@pytest.mark.parametrize(
    "shape, message",
    [
        (MeshShape(data=3), "mesh.data=3 does not fit 8 devices"),
        (MeshShape(data=8, fsdp=8), "mesh.data=8, mesh.fsdp=8 does not fit 8 devices"),
        (MeshShape(tensor=3), "mesh.tensor is 3: it must divide 8 devices"),
        (MeshShape(tensor=8), r"mesh.tensor is 8: it must divide 8 devices and the numbers of heads, \[4, 32\]"),
        (MeshShape(data=1), "in 2 slices, which go on data"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
    devices = [Device(i, slice_index=i // 4 if "slices" in message else 0) for i in range(8)]
    with pytest.raises(ConfigError, match=message):
        shape.build(Load(heads=(4, 32) if "heads" in message else ()), devices)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for preset, shape in PRESETS.items():
        (GOLDEN / f"{preset}.txt").write_text(layout(shape), "utf-8")
