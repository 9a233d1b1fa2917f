"""Streams that a TFDS builder prepares once, and that are then read by index.

TensorFlow is never imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from absl.logging import converter
from tensorflow_datasets.core import shuffle

from rmjax.data.source import Examples, Source
from rmjax.io import atomic, paths, text
from rmjax.io.progress import watch

_IDS = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")


@dataclasses.dataclass
class StreamConfig(tfds.core.BuilderConfig):
    """The config of a builder: everything that its data depend on.

    TFDS reuses data by the name of the config, so `name` is a digest of the fields below.

    Attributes:
      files: the raw files. The digest covers their names, sizes and times of change.
      parameters: options of the builder, as values that JSON can hold.
    """

    files: tuple[Path, ...] = ()
    parameters: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.name = atomic.digest(self.files, self.parameters)


class StreamBuilder(tfds.core.GeneratorBasedBuilder):
    """Base class of the builders.

    A record is {items, query, position, target}, all i32 and one-dimensional; position counts
    items. A subclass implements `_split_generators`, whose keys 0, 1, ... set the order of the
    records. It also fills `info.metadata` with num_items, max_items, num_queries and
    streams {split: [the stream each record is cut from]}.

    Attributes:
      fields: names of a record's arrays, i32 of any length. A subclass with other fields needs its
        own reader in place of `Records`.
    """

    fields: tuple[str, ...] = ("items", "query", "position", "target")
    VERSION = tfds.core.Version("1.0.0")  # raise it when the records change
    code_path = None  # without checksums, whose lookup needs importlib_resources

    def __init_subclass__(cls, **kwargs):  # unregistered: TFDS has a builder 'movielens' too
        super().__init_subclass__(skip_registration=True, **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(dict.fromkeys(self.fields, _IDS)),
            disable_shuffling=True,  # the pipeline shuffles
            metadata=tfds.core.MetadataDict(),
        )


class Records(Source):
    """A source that reads the directory that `prepare` returns.

    Args:
      directory: the prepared data.
      positions_at_end: see `Source`.

    Attributes:
      metadata: what the builder stored in `info.metadata`.
      rows: {split: (stored split, indices into it)}. Change it to select or rename examples.
    """

    def __init__(self, directory: Path, positions_at_end: bool):
        self.metadata, self._records = open_records(directory)
        metadata = self.metadata
        self.num_items: int = metadata["num_items"]
        self.max_items: int = metadata["max_items"]
        self.num_queries: int = metadata["num_queries"]
        self.positions_at_end = positions_at_end
        self._streams = {
            split: np.asarray(ids, np.int64) for split, ids in metadata["streams"].items()
        }
        self.rows = {split: (split, np.arange(len(ids))) for split, ids in self._streams.items()}

    def size(self, split: str) -> int:
        """See `Source.size`."""
        return len(self.rows[split][1])

    def stream_id(self, split: str) -> np.ndarray:
        """See `Source.stream_id`; a stream is a user."""
        stored, rows = self.rows[split]
        return self._streams[stored][rows]

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`."""
        stored, rows = self.rows[split]
        records = self._records[stored].__getitems__(rows[indices].tolist())
        items, length = _stack(records, "items", self.max_items)
        query, asked = _stack(records, "query", self.num_queries)
        examples = {
            "items": items,
            "length": length,
            "query": query,
            "query_mask": np.arange(self.num_queries) < asked[:, None],
            "target": _stack(records, "target", self.num_queries)[0],
            "example_id": np.asarray(indices, np.int32),
        }
        if not self.positions_at_end:
            examples["position"] = _stack(records, "position", self.num_queries)[0]
        return examples


def prepare(
    builder_class: type[StreamBuilder],
    cache_dir: str,
    *,
    files: tuple[Path, ...],
    parameters: Mapping[str, object] | None = None,
) -> Path:
    """Prepares the data of a builder, unless they exist already.

    The data are made in another folder, which is renamed at the end, so an error leaves nothing
    behind. Leftovers of killed processes are removed. If several processes prepare the same data,
    the first one to finish wins.

    Args:
      builder_class: makes the records.
      cache_dir: the folder for prepared data; '' means `paths.cache('')`.
      files: see `StreamConfig`.
      parameters: see `StreamConfig`; default {}.

    Returns:
      The directory of the prepared data, in `cache_dir`.

    Raises:
      OSError: nothing can be written in `cache_dir`.
      Stopped: the run was asked to stop.
    """
    config = StreamConfig(name="", files=files, parameters=parameters or {})
    cache, name = paths.cache(cache_dir), builder_class.name
    place = Path(name, config.name, str(builder_class.VERSION))
    if (cache / place).exists():
        return cache / place
    logging.info("Preparing %s, once, from %s in %s", name, files[0].parent, cache / place)
    with atomic.folder(cache / name) as scratch:
        with _quiet():
            builder = builder_class(data_dir=scratch, config=config, file_format="array_record")
            split_generators = builder._split_generators

            def watched(dl_manager):
                return {
                    split: watch(records, f"writing {split} of {name}", "records")
                    for split, records in split_generators(dl_manager).items()
                }

            builder._split_generators = watched  # type: ignore[method-assign]
            builder.download_and_prepare()
        atomic.publish(scratch / place, cache / place)
    return cache / place


