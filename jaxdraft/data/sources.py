"""Where text comes from: a source is a frozen dataclass with `documents()` and `fingerprint()`.

`Text` reads files by suffix, here, in a bucket or on the Hugging Face hub; `TFDS` what TensorFlow Datasets has
prepared; `jaxdraft.data.named` the corpora of the papers, `jaxdraft.data.source_code` a folder of code. A source of
one's own needs only the two methods of `Source`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxdraft.data.quarantine import Misfit, Rejected, first
from jaxdraft.data.readers import Files, Row, files_fingerprint, fingerprint_of, text_of
from jaxdraft.errors import ConfigError
from jaxdraft.remote import local_copy


class Source(Protocol):
    """What `Prepare` reads. It may have `provenance()` besides: what shall stand in the manifest of its rows."""

    def documents(self) -> Iterator[str | Rejected]:
        """The documents, in the same order every time, with a ``Rejected`` in the place of each that cannot be had."""
        ...

    def fingerprint(self) -> str:
        """sha256 of the content `documents` is made from."""
        ...


def documents_of(
    rows: Iterable[Row | Rejected], text: Callable[[Any], str], limit: int | None = None
) -> Iterator[str | Rejected]:
    """What `text` makes of each row's value, at most `limit` documents; blank ones and misfits are rejected."""

    def each() -> Iterator[str | Rejected]:
        for row in rows:
            if isinstance(row, Rejected):
                yield row
                continue
            try:
                document = text(row.value)
                yield document if document.strip() else Rejected(row.where, "blank")
            except Misfit as misfit:
                yield misfit.at(row.where)

    return first(each(), limit)


@dataclass(frozen=True)
class Text:
    """Documents from files.

    `.txt` is one document, or several with `separator`; `.jsonl`, `.json` (a list of objects, or one per line),
    `.parquet` and `.array_record` (tf.Example, or raw UTF-8 records) give one document per row. Blank documents, rows
    without text in `field` and lines that are not JSON are rejected.

    Attributes:
      path: a file, a folder (its files of known suffix, sorted, with those below it) or a glob; also in a bucket
        (`gs://`, `s3://`) and on the Hugging Face hub
        (`hf://datasets/OWNER/NAME@COMMIT/data/train-*.parquet`).
      field: the column that holds the text.
      separator: splits plain text into documents, e.g. "<|endoftext|>".
      limit: at most this many documents.
      licence, revision: kept next to the data made from it.
    Raises (when read):
      ConfigError: nothing there, an unknown suffix, no such column, or a damaged file; the message names the file.
    """

    path: str
    field: str = "text"
    separator: str | None = None
    limit: int | None = None
    licence: str | None = None
    revision: str | None = None

    def files(self) -> Files:
        """The files read, in order."""
        return Files(self.path)

    def documents(self) -> Iterator[str | Rejected]:
        rows = self.files().rows([self.field], self.separator)
        return documents_of(rows, lambda value: text_of(value, self.field), self.limit)

    def fingerprint(self) -> str:
        return fingerprint_of(self.path)

    def provenance(self) -> dict[str, Any]:
        files = self.files()
        return {"files": files.names, "revision": files.commit or self.revision, "licence": self.licence}


@dataclass(frozen=True)
class TFDS:
    """Documents of a dataset that TensorFlow Datasets has prepared as ArrayRecord; TensorFlow is not needed to read it.

    Attributes:
      name: as in `tfds.load`, with its version: "c4/en:3.1.0".
      split: e.g. "train" or "train[:10%]".
      field: the feature that holds the text.
      data_dir: where it was prepared, here or in a bucket; None is TFDS's own (`~/tensorflow_datasets`).
      limit: at most this many documents.
      licence: kept next to the data made from it.
    Raises (when read):
      ConfigError: it is not prepared there, not as ArrayRecord, or has no such split.
    """

    name: str
    split: str = "train"
    field: str = "text"
    data_dir: str | None = None
    limit: int | None = None
    licence: str | None = None

    def documents(self) -> Iterator[str | Rejected]:
        with self._naming():
            rows = self._builder().as_data_source(split=self.split)

        def each() -> Iterator[Row]:
            for number in range(len(rows)):
                with self._naming():
                    value = rows[number]
                yield Row(f"{self.name}: {self.split} row {number}", number, value)

        return documents_of(each(), lambda value: text_of(value, self.field), self.limit)

    def fingerprint(self) -> str:
        return files_fingerprint(self._files())

    def provenance(self) -> dict[str, Any]:
        name = self._builder().info.full_name
        return {"files": [str(file) for file in self._files()], "revision": name, "licence": self.licence}

    def _files(self) -> list[Path]:
        with self._naming():
            return [Path(file) for file in self._builder().info.splits[self.split].filepaths]

    def _builder(self) -> Any:
        import tensorflow_datasets

        with self._naming():
            return tensorflow_datasets.builder(self.name, data_dir=self.data_dir and local_copy(self.data_dir))

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            raise ConfigError(
                f"TFDS {self.name}, split {self.split!r}: {str(error).splitlines()[0]} Looked in "
                f"{self.data_dir or 'its own folder'}; `tfds build {self.name} --file_format=array_record` prepares it "
                "where TensorFlow is installed"
            ) from error
