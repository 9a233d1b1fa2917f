"""ActivityNet-QA (Yu et al. 2019): questions about long videos, answered with one of the most frequent answers.

The release has questions and answers. Features of the videos' frames come from elsewhere: ActivityNet's
own are one file (sub_activitynet_v1-3.c3d.hdf5), with a group v_<video_name> of each video and
'c3d_features' in it. As in the release's evaluation an answer is right if it is the same string.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging

from rmjax.data import records
from rmjax.data.source import Examples, Source
from rmjax.data.stories import text
from rmjax.io import paths
from rmjax.io import text as text_files
from rmjax.registry import a_path, at_least, setting

SPLITS = {"train": "train", "valid": "val", "test": "test"}  # {ours: theirs}
TYPES = (
    "motion",
    "spatial",
    "temporal",
    "yes-no",
    "color",
    "object",
    "location",
    "number",
    "other",
)  # by number
ADVICE = "Clone https://github.com/MILVLG/activitynet-qa and set data.dir to it, or to its folder 'dataset'."
EXPECTED = (
    "expected a folder with a file <video_name>.npy, <video_name>.npz or <video_name>.h5 (or "
    "v_<video_name>...) of each video, or one .h5 file with a dataset or a group of each; they hold one "
    "array, or one named 'features' or 'c3d_features', f32 [frames, F]"
)
H5 = (".h5", ".hdf5")
NAMES = ("features", "c3d_features")
MOST_BYTES = 1 << 30  # of a video's array


@dataclasses.dataclass(frozen=True)
class Settings:
    """The videos' frames and the classes."""

    asks_in_words = True
    has_item_table = False  # items are features
    features: str = setting("", a_path, "frame features: a folder, or one .h5 file")
    frames: int = setting(200, at_least(1), "frames taken of a video")
    answers: int = setting(1000, at_least(1), "classes: the most frequent answers")


def make(settings: Settings, common: Any, seed: int) -> Source:
    options = dict(segment_length=common.segment_length, ram_bytes=common.ram_bytes)
    return open_activitynet(common.dir, cache_dir=common.cache_dir, **options, **vars(settings))


def question_only(directory: str, cache_dir: str, *, answers: int = 1000) -> Asked:
    """The questions without their videos: a source of streams without an item.

    Raises:
      FileNotFoundError: `directory` (or its folder dataset) has not all six files.
      ValueError: a file is not of the format, or a question has no answer.
    """
    return Asked(_prepare(directory, cache_dir, answers), segment_length=1)


def open_activitynet(
    directory: str,
    features: str,
    cache_dir: str,
    *,
    segment_length: int = 20,
    frames: int = 200,
    answers: int = 1000,
    ram_bytes: int = 1 << 30,
) -> ActivityNet:
    """The source. An example is a video, `frames` of its frames in segments, and all its questions.

    Classes are the `answers` most frequent answers of the training questions, of equally frequent ones the first by
    the alphabet. Training questions with another answer are left out. In 'valid' and 'test' they stay: their target is
    the number of classes, which no answer given is equal to. Up to `ram_bytes` of frames are kept in RAM.

    features: a folder with a file of each video, <video_name>.npy, .npz, .h5 or .hdf5, or one .h5 or
    .hdf5 file with a dataset or a group of each video; names may begin with v_. A file or a group has one
    array, or one that is named 'features' or 'c3d_features'.

    Raises:
      FileNotFoundError: `directory` (or its folder dataset) has not all six files, or `features` not every video.
      ValueError: a file is not of the format, or a question has no answer; a size below 1; features, when they are
        read, that are not [frames, F] with the F of the first video, or not finite, or of over 1 GiB, or
        that are links to other files.
      ModuleNotFoundError: an .h5 is read and h5py is not installed.
    """
    place = paths.resolve(features, "config.data.activitynet.features")
    if not features or not (place.is_dir() or place.is_file() and place.suffix in H5):
        state = "no such folder" if features else "it is empty"
        state = "a file of another format" if place.is_file() else state
        raise FileNotFoundError(f"config.data.activitynet.features={features}: {state}; {EXPECTED}")
    if min(segment_length, frames) < 1:
        raise ValueError(f"segment_length={segment_length}, frames={frames}: expected 1 or more")
    prepared = _prepare(directory, cache_dir, answers)
    return ActivityNet(
        prepared, place, segment_length=segment_length, frames=frames, ram_bytes=ram_bytes
    )


