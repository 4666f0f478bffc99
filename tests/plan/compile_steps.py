"""Compiles train steps of a small pair for eight CPU devices; test_steps.py reads what it prints and writes.

Writes MESH.hlo into the current folder.
"""

from pathlib import Path

import jax

from jaxdraft.home import Home
from jaxdraft.losses import KL, engine
from jaxdraft.models import ModelConfig
from jaxdraft.plan.hardware import Hardware
from jaxdraft.plan.programs import programs
from jaxdraft.plan.shapes import PlannedContext
from jaxdraft.plan.stages import plan_stages
from jaxdraft.recipe import HFModel, Prepare, Recipe, Train
from jaxdraft.sharding import MeshShape

ROWS, LENGTH, VOCABULARY = 16, 48, 512
DRAFT = ModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2)
TARGET = ModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=VOCABULARY,
    tie_embeddings=False,
)
MESHES = {"fsdp": (MeshShape(fsdp=8), 1), "tensor": (MeshShape(fsdp=4, tensor=2), 4)}


class Planned(PlannedContext):
    target_shape = TARGET


def context(mesh, accumulate):
    step = {"loss": KL(), "batch_size": ROWS, "accumulate": accumulate, "remat": "full"}
    stages = (Prepare("text", sources=(), length=LENGTH), Train("distill", data="text", steps=1, **step))
    return Planned(Recipe(title="", target=HFModel(""), draft=DRAFT, stages=stages, mesh=mesh), Home(Path()))


def main():
    engine.default_chunk = lambda vocabulary: 8  # of the 96 positions of a device, or the 24 of a micro-batch
    for name, (mesh, accumulate) in MESHES.items():
        planned = context(mesh, accumulate)
        plan = plan_stages(planned, Hardware("v5e", 8))[-1]
        for program in programs(planned, planned.recipe.stages[-1], plan, jax.devices()):
            with jax.set_mesh(program.mesh):
                compiled = program.lower(program.rows).compile()
            Path(f"{name}.hlo").write_text(compiled.as_text())


if __name__ == "__main__":
    main()
