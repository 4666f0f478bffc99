"""A data set that TFDS reads without TensorFlow: its own metadata beside ArrayRecord files of tf.Example."""

import sys

import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from jaxdraft.data.quarantine import Rejected
from jaxdraft.data.sources import TFDS, Text
from jaxdraft.errors import ConfigError


def example(row: dict[str, bytes]) -> bytes:
    """A row as a serialised tf.Example."""

    def field(number: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    features = (field(1, key.encode()) + field(2, field(1, field(1, value))) for key, value in row.items())
    return field(1, b"".join(field(1, feature) for feature in features))


def prepare(data_dir, shards, name="tiny", version="1.2.3"):
    """Shards of rows of bytes as `download_and_prepare` leaves them."""
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    for i, rows in enumerate(shards):
        path = folder / f"{name}-train.array_record-{i:05d}-of-{len(shards):05d}"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(example(row))
        writer.close()
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict({key: tfds.features.Text() for key in shards[0][0]}),
        split_infos=[tfds.core.SplitInfo("train", [len(rows) for rows in shards], 1)],
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,  # would need TensorFlow
    )
    return folder


ROWS = [[{"text": b"one", "url": b"a"}, {"text": "zw\u00f6lf".encode(), "url": b"b"}], [{"text": b"\xff", "url": b"c"}]]


def test_documents(tmp_path):
    prepare(tmp_path, ROWS)
    source = TFDS("tiny:1.2.3", data_dir=str(tmp_path))
    rejected = Rejected("tiny:1.2.3: train row 2", "field 'text' is not Unicode text")
    assert list(source.documents()) == ["one", "zw\u00f6lf", rejected]
    assert list(TFDS("tiny", "train[1:2]", "url", str(tmp_path)).documents()) == ["b"]
    assert {item.reason for item in TFDS("tiny", field="body", data_dir=str(tmp_path)).documents()} == {
        "no field 'body'"
    }
    assert source.provenance()["revision"] == "tiny/1.2.3"
    assert len(source.provenance()["files"]) == 2
    assert "tensorflow" not in sys.modules


def test_fingerprint_follows_the_content(tmp_path):
    prepare(tmp_path / "a", ROWS)
    prepare(tmp_path / "b", [ROWS[0], ROWS[0][:1]])
    first, second = (TFDS("tiny", data_dir=str(tmp_path / name)) for name in "ab")
    assert first.fingerprint() == TFDS("tiny", data_dir=str(tmp_path / "a")).fingerprint() != second.fingerprint()
    assert TFDS("tiny", "train[:2]", data_dir=str(tmp_path / "a")).fingerprint() != first.fingerprint()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "tinny"}, r"TFDS tinny, split 'train': Dataset tinny not found\. Looked in .* `tfds build tinny"),
        ({"name": "tiny", "split": "tests"}, r"split 'tests': Unknown split 'tests'"),
        ({"name": "tiny", "split": "train[x]"}, r"Error parsing split 'train\[x\]'"),
    ],
)
def test_what_is_not_prepared_is_named(tmp_path, settings, message):
    prepare(tmp_path, ROWS)
    with pytest.raises(ConfigError, match=message):
        list(TFDS(**settings, data_dir=str(tmp_path)).documents())


def test_a_damaged_shard_is_named(tmp_path):
    folder = prepare(tmp_path, ROWS)
    shard = folder / "tiny-train.array_record-00000-of-00002"
    content = bytearray(shard.read_bytes())
    content[content.index(b"one")] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"TFDS tiny, split 'train'.*Corrupted"):
        list(TFDS("tiny", data_dir=str(tmp_path)).documents())


def test_c4_as_tfds_has_it(tmp_path, shared_data):
    """The same records, read as files."""
    shards = sorted((shared_data / "corpora" / "c4_arrayrecord").iterdir())
    folder = tmp_path / "c4" / "3.1.0"
    folder.mkdir(parents=True)
    for shard in shards:
        (folder / shard.name).symlink_to(shard)
    keys = ("content-length", "content-type", "text", "timestamp", "url")
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict({key: tfds.features.Text() for key in keys}),
        split_infos=[tfds.core.SplitInfo("train", [125] * len(shards), 1)],
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
    )
    documents = list(TFDS("c4:3.1.0", data_dir=str(tmp_path)).documents())
    assert documents == list(Text(str(shards[0].parent)).documents())
