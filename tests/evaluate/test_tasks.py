"""The papers' tasks from files in the shape of the real ones, a task of one's own, and what does not fit."""

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from jaxdraft.data.prompts import PromptFile, PromptList
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate import tasks
from jaxdraft.evaluate.tasks import Task

# task -> file of its repository, row, what a chat model is asked, what another goes on with
ROWS = {
    "dolly": (
        "databricks-dolly-15k.jsonl",
        {"instruction": "Who?", "context": "A", "response": "B", "category": "closed_qa"},
        "Who?\n\nA",
        "### Instruction:\nWho?\n\n### Input:\nA\n\n### Response:",
    ),
    "xsum": (
        "data/test-00000-of-00001.parquet",
        {"document": "News.", "summary": "N.", "id": "7"},
        "Summarize: News.",
        "Summarize: News.\n",
    ),
    "cnn-dailymail": (
        "3.0.0/test-00000-of-00001.parquet",
        {"article": "News.", "highlights": "N .", "id": "a"},
        "Article: News.",
        "Article: News.\n",
    ),
    "tinystories": ("data/validation-00000-of-00001.parquet", {"text": "Once there was."}, None, ""),
    "humaneval": (
        "openai_humaneval/test-00000-of-00001.parquet",
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n"},
        None,
        "def f():\n",
    ),
    "wmt18-de-en": (
        "de-en/test-00000-of-00001.parquet",
        {"translation": {"de": "Ja .", "en": "Yes ."}},
        "from German to English:\n\nJa .",
        "German: Ja .\nEnglish:",
    ),
}


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_papers_tasks(name, tmp_path, made_run, monkeypatch):
    file, row, chat, plain = ROWS[name]
    path = tmp_path / name / file
    path.parent.mkdir(parents=True)
    if path.suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    tokenizer = made_run.tokenizer
    ask = lambda: tasks.named(name, str(tmp_path / name)).read(tokenizer, 2048)
    (prompt,) = ask()
    assert prompt.text.endswith(plain)
    assert name != "tinystories" or row["text"].startswith(prompt.text)
    assert prompt.messages is None
    monkeypatch.setattr(tokenizer, "template_fingerprint", lambda: "a chat template")
    monkeypatch.setattr(tokenizer, "render", lambda messages: f"<user>{messages[-1]['content']}<end>")
    (again,) = ask()
    assert again.text.endswith(f"{chat}<end>") if chat else again == prompt


def test_their_decoding():
    made = {name: make() for name, make in tasks.TASKS.items()}
    sampled = {name: (task.temperature, task.top_p) for name, task in made.items() if task.temperature}
    assert sampled == {"dolly": (0.6, 0.9)}
    assert {name: task.limit for name, task in made.items()} == dict.fromkeys(made, 100) | {"humaneval": 164}
    assert all(task.name == name and task.max_new_tokens == 128 for name, task in made.items())
    other = tasks.dolly("rows.jsonl", name="dolly, greedy", temperature=0.0, top_p=1.0, limit=5)
    assert (other.name, other.temperature, other.limit, other.prompts.path) == ("dolly, greedy", 0, 5, "rows.jsonl")


