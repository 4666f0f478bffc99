import gzip
import hashlib
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from jaxdraft.data.quarantine import Rejected
from jaxdraft.data.readers import tf_example
from jaxdraft.data.sources import Text
from jaxdraft.errors import ConfigError

TEXTS = ["One.\n\nTwo paragraphs, naïve.", "def f():\n    return 1\n", "last"]


def documents(path, **settings) -> list[str]:
    return list(Text(str(path), **settings).documents())


def read_or_named(path) -> list[str] | None:
    """The documents, or None where a ConfigError names the file."""
    try:
        return documents(path)
    except ConfigError as error:
        return None if path.name in str(error) else [str(error)]


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
    assert split[:3] == ["  one\r\n\n two", Rejected(f"{path}: document 1", "blank"), "three" + "y" * 1000]
    assert split[3:] == ["y" * 1000] * 2999
    assert documents(path, separator="<|end|>", limit=2) == split[:3]


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
    "name, content, rejected",
    [
        ("x.jsonl", b'{"text": "a"}\n{"body": "b", "n": 1}', ("line 2 (it has body, n)", "no field 'text'")),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": 3}', ("line 3", "field 'text' is int, not text")),
        ("x.jsonl", b'{"text": "a"}\n{"text": " \\n"}', ("line 2", "blank")),
        ("x.jsonl", b'["a"]\n{"text": "a"}', ("line 1 (list)", "not an object")),
        ("x.jsonl", b'\xff\n{"text": "a"}', ("line 1", "not UTF-8")),
        ("x.jsonl", b'{"text": "\\ud83d"}\n{"text": "a"}', ("line 1", "field 'text' is not Unicode text")),
        ("x.json", b'{"text": "a"}\n{}', ("line 2 (it has )", "no field 'text'")),
        ("x.json", b'[{"text": "a"}, {"text": null}]', ("row 1", "field 'text' is NoneType, not text")),
    ],
)
def test_a_row_that_does_not_fit_is_rejected(tmp_path, name, content, rejected):
    path = tmp_path / name
    path.write_bytes(content)
    where, reason = rejected
    assert [item for item in documents(path) if item != "a"] == [Rejected(f"{path}: {where}", reason)]
    assert documents(path).count("a") == 1


def test_a_line_that_is_not_json_is_rejected(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text"\n{"text": "b"}')
    first, bad, last = documents(path)
    assert (first, last, bad.reason) == ("a", "b", "not JSON")
    assert bad.where.startswith(f"{path}: line 2 (Expecting ':' delimiter")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.json", b"[{]", r"x\.json: cannot be read"),
        ("x.txt", b"\xff\xfe", r"x\.txt: cannot be read"),
        ("x.txt.gz", b"not gzip", r"x\.txt\.gz: cannot be read"),
        ("x.txt.gz", gzip.compress(b"cut off" * 99, mtime=0)[:-9], r"x\.txt\.gz: cannot be read"),
        ("x.jsonl.gz", b"", r"x\.jsonl\.gz: cannot be read \(not gzip: it is empty\)"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99999, mtime=0)[:-4], r"cannot be read after 99,\d{3} rows"),
        ("x.parquet", b"not parquet", r"x\.parquet: cannot be read"),
        ("x.array_record", b"not an array record", r"x\.array_record: cannot be read"),
        ("x.array_record", b"", r"x\.array_record: cannot be read"),
        ("x.csv", b"", r"x\.csv: unknown suffix; known are \.txt \.jsonl"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        documents(tmp_path / name)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_flipped_bits_and_missing_ends_do_not_pass(tmp_path, compression):
    """What the format can see: Parquet with page checksums, ArrayRecord and gzip always."""
    texts = [f"document {i}: " + hashlib.sha256(b"%d" % i).hexdigest() * 4 for i in range(400)]
    parquet, records, packed = tmp_path / "a.parquet", tmp_path / "b.array_record", tmp_path / "c.jsonl.gz"
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, parquet, compression=compression, write_page_checksum=True, row_group_size=100)
    write_array_record(records, [text.encode() for text in texts])
    packed.write_bytes(gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode()))
    rng = np.random.default_rng(0)
    for path in (parquet, records, packed):
        assert documents(path) == texts
        content = path.read_bytes()
        for place in rng.integers(len(content), size=25):
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            # What is not seen is in padding, or in metadata that nothing depends on.
            assert read_or_named(path) in (None, texts)
        for end in (len(content) - 1, len(content) // 2, 5, 0):
            path.write_bytes(content[:end])
            with pytest.raises(ConfigError, match=path.name):
                documents(path)


def test_missing_columns_and_files(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"d\.parquet has none of the columns body; it has id, text"):
        documents(folder / "d.parquet", field="body")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}]), tmp_path / "n.parquet")
    where = f"{tmp_path}/n.parquet: row 1"
    assert documents(tmp_path / "n.parquet") == ["a", Rejected(where, "field 'text' is NoneType, not text")]
    with pytest.raises(ConfigError, match="no such file"):
        documents(tmp_path / "nowhere" / "*.txt")


def test_example_records_without_the_field_are_rejected(shared_data):
    items = documents(shared_data / "corpora" / "c4_arrayrecord", field="body")
    assert {item.reason for item in items} == {"no field 'body'"}
    assert "row 0 (it has content-length" in items[0].where


def test_fingerprint_follows_the_content(folder):
    source = Text(str(folder))
    before = source.fingerprint()
    assert source.fingerprint() == before
    (folder / "notes.md").write_text("still not data")
    assert source.fingerprint() == before
    (folder / "a.jsonl").write_text('{"text": "changed"}')
    assert source.fingerprint() != before


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", b"text"),
        ("a.jsonl", b'{"text": "text"}\n'),
        ("a.json", b'[{"text": "text"}]'),
        ("b.json", b'{"text": "text"}'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(BOM + content)
    assert list(Text(str(tmp_path / name)).documents()) == ["text"]


def test_a_line_that_is_nested_too_deeply_costs_no_other(tmp_path):
    deep = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{deep}\n{{"text": "three"}}\n')
    items = list(Text(str(tmp_path / "a.jsonl")).documents())
    assert items == ["one", Rejected(f"{tmp_path}/a.jsonl: line 2", "nested too deeply"), "three"]


def test_a_parquet_row_that_is_not_utf8_costs_no_other(tmp_path):
    offsets = np.array([0, 2, 4, 6], np.int32)
    texts = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"aa\xff\xfebb"))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    items = list(Text(str(tmp_path / "a.parquet")).documents())
    assert items == ["aa", Rejected(f"{tmp_path}/a.parquet: row 1", "not UTF-8"), "bb"]


def test_a_link_to_a_file_that_is_gone_is_an_error(tmp_path):
    """A hub's cache is links: a shard whose content was evicted must not be left out in silence."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "evicted")
    for place in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(ConfigError, match=r"b\.txt: cannot be read"):
            documents(place)
        with pytest.raises(OSError, match="No such file"):
            Text(str(place)).fingerprint()
