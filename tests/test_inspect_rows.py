"""``jaxdraft inspect RUN --stage NAME``: random rows and answers as text, and nothing but text."""

import io
import json
import re
import sys

import numpy as np
import pytest

from jaxdraft.cli import main
from jaxdraft.data.quarantine import Rejected
from jaxdraft.errors import ConfigError
from jaxdraft.home import open_home
from jaxdraft.inspect_rows import inspect_stage
from jaxdraft.untrusted import printable

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e<b>bold</b>\u2028\x00"
K = 2


def row(tokenizer, *texts: str, length: int = 64, answers_from: int = 1) -> dict[str, np.ndarray]:
    """Whole texts in a row with padding; all but the first tokens of each are labels."""
    ids = [tokenizer.encode(text) for text in texts]
    found = {key: np.zeros(length, np.int32) for key in ("tokens", "segment_ids", "loss_mask")}
    start = 0
    for number, tokens in enumerate(ids, start=1):
        found["tokens"][start : start + len(tokens)] = tokens
        found["segment_ids"][start : start + len(tokens)] = number
        found["loss_mask"][start + answers_from : start + len(tokens)] = 1
        start += len(tokens)
    return found


def scored(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A target that gives the token after place i a probability of (i + 1) / 100, and every other one is its first."""
    length = len(found["tokens"])
    after = np.append(found["tokens"][1:], 0)
    ids = np.stack([np.where(np.arange(length) % 2, after, (after + 1) % 400), after], -1)
    probabilities = np.full((length, K + 2), 0.9)
    probabilities[:, K] = np.arange(1, length + 1) / 100
    return {**found, "target_ids": ids, "target_log_probs": np.log(probabilities).astype(np.float16)}


def look(run, name, capsys, *arguments: str) -> str:
    assert main(["inspect", str(run.folder), "--stage", name, *arguments]) == 0
    return capsys.readouterr().out


def refused(run, name) -> str:
    with pytest.raises(ConfigError) as error:
        inspect_stage(open_home(run.folder, None), name, 99, 0)
    return str(error.value)


def question(number: int) -> str:
    return f"Question {number}?"


def test_a_row_is_its_segments_labels_and_padding(made_run, capsys):
    tokenizer = made_run.tokenizer
    packed = row(tokenizer, "the width of lines", "text = \n\twrap(text)")
    first, second = (len(tokenizer.encode(text)) for text in ("the width of lines", "text = \n\twrap(text)"))
    made_run.rows("text", [packed], counts={"documents": 2, "dropped_tokens": 1234})
    lines = look(made_run, "text", capsys).splitlines()
    assert lines[0].split() == ["rows", "1", "of", "64", "tokens"]
    assert "2 documents, 1,234 dropped tokens" in lines[2]
    tokens, labels = first + second, first + second - 2
    assert lines[4] == f"row 0 of 1: 2 segments, {tokens} tokens, {labels} labels, {64 - tokens} padding"
    assert lines[5:7] == [f"  segment 1: {first} tokens, {first - 1} labels", "    ‹<s>›the width of lines"]
    assert lines[7] == f"  segment 2: {second} tokens, {second - 1} labels"
    assert lines[8:] == ["    ‹<s>›text = ", "    \twrap(text)"]


def test_rows_that_were_set_aside(made_run, capsys):
    folder = made_run.rows("text", [row(made_run.tokenizer, "text")])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"quarantined": {"no field": 1200, "not text": 1}}))
    (folder / "quarantine.jsonl").write_text(json.dumps({"where": "a.jsonl: row 3", "reason": "no field"}) + "\n")
    out = look(made_run, "text", capsys)
    assert "1,200 no field, 1 not text" in out
    assert "set aside, the first of quarantine.jsonl\n  a.jsonl: row 3: no field\n" in out


def test_what_the_target_thinks_of_the_labels(made_run, capsys):
    packed = scored(row(made_run.tokenizer, "the width of lines", answers_from=2))
    stored = {"k": K, "temperature": 0.5, "target": "abc", "vocabulary": 400}
    made_run.rows("scores", [packed], kind="Score", target_logits=stored)
    out = look(made_run, "scores", capsys)
    assert "the target's 2 most likely tokens, at temperature 0.5" in out
    labels = np.flatnonzero(packed["loss_mask"])
    assert len(labels) % 2  # or the place of a label would have the share of the one before it
    mean, share = f"{labels.mean() / 100:.3f}", f"{((labels - 1) % 2).mean():.0%}"
    assert f"{len(labels)} labels; the target gives a label {mean} on average, {share} are its first choice" in out


def test_the_seed_chooses(made_run, capsys):
    made_run.rows("text", [row(made_run.tokenizer, f"line {i}") for i in range(50)])
    number = lambda out: re.findall(r"^row (\d+) of 50", out, re.MULTILINE)
    outputs = [look(made_run, "text", capsys, "--rows", "4", "--seed", seed) for seed in ("1", "1", "2")]
    assert outputs[0] == outputs[1]
    assert number(outputs[0]) != number(outputs[2])
    for found in map(number, outputs):
        assert len(set(found)) == 4
    assert f"    ‹<s>›line {number(outputs[0])[0]}\n" in outputs[0]
    assert len(number(look(made_run, "text", capsys))) == 3
    assert number(look(made_run, "text", capsys, "--rows", "999")) == [str(i) for i in range(50)]


def test_answers_stand_below_their_account(made_run, capsys):
    prompts = [*map(question, range(6)), *(Rejected(f"p.jsonl: line {i}", "no messages") for i in range(7, 15))]
    answer = lambda q: {"error": "HTTP 500"} if q.id == "2@0" else f"Answer to {q.prompt.id}." * (q.temperature < 1)
    made_run.answers("responses", prompts, answer)
    out = look(made_run, "responses", capsys, "--rows", "12")
    for fact in (
        "14 read, 6 asked, 8 skipped: 8 no messages",
        "12 asked, 11 written, 1 failed: 1 HTTP 500",
        "11 eos",
        "6 answers; tokens: mean 1.0, median 1, p95 1, max 1",
    ):
        assert fact in out
    assert "set aside, the first of quarantine.jsonl\n  p.jsonl: line 7: no messages\n" in out
    assert "p.jsonl: line 11: no messages\n\n" in out  # the fifth, and the last that is shown
    size = len(made_run.tokenizer.encode("Answer to 1.", bos=False)) + 1
    told = f"\n1@0 (responses-00000-of-00003.jsonl, line 3)\n  target, greedy, ended by eos, {size} tokens\n"
    assert f"{told}    ‹<s>Question 1?›Answer to 1.</s>\n" in out
    assert "\n3@1 (responses-00001-of-00003.jsonl, line 4)\n  target, T 1, top-p 0.95, ended by eos, 1 token\n" in out
    assert "line 1)\n  target, greedy, no answer: HTTP 500\n    ‹Question 2?›\n" in out


def test_nothing_skipped_and_one_temperature(made_run, capsys):
    made_run.answers("responses", [question(1)], lambda q: "Yes.", temperatures=(0.7,))
    out = look(made_run, "responses", capsys)
    assert "1 read, 1 asked, 0 skipped\n" in out
    assert "1 asked, 1 written, 0 failed\n" in out
    assert "set aside" not in out
    assert re.search(r"^T 0\.7 +1 answer; ", out, re.MULTILINE)


def test_only_the_shards_of_the_chosen_answers_are_read(made_run, capsys):
    folder = made_run.answers("responses", list(map(question, range(20))), lambda q: "Yes.")
    whole = look(made_run, "responses", capsys, "--rows", "2")
    files = set(re.findall(r"responses-\d+-of-00010\.jsonl", whole))
    for file in folder.glob("responses-*.jsonl"):
        if file.name not in files:
            file.unlink()
    assert look(made_run, "responses", capsys, "--rows", "2") == whole
    assert "responses-00000-of-00010.jsonl is missing" in refused(made_run, "responses")
    (folder / "responses-00000-of-00010.jsonl").write_text("{}\n")
    assert "responses-00000-of-00010.jsonl is damaged" in refused(made_run, "responses")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_dimmed_text_and_no_other_escape(made_run, capsys, monkeypatch):
    made_run.rows("text", [row(made_run.tokenizer, f"a{HOSTILE}b", answers_from=2)])
    made_run.answers("responses", [HOSTILE, Rejected(HOSTILE, HOSTILE)], lambda q: HOSTILE, temperatures=(0.0,))
    made_run.answers("failed", ["a", HOSTILE], lambda q: {"error": HOSTILE} if q.prompt.id == "1" else "b")
    for name in ("text", "responses", "failed"):
        plain = look(made_run, name, capsys, "--rows", "9")
        assert not re.search(r"[^\n\t -~‹›]", plain)
        assert r"\x1b[2J\x9b31m\r\u202e<b>bold</b>\u2028\x00" in plain
        monkeypatch.setattr(sys, "stdout", Terminal())
        inspect_stage(open_home(made_run.folder, None), name, 9, 0)
        shown = sys.stdout.getvalue()
        monkeypatch.undo()
        dimmed = re.sub("\x1b\\[2m([^\x1b]*)\x1b\\[0m", r"‹\1›", shown).replace("stand dimmed", "stand between ‹ and ›")
        assert dimmed == plain != shown


def test_printable():
    assert printable("café 中文\u3000‹γ›") == "café 中文\u3000‹γ›"
    assert printable("a\n\tb\x7f\ud800", keep="\n\t") == "a\n\tb\\x7f\\ud800"


@pytest.mark.parametrize(
    "name, words",
    {
        "tex": r"no stage 'tex': did you mean 'text'\? There are: tokenizer, text, later, half, distill",
        "distill": "distill is a Train stage, which makes no rows and no answers; stages that do: text, later, half",
        "later": "later has not run yet: `jaxdraft run`",
        "half": r"half is not done \(running\)",
    }.items(),
)
def test_what_cannot_be_shown_is_said(made_run, name, words):
    made_run.rows("text", [row(made_run.tokenizer, "text")])
    made_run.plan("later", "Generate")
    made_run.record("half", "Generate", status="running")
    made_run.record("distill", "Train")
    assert re.search(words, refused(made_run, name))


def test_damage_and_another_tokenizer_are_named(made_run, tmp_path):
    folder = made_run.rows("text", [row(made_run.tokenizer, "text")])
    shard = folder / "rows-00000.array_record"
    content = bytearray(shard.read_bytes())
    content[content.index(np.array(made_run.tokenizer.encode("text"), "<u2").tobytes())] ^= 1
    shard.write_bytes(content)
    assert "row 0 is damaged" in refused(made_run, "text")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": "another"}))
    assert "was made with another tokenizer" in refused(made_run, "text")
    (folder / "manifest.json").unlink()
    assert "manifest.json: missing, so" in refused(made_run, "text")
    with pytest.raises(ConfigError, match=r"is not a run directory: it has no recipe\.json"):
        inspect_stage(open_home(tmp_path / "nowhere", None), "text", 3, 0)


def test_a_shard_outside_the_folder_is_refused(made_run):
    folder = made_run.answers("responses", [question(1)], lambda q: "Yes.")
    account = json.loads((folder / "answers.json").read_text())
    account["shards"][0]["file"] = "../../secret.jsonl"
    (folder / "answers.json").write_text(json.dumps(account))
    assert "'../../secret.jsonl' is not a file of this folder" in refused(made_run, "responses")


def test_the_tokenizer_of_a_target_s_folder(made_run, capsys):
    made_run.rows("text", [row(made_run.tokenizer, "text")])
    path = made_run.folder / "recipe.json"
    target = {"type": "HFModel", "path": str(made_run.tokenizer.folder), "revision": None}
    for given in ({"target": target, "tokenizer": None}, {"tokenizer": target}):
        path.write_text(json.dumps(json.loads(path.read_text()) | given))
        assert "‹<s>›text" in look(made_run, "text", capsys)


def test_rows_and_seed_belong_to_a_stage(made_run, capsys):
    assert main(["inspect", str(made_run.folder), "--rows", "3"]) == 2
    assert "name the stage with --stage" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, told", [("[]", "not an object"), ("{}", "no 'format'"), ("\\xff", "Expecting value")]
)
def test_a_manifest_that_lacks_something_is_named(made_run, content, told):
    made_run.rows("text", [row(made_run.tokenizer, "text")])
    (made_run.folder / "text" / "manifest.json").write_text(content)
    assert f"manifest.json is damaged ({told}" in refused(made_run, "text")