class Asked(text.TextRecords):
    """The questions; `videos` {split: names}. metadata["counts"] {split: {videos, questions, outside}}, where `outside`
    counts questions whose answer is none of the classes.
    """

    def __init__(self, directory: Path, *, segment_length: int):
        super().__init__(
            directory, segment_length=segment_length, metric="accuracy", positions_at_end=True
        )
        self.videos: dict[str, list[str]] = self.metadata["videos"]
        for split, counts in self.metadata["counts"].items():
            note = "left out" if split == "train" else "counted as wrong"
            logging.info(
                "ActivityNet-QA %s: %d questions of %d videos; the answers of %d (%s) are none of the %d classes.",
                *(
                    split,
                    counts["questions"],
                    counts["videos"],
                    counts["outside"],
                    note,
                    len(self.classes),
                ),
            )

    def references(self, split: str) -> dict[str, np.ndarray]:
        """What one answers without a video: i32 [size, Q], the most frequent class of the training questions that
        begin with the same words, as many words as there is such a question for. (To ask for more than one such
        question made it no better on 'valid'.)
        """
        seen: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for _, words, target in self._each("train"):
            for count in range(len(words) + 1):
                seen[words[:count]][target] += 1
        best = {start: min(found, key=lambda c: (-found[c], c)) for start, found in seen.items()}
        chosen = np.zeros((self.size(split), self.num_queries), np.int32)
        for place, words, _ in self._each(split):
            chosen[place] = next(
                best[words[:n]] for n in range(len(words), -1, -1) if words[:n] in best
            )
        return {"question only": chosen}

    def _each(self, split: str) -> Iterator[tuple[tuple[int, int], tuple[int, ...], int]]:
        """(place in [size, Q], words, target) of each question; no frame is read."""
        asked = text.TextRecords.fetch(self, split, np.arange(self.size(split)))
        length = asked["word_mask"].sum(-1)
        for place in zip(*np.nonzero(asked["query_mask"]), strict=True):
            yield (
                place,
                tuple(asked["query"][place][: length[place]].tolist()),
                int(asked["target"][place]),
            )


class ActivityNet(Asked):
    """The questions with the frames of their videos, read when an example is fetched. Videos are of one bucket."""

    def __init__(
        self, directory: Path, features: Path, *, segment_length: int, frames: int, ram_bytes: int
    ):
        super().__init__(directory, segment_length=segment_length)
        self.num_items, self.max_items = 0, frames
        self.questions = self.questions._replace(words=len(self.vocabulary))
        self._segments, self._segment_length = -(-frames // segment_length), segment_length
        places = _places(features, [video for videos in self.videos.values() for video in videos])
        self._frames = _Frames(places, frames, ram_bytes)
        self.feature_width = self._frames.width

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]]:
        return np.zeros(self.size(split), np.int64), [self._segments]

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """As `Source.fetch`, in segments; items are f32 [B, T, N, F]."""
        shape = (len(indices), self._segments, self._segment_length)
        items = np.zeros((len(indices), shape[1] * shape[2], self.feature_width), np.float32)
        item_mask = np.zeros(items.shape[:2], bool)
        for row, index in enumerate(indices):
            frames = self._frames.read(self.videos[split][index])
            items[row, : len(frames)], item_mask[row, : len(frames)] = frames, True
        return super().fetch(split, indices) | {
            "items": items.reshape(*shape, -1),
            "item_mask": item_mask.reshape(shape),
        }


class ActivityNetBuilder(text.TextBuilder):
    """A story is the questions of a video, in the order of the file, without a sentence; a group is a type."""

    name = "activitynet"
    fields = (*text.TextBuilder.fields, "group")

    def stories(self) -> dict[str, list[text.Story]]:
        files = self.builder_config.files
        asked = {split: _read(*files[2 * i : 2 * i + 2]) for i, split in enumerate(SPLITS)}
        frequency = Counter(question.answer for question in asked["train"])
        classes = sorted(frequency, key=lambda answer: (-frequency[answer], answer))
        classes = classes[: self.builder_config.parameters["answers"]]
        number = {answer: i for i, answer in enumerate(classes)}
        stories, videos, counts = {}, {}, {}
        for split, questions in asked.items():
            by_video: dict[str, list[Question]] = {question.video: [] for question in questions}
            for question in questions:
                if question.answer in number or split != "train":
                    by_video[question.video].append(question)
            stories[split] = [
                text.Story(
                    sentences=[],
                    questions=[text.tokenize(question.text) for question in of_video],
                    position=[0] * len(of_video),
                    target=[number.get(question.answer, len(classes)) for question in of_video],
                    group=[question.type for question in of_video],
                )
                for of_video in by_video.values()
            ]
            videos[split] = list(by_video)
            outside = sum(question.answer not in number for question in questions)
            counts[split] = dict(videos=len(by_video), questions=len(questions), outside=outside)
        self.info.metadata.update(classes=classes, groups=list(TYPES), videos=videos, counts=counts)
        return stories


