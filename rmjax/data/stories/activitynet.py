"""ActivityNet-QA (Yu et al. 2019): questions about long videos.

The classes are the most frequent answers. As in the release's evaluation, an answer is right if it
is the same string.

The release has questions and answers. Features of the video frames come from elsewhere.
ActivityNet's own features are one file, sub_activitynet_v1-3.c3d.hdf5. It has a group
v_<video_name> for each video, with a dataset 'c3d_features'.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.source import Examples, Source
from rmjax.data.stories import text
from rmjax.io import paths
from rmjax.io import text as text_files
from rmjax.registry import a_path, at_least, setting

if TYPE_CHECKING:
    import h5py

T = TypeVar("T")
SPLITS = {"train": "train", "valid": "val", "test": "test"}  # {our name: the release's name}
TYPES: tuple[str, ...] = ("motion", "spatial", "temporal", "yes-no", "color")  # by number
TYPES += ("object", "location", "number", "other")
ADVICE = (
    "Clone https://github.com/MILVLG/activitynet-qa and set data.dir to it, or to its folder "
    "'dataset'."
)
EXPECTED = (
    "expected a folder with a file <video_name>.npy, <video_name>.npz or <video_name>.h5 (or "
    "v_<video_name>...) for each video, or one .h5 file with a dataset or a group for each video; "
    "a file or a group must hold one array f32 [frames, F], or one named 'features' or "
    "'c3d_features'"
)
H5 = (".h5", ".hdf5")
NAMES = ("features", "c3d_features")
MOST_BYTES = 1 << 30  # of a video's array


@dataclasses.dataclass(frozen=True)
class Settings:
    """The videos' frames and the classes."""

    asks_in_words: ClassVar[bool] = True
    has_item_table: ClassVar[bool] = False  # items are features
    features: str = setting("", a_path, "frame features: a folder, or one .h5 file")
    frames: int = setting(200, at_least(1), "frames taken of a video")
    answers: int = setting(1000, at_least(1), "classes: the most frequent answers")


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Builds the source, see `open_activitynet`."""
    return open_activitynet(
        common.dir,
        cache_dir=common.cache_dir,
        segment_length=common.segment_length,
        ram_bytes=common.ram_bytes,
        **vars(settings),
    )


def question_only(directory: str, cache_dir: str, *, answers: int = 1000) -> Asked:
    """Opens the questions without their videos, as a source of empty streams.

    Args:
      directory: as in `open_activitynet`.
      cache_dir: as in `open_activitynet`.
      answers: as in `open_activitynet`.

    Returns:
      The source.

    Raises:
      FileNotFoundError: `directory`, or its folder dataset, does not have all six files.
      ValueError: a file is malformed, or a question has no answer.
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
    """Opens the source; the first call prepares the questions.

    An example is a video with all its questions. Its stream is `frames` frames, in segments.

    The classes are the most frequent answers to the training questions; answers of equal frequency
    are taken in alphabetical order. Training questions with another answer are left out. In 'valid'
    and 'test' such questions stay. Their target is the number of classes, so that every answer to
    them counts as wrong.

    Features are read when an example is fetched. `fetch` raises ValueError if an array is not
    [frames, F] with the F of the first video. It also does so if an array is not finite, has over
    1 GiB, or is a link to another file.

    Args:
      directory: a clone of the release, or its folder dataset.
      features: a folder with a file for each video, <video_name>.npy, .npz, .h5 or .hdf5; or one
        .h5 or .hdf5 file with a dataset or a group for each video. Names may begin with v_. A file
        or a group has one array, or one that is named 'features' or 'c3d_features'.
      cache_dir: folder for prepared data, see `records.prepare`.
      segment_length: frames of a segment.
      frames: most frames taken of a video, see `sample_frames`.
      answers: most classes.
      ram_bytes: most bytes of frames kept in RAM.

    Returns:
      The source.

    Raises:
      FileNotFoundError: `directory`, or its folder dataset, does not have all six files; or
        `features` does not have every video.
      ValueError: a file is malformed, a question has no answer, a size is below 1, or the features
        of the first video are wrong, as above.
      ModuleNotFoundError: an .h5 file is read and h5py is not installed.
    """
    place = paths.resolve(features, "config.data.activitynet.features")
    if not features or not (place.is_dir() or place.is_file() and place.suffix in H5):
        state = "no such folder" if features else "it is empty"
        state = "a file of another format" if place.is_file() else state
        raise FileNotFoundError(f"config.data.activitynet.features={features}: {state}; {EXPECTED}")
    if min(segment_length, frames) < 1:
        raise ValueError(f"segment_length={segment_length}, frames={frames}: expected 1 or more")
    prepared = _prepare(directory, cache_dir, answers)
    sizes = dict(segment_length=segment_length, frames=frames, ram_bytes=ram_bytes)
    return ActivityNet(prepared, place, **sizes)


