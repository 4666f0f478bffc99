"""A recipe in its run directory: where everything lies, and what the recipe leaves to its target."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdraft.data.records import PackedRows
from jaxdraft.errors import ConfigError
from jaxdraft.export import MODEL
from jaxdraft.files import sha256
from jaxdraft.home import Home
from jaxdraft.models import ModelConfig, compute_dtype
from jaxdraft.models.folder import weight_files
from jaxdraft.models.hf import load_config
from jaxdraft.models.hub import model_folder
from jaxdraft.recipe import HFModel, Recipe, Train
from jaxdraft.sharding import MESH_AXES, Load
from jaxdraft.tokenizers import Tokenizer, load_tokenizer
from jaxdraft.untrusted import read_json

VOCABULARY = "draft_vocabulary.json"
_TRAINED_BYTES = 16  # float32 weights, gradients and two moments


@dataclasses.dataclass(frozen=True)
class Context:
    """A recipe in its run directory.

    Attributes:
      recipe: the recipe.
      home: the run directory, and where it is kept.
      profile: first step to trace of each Train stage, and the one to stop before.
    """

    recipe: Recipe
    home: Home
    profile: tuple[int, int] | None = None

    @property
    def workdir(self) -> Path:
        return self.home.folder

    def folder(self, stage: str) -> Path:
        return self.workdir / stage

    def model_folder(self, stage: str) -> Path:
        """The Hugging Face folder that a Train stage leaves behind."""
        return self.folder(stage) / MODEL

    @cached_property
    def target_folder(self) -> Path:
        target = self.recipe.target
        return model_folder(target.path, target.revision) if isinstance(target, HFModel) else self.model_folder(target)

    @cached_property
    def tokenizer_folder(self) -> Path:
        given = self.recipe.tokenizer
        if given is None:
            return self.target_folder
        if isinstance(given, HFModel):
            return model_folder(given.path, given.revision)
        self.home.fetch(given)
        return self.folder(given)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_folder)

    @cached_property
    def target_hashes(self) -> dict[str, str]:
        """sha256 of each file that makes the target's folder a model."""
        described = [self.target_folder / name for name in ("config.json", "generation_config.json")]
        files = [*filter(Path.exists, described), *weight_files(self.target_folder)]
        return {file.name: sha256(file) for file in files}

    @cached_property
    def target_hash(self) -> str:
        """Of all of them."""
        return hashlib.sha256("".join(self.target_hashes.values()).encode()).hexdigest()

    @cached_property
    def tokenizer_hashes(self) -> dict[str, str]:
        """sha256 of each file that says how text is cut into tokens: of the same pieces, other merges cut otherwise."""
        files = [self.tokenizer_folder / name for name in ("tokenizer.json", "tokenizer.model")]
        return {file.name: sha256(file) for file in files if file.exists()}

    @cached_property
    def mesh(self) -> Mesh:
        """The devices as all Train stages of the recipe, and passes over whole texts, use them.

        Raises:
          ConfigError: the recipe's mesh does not fit the devices, the models or the batches.
        """
        return self.mesh_on(None)

    @cached_property
    def decode_mesh(self) -> Mesh:
        """The same devices as they are used to write text."""
        return self.decode_mesh_on(self.mesh)

    @cached_property
    def own_decode_mesh(self) -> Mesh | None:
        """The part of ``decode_mesh`` that is this process's alone, to write text without the others; ``None`` where a
        model is cut over devices of several processes.
        """
        own = jax.local_devices()
        tensor = self.decode_mesh.shape["tensor"]
        groups = [group for group in self.decode_mesh.devices.reshape(-1, tensor) if set(group) <= set(own)]
        if len(groups) * tensor < len(own):
            return None
        return Mesh(np.array(groups).reshape(-1, 1, tensor), MESH_AXES, axis_types=self.decode_mesh.axis_types)

    def mesh_on(self, devices: Sequence[Any] | None) -> Mesh:
        """``mesh`` for other devices than those at hand; their dtype is that of ``backend.platform``."""
        trained = [stage for stage in self.recipe.stages if isinstance(stage, Train)]
        rows = math.gcd(*(stage.batch_size // stage.accumulate for stage in trained)) or None
        sizes = [(_TRAINED_BYTES * self._parameters(stage.model or self.recipe.draft)) for stage in trained]
        frozen = compute_dtype().itemsize * self._parameters(self.target_shape)
        return self.recipe.mesh.build(Load(frozen + max(sizes, default=0), rows, self._heads), devices)

    def decode_mesh_on(self, mesh: Mesh) -> Mesh:
        """``decode_mesh`` for a mesh of ``mesh_on``."""
        parameters = self._parameters(self.target_shape) + self._parameters(self.recipe.draft)
        return self.recipe.mesh.for_decoding(mesh, Load(compute_dtype().itemsize * parameters, heads=self._heads))

    def _parameters(self, shape: ModelConfig) -> int:
        """Of a shape that may wait for a vocabulary: the target's; at least so many where that waits too."""
        size = shape.vocab_size or self.target_shape.vocab_size or 1
        return dataclasses.replace(shape, vocab_size=size).num_parameters

    @property
    def _heads(self) -> tuple[int, ...]:
        own = [stage.model for stage in self.recipe.stages if isinstance(stage, Train) and stage.model]
        return tuple(shape.num_heads for shape in (self.target_shape, self.recipe.draft, *own))

    @property
    def target_shape(self) -> ModelConfig:
        """The target's shape; of one that a stage is yet to train, perhaps without vocabulary."""
        if isinstance(self.recipe.target, HFModel):
            config = load_config(self.target_folder)
            config.check_target()
            return config
        stage = self.recipe.stage(self.recipe.target)
        assert isinstance(stage, Train)
        return stage.model or self.recipe.draft

    def target_config(self) -> ModelConfig:
        """The target's full shape, also of one that a stage trains."""
        if isinstance(self.recipe.target, HFModel):
            return self.target_shape
        stage = self.recipe.stage(self.recipe.target)
        assert isinstance(stage, Train)
        return self.trained_config(stage)

    def draft_config(self) -> ModelConfig:
        """The recipe's draft with the target's vocabulary, BOS, EOS and longest sequence."""
        target, draft = self.target_config(), self.recipe.draft
        self.check_draft(target.vocab_size)
        return dataclasses.replace(
            draft,
            vocab_size=target.vocab_size,
            bos_id=target.bos_id,
            eos_ids=target.eos_ids,
            max_positions=target.max_positions,
        )

    def check_draft(self, vocabulary: int | None) -> None:
        """Raises ConfigError where the recipe's draft does not take a target's vocabulary of this size."""
        own = self.recipe.draft.vocab_size
        if None not in (own, vocabulary) and own != vocabulary:
            raise ConfigError(f"draft.vocab_size is {own}, the target's {vocabulary}: leave the draft's out")

    def seed(self, stage: Train) -> int:
        """A Train stage's own seed, or the recipe's."""
        return self.recipe.seed if stage.seed is None else stage.seed

    def draft_vocabulary(self, stage: str) -> tuple[int, ...]:
        """The tokens that a DraftVocabulary stage chose."""
        return tuple(read_json(self.folder(stage) / VOCABULARY, fields={"ids": list})["ids"])

    def rows(self, stage: str) -> PackedRows:
        """The packed rows of a Prepare, Generate or Score stage.

        Raises:
          ConfigError: they were made with another tokenizer.
        """
        packed = PackedRows(self.folder(stage))
        if packed.manifest["tokenizer"] != self.tokenizer.fingerprint():
            raise ConfigError(f"{packed.folder} was made with another tokenizer; delete it to make it anew")
        return packed

    def trained_config(self, stage: Train) -> ModelConfig:
        """The full shape of what a Train stage trains, its draft vocabulary left out."""
        if stage.model is None:
            return self.draft_config()
        if stage.model.vocab_size is not None:
            return stage.model
        tokenizer, eos_ids = self.tokenizer, stage.model.eos_ids
        if tokenizer.eos_id not in eos_ids:
            eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        return dataclasses.replace(
            stage.model,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_ids=eos_ids,
        )
