"""Data sets of the Hugging Face hub, from huggingface_hub's cache as a download leaves it, without a network."""

import hashlib
import logging
import os

import pyarrow
import pyarrow.parquet
import pytest

from jaxdraft import huggingface
from jaxdraft.data.catalogue import CORPORA
from jaxdraft.data.named import Corpus
from jaxdraft.data.sources import Text
from jaxdraft.errors import ConfigError

COMMIT = "c" * 40


@pytest.fixture
def download(tmp_path, monkeypatch):
    """download(repository, {name: text}) puts one-row Parquet files where a download of the main branch would."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    huggingface.list_dataset.cache_clear()
    huggingface.dataset_file.cache_clear()

    def put(repository, files, commit=COMMIT):
        folder = tmp_path / f"datasets--{repository.replace('/', '--')}"
        for part in ("blobs", "refs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        for name, text in files.items():
            path = folder / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), folder / "new")
            blob = folder / "blobs" / hashlib.sha256((folder / "new").read_bytes()).hexdigest()
            (folder / "new").rename(blob)
            path.symlink_to(os.path.relpath(blob, path.parent))
        return folder / "snapshots" / commit

    return put


def test_files_of_a_repository(download, caplog):
    download("owner/tiny", {"data/train-1.parquet": "b", "data/train-0.parquet": "a", "data/test-0.parquet": "c"})
    with caplog.at_level(logging.WARNING):
        text = Text("hf://datasets/owner/tiny/data/train-*.parquet")
        assert list(text.documents()) == ["a", "b"]
        assert text.provenance()["revision"] == COMMIT
        assert caplog.text.count("owner/tiny is read at its main branch, which may change") == 1
    for place in ("", "/data", f"@{COMMIT}", "@main/data/*"):
        assert list(Text(f"hf://datasets/owner/tiny{place}").documents()) == ["c", "a", "b"]
    assert list(Text("hf://datasets/owner/tiny/data/test-0.parquet").documents()) == ["c"]
    pinned = Text(f"hf://datasets/owner/tiny@{COMMIT}/data/train-*.parquet")
    assert text.fingerprint() == pinned.fingerprint() != Text("hf://datasets/owner/tiny").fingerprint()


def test_a_named_corpus_is_read_at_its_commit(download, caplog):
    commit = CORPORA["fineweb"].revision
    download("HuggingFaceFW/fineweb", {"sample/10BT/0.parquet": "kept", "sample/350BT/0.parquet": "not"}, commit)
    with caplog.at_level(logging.WARNING):
        assert list(Corpus("fineweb").documents()) == ["kept"]
    assert not caplog.text
    assert Corpus("fineweb").provenance() == {
        "repository": "HuggingFaceFW/fineweb",
        "revision": commit,
        "files": ["sample/10BT/0.parquet"],
        "licence": "ODC-By-1.0",
        "reference": "arXiv 2406.17557",
    }


def test_a_file_that_was_damaged_in_the_cache_is_named(download):
    """Parquet as it mostly is, without page checksums, would be read as if nothing had happened."""
    file = download("owner/tiny", {"data/train-0.parquet": "a story " * 99}) / "data" / "train-0.parquet"
    content = bytearray(file.read_bytes())
    content[content.index(b"story") + 1] ^= 1
    file.resolve().write_bytes(content)
    assert next(Text(str(file)).documents()).startswith("a suory")
    with pytest.raises(ConfigError, match=rf"{file.resolve().name}: damaged since it was downloaded: delete it"):
        list(Text("hf://datasets/owner/tiny").documents())


@pytest.mark.parametrize(
    "place, message",
    [
        ("owner/tiny/data/*.jsonl", "no such file, or a folder or glob without"),
        (f"owner/tiny@{'d' * 40}/data/*", "owner/tiny is no folder here and the hub could not be reached"),
        ("owner/other", "owner/other is no folder here and the hub could not be reached .* give its folder"),
        ("tiny", "write hf://datasets/OWNER/NAME@REVISION/FILES"),
    ],
)
def test_what_cannot_be_had_is_named(download, place, message):
    download("owner/tiny", {"data/train-0.parquet": "a"})
    with pytest.raises(ConfigError, match=message):
        list(Text(f"hf://datasets/{place}").documents())
