"""Text to rows and rows to samples: the same bytes however many make them and however often they are stopped."""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxdraft import prepare
from jaxdraft.data import chunks
from jaxdraft.data.conversations import Conversation, labelled
from jaxdraft.data.pipeline import sample
from jaxdraft.data.prompts import PromptList
from jaxdraft.data.quarantine import Rejected
from jaxdraft.data.records import PackedRows, write_rows
from jaxdraft.data.sources import Text
from jaxdraft.data.stdlib import PythonLibrary
from jaxdraft.errors import ConfigError
from jaxdraft.files import sha256
from jaxdraft.recipe import HFModel, Prepare, Subset
from jaxdraft.run import plan_all, run
from jaxdraft.tokenizers import ChatTemplateError, load_tokenizer
from tests.distributed import layouts
from tests.tiny_recipe import recipe as tiny

LENGTH = 64


def recipe(*stages):
    """The tiny recipe's tokenizer, these stages, and a target that is never trained."""
    whole = tiny()
    tokenizer, target = whole.stage("tokenizer"), whole.stage("target")
    return dataclasses.replace(whole, stages=(tokenizer, *stages, dataclasses.replace(target, data=stages[0].name)))


def corpus(path, **settings):
    return Prepare("corpus", sources=(Text(str(path)),), length=LENGTH, **settings)


@pytest.fixture(scope="module")
def texts():
    return list(PythonLibrary("text", limit=200).documents())


@pytest.fixture(scope="module")
def begun(tmp_path_factory, texts):
    """A run directory with a tokenizer, and a file of documents beside it."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(recipe(corpus(folder / "text.jsonl")), folder / "run", only=["tokenizer"])
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / "own"))


@pytest.fixture
def small_units(monkeypatch):
    """Units of about 8000 characters: the file is some 20 of them."""
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 2000)
    monkeypatch.setattr(chunks, "UNIT_CHUNKS", 4)


def prepared(folder, *stages, only=None):
    run(recipe(*stages), folder / "run", only=only or [stage.name for stage in stages])
    return PackedRows(folder / "run" / stages[-1].name)


def files(folder, stage="corpus"):
    """What a stage made, but for what tells the time."""
    place = folder / "run" / stage
    names = sorted(path.name for path in place.iterdir() if path.name not in ("stage.json", "timing.jsonl"))
    return {name: (place / name).read_bytes() for name in names}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "run" / "corpus").glob("rows-*")}


def stacked(rows):
    return {key: np.stack([rows[i][key] for i in range(len(rows))]) for key in rows[0]}


def segments(rows):
    """Tokens and mask of each."""
    found = []
    for i in range(len(rows)):
        row = rows[i]
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            place = row["segment_ids"] == segment
            found.append((row["tokens"][place].tolist(), row["loss_mask"][place].tolist()))
    return found


def test_any_number_of_workers_gives_the_same_bytes(folder, small_units):
    found = {}
    for workers in (1, 2, 4, None):
        shutil.rmtree(folder / "run" / "corpus", ignore_errors=True)
        prepared(folder, corpus(folder / "text.jsonl", workers=workers))
        found[workers] = files(folder)
    assert len(found[1]) > 10
    assert found[1] == found[2] == found[4] == found[None]
    prepared(folder, corpus(folder / "text.jsonl", workers=3))
    assert plan_all(recipe(corpus(folder / "text.jsonl", workers=3)), folder / "run")[1].state == "done"


def test_the_rows_are_the_texts_cut_in_each_unit(folder, small_units, texts):
    rows = prepared(folder, corpus(folder / "text.jsonl"))
    tokenizer = load_tokenizer(folder / "run" / "tokenizer")
    units = itertools.groupby(
        chunks.chunks([Text(str(folder / "text.jsonl"))], chunks.Documents(tokenizer, LENGTH, True)),
        lambda chunk: chunk.unit,
    )
    expected, dropped = [], 0
    for _, unit in units:
        stream = [t for chunk in unit for text in chunk.items for t in [*tokenizer.encode(text), tokenizer.eos_id]]
        kept = len(stream) // LENGTH * LENGTH
        expected += stream[:kept]
        dropped += len(stream) - kept
    assert stacked(rows)["tokens"].ravel().tolist() == expected
    assert rows.manifest["counts"] == {
        "documents": len(texts),
        "tokens": len(expected) + dropped,
        "dropped_tokens": dropped,
    }


def test_a_unit_of_long_documents_has_fewer_of_them(monkeypatch):
    """A unit is held in memory, so its characters are bounded and not only its chunks."""
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(chunks, "UNIT_CHUNKS", 8)
    monkeypatch.setattr(chunks, "UNIT_CHARACTERS", 2000)

    @dataclasses.dataclass(frozen=True)
    class Lengths:
        of: tuple[int, ...]

        def documents(self):
            return iter(["x" * length for length in self.of])

    form = chunks.Documents(None, LENGTH, True)
    units = lambda *lengths: [chunk.unit for chunk in chunks.chunks([Lengths(lengths)], form)]
    assert units(*[100] * 17) == [0] * 8 + [1] * 8 + [2]
    assert units(*[1000] * 5) == [0, 0, 1, 1, 2]
    assert units(5000, 100, 5000, 100) == [0, 1, 1, 2]


def test_a_run_that_was_killed_goes_on_where_it_was(folder, small_units):
    stage = corpus(folder / "text.jsonl")
    prepared(folder, stage)
    undisturbed = files(folder)
    shutil.rmtree(folder / "run" / "corpus")
    program = KILLED.format(recipe=repr(str(folder / "text.jsonl")), workdir=repr(str(folder / "run")))
    made = 0
    while made < 3:
        killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert len(times(folder)) // 2 > made, killed.stderr
        made = len(times(folder)) // 2
    before = times(folder)
    prepared(folder, stage)
    assert files(folder) == undisturbed
    after = times(folder)
    assert {name: after[name] for name in before if not name.endswith(".tmp")} == {
        name: time for name, time in before.items() if not name.endswith(".tmp")
    }


# Killed as it writes its second unit of this run.
KILLED = """
import os, signal
from jaxdraft import prepare
from jaxdraft.data import chunks
from jaxdraft.run import run
from tests.test_prepare import corpus, recipe
chunks.CHUNK_CHARACTERS, chunks.UNIT_CHUNKS = 2000, 4
shards, whole = [], prepare.write_shard
def write_shard(path, blocks, format):
    shards.append(path)
    if len(shards) == 2:
        path.with_name(path.name + ".tmp").write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(path, blocks, format)