class Question(NamedTuple):
    video: str
    text: str
    answer: str
    type: int


def sample_frames(count: int, frames: int) -> np.ndarray:
    """i64 [min(count, frames)], which frames of `count` are taken: all, or `frames` from the first to the last."""
    if count <= frames:
        return np.arange(count)
    return np.rint(np.arange(frames) * (count - 1) / max(frames - 1, 1)).astype(np.int64)


def _prepare(directory: str, cache_dir: str, answers: int) -> Path:
    if answers < 1:
        raise ValueError(f"answers={answers}: expected 1 or more")
    names = tuple(f"{split}_{kind}.json" for split in SPLITS.values() for kind in "qa")
    files = records.find_files(directory, names, (".", "dataset"), ADVICE)
    return records.prepare(
        ActivityNetBuilder, cache_dir, files=files, parameters=dict(answers=answers)
    )


def _read(questions: Path, answers: Path) -> list[Question]:
    """The questions of a split with their answers, in the order of the questions' file."""
    answered = _entries(answers, {"answer": str, "type": int})
    joined = []
    for name, question in _entries(questions, {"video_name": str, "question": str}).items():
        if name not in answered:
            raise ValueError(
                f"{questions}: question {name!r} of video {question['video_name']!r} has no answer in {answers}; "
                "take both files from one release"
            )
        answer = answered[name]
        if answer["type"] not in range(len(TYPES)):
            wrong = str(answer["type"])[:60]
            raise ValueError(
                f"{answers}, question {name!r}, key 'type': expected 0 to 8, found {wrong}"
            )
        joined.append(
            Question(question["video_name"], question["question"], answer["answer"], answer["type"])
        )
    return joined


