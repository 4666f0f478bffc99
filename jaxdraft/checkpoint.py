"""Checkpoints of a training state: atomic, checked on the way in. The only module that imports orbax.

Orbax does not notice a flipped bit inside an array, so every checkpoint carries a fingerprint of its own, and a restore
walks back to the newest step whose arrays still match theirs.
"""

import json
import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxdraft.distributed import on_all, on_lead
from jaxdraft.fingerprint import fingerprint
from jaxdraft.remote import is_url

logger = logging.getLogger(__name__)


def saved_fingerprint(folder: Path, step: int) -> list[int]:
    """The fingerprint that a checkpoint was saved with, as it is written beside its arrays."""
    return json.loads((folder / str(step) / "meta" / "metadata").read_text())["fingerprint"]


class Checkpoints:
    """The checkpoints of one stage: the newest two, and those kept for good.

    Args:
      folder: made if it does not exist; ``gs://bucket/path`` is written to by every process directly.
      keep_every: keep the steps that this divides; ``None`` keeps the newest two only.
    """

    def __init__(self, folder: Path | str, keep_every: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, keep_period=keep_every, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        place = folder if is_url(folder) else Path(folder).absolute()
        self._manager = ocp.CheckpointManager(place, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Saves in the background; an error of the previous save is raised here."""
        meta = {"fingerprint": [int(x) for x in fingerprint(state)]}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args)

    def wait(self) -> None:
        """Returns when every save is on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract_state: Any, step: int) -> Any:
        """The state of one step, laid out as ``abstract_state`` says.

        Raises:
          ValueError: arrays differ in shape or dtype, or do not match the fingerprint they were saved with.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        if [int(x) for x in fingerprint(restored.state)] != restored.meta["fingerprint"]:
            raise ValueError(f"checkpoint {step} in {self._manager.directory} does not match its fingerprint")
        return restored.state

    def restore_newest(self, abstract_state: Any) -> tuple[int, Any] | None:
        """Step and state of the newest checkpoint that passes its check, or ``None`` if there is none at all.

        Raises:
          OSError: there are checkpoints, but none passes.
        """
        failures: dict[int, str] = {}
        for step in reversed(on_lead(lambda: self.steps)):
            try:
                state, failure = self.restore(abstract_state, step), ""
            except Exception as error:  # orbax raises many kinds for a damaged file
                state, failure = None, str(error).splitlines()[0]
            if found := on_all(failure):  # a process reads its own parts only
                failures[step] = f"step {step}: {found[0]}"
                logger.warning("checkpoint skipped, %s", failures[step])
                continue
            for damaged in failures:  # orbax saves nothing before its newest step, so they have to go
                self._manager.delete(damaged)
            return step, state
        if failures:
            raise OSError(f"no checkpoint in {self._manager.directory} is intact ({'; '.join(failures.values())})")
        return None
