"""Streams prepared once by a TFDS builder, then read by index. TensorFlow is never imported."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from absl.logging import converter
from tensorflow_datasets.core import shuffle

from rmjax.data.source import Examples, Source
from rmjax.io import atomic, paths
from rmjax.io.progress import watch

_IDS = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")


@dataclasses.dataclass
class StreamConfig(tfds.core.BuilderConfig):
    """A builder's config: everything its data depends on. `name` is a digest of it, since TFDS reuses data by name."""

    files: tuple[Path, ...] = ()
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        sources = [
            (file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files
        ]
        whole = json.dumps([sources, self.parameters], sort_keys=True)
        self.name = hashlib.sha256(whole.encode()).hexdigest()[:16]


class StreamBuilder(tfds.core.GeneratorBasedBuilder):
    """Base of the builders. A record is {items, query, position, target}; position counts items, queries are flat.

    A subclass gives `_split_generators` (keys are 0, 1, ... and set the order) and fills `info.metadata`: num_items,
    max_items, num_queries and streams {split: [the stream each record is cut from]}. One whose records have other
    `fields`, i32 of any length each, has a reader of its own.
    """

    fields: tuple[str, ...] = ("items", "query", "position", "target")
    VERSION = tfds.core.Version("1.0.0")  # of the records; a change of what is written raises it
    code_path = None  # no checksums beside the code; looking for them needs importlib_resources

    def __init_subclass__(cls, **kwargs):  # TFDS has names of its own, 'movielens' among them
        super().__init_subclass__(skip_registration=True, **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(dict.fromkeys(self.fields, _IDS)),
            disable_shuffling=True,  # the pipeline has its own order
            metadata=tfds.core.MetadataDict(),
        )


class Records(Source):
    """A `Source` over what `prepare` left in a directory; `rows` {split: (its split there, indices)} picks from it."""

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
        return len(self.rows[split][1])

    def stream_id(self, split: str) -> np.ndarray:
        """i64 [size]: the stream (user) each example is cut from."""
        stored, rows = self.rows[split]
        return self._streams[stored][rows]

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
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


def prepare(builder_class: type[StreamBuilder], cache_dir: str, **config: Any) -> Path:
    """Prepares what the builder makes of `StreamConfig(**config)`, unless it is there already.

    The data are made in another folder, which is renamed at the end. An error leaves nothing. What
    killed processes have left is removed. If several processes prepare the same data, the first to
    end wins.

    Returns:
      Its directory, in `cache_dir` ('' is `paths.cache`).

    Raises:
      OSError: nothing can be written there.
      Stopped: the run was asked to stop.
    """
    cache, described = paths.cache(cache_dir), StreamConfig(name="", **config)
    place = Path(builder_class.name, described.name, str(builder_class.VERSION))
    if (cache / place).exists():
        return cache / place
    name = builder_class.name
    logging.info(
        "Preparing %s, once, from %s in %s", name, described.files[0].parent, cache / place
    )
    with atomic.folder(cache / name) as scratch:
        with _quiet():
            builder = builder_class(data_dir=scratch, config=described, file_format="array_record")
            made = builder._split_generators

            def watched(dl_manager):
                splits = made(dl_manager)
                return {
                    split: watch(of, f"writing {split} of {name}", "records")
                    for split, of in splits.items()
                }

            builder._split_generators = watched  # type: ignore[method-assign]
            builder.download_and_prepare()
        (cache / place).parent.mkdir(exist_ok=True)
        try:
            (scratch / place).rename(cache / place)
        except OSError:
            if not (cache / place).exists():
                raise
    return cache / place


def open_records(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata, and the records of each split by index, of what `prepare` left in a directory.

    Raises FileNotFoundError naming a file that is gone since.
    """
    with _quiet():
        wanted = [directory / "dataset_info.json", directory / "features.json"]
        if all(path.is_file() for path in wanted):
            builder = tfds.builder_from_directory(directory)
            wanted = [
                Path(path) for split in builder.info.splits.values() for path in split.filepaths
            ]
        for path in wanted:
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is gone: remove {directory}, and it is prepared anew"
                )
        return dict(builder.info.metadata), {
            split: builder.as_data_source(split) for split in builder.info.splits
        }


def find_files(
    directory: str, names: tuple[str, ...], folders: tuple[str, ...], advice: str
) -> tuple[Path, ...]:
    """Paths of `names` in the first of `directory`/`folders` that has all; FileNotFoundError with `advice` if none."""
    for folder in folders if directory else ():
        of_folder = tuple(
            paths.resolve(directory, "config.data.dir") / folder / name for name in names
        )
        if all(path.is_file() for path in of_folder):
            return of_folder
    raise FileNotFoundError(
        f"{' and '.join(names)} not found in {paths.lacks(directory, names[0])}. {advice}"
    )


def malformed(path: Path, line: int, field: str, expected: str, found: str) -> ValueError:
    """The error of a line that is not of the format."""
    found = found if len(found) <= 60 else found[:60] + "..."
    return ValueError(f"{path}, line {line}, field {field}: expected {expected}, found {found!r}")


def _stack(
    records: list[dict[str, np.ndarray]], name: str, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """i32 [B, width], padded with 0, and length i32 [B]."""
    stacked = np.zeros((len(records), width), np.int32)
    length = np.array([len(record[name]) for record in records], np.int32)
    for row, record in zip(stacked, records, strict=True):
        row[: len(record[name])] = record[name]
    return stacked, length


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing, and from spilling more than 1000 MiB through tf.io, which would need TensorFlow."""
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