prepare.write_shard = write_shard
run(recipe(corpus({recipe})), {workdir}, only=["corpus"])
"""


def test_a_damaged_unit_is_named_and_made_anew(folder, small_units, capsys):
    stage = corpus(folder / "text.jsonl")
    prepared(folder, stage)
    whole, before = files(folder), times(folder)
    shard = folder / "run" / "corpus" / "rows-00002.array_record"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (folder / "run" / "corpus" / "rows-00004.json").write_text("{")
    (folder / "run" / "corpus" / "manifest.json").unlink()
    prepared(folder, stage)
    assert "rows-00002.array_record is damaged: it is made anew" in capsys.readouterr().err
    assert files(folder) == whole
    changed = {name for name, time in times(folder).items() if before[name] != time}
    assert changed == {f"rows-0000{i}.{suffix}" for i in (2, 4) for suffix in ("array_record", "json")}


@pytest.mark.parametrize(
    "damage", ["[]", "{}", '{"shard": {}, "counts": {"tokens": 1}}', '{"shard": null, "counts": []}']
)
def test_a_record_that_lacks_something_is_made_anew(folder, small_units, damage):
    prepared(folder, corpus(folder / "text.jsonl"))
    whole, made = files(folder), folder / "run" / "corpus"
    path = made / "rows-00001.json"
    damaged = json.loads(damage)
    path.write_text(json.dumps({**damaged, "text": json.loads(path.read_text())["text"]} if damaged else damaged))
    (made / "manifest.json").unlink()
    prepared(folder, corpus(folder / "text.jsonl"))
    assert files(folder) == whole


def test_a_record_with_another_number_is_made_anew(folder, small_units):
    prepared(folder, corpus(folder / "text.jsonl"))
    whole, made = files(folder), folder / "run" / "corpus"
    path = made / "rows-00001.json"
    record = json.loads(path.read_text())
    record["shard"]["labels"] += 1024
    path.write_text(json.dumps(record, indent=2) + "\n")
    (made / "manifest.json").unlink()
    prepared(folder, corpus(folder / "text.jsonl"))
    assert files(folder) == whole


@pytest.mark.parametrize("rows", [1, 40, 200])
def test_a_budget_is_kept_exactly(folder, small_units, rows):
    whole = stacked(prepared(folder, corpus(folder / "text.jsonl")))
    shutil.rmtree(folder / "run" / "corpus")
    some = prepared(folder, corpus(folder / "text.jsonl", tokens=rows * LENGTH + LENGTH - 1))
    assert len(some) == rows
    for key, values in stacked(some).items():
        assert (values == whole[key][:rows]).all()
    assert some.manifest["tokens"] == rows * LENGTH


def test_a_budget_that_ends_with_a_unit_found_again_is_counted_as_in_one_go(folder, small_units):
    """A unit made for a larger budget was read to its end, and what followed its last row is no part of this one's."""
    whole = corpus(folder / "text.jsonl")
    shards = prepared(folder, whole).manifest["shards"]
    rows = sum(shard["rows"] for shard in shards[:3])
    record = folder / "run" / "corpus" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    stage = corpus(folder / "text.jsonl", tokens=rows * LENGTH)
    prepared(folder, stage)
    resumed = files(folder)
    shutil.rmtree(folder / "run" / "corpus")
    prepared(folder, stage)
    assert resumed == files(folder)


