"""The shapes of a recipe's models, without their weights."""

import dataclasses
from functools import cached_property
from pathlib import Path

from jaxdraft.context import Context
from jaxdraft.errors import ConfigError
from jaxdraft.home import Home
from jaxdraft.models import ModelConfig, presets
from jaxdraft.models.hf_config import load_config
from jaxdraft.recipe import INITS, DraftVocabulary, HFModel, Recipe, Train, TrainTokenizer
from jaxdraft.remote import local_copy

# What the hub calls the targets that there are presets of.
_PRESETS = {
    "meta-llama/llama-2-7b-hf": "llama2_7b",
    "meta-llama/llama-2-7b-chat-hf": "llama2_7b",
    "microsoft/phi-3-mini-4k-instruct": "phi3_mini_4k",
    "meta-llama/llama-3.1-8b": "llama31_8b",
    "meta-llama/llama-3.1-8b-instruct": "llama31_8b",
}


@dataclasses.dataclass(frozen=True)
class PlannedContext(Context):
    """A recipe that is not run: no file of it needs to be there, but a target's ``config.json`` is read if it is.

    Attributes:
      notes: where shapes are from, and what was assumed of them.
    """

    notes: list[str] = dataclasses.field(default_factory=list)

    @staticmethod
    def of(recipe: Recipe) -> "PlannedContext":
        return PlannedContext(recipe, Home(Path("nowhere")))

    @cached_property
    def target_shape(self) -> ModelConfig:
        target = self.recipe.target
        if isinstance(target, HFModel):
            return self._found(target)
        stage = self.recipe.stage(target)
        assert isinstance(stage, Train)
        return self.trained_config(stage)

    def trained_config(self, stage: Train) -> ModelConfig:
        if stage.model is None:
            return self.draft_config()
        if stage.model.vocab_size is not None:
            return stage.model
        if self.recipe.tokenizer is None:
            return dataclasses.replace(stage.model, vocab_size=self.target_shape.vocab_size)
        if isinstance(self.recipe.tokenizer, HFModel):
            return dataclasses.replace(stage.model, vocab_size=self.tokenizer.vocab_size)
        tokenizer = self.recipe.stage(self.recipe.tokenizer)
        assert isinstance(tokenizer, TrainTokenizer)
        return dataclasses.replace(stage.model, vocab_size=tokenizer.vocab_size)

    def model(self, stage: Train) -> ModelConfig:
        """The shape that a stage trains, with as many tokens in its draft vocabulary as it will have."""
        config, named = self.trained_config(stage), self._vocabulary(stage)
        if named is None:
            return config
        chosen = self.recipe.stage(named)
        assert isinstance(chosen, DraftVocabulary)
        return dataclasses.replace(config, head_ids=tuple(range(chosen.size)))

    def _vocabulary(self, stage: Train) -> str | None:
        if stage.draft_vocabulary is not None or stage.init in INITS:
            return stage.draft_vocabulary
        started = self.recipe.stage(stage.init)
        assert isinstance(started, Train)
        return self._vocabulary(started)

    def _found(self, target: HFModel) -> ModelConfig:
        """The target's shape from its folder, the hub's cache, a preset, or the hub, whichever comes first."""
        folder: Path | None = Path(local_copy(target.path, ("config.json", "generation_config.json")))
        if (folder and (folder / "config.json").is_file()) or (folder := _cached(target)):
            config = load_config(folder)
        elif name := _PRESETS.get(target.path.partition("@")[0].lower()):
            self.notes.append(f"{target.path} is not here: its shape is that of presets.{name}")
            config = presets.preset(name)
        else:
            raise ConfigError(
                f"{target.path} is not here, and no preset is of its shape: give a folder that holds its config.json, "
                "as in --set target.path=FOLDER; plan reads no weights"
            )
        config.check_target()
        return config


def _cached(target: HFModel) -> Path | None:
    """The folder of a hub model whose ``config.json`` was downloaded before."""
    import huggingface_hub

    name, _, at = target.path.partition("@")
    try:
        path = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=target.revision or at or None)
    except huggingface_hub.errors.HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None
