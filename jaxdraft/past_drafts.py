"""Drafts as they were while they learned: from the checkpoints that a Train stage keeps, ready to decode."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path

from jax.sharding import Mesh

from jaxdraft.checkpoint import Checkpoints
from jaxdraft.distributed import on_lead
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Model
from jaxdraft.evaluate.sweep import Draft
from jaxdraft.export import MODEL
from jaxdraft.home import CHECKPOINTS, RECORD
from jaxdraft.models import ModelConfig
from jaxdraft.models.hf import load_config
from jaxdraft.models.hub import model_folder
from jaxdraft.train.state import OptimizerSettings, abstract_state, state_shardings
from jaxdraft.untrusted import damaged, read_json


class PastDrafts:
    """The checkpoints of one Train stage that its ``keep_every`` keeps, and its last.

    Args:
      name: of the stage.
      folder: of its checkpoints, as in ``Checkpoints``.
      optimizer: the stage's settings, which say what else is in a checkpoint.
      keep_every: the stage's.
      config: shape of the draft.
    """

    def __init__(
        self, name: str, folder: Path | str, optimizer: OptimizerSettings, keep_every: int | None, config: ModelConfig
    ):
        self._name, self._folder, self._optimizer, self._config = name, folder, optimizer, config
        with Checkpoints(folder) as checkpoints:
            there = on_lead(lambda: checkpoints.steps)
        self.steps = [step for step in there if step == optimizer.steps or (keep_every and step % keep_every == 0)]

    def load(self, step: int, mesh: Mesh, decode_mesh: Mesh | None = None) -> Model:
        """The draft at one of ``steps``.

        Args:
          step: the step.
          mesh: on which the state is restored.
          decode_mesh: the same devices as the draft is decoded on; ``None`` is ``mesh``.
        """
        shardings = state_shardings(self._config, self._optimizer, mesh)
        with Checkpoints(self._folder) as checkpoints:
            state = checkpoints.restore(abstract_state(self._optimizer, self._config, shardings), step)
        return Model.create(f"{self._name}@{step}", self._config, state.params, decode_mesh or mesh)


def drafts_at(place: str, checkpoints: Collection[int] | None) -> Sequence[Draft]:
    """What ``--draft`` names: a model, or a Train stage of a run by its folder.

    Args:
      place: a Hugging Face folder or repository, or ``RUN/STAGE``.
      checkpoints: of a stage, these steps in place of what it became; none of them is all it kept.

    Raises:
      ConfigError: there is no such model, or no such checkpoint.
    """
    folder = Path(place)
    own = folder.resolve().name
    record = read_json(folder / RECORD, fields={"kind": str, "status": str}) if (folder / RECORD).is_file() else {}
    if record.get("kind") != "Train":
        if checkpoints is not None:
            raise ConfigError(f"{place} has no checkpoints: give the folder of a Train stage, RUN/STAGE")
        folder = model_folder(place)
        return [Draft(own, folder, functools.partial(Model.load, folder))]
    if record["status"] != "done":
        raise ConfigError(f"{place} is not finished: run its recipe to the end of this stage")
    if checkpoints is None:
        return [Draft(own, folder / MODEL, functools.partial(Model.load, folder / MODEL))]
    with damaged(folder / RECORD):
        settings = record["settings"]
        optimizer = OptimizerSettings(**{field.name: settings[field.name] for field in fields(OptimizerSettings)})
        past = PastDrafts(own, folder / CHECKPOINTS, optimizer, settings["keep_every"], load_config(folder / MODEL))
    if not past.steps:
        raise ConfigError(f"{place} has no checkpoints left: without --checkpoints, its last draft is measured")
    if missing := set(checkpoints).difference(past.steps):
        kept = ", ".join(map(str, past.steps))
        raise ConfigError(f"{place} kept no checkpoint of step {min(missing)}: it has {kept}")
    return [
        Draft(f"{own}@{step}", folder / MODEL, functools.partial(past.load, step))
        for step in sorted(checkpoints or past.steps)
    ]