def test_too_little_text_for_a_budget_is_told(folder, capsys):
    rows = prepared(folder, corpus(folder / "text.jsonl", tokens=5e9))
    assert f"the text ends after {len(rows) * LENGTH:,} tokens of 5,000,000,000" in capsys.readouterr().err
    summary = json.loads((folder / "run" / "corpus" / "stage.json").read_text())["summary"]
    assert summary["of the tokens asked for"] == "0.0%"
    assert summary["tokens per second"] > 0


@pytest.mark.parametrize("tokens", [1.5, 63, -1, 0, float("inf"), float("nan")])
def test_a_budget_is_a_whole_number_of_tokens(tokens):
    with pytest.raises(ConfigError, match="corpus: tokens is"):
        Prepare("corpus", sources=(), length=LENGTH, tokens=tokens)


def test_a_budget_is_the_same_however_it_is_spelled():
    assert Prepare("a", sources=(), length=2, tokens=5e9) == Prepare("a", sources=(), length=2, tokens=5_000_000_000)


def test_without_segments_a_row_is_one_text(folder, small_units):
    apart = stacked(prepared(folder, corpus(folder / "text.jsonl")))
    joined = stacked(prepared(folder, corpus(folder / "text.jsonl", segments=False)))
    assert (apart["tokens"] == joined["tokens"]).all()
    assert (joined["segment_ids"] == 1).all()
    assert (joined["loss_mask"].sum(axis=1) == LENGTH - 1).all()
    assert apart["segment_ids"].max() > 1


@dataclasses.dataclass(frozen=True)
class Patchy:
    """Every third document does not fit."""

    path: str

    def documents(self):
        for number, line in enumerate(Path(self.path).read_text().splitlines()):
            yield Rejected(f"line {number}", f"reason {number % 2}") if number % 3 == 0 else json.loads(line)["text"]

    def fingerprint(self):
        return "the same"


def test_a_source_that_gives_nothing_is_named_wherever_it_stands(folder):
    (folder / "wrong.jsonl").write_text('{"content": "x"}\n' * 20_000)
    sources = [Text(str(folder / name)) for name in ("text.jsonl", "wrong.jsonl")]
    for order in (sources, sources[::-1]):
        stage = Prepare("corpus", sources=tuple(order), length=LENGTH)
        with pytest.raises(ConfigError, match=r"wrong.jsonl: line 1 .*no field 'text'; not one of 10,000 rows fits"):
            prepared(folder, stage)


