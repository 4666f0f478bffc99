"""Checkpoints of a training state: atomic, checked on the way in. The only module that imports orbax.

Orbax notices neither a flipped bit inside an array nor that a state is another run's. So a checkpoint carries a
fingerprint of its arrays and what they depend on, and the hashes of its files lie beside it; a restore walks back to
the newest step that is whole, and says what it left out.
"""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxdraft.distributed import is_lead, on_all, on_lead
from jaxdraft.errors import ConfigError
from jaxdraft.file_hashes import damage, is_complete, write_hashes
from jaxdraft.fingerprint import all_finite, fingerprint
from jaxdraft.remote import is_url
from jaxdraft.settings import changes

logger = logging.getLogger(__name__)
_TEMPORARY = "orbax-checkpoint-tmp"  # behind the step, in the name of a folder that is being written
_NAMED = 3  # damaged files


def saved_fingerprint(folder: Path, step: int) -> list[int]:
    """The fingerprint that a checkpoint was saved with, as orbax writes it beside the arrays."""
    return json.loads((folder / str(step) / "meta" / "metadata").read_text("utf-8"))["fingerprint"]


class _Foreign(ConfigError):
    """A checkpoint is whole, and another run's."""


class Checkpoints:
    """The checkpoints of one stage: the newest two, and those kept for good.

    Args:
      folder: made if it does not exist; ``gs://bucket/path`` is written to by every process directly, and has checksums
        of its own, so that no hashes of files are kept there.
      keep_every: keep the steps that this divides; ``None`` keeps the newest two only.
      identity: what the state depends on besides its step, as JSON; kept with it.
    """

    def __init__(self, folder: Path | str, keep_every: int | None = None, identity: Mapping[str, Any] | None = None):
        self._identity = None if identity is None else json.loads(json.dumps(identity))
        self._records = None if is_url(folder) else Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            keep_period=keep_every,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._hash),
        )
        self._manager = ocp.CheckpointManager(self._records or folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Saves in the background.

        Raises:
          FloatingPointError: the state holds numbers that are not finite; nothing is saved.
          OSError: this save could not begin, or the one before could not be finished.
        """
        finite, sums = all_finite(state), fingerprint(state)
        if not finite:
            raise FloatingPointError(
                f"the state after step {step} is not finite, and was not saved: lower learning_rate"
            )
        self.wait()
        meta = {"fingerprint": [int(x) for x in sums], "identity": self._identity}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._written(lambda: self._manager.save(step, args=args))

    def wait(self) -> None:
        """Returns when every save is on disk.

        Raises:
          OSError: one could not be finished.
        """
        self._written(self._manager.wait_until_finished)
        if self._records is not None and is_lead():
            self._finish_records(self._records)

    def restore(self, abstract_state: Any, step: int) -> Any:
        """The state of one step, laid out as ``abstract_state`` says.

        Raises:
          ConfigError: it is a state of another identity; the message says in what they differ.
          OSError: a file is damaged, or arrays differ in shape or dtype or from the fingerprint they were saved with.
        """
        state, failure = self._checked(abstract_state, step)
        if failure:
            raise OSError(f"checkpoint {step} in {self._manager.directory} cannot be used: {failure}")
        return state

    def restore_newest(self, abstract_state: Any) -> tuple[int, Any] | None:
        """Step and state of the newest checkpoint that passes its checks, or ``None`` if there is none at all.

        Raises:
          ConfigError: it is a state of another identity.
          OSError: there are checkpoints, but none passes.
        """
        failures: dict[int, str] = {}
        for step in reversed(on_lead(self._steps_there_should_be)):
            state, failure = self._checked(abstract_state, step)
            if not failure:
                for damaged in failures.keys() & set(self.steps):  # orbax saves nothing before its newest step
                    self._manager.delete(damaged)
                return step, state
            failures[step] = f"step {step}: {failure}"
            logger.warning("checkpoint skipped, %s", failures[step])
        if failures:
            raise OSError(
                f"no checkpoint in {self._manager.directory} is intact ({'; '.join(failures.values())}): bring one "
                f"back from a copy, or delete the folder to train anew"
            )
        return None

    def _checked(self, abstract_state: Any, step: int) -> tuple[Any, str]:
        """The state of a step, and what is wrong with it on any process, each of which reads its own parts only."""
        state, failure = None, on_lead(functools.partial(self._damage, step))
        if not failure:
            try:
                state = self._read(abstract_state, step)
            except _Foreign:
                raise
            except Exception as error:  # orbax raises many kinds for a damaged file
                failure = str(error).splitlines()[0] if str(error) else type(error).__name__
        return state, next(iter(on_all(failure)), "")

    def _read(self, abstract_state: Any, step: int) -> Any:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if self._identity is not None and meta["identity"] != self._identity:
            told = "; ".join(changes(meta["identity"] or {}, self._identity))
            raise _Foreign(f"checkpoint {step} in {self._manager.directory} is of another run: {told}")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        state = self._manager.restore(step, args=args).state
        if [int(x) for x in fingerprint(state)] != meta["fingerprint"]:
            raise ValueError("its arrays do not match their fingerprint")
        return state

    def _hash(self) -> None:
        """Called by orbax, in its thread, when a checkpoint is complete and does not have its name yet."""
        if self._records is not None and is_lead():
            for folder in self._records.glob(f"*.{_TEMPORARY}*"):
                step = folder.name.split(".")[0]
                write_hashes(folder, self._records / f"{step}.json", complete=False)

    def _finish_records(self, folder: Path) -> None:
        there = set(map(str, self.steps))
        for record in folder.glob("[0-9]*.json"):
            if record.stem not in there:
                record.unlink()
            elif not is_complete(record):
                write_hashes(folder / record.stem, record, complete=True)

    def _steps_there_should_be(self) -> list[int]:
        """With those newer than all others whose folder is gone; one without a complete record was never finished."""
        steps = self.steps
        found = [] if self._records is None else self._records.glob("[0-9]*.json")
        recorded = [int(path.stem) for path in found if path.stem.isdigit() and is_complete(path)]
        return steps + sorted(step for step in recorded if step > max(steps, default=-1))

    def _damage(self, step: int) -> str:
        """What is wrong with a step's files, in words; where their hashes alone are gone its fingerprint decides."""
        if self._records is None:
            return ""
        folder, record = self._records / str(step), self._records / f"{step}.json"
        if not folder.is_dir():
            return f"{folder} is gone"
        if not record.is_file():
            logger.warning("%s is gone: checkpoint %d is checked by the fingerprint of its arrays alone", record, step)
            return ""
        return "; ".join(damage(folder, record)[:_NAMED])

    def _written(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # orbax raises many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OSError(f"{self._manager.directory}: a checkpoint could not be written: {reason}") from error