def test_stories_that_nothing_separates_are_cut(tmp_path, made_run):
    lines = [f"Story {i} has a line that is not very long.\n" for i in range(400)]
    (tmp_path / "stories.txt").write_text("".join(lines))
    prompts = tasks.tinystories(str(tmp_path / "stories.txt")).read(made_run.tokenizer, 8192)
    assert len(prompts) == -(-sum(map(len, lines)) // 4000)
    assert all(prompt.text.startswith("Story") for prompt in prompts)


def prompts_of(*texts):
    return PromptList([{"prompt": text} for text in texts])


def test_prompts_that_leave_no_room_are_left_out_and_counted(made_run, caplog):
    texts = ["a", "b" * 60, "c", "d" * 30, "e", "f"]
    task = Task("t", prompts_of(*texts), max_new_tokens=20, max_prompt_tokens=40, limit=3)
    tokens = [len(made_run.tokenizer.encode(text)) for text in texts]
    with caplog.at_level(logging.WARNING):
        assert [prompt.text for prompt in task.read(made_run.tokenizer, 20 + tokens[3])] == ["a", "c", "d" * 30]
        assert [prompt.text for prompt in task.read(made_run.tokenizer, 19 + tokens[3])] == ["a", "c", "e"]
    assert "t: left out 1 prompts: more than 40 tokens" in caplog.text
    assert (
        f"left out 1 prompts: with an answer of 20 tokens past the target's {19 + tokens[3]} positions" in caplog.text
    )
    with pytest.raises(ConfigError, match=r"task t: prompt 1: with an .* not one of 6 rows fits"):
        task.read(made_run.tokenizer, 21)
    with pytest.raises(ConfigError, match="task t: max_new_tokens is 20: the target has only 20 positions"):
        task.read(made_run.tokenizer, 20)


OWN = """
from jaxdraft.data.prompts import PromptFile, PromptList
from jaxdraft.evaluate.tasks import Task

def capitals(path: str = "countries.txt") -> Task:
    countries = open(path).read().splitlines()
    return Task("capitals", PromptList([{"prompt": f"The capital of {c} is"} for c in countries]), temperature=0.3)

def needs(path, count): ...

def nothing(): ...

HELLO = Task("hello", PromptList([{"prompt": "Hello"}]))
"""


def test_a_task_of_ones_own(tmp_path, monkeypatch, made_run):
    (tmp_path / "own_tasks.py").write_text(OWN)
    (tmp_path / "countries.txt").write_text("France\nJapan\n")
    (tmp_path / "more.txt").write_text("Peru\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undone after the test, with what the import adds
    task = tasks.named("own_tasks:capitals")
    assert [prompt.text for prompt in task.read(made_run.tokenizer, 2048)] == [
        "The capital of France is",
        "The capital of Japan is",
    ]
    assert task.temperature == 0.3
    assert len(tasks.named("own_tasks:capitals", "more.txt").prompts.rows) == 1
    assert tasks.named("own_tasks:HELLO").name == "hello"
    for name, path, message in (
        (
            "own_tasks:capitls",
            None,
            "no task 'capitls': did you mean 'capitals'.*There are: capitals, needs, nothing, HEL",
        ),
        ("own_tasks:needs", "x", "missing a required argument: 'count'"),
        ("own_tasks:HELLO", "x", "unexpected keyword argument 'path'"),
        ("own_tasks:nothing", None, "gives NoneType, not a Task"),
        ("no_such_tasks:mine", None, "task 'no_such_tasks:mine': cannot import 'no_such_tasks'"),
        ("doly", None, "no task 'doly': did you mean 'dolly'.*your own: 'my_package.module:my_task'"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.named(name, path)


def test_what_the_command_line_asks_for():
    assert tasks.asked_for([], ["chat.jsonl", "code.jsonl"], {"limit": 3}) == [
        Task("chat", PromptFile("chat.jsonl"), limit=3),
        Task("code", PromptFile("code.jsonl"), limit=3),
    ]
    assert tasks.asked_for(["dolly"], ["rows.jsonl"], {}) == [Task("dolly", PromptFile("rows.jsonl"))]
    assert tasks.asked_for(["dolly=rows=1.jsonl", "xsum"], [], {"top_p": 0.5}) == [
        tasks.dolly("rows=1.jsonl", top_p=0.5),
        tasks.xsum(top_p=0.5),
    ]
    for names, files, message in (
        (["dolly", "xsum"], ["a.jsonl"], "--task names one file"),
        (["dolly=b.jsonl"], ["a.jsonl"], "--task names one file"),
        (["xsun"], [], "did you mean 'xsum'"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.asked_for(names, files, {})


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}, {"limit": 0}],
)
def test_a_task_checks_its_settings(wrong):
    with pytest.raises(ConfigError, match="task x"):
        Task("x", None, **wrong)