def test_text_shorter_than_a_row_is_called_that(folder):
    (folder / "short.jsonl").write_text('{"text": ""}\n{"text": "word"}\n')
    with pytest.raises(ConfigError, match="fewer tokens than one row"):
        prepared(folder, corpus(folder / "short.jsonl"))


@pytest.mark.parametrize("tokens", [None, 200 * LENGTH])
def test_what_does_not_fit_is_counted_and_written_down(folder, small_units, tokens):
    stage = Prepare("corpus", sources=(Patchy(str(folder / "text.jsonl")),), length=LENGTH, tokens=tokens)
    found = []
    for workers in (1, 4):
        rows = prepared(folder, dataclasses.replace(stage, workers=workers))
        found.append(files(folder))
        lines = [json.loads(line) for line in found[-1]["quarantine.jsonl"].splitlines()]
        counts = rows.manifest["quarantined"]
        assert [line["where"] for line in lines] == [f"line {3 * i}" for i in range(len(lines))]
        assert counts.keys() == {"reason 0", "reason 1"}
        assert sum(counts.values()) == len(lines)
        record = json.loads((folder / "run" / "corpus" / "stage.json").read_text())
        assert record["summary"]["set aside"] == len(lines)
        assert "quarantine.jsonl" in record["outputs"]
        shutil.rmtree(folder / "run" / "corpus")
    assert found[0] == found[1]
    if tokens is None:
        documents = len((folder / "text.jsonl").read_text().splitlines())
        assert len(lines) == -(-documents // 3)
        assert rows.manifest["counts"]["documents"] == documents - len(lines)


def test_a_truncated_file_costs_nothing_that_was_made(folder, small_units, texts, capsys):
    sources = folder / "parquet"
    sources.mkdir()
    parts = np.array_split(np.array(texts, object), 3)
    for i, part in enumerate(parts):
        pyarrow.parquet.write_table(pyarrow.table({"text": list(part)}), sources / f"{i}.parquet")
    stage = corpus(sources)
    prepared(folder, stage)
    undisturbed = files(folder)
    shutil.rmtree(folder / "run" / "corpus")
    middle = sources / "1.parquet"
    content = middle.read_bytes()
    middle.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"1\.parquet"):
        prepared(folder, stage)
    made = times(folder)
    assert len(made) > 4
    middle.write_bytes(content)
    prepared(folder, stage)
    assert files(folder) == undisturbed
    after = times(folder)
    assert {name: after[name] for name in made} == made
    assert not (folder / "run" / "superseded").exists()


def test_a_finished_stage_that_changes_is_set_aside(folder, small_units):
    prepared(folder, corpus(folder / "text.jsonl"))
    prepared(folder, corpus(folder / "text.jsonl", tokens=640))
    assert (folder / "run" / "superseded" / "corpus.1" / "manifest.json").exists()


def test_units_of_a_longer_text_do_not_stay(folder, small_units, texts, monkeypatch):
    def stopped(*arguments, **settings):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_manifest", stopped)
        with pytest.raises(OSError, match="disk full"):
            prepared(folder, corpus(folder / "text.jsonl"))
    prepared(folder, corpus(folder / "text.jsonl", tokens=10 * LENGTH))
    assert files(folder).keys() == {"manifest.json", "rows-00000.array_record", "rows-00000.json"}


def test_samples_nest(folder, small_units):
    stages = [Subset(f"of-{rows}", data="corpus", tokens=rows * LENGTH + 1) for rows in (5, 50, 100)]
    everything = {row.tobytes() for row in stacked(prepared(folder, corpus(folder / "text.jsonl")))["tokens"]}
    samples = []
    for stage in stages:
        rows = prepared(folder, corpus(folder / "text.jsonl"), stage)
        samples.append({row.tobytes() for row in stacked(rows)["tokens"]})
        assert rows.manifest["source"] == PackedRows(folder / "run" / "corpus").manifest["source"]
    assert [len(sample) for sample in samples] == [5, 50, 100]
    assert samples[0] < samples[1] < samples[2] < everything
    with pytest.raises(ConfigError, match="take fewer"):
        prepared(folder, corpus(folder / "text.jsonl"), Subset("more", data="corpus", tokens=1e9))


