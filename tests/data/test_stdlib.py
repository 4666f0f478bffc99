import hashlib
import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from jaxdraft.data.prompts import read_prompts
from jaxdraft.data.stdlib import PythonLibrary, PythonTask
from jaxdraft.errors import ConfigError

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "seed", "eval")


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def library() -> dict[tuple[str, str], list[str]]:
    parts = itertools.product(("text", "code", "instructions"), SPLITS)
    return {(part, split): list(PythonLibrary(part, split).documents()) for part, split in parts}


def test_there_is_enough(library):
    sizes = {key: sum(map(len, documents)) for key, documents in library.items()}
    assert sizes["text", "train"] > 1_000_000
    assert sizes["code", "train"] > 4_000_000
    assert sizes["instructions", "train"] > 1_500_000
    assert all(len(set(documents)) == len(documents) for (part, _), documents in library.items() if part != "code")


def test_splits_do_not_share_documents(library):
    for part in ("code", "instructions"):
        everything = [{d for d in library[part, split] if d.strip()} for split in SPLITS]
        assert not any(a & b for a, b in itertools.combinations(everything, 2))


def test_no_evaluated_answer_is_in_the_training_text(library, tokenizer):
    training = plain(" ".join(d for part in ("text", "code", "instructions") for d in library[part, "train"]))
    long_answers = [
        (prompt.id, answer)
        for prompt in read_prompts(PythonTask("all", "eval", max_tokens=10_000), tokenizer)
        if prompt.reference and len(answer := plain(prompt.reference)) >= 100
    ]
    assert len(long_answers) > 100
    assert [name for name, answer in long_answers[:100] if answer in training] == []


@pytest.mark.parametrize("kind, least", [("open", 200), ("summary", 40), ("code", 150)])
def test_tasks(library, tokenizer, kind, least):
    prompts = read_prompts(PythonTask(kind, "eval", max_tokens=200), tokenizer)
    assert len(prompts) >= least
    assert len({p.id for p in prompts}) == len(prompts)
    for prompt in prompts:
        assert prompt.id.startswith(f"{kind}:")
        assert prompt.extra == {"task": kind}
        assert 0 < len(prompt.tokens) <= 200
        assert prompt.tokens == tuple(tokenizer.encode(prompt.text))
        assert prompt.text.endswith("\n\n### Response:\n")
        assert prompt.text + prompt.reference in library["instructions", "eval"]


def test_what_a_task_asks(tokenizer):
    tasks = {
        p.id: (p.text, p.reference)
        for split in SPLITS
        for p in read_prompts(PythonTask("all", split, max_tokens=10_000), tokenizer)
    }
    text, reference = tasks["open:queue.Queue.qsize"]
    assert text == (
        "### Instruction:\nDescribe this function.\n\n### Input:\n# queue.Queue\ndef qsize(self):\n\n### Response:\n"
    )
    assert reference == "Return the approximate size of the queue (not reliable!).\n"
    text, reference = tasks["code:queue.Queue.qsize"]
    assert "def qsize(self):\n    '''Return the approximate size of the queue (not reliable!).'''\n\n###" in text
    assert reference == "    with self.mutex:\n        return self._qsize()\n"
    text, reference = tasks["summary:queue.Queue"]
    assert reference.startswith("Create a queue object")
    assert reference.strip() not in text
    assert "    def qsize(self)\n" in text


def test_limits_are_prefixes(tokenizer):
    task = PythonTask("open", "seed", max_tokens=120)
    few = PythonTask("open", "seed", limit=5, max_tokens=120)
    assert read_prompts(few, tokenizer) == read_prompts(task, tokenizer)[:5]
    assert len(list(PythonLibrary("code", limit=3).documents())) == 3
    kinds = {p.extra["task"] for p in read_prompts(PythonTask("all", "seed", limit=60), tokenizer)}
    assert kinds == {"open", "summary", "code"}


def test_code_is_source_and_leaves_out_what_is_not_for_reading(library):
    assert any("def namedtuple(" in source for split in SPLITS for source in library["code", split])
    everything = "".join(source for split in SPLITS for source in library["code", split])
    for foreign in ("decoding_table = (", "build_time_vars = {", "class IOBinding"):
        assert foreign not in everything


def test_another_process_gives_the_same(library):
    code = (
        "import hashlib, jaxdraft.data.stdlib as s\n"
        "d = [t for p in ('text', 'code', 'instructions') for t in s.PythonLibrary(p).documents()]\n"
        "print(hashlib.sha256(repr(d).encode()).hexdigest(), s.PythonLibrary().fingerprint())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "1"}
    )
    documents = [text for part in ("text", "code", "instructions") for text in library[part, "train"]]
    here = hashlib.sha256(repr(documents).encode()).hexdigest()
    assert run.stdout.split() == [here, PythonLibrary().fingerprint()]


def test_packages_are_read_in_the_library_s_place():
    def of(part, *packages):
        return [list(PythonLibrary(part, split, packages=packages).documents()) for split in SPLITS]

    text, code = of("text", "numpy"), of("code", "numpy")
    assert sum(map(len, text[0])) > 500_000
    everything = "".join(itertools.chain(*text))
    assert "\nnumpy.linalg._linalg.norm\n" in everything
    assert "numpy.linalg.tests" not in everything
    assert all(document.startswith("numpy") for document in text[0]), "no language reference"
    for documents in (text, code, of("instructions", "numpy")):
        each = list(itertools.chain(*documents))
        assert len(set(each)) == len(each), "no document is in two splits, or twice"
    mixed, own = of("text", "numpy", "jaxdraft")[0], of("text", "jaxdraft")[0]
    assert sorted(mixed) == sorted(own + text[0])
    half = len(mixed) // 2
    assert all(any(document in own for document in part) for part in (mixed[:half], mixed[half:]))


def test_a_package_is_not_imported_and_its_contents_are_the_fingerprint(tmp_path, monkeypatch):
    def made(name, source):
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError\n")
        (tmp_path / name / "pipeline.py").write_text(source)
        (tmp_path / name / "tests" / "case.py").write_text("left = 'out'\n")
        return PythonLibrary("code", packages=(name,))

    monkeypatch.syspath_prepend(tmp_path)
    one, other = made("draft_words", "x = 1\n"), made("draft_words_too", "x = 2\n")
    found = [text for split in SPLITS for text in replace(one, split=split).documents()]
    assert sorted(found) == ["raise RuntimeError\n", "x = 1\n"]
    assert len({library.fingerprint() for library in (one, other, PythonLibrary())}) == 3
    assert one.provenance() == {"licence": None}, "not the standard library's"
    assert replace(one, licence="MIT").provenance() == PythonLibrary().provenance() == {}


@pytest.mark.parametrize("name", ["nump", "json.decoder", "queue"])
def test_a_package_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=f"packages: '{name}' is not .* pip install"):
        PythonLibrary(packages=("numpy", name)).fingerprint()


def test_settings_are_checked_and_plain():
    for wrong in ({"part": "pairs"}, {"split": "heldout"}):
        with pytest.raises(ConfigError, match="must be one of"):
            PythonLibrary(**wrong)
    with pytest.raises(ConfigError, match="must be one of open, summary, code, all"):
        PythonTask("chat")
    assert json.loads(json.dumps(asdict(PythonTask()))) == asdict(PythonTask())