def _entries(path: Path, keys: dict[str, type]) -> dict[str, dict[str, Any]]:
    """The entries of a file by question_id."""
    content = text_files.read_json(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: expected a list of entries, found {str(content)[:60]!r}")
    entries = {}
    for number, entry in enumerate(content, 1):
        for key, kind in {"question_id": str, **keys}.items():
            if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
                found = repr(entry.get(key) if isinstance(entry, dict) else entry)[:60]
                raise ValueError(
                    f"{path}, entry {number}, key {key!r}: expected {kind.__name__}, found {found}"
                )
        if entry["question_id"] in entries:
            raise ValueError(
                f"{path}, entry {number}: question_id {entry['question_id']!r} is there twice"
            )
        entries[entry["question_id"]] = entry
    return entries


class _Place(NamedTuple):
    """Where a video's features are."""

    path: Path
    name: str = ""  # of a dataset or a group, in the one file of all videos

    def __str__(self):
        return f"{self.path}, {self.name}" if self.name else str(self.path)


def _places(features: Path, videos: Sequence[str]) -> dict[str, _Place]:
    """The place of each video's features, in a folder of files or in one file."""
    by_name: dict[str, _Place] = {}
    if features.is_file():
        by_name = {name: _Place(features, name) for name in _read_file(_Place(features), _names)}
    else:
        for path in paths.visible(features):
            if path.suffix not in (".npy", ".npz", *H5):
                continue
            if path.stem in by_name:
                raise ValueError(
                    f"{path} and {by_name[path.stem].path.name} are of one video: remove one of them"
                )
            by_name[path.stem] = _Place(path)
    places = {video: by_name.get(video) or by_name.get(f"v_{video}") for video in videos}
    missing = [video for video, place in places.items() if place is None]
    if missing:
        few = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        raise FileNotFoundError(
            f"{features}: {len(missing)} of {len(places)} videos have no features: {few}; {EXPECTED}. Extract those of "
            "the missing ones too, or take their questions out of the json files."
        )
    return {video: place for video, place in places.items() if place}


class _Frames:
    """Sampled frames by video, of which the last used are kept in RAM; `width` is F, that of the first video."""

    def __init__(self, places: dict[str, _Place], frames: int, ram_bytes: int):
        self._settings = (places, frames, ram_bytes)
        self._first = next(iter(places))
        self.width = 0
        self.width = self._read(self._first).shape[1]
        self.read = functools.lru_cache(max(ram_bytes // (frames * self.width * 4), 1))(self._read)

    def __reduce__(self):  # another process fills its own
        return _Frames, self._settings

    def _read(self, video: str) -> np.ndarray:
        """f32 [n, F], n at most `frames`."""
        places, frames, _ = self._settings
        place = places[video]
        array = _array(place)
        if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.size:
            raise ValueError(
                f"{place}: expected numbers [frames, F], found {array.dtype} {list(array.shape)}"
            )
        if self.width and array.shape[1] != self.width:
            raise ValueError(
                f"{place}: expected features of width {self.width}, as in {places[self._first]}, found "
                f"{array.shape[1]}; extract those of all videos with one network"
            )
        taken = sample_frames(len(array), frames)
        with np.errstate(over="ignore"):
            array = array[taken].astype(np.float32)
        finite = np.isfinite(array).all(1)
        if not finite.all():
            wrong = taken[np.argmin(finite)]
            raise ValueError(
                f"{place}: expected finite features, found nan or inf in frame {wrong}; extract them again"
            )
        return array


def _array(place: _Place) -> np.ndarray:
    """The one array of a place, or the one of a known name."""
    array = _read_file(place, {".npy": _npy, ".npz": _npz}.get(place.path.suffix, _h5))
    if isinstance(array, list):
        raise ValueError(f"{place}: expected one array, or one named 'features', found {array}")
    return array


def _read_file(place: _Place, read: Callable[[_Place], Any]) -> Any:
    """What `read` reads; an error names the file."""
    suffix = place.path.suffix
    try:
        return read(place)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{place.path}: h5py, which reads it, is not installed: pip install 'rmjax[video]'"
        ) from error
    except (
        Exception
    ) as error:  # what the readers of three formats raise of a damaged file is not listed anywhere
        raise ValueError(
            f"{place}: not to be read as {suffix} ({error}); extract it again"
        ) from error


def _npy(place: _Place) -> np.ndarray:
    with place.path.open("rb") as file:
        return _numbers(file)


def _npz(place: _Place) -> np.ndarray | list[str]:
    with zipfile.ZipFile(place.path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        name = _chosen(members)
        if name is None:
            return [*members]
        _bounded(
            (members[name].file_size,), np.dtype(np.uint8)
        )  # its header too is read as a whole
        with archive.open(members[name]) as file:
            return _numbers(file)


def _numbers(file: IO[bytes]) -> np.ndarray:
    """The array of an .npy file, whose size is looked at before there is room made for it."""
    version = np.lib.format.read_magic(file)
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in headers:
        raise ValueError(f"version {version} of the format is not known")
    shape, _, dtype = headers[version](file)
    _bounded(shape, dtype)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _names(place: _Place) -> list[str]:
    import h5py

    with h5py.File(place.path) as file:
        return list(file)


def _h5(place: _Place) -> np.ndarray | list[str]:
    import h5py

    with h5py.File(place.path) as file:
        entry = _own(file, place.name) if place.name else file
        if isinstance(entry, h5py.Group):
            name = _chosen(entry)
            if name is None:
                return list(entry)
            entry = _own(entry, name)
        if not isinstance(entry, h5py.Dataset) or entry.shape is None or entry.dtype.hasobject:
            raise ValueError(f"{entry.name} is no array of numbers")
        if entry.external or entry.is_virtual:
            raise ValueError(
                f"{entry.name} has its numbers in other files: copy them into this one"
            )
        for shape in (entry.shape, entry.chunks or ()):
            _bounded(shape, entry.dtype)
        return entry[()]


def _own(group: Any, name: str) -> Any:
    """An entry of an .h5 file's group that lies in the file itself: links may lead to other files."""
    import h5py

    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(
            f"{name} is a link ({type(link).__name__}): copy what it leads to into this file"
        )
    return group[name]


def _chosen(names: Collection[str]) -> str | None:
    """The one name, or the one that is known."""
    return next(
        (name for name in NAMES if name in names), next(iter(names)) if len(names) == 1 else None
    )


def _bounded(shape: tuple[int, ...], dtype: np.dtype) -> None:
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > MOST_BYTES:
        raise ValueError(
            f"an array {list(shape)} of {size:,} bytes, and at most {MOST_BYTES:,} are read"
        )