class Asked(text.TextRecords):
    """The questions of the videos, with empty streams.

    metadata["counts"] is {split: {videos, questions, outside}}. `outside` counts the questions
    whose answer is not a class.

    Args:
      directory: folder that `records.prepare` returned.
      segment_length: as in `open_activitynet`.

    Attributes:
      videos: {split: names of the videos}.
    """

    def __init__(self, directory: Path, *, segment_length: int):
        super().__init__(
            directory, segment_length=segment_length, metric="accuracy", positions_at_end=True
        )
        self.videos: dict[str, list[str]] = self.metadata["videos"]
        message = (
            "ActivityNet-QA %s: %d questions of %d videos; the answers to %d questions (%s) are "
            "not among the %d classes."
        )
        for split, counts in self.metadata["counts"].items():
            note = "left out" if split == "train" else "counted as wrong"
            sizes = counts["questions"], counts["videos"], counts["outside"]
            logging.info(message, split, *sizes, note, len(self.classes))

    def references(self, split: str) -> dict[str, np.ndarray]:
        """The answers of a reader that sees no video, {"question only": i32 [size, Q]}.

        The reader takes the longest beginning of the question that a training question shares. It
        answers the most frequent class of the training questions with this beginning. (To require
        more than one such question did not improve 'valid'.)
        """
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for _, words, target in self._asked("train"):
            for length in range(len(words) + 1):
                counts[words[:length]][target] += 1
        best = {start: min(seen, key=lambda c: (-seen[c], c)) for start, seen in counts.items()}
        chosen = np.zeros((self.size(split), self.num_queries), np.int32)
        for place, words, _ in self._asked(split):
            starts = (words[:length] for length in range(len(words), -1, -1))
            chosen[place] = next(best[start] for start in starts if start in best)
        return {"question only": chosen}

    def _asked(self, split: str) -> Iterator[tuple[tuple[int, int], tuple[int, ...], int]]:
        """(place in [size, Q], words, target) of all questions; no frame is read."""
        asked = text.TextRecords.fetch(self, split, np.arange(self.size(split)))
        length = asked["word_mask"].sum(-1)
        for place in zip(*np.nonzero(asked["query_mask"]), strict=True):
            words = asked["query"][place][: length[place]].tolist()
            yield place, tuple(words), int(asked["target"][place])