@pytest.mark.parametrize("tokens, limits", [(63, "at least a row, 64"), (1001, "at most 1,000")])
def test_a_sample_has_a_row_and_is_no_larger_than_the_budget(tokens, limits):
    with pytest.raises(ConfigError, match=f"part: tokens is .*{limits}"):
        recipe(corpus("text.jsonl", tokens=1000), Subset("part", data="corpus", tokens=tokens))


def test_a_sample_keeps_what_is_stored_of_the_target(folder):
    """Rows with stored logits as a Score stage leaves them, but without its target."""
    stored = {"k": 2, "temperature": 1.0, "target": "hash", "vocabulary": 400}
    tokenizer = load_tokenizer(folder / "run" / "tokenizer")
    plain = prepared(folder, corpus(folder / "text.jsonl", tokens=20 * LENGTH))
    rng = np.random.default_rng(0)
    columns = {"target_ids": (LENGTH, 2), "target_log_probs": (LENGTH, 4)}
    rows = [{**plain[i], **{name: rng.integers(0, 400, shape) for name, shape in columns.items()}} for i in range(20)]
    made = folder / "run" / "corpus"
    settings = {"length": LENGTH, "vocab_size": tokenizer.vocab_size, "source": {"settings": []}}
    write_rows(made, iter(rows), tokenizer_fingerprint=tokenizer.fingerprint(), target_logits=stored, **settings)
    record = json.loads((made / "stage.json").read_text())
    record["outputs"] = {name: sha256(made / name) for name in record["outputs"]}
    (made / "stage.json").write_text(json.dumps(record))
    stage = Subset("part", data="corpus", tokens=7 * LENGTH)
    part = prepared(folder, corpus(folder / "text.jsonl", tokens=20 * LENGTH), stage)
    assert part.manifest["target_logits"] == stored
    for i, chosen in enumerate(sample(20, 7, 0, "corpus")):
        assert all((part[i][name] == rows[chosen][name]).all() for name in rows[chosen])


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """A hundred conversations, of which every tenth is of no use."""

    def conversations(self):
        for i in range(100):
            turns = [("user", f"What is {i} + {i}?"), ("assistant", f"It is {2 * i}." * (i % 5 + 1))]
            turns += [("user", "And now?"), ("assistant", "The same.")] if i % 3 else []
            turns = turns[1:] if i % 10 == 9 else turns
            yield Conversation(str(i), tuple({"role": role, "content": content} for role, content in turns))

    def fingerprint(self):
        return "the same"


@pytest.mark.parametrize("labels", ["assistant", "all"])
def test_conversations_stay_whole(shared_data, tmp_path, small_units, labels):
    phi = HFModel(str(shared_data / "tokenizers" / "phi3-mini"))
    stage = Prepare("corpus", sources=(Dialogues(),), length=LENGTH, labels=labels)
    whole = recipe(stage)
    target = whole.stage("target")
    target = dataclasses.replace(target, model=dataclasses.replace(target.model, eos_ids=(32007, 32000)))
    whole = dataclasses.replace(whole, tokenizer=phi, stages=(stage, target))
    for name in ("one", "two"):
        run(whole, tmp_path / name / "run", only=["corpus"])
        whole = dataclasses.replace(whole, stages=(dataclasses.replace(stage, workers=1), target))
    assert files(tmp_path / "one") == files(tmp_path / "two")

    tokenizer, rows = load_tokenizer(phi.path), PackedRows(tmp_path / "one" / "run" / "corpus")
    expected, refused = [], 0
    for conversation in Dialogues().conversations():
        try:
            expected.append(labelled(tokenizer, conversation.messages, labels, eos_ids=(32007, 32000)))
        except ChatTemplateError:
            refused += 1
    assert sorted(segments(rows)) == sorted((tokens, [0, *mask[1:]]) for tokens, mask in expected)
    assert rows.manifest["counts"]["examples"] == len(expected)
    assert sum(rows.manifest.get("quarantined", {}).values()) == refused == (10 if labels == "assistant" else 0)


