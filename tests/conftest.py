"""Fixtures that many tests share."""

import json
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import pytest

from jaxdraft.cli import main
from jaxdraft.data.pipeline import pack_whole
from jaxdraft.data.records import write_rows
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, corpora and trained models that are not part of the project."""
    folder = Path(os.environ.get("JAXDRAFT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test material is not here ({folder}); set JAXDRAFT_SHARED_DATA to its folder")
    return folder


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """XLA compiles twice as fast and optimises little, for modules that compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe as the command line runs it, once for all test processes. Nobody changes it: copy it first."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    workdir = folder / "tiny" / "run"
    with filelock.FileLock(folder / "tiny.lock"):
        if not (workdir / "report" / "index.html").exists():
            assert main(["run", str(ROOT / "tests" / "tiny_recipe.py"), "--workdir", str(workdir)]) == 0
    return workdir


class MadeRun:
    """A run directory whose stages hold what a test says, written by the functions that write real ones.

    Attributes:
      folder: the run directory; its stage ``tokenizer`` is there.
      tokenizer: of that stage.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        train_sentencepiece([str(textwrap.__doc__), Path(textwrap.__file__).read_text()], folder / "tokenizer", 400)
        self.tokenizer: Tokenizer = load_tokenizer(folder / "tokenizer")
        self._stages: list[dict[str, Any]] = []
        self.plan("tokenizer", "TrainTokenizer")

    def plan(self, name: str, kind: str) -> Path:
        """A stage of the recipe that has not run."""
        self._stages.append({"name": name, "kind": kind})
        recipe = {"title": "Tiny", "target": "target", "tokenizer": "tokenizer", "seed": 0, "stages": self._stages}
        (self.folder / "recipe.json").write_text(json.dumps(recipe))
        return self.folder / name

    def record(self, name: str, kind: str, status: str = "done") -> Path:
        """A stage of the recipe with a record, and nothing else."""
        folder = self.plan(name, kind)
        folder.mkdir()
        record = {"name": name, "kind": kind, "status": status, "seconds": 1.0, "settings": {}, "summary": {}}
        (folder / "stage.json").write_text(json.dumps(record))
        return folder

    def rows(self, name: str, rows: Sequence[Mapping[str, np.ndarray]], kind: str = "Prepare", **given: Any) -> Path:
        """A stage with packed rows, four in a shard; further words are ``write_rows``'s."""
        folder = self.record(name, kind)
        self._write_rows(folder, rows, **given)
        return folder

    def answers(
        self,
        name: str,
        prompts: Sequence[Any],
        answer: Callable[[Any], str | dict[str, str]],
        temperatures: Sequence[float] = (0.0, 1.0),
    ) -> Path:
        """A Generate stage, four answers in a shard.

        Args:
          prompts: texts, and a ``Rejected`` for each that gives no prompt.
          answer: of a question: its text, or as ``{"error": reason}`` why there is none.
        """
        from jaxdraft import answers
        from jaxdraft.data.prompts import Prompt
        from jaxdraft.data.quarantine import Quarantine
        from jaxdraft.files import write_json
        from jaxdraft.questions import Question

        folder, quarantine = self.record(name, "Generate"), Quarantine()
        asked = [
            Question(0, f"{i}@{t:g}", Prompt(str(i), tuple(self.tokenizer.encode(text)), text), t, 0.95, 64, "target")
            for i, text in enumerate(quarantine.accepted(prompts))
            for t in temperatures
        ]
        shards, generator = answers.cut(asked, 4, folder), {"dtype": "float32"}
        for shard in shards:
            answers.commit(shard, [self._line(question, answer(question)) for question in shard.questions], generator)
        write_json(folder / answers.ACCOUNT, answers.account(shards, quarantine.counts, generator))
        quarantine.write(folder)
        examples = answers.examples(shards, lambda question: [0] * len(question.prompt.tokens))
        self._write_rows(folder, list(pack_whole(examples, 64)))
        return folder

    def _write_rows(self, folder: Path, rows: Sequence[Mapping[str, np.ndarray]], **given: Any) -> None:
        known = {"length": len(rows[0]["tokens"]), "vocab_size": self.tokenizer.vocab_size, "shard_rows": 4}
        known |= {"source": {"settings": []}, "tokenizer_fingerprint": self.tokenizer.fingerprint()}
        write_rows(folder, iter(rows), **{**known, **given})

    def _line(self, question: Any, answer: str | dict[str, str]) -> dict[str, Any]:
        line = {"id": question.id, "writer": question.writer, "prompt": question.prompt.text}
        line |= {"temperature": question.temperature, "top_p": question.top_p}
        if isinstance(answer, dict):
            return line | answer | {"text": ""}
        tokens = [*self.tokenizer.encode(answer, bos=False), self.tokenizer.eos_id]
        return line | {"finish": "eos", "prompt_tokens": list(question.prompt.tokens), "tokens": tokens, "text": answer}


@pytest.fixture
def made_run(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run")