class ActivityNet(Asked):
    """The questions with the frames of their videos. All videos share one bucket.

    Frames are read when an example is fetched.

    Args:
      directory: folder that `records.prepare` returned.
      features: as in `open_activitynet`.
      segment_length: as in `open_activitynet`.
      frames: as in `open_activitynet`.
      ram_bytes: as in `open_activitynet`.
    """

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
        """See `Source.buckets`."""
        return np.zeros(self.size(split), np.int64), [self._segments]

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`. The streams come in segments; items are f32 [B, T, N, F]."""
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
    """Stores a story without sentences for each video, with questions in the order of the file.

    A group is a type of question.
    """

    name = "activitynet"
    fields = (*text.TextBuilder.fields, "group")

    def stories(self) -> dict[str, list[text.Story]]:
        """See `TextBuilder.stories`."""
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
    """A question about a video, with the right answer."""

    video: str
    text: str
    answer: str
    type: int  # index in `TYPES`


def sample_frames(count: int, frames: int) -> np.ndarray:
    """Chooses which frames of a video are taken.

    Args:
      count: frames of the video.
      frames: most frames taken.

    Returns:
      i64 [min(count, frames)]: all frames, or evenly spaced ones from the first to the last.
    """
    if count <= frames:
        return np.arange(count)
    return np.rint(np.arange(frames) * (count - 1) / max(frames - 1, 1)).astype(np.int64)


# ---- the files of questions and answers


def _prepare(directory: str, cache_dir: str, answers: int) -> Path:
    if answers < 1:
        raise ValueError(f"answers={answers}: expected 1 or more")
    names = tuple(f"{split}_{kind}.json" for split in SPLITS.values() for kind in "qa")
    files = records.find_files(directory, names, (".", "dataset"), ADVICE)
    parameters = dict(answers=answers)
    return records.prepare(ActivityNetBuilder, cache_dir, files=files, parameters=parameters)


def _read(questions: Path, answers: Path) -> list[Question]:
    """The questions of a split with their answers, in the order of the file of questions."""
    answered = _entries(answers, {"answer": str, "type": int})
    joined = []
    for name, question in _entries(questions, {"video_name": str, "question": str}).items():
        if name not in answered:
            raise ValueError(
                f"{questions}: question {name!r} of video {question['video_name']!r} has no answer "
                f"in {answers}; take both files from one release"
            )
        answer = answered[name]
        if answer["type"] not in range(len(TYPES)):
            cause = f"expected 0 to 8, found {str(answer['type'])[:60]}"
            raise ValueError(f"{answers}, question {name!r}, key 'type': {cause}")
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
                value = repr(entry.get(key) if isinstance(entry, dict) else entry)[:60]
                cause = f"expected {kind.__name__}, found {value}"
                raise ValueError(f"{path}, entry {number}, key {key!r}: {cause}")
        name = entry["question_id"]
        if name in entries:
            cause = f"question_id {name!r} occurs twice; remove one of the entries"
            raise ValueError(f"{path}, entry {number}: {cause}")
        entries[name] = entry
    return entries


# ---- the files of features


class _Place(NamedTuple):
    """Where the features of a video are."""

    path: Path
    name: str = ""  # of a dataset or a group, in a file with all videos

    def __str__(self) -> str:
        return f"{self.path}, {self.name}" if self.name else str(self.path)


def _places(features: Path, videos: Sequence[str]) -> dict[str, _Place]:
    """The place of the features of each video, in a folder of files or in one file."""
    by_name: dict[str, _Place] = {}
    if features.is_file():
        by_name = {name: _Place(features, name) for name in _read_file(_Place(features), _names)}
    else:
        for path in paths.visible(features):
            if path.suffix not in (".npy", ".npz", *H5):
                continue
            if path.stem in by_name:
                other = by_name[path.stem].path.name
                raise ValueError(f"{path} and {other} are of one video: remove one of them")
            by_name[path.stem] = _Place(path)
    places = {video: by_name.get(video) or by_name.get(f"v_{video}") for video in videos}
    missing = [video for video, place in places.items() if place is None]
    if missing:
        few = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        raise FileNotFoundError(
            f"{features}: {len(missing)} of {len(places)} videos have no features: {few}; "
            f"{EXPECTED}. Extract the missing features too, or take the questions about these "
            "videos out of the json files."
        )
    return {video: place for video, place in places.items() if place}


class _Frames:
    """Reads sampled frames by video, and keeps the most recently used in RAM.

    `width` is F, taken from the first video.
    """

    def __init__(self, places: dict[str, _Place], frames: int, ram_bytes: int):
        self._settings = (places, frames, ram_bytes)
        self._first = next(iter(places))
        self.width = 0
        self.width = self._read(self._first).shape[1]
        self.read = functools.lru_cache(max(ram_bytes // (frames * self.width * 4), 1))(self._read)

    def __reduce__(self):  # another process fills a cache of its own
        return _Frames, self._settings

    def _read(self, video: str) -> np.ndarray:
        """f32 [n, F], where n is at most `frames`."""
        places, frames, _ = self._settings
        place = places[video]
        array = _array(place)
        if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.size:
            cause = f"expected numbers [frames, F], found {array.dtype} {list(array.shape)}"
            raise ValueError(f"{place}: {cause}")
        if self.width and array.shape[1] != self.width:
            raise ValueError(
                f"{place}: expected features of width {self.width}, as in {places[self._first]}, "
                f"found {array.shape[1]}; extract the features of all videos with one network"
            )
        taken = sample_frames(len(array), frames)
        with np.errstate(over="ignore"):
            array = array[taken].astype(np.float32)
        finite = np.isfinite(array).all(1)
        if not finite.all():
            cause = f"found nan or inf in frame {taken[np.argmin(finite)]}; extract them again"
            raise ValueError(f"{place}: expected finite features, {cause}")
        return array


def _array(place: _Place) -> np.ndarray:
    """The only array of a place, or the one with a known name."""
    array = _read_file(place, {".npy": _npy, ".npz": _npz}.get(place.path.suffix, _h5))
    if isinstance(array, list):
        raise ValueError(f"{place}: expected one array, or one named 'features', found {array}")
    return array


def _read_file(place: _Place, read: Callable[[_Place], T]) -> T:
    """Calls `read`; an error names the file."""
    suffix = place.path.suffix
    try:
        return read(place)
    except ModuleNotFoundError as error:
        cause = "h5py, which reads this file, is not installed: pip install 'rmjax[video]'"
        raise ModuleNotFoundError(f"{place.path}: {cause}") from error
    except Exception as error:  # what the three readers raise on a damaged file is not documented
        cause = f"cannot be read as {suffix} ({error}); extract it again"
        raise ValueError(f"{place}: {cause}") from error


def _npy(place: _Place) -> np.ndarray:
    with place.path.open("rb") as file:
        return _numbers(file)


def _npz(place: _Place) -> np.ndarray | list[str]:
    """The chosen array of an archive, or the names of all arrays."""
    with zipfile.ZipFile(place.path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        name = _chosen(members)
        if name is None:
            return [*members]
        # NumPy reads the header of the array in one piece, so the size of the member is bounded.
        _bounded((members[name].file_size,), np.dtype(np.uint8))
        with archive.open(members[name]) as file:
            return _numbers(file)


def _numbers(file: IO[bytes]) -> np.ndarray:
    """The array of an .npy file, whose size is checked before memory is allocated."""
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
    """The chosen array of an .h5 file or of one of its groups, or the names of all entries."""
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
            cause = "has its numbers in other files: copy them into this one"
            raise ValueError(f"{entry.name} {cause}")
        for shape in (entry.shape, entry.chunks or ()):
            _bounded(shape, entry.dtype)
        return entry[()]


def _own(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """An entry that the .h5 file itself holds. A link may lead to another file, and is refused."""
    import h5py

    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        cause = (
            f"is a link ({type(link).__name__}): copy the array that it points to into this file"
        )
        raise ValueError(f"{name} {cause}")
    return group[name]


def _chosen(names: Collection[str]) -> str | None:
    """The name that is known, or else the only name."""
    only = next(iter(names)) if len(names) == 1 else None
    return next((name for name in NAMES if name in names), only)


def _bounded(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises ValueError if an array is larger than `MOST_BYTES`, or has a negative axis."""
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > MOST_BYTES:
        cause = f"an array {list(shape)} of {size:,} bytes; at most {MOST_BYTES:,} are read"
        raise ValueError(cause)