def open_records(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Opens the directory that `prepare` returned.

    Args:
      directory: the prepared data.

    Returns:
      (metadata of the builder, {split: records by index, a TFDS data source}).

    Raises:
      FileNotFoundError: a file was removed; names it.
    """
    with _quiet():
        wanted = [directory / "dataset_info.json", directory / "features.json"]
        if all(path.is_file() for path in wanted):
            builder = tfds.builder_from_directory(directory)
            splits = builder.info.splits
            wanted = [Path(path) for split in splits.values() for path in split.filepaths]
        for path in wanted:
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is gone: remove {directory}, and the next run prepares it again"
                )
        records = {split: builder.as_data_source(split) for split in splits}
        return dict(builder.info.metadata), records


def find_files(
    directory: str, names: tuple[str, ...], folders: tuple[str, ...], advice: str
) -> tuple[Path, ...]:
    """Finds the raw files of a data set.

    Args:
      directory: config.data.dir, as the user gave it.
      names: the files.
      folders: folders of `directory` to search; the first one that has all files is taken.
      advice: where to get the files, for the error.

    Returns:
      The paths of `names`.

    Raises:
      FileNotFoundError: no folder has all files; says why and ends with `advice`.
    """
    for folder in folders if directory else ():
        root = paths.resolve(directory, "config.data.dir") / folder
        files = tuple(root / name for name in names)
        if all(path.is_file() for path in files):
            return files
    place = paths.lacks(directory, names[0])
    raise FileNotFoundError(f"{' and '.join(names)} not found in {place}. {advice}")


def malformed(path: Path, line: int, field: str, expected: str, actual: str) -> ValueError:
    """Makes the error of a line that does not follow the format.

    Args:
      path: the file.
      line: the number of the line, from 1.
      field: the name of the field.
      expected: what the field must hold, such as 'an integer'.
      actual: what the field holds; cut after 60 characters.

    Returns:
      The error, to be raised.
    """
    actual = actual if len(actual) <= 60 else actual[:60] + "..."
    return ValueError(f"{path}, line {line}, field {field}: expected {expected}, found {actual!r}")


def read_json_lines(
    path: Path, strings: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a file of JSON lines.

    Args:
      path: the file.
      strings: keys of every object whose values must be strings.

    Yields:
      (number of the line, object).

    Raises:
      ValueError: a line is not a JSON object, or a key of `strings` is missing or holds another
        type; names the line and key.
    """
    # A line of JSON shows its end by itself, so a missing line end is not reported.
    for number, line in text.read_lines(path, ended=False):
        try:
            entry = text.parse_json(line, str(path))
        except ValueError as error:
            cause = getattr(error.__cause__, "msg", error.__cause__)
            wrong = malformed(path, number, "line", f"JSON ({cause})", line.strip())
            raise wrong from error
        if not isinstance(entry, dict):
            raise malformed(path, number, "line", "a JSON object", line.strip())
        for key in strings:
            if not isinstance(entry.get(key), str):
                value = repr(entry[key]) if key in entry else "no such key"
                raise malformed(path, number, key, "a string", value)
        yield number, entry


def _stack(
    records: list[dict[str, np.ndarray]], name: str, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks one field of records: i32 [B, width], padded with 0, and lengths i32 [B]."""
    stacked = np.zeros((len(records), width), np.int32)
    length = np.array([len(record[name]) for record in records], np.int32)
    for row, record in zip(stacked, records, strict=True):
        row[: len(record[name])] = record[name]
    return stacked, length


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing and from spilling to disk.

    TFDS spills more than 1000 MiB through tf.io, which needs TensorFlow.
    """
    tfds.disable_progress_bar()
    folder = os.fspath(Path(tfds.__file__).parent)
    logger, limit = logging.get_absl_logger(), shuffle.MAX_MEM_BUFFER_SIZE

    def ours(record):
        return record.levelno >= converter.STANDARD_ERROR or not record.pathname.startswith(folder)

    logger.addFilter(ours)
    shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(ours)
        shuffle.MAX_MEM_BUFFER_SIZE = limit
