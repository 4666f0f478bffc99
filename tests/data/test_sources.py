import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from jaxdraft.data.sources import Text, tf_example
from jaxdraft.errors import ConfigError

TEXTS = ["One.\n\nTwo paragraphs, naïve.", "def f():\n    return 1\n", "last"]


def documents(path, **settings) -> list[str]:
    return list(Text(str(path), **settings).documents())


def write_array_record(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def folder(tmp_path):
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    write_array_record(tmp_path / "e.array_record", [text.encode() for text in TEXTS])
    (tmp_path / "notes.md").write_text("not data")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet", "e.array_record"])
def test_each_kind_gives_the_same_documents(folder, name):
    assert documents(folder / name) == TEXTS


def test_folder_and_glob_are_sorted(folder, monkeypatch):
    assert documents(folder) == TEXTS * 5
    assert documents(folder / "*.json*", limit=7) == (TEXTS * 3)[:7]
    monkeypatch.chdir(folder / "..")
    assert documents(f"{folder.name}/*.parquet") == documents(f"../{folder.parent.name}/{folder.name}/d.*") == TEXTS


@pytest.mark.parametrize("suffix, pack", [(".txt", bytes), (".txt.gz", gzip.compress)])
def test_plain_text(tmp_path, suffix, pack):
    path = tmp_path / f"x{suffix}"
    text = "  one\r\n\n two\n<|end|>\n\n<|end|>\nthree" + "<|end|>".join("y" * 1000 for _ in range(3000))
    path.write_bytes(pack(text.encode()))
    assert documents(path) == [text]
    split = documents(path, separator="<|end|>")
    assert split[:2] == ["  one\r\n\n two", "three" + "y" * 1000]
    assert split[2:] == ["y" * 1000] * 2999


def test_real_corpora(shared_data):
    corpora = shared_data / "corpora"
    records = documents(corpora / "c4_arrayrecord")
    assert len(records) == 1000
    assert records[0].startswith("Posted on April 12, 2018 by admin")
    shard = corpora / "c4_arrayrecord" / "c4-train.array_record-00000-of-00008"
    assert documents(shard) == records[: len(documents(shard))]
    assert len(documents(corpora / "c4_parquet")) == 200
    assert len(documents(corpora / "c4_demo.jsonl")) == 300
    assert len(documents(shared_data / "prompts" / "HumanEval.jsonl.gz", field="prompt")) == 164


def test_tf_example_is_read_as_tensorflow_writes_it(shared_data):
    shard = shared_data / "corpora" / "c4_arrayrecord" / "c4-train.array_record-00000-of-00008"
    record = array_record_module.ArrayRecordReader(str(shard), "").read([0])[0]
    assert set(tf_example(record)) == {"content-length", "content-type", "text", "timestamp", "url"}
    for foreign in (b"", b"plain text", b"\n\x05hello", record[:-1], record + b"x"):
        assert tf_example(foreign) is None


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}', r"x\.jsonl: line 2 has no field 'text'; it has \['body'\]"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}', r"x\.jsonl: line 2: field 'text' is int"),
        ("x.jsonl", b'{"text": "a"}\n{"text"', r"x\.jsonl: line 2 is not JSON"),
        ("x.jsonl", b'["a"]', r"x\.jsonl: line 1 is not an object"),
        ("x.json", b'[{"text": "a"}, {}]', r"x\.json: row 1 has no field"),
        ("x.json", b"{}", r"x\.json: not a JSON list"),
        ("x.txt", b"\xff\xfe", r"x\.txt: cannot be read"),
        ("x.txt.gz", b"not gzip", r"x\.txt\.gz: cannot be read"),
        ("x.txt.gz", gzip.compress(b"cut off" * 99, mtime=0)[:-9], r"x\.txt\.gz: cannot be read"),
        ("x.parquet", b"not parquet", r"x\.parquet: cannot be read"),
        ("x.array_record", b"not an array record", r"x\.array_record: cannot be read"),
        ("x.array_record", b"", r"x\.array_record: cannot be read"),
        ("x.csv", b"", r"x\.csv: unknown suffix; known are \.txt \.jsonl"),
    ],
)
def test_errors_name_file_and_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        documents(tmp_path / name)


def test_missing_columns_and_files(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"d\.parquet: row 0 has no field 'body'; the columns are \['id', 'text'\]"):
        documents(folder / "d.parquet", field="body")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}]), tmp_path / "n.parquet")
    with pytest.raises(ConfigError, match=r"n\.parquet: row 1: field 'text' is NoneType"):
        documents(tmp_path / "n.parquet")
    with pytest.raises(ConfigError, match="no such file"):
        documents(tmp_path / "nowhere" / "*.txt")


def test_example_record_without_the_field_is_refused(shared_data):
    with pytest.raises(ConfigError, match=r"00000-of-00008: row 0 has no field 'body'"):
        documents(shared_data / "corpora" / "c4_arrayrecord", field="body")


def test_fingerprint_follows_the_content(folder):
    source = Text(str(folder))
    before = source.fingerprint()
    assert source.fingerprint() == before
    (folder / "notes.md").write_text("still not data")
    assert source.fingerprint() == before
    (folder / "a.jsonl").write_text('{"text": "changed"}')
    assert source.fingerprint() != before