ASKED = [
    {"id": "one", "prompt": "Name a fruit:", "reference": " an apple"},
    {"id": "merged", "prompt": "tell me the sto", "reference": "ry of a long walk " * 3},
    {"id": "none", "prompt": "Name a colour:"},
    {"id": "two", "prompt": "### Input:\ndef f(x):\n", "reference": "    return x + 1\n"},
    {"id": "cut", "prompt": "Count:", "reference": " one two three four five" * 20},
    {"id": "long", "prompt": "one two three four five " * 20, "reference": "six"},
]


def test_prompts_with_references_are_rows_of_their_answers(folder, small_units):
    many = [{**row, "id": f"{row['id']}-{i}"} for i in range(20) for row in ASKED]
    rejected_last = [{"id": f"last-{i}", "prompt": "Name one more:"} for i in range(9)]
    stage = Prepare("corpus", sources=(PromptList([*many, *rejected_last]),), length=LENGTH, labels="references")
    rows = prepared(folder, stage)
    tokenizer = load_tokenizer(folder / "run" / "tokenizer")
    expected, merged = [], []
    for row in ASKED:
        if "reference" in row and row["id"] != "long":
            asked, whole = tokenizer.encode(row["prompt"]), tokenizer.encode(row["prompt"] + row["reference"])
            if whole[: len(asked)] != asked:
                merged.append(row["id"])
            known = len(asked) - (whole[: len(asked)] != asked)
            assert whole[:known] == asked[:known]
            tokens, mask = [*whole, tokenizer.eos_id], [0] * known + [1] * (len(whole) - known + 1)
            expected.append((tokens[:LENGTH], mask[:LENGTH]))
    assert merged == ["merged"]
    assert sorted(segments(rows)) == sorted(20 * expected)
    assert rows.manifest["quarantined"] == {"no reference": 29, f"it fills a row of {LENGTH} tokens": 20}
    assert rows.manifest["counts"]["cut_answers"] == 20
    assert len(rows.manifest["shards"]) > 1


def test_a_prompt_whose_tokens_are_not_its_texts_has_no_known_answer(shared_data):
    """Its answer would begin at a token that stands elsewhere in what is encoded."""
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama2")
    ids = tokenizer.encode("Name a fruit:")
    asked = [{"tokens": ids, "reference": " pear"}, {"tokens": ids[1:], "reference": " pear"}]
    form = chunks.References(tokenizer, LENGTH)
    whole, without_bos = PromptList(asked).prompts(tokenizer)
    part = form.encode([whole, without_bos])
    (example,) = part.content
    assert example["loss_mask"] == [0] * len(ids) + [1] * (len(example["tokens"]) - len(ids))
    assert part.rejected == [Rejected("prompt 2", "its tokens are not those of its text")]
    assert form.text(whole) != form.text(dataclasses.replace(without_bos, id=whole.id))
    assert form.encode([]) == chunks.Part(0, [])


def test_a_conversation_is_no_prompt_with_a_reference(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "phi3-mini")
    asked = PromptList([{"messages": [{"role": "user", "content": "Hello"}], "reference": "Hi"}])
    (found,) = chunks.References(tokenizer, LENGTH).read(asked)
    assert found == Rejected("prompt 1", "a conversation: give its answer too, and labels='assistant'")


def test_another_chat_template_makes_all_conversations_anew(shared_data, tmp_path, small_units):
    """Whether the stage was done, or stopped half way: units in the words of two templates must not meet."""
    folder = Path(shutil.copytree(shared_data / "tokenizers" / "phi3-mini", tmp_path / "phi"))
    stage = Prepare("corpus", sources=(Dialogues(),), length=LENGTH, labels="assistant")
    whole = recipe(stage)
    target = whole.stage("target")
    target = dataclasses.replace(target, model=dataclasses.replace(target.model, eos_ids=(32007, 32000)))
    whole = dataclasses.replace(whole, tokenizer=HFModel(str(folder)), stages=(stage, target))
    run(whole, tmp_path / "run", only=["corpus"])
    shutil.copytree(tmp_path / "run", tmp_path / "half" / "run")

    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings["chat_template"] = settings["chat_template"].replace("<|user|>\n", "<|user|>\n> ")
    config.write_text(json.dumps(settings))
    assert "input chat template has changed" in plan_all(whole, tmp_path / "run")[0].reason
    run(whole, tmp_path / "run", only=["corpus"])

    record = tmp_path / "half" / "run" / "corpus" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    run(whole, tmp_path / "half" / "run", only=["corpus"])
    assert files(tmp_path / "half") == files(tmp_path)


@pytest.mark.parametrize("answer", [{"role": "assistant"}, {"content": "a"}, {"role": "assistant", "content": None}])
def test_a_message_without_a_role_or_text_is_refused(shared_data, answer):
    """A source of one's own may give anything: one bad conversation must not end a process that others wait for."""
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "phi3-mini")
    form = chunks.Conversations(tokenizer, LENGTH, "assistant", (32007,))
    part = form.encode([Conversation("a", ({"role": "user", "content": "q"}, answer))])
    assert [(row.where, row.reason[:15]) for row in part.rejected] == [("conversation a", "a message lacks")]


def test_units_of_another_chat_template_are_made_anew(shared_data, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(shared_data / "tokenizers" / "phi3-mini", folder, copy_function=shutil.copyfile)
    before = chunks.Conversations(load_tokenizer(folder), 64, "all", (32000,)).settings
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert chunks.Conversations(load_tokenizer(folder), 64, "all", (32000,)).settings != before


def test_conversations_are_asked_for_where_there_are_some():
    with pytest.raises(ConfigError, match=r"corpus: Text has no conversations\(\): leave labels out or another"):
        corpus("text.jsonl", labels="assistant")
    with pytest.raises(ConfigError, match=r"corpus: Dialogues has no documents\(\): labels='assistant' or"):
        Prepare("corpus", sources=(Dialogues(),), length=LENGTH)
    with pytest.raises(ConfigError, match=r"corpus: PromptList has no documents\(\): labels='references' or another"):
        Prepare("corpus", sources=(PromptList(ASKED),), length=LENGTH)
    with pytest.raises(ConfigError, match="labels is 'reference': it must be one of None, 'assistant', 'all', 'refe"):
        Prepare("corpus", sources=(PromptList(ASKED),), length=LENGTH, labels="reference")
    with pytest.raises(ConfigError, match="segments is False"):
        Prepare("corpus", sources=(Dialogues(),), length=LENGTH, labels="all", segments=False)


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(folder, tmp_path, small_units):
    text = str(folder / "text.jsonl")
    units = prepared(folder, Prepare("corpus", sources=(Patchy(text),), length=LENGTH)).manifest["shards"]
    shutil.rmtree(folder / "run" / "corpus")
    recipe_file = tmp_path / "recipe.py"
    recipe_file.write_text(PROCESSES.format(path=text, two_units=units[0]["rows"] + units[1]["rows"]))
    found = []
    for processes in (1, 2):
        own = tmp_path / str(processes)
        shutil.copytree(folder / "run", own / "run")
        layouts.run(recipe_file, own / "run", processes, 1, "--only", *NAMES)
        found.append({name: files(own, name) for name in NAMES})
    assert found[0] == found[1]


NAMES = ("all", "some", "two-units", "few", "too-many", "of-all")
PROCESSES = """
import dataclasses
from jaxdraft.data import chunks
from jaxdraft.recipe import Subset
from tests.test_prepare import LENGTH, Patchy, corpus, recipe as with_tokenizer
chunks.CHUNK_CHARACTERS, chunks.UNIT_CHUNKS = 2000, 4

def recipe():
    rows = {{"some": 150, "two-units": {two_units}, "few": 7}}
    budgets = {{"all": None, **{{name: count * LENGTH for name, count in rows.items()}}, "too-many": 1e9}}
    source = Patchy({path!r})
    text = corpus({path!r})
    stages = [dataclasses.replace(text, name=name, sources=(source,), tokens=n) for name, n in budgets.items()]
    return with_tokenizer(*stages, Subset("of-all", data="all", tokens=100 * LENGTH))
"""
