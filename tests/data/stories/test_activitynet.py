import io
import json
import pickle
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
from absl import logging

from rmjax.data.pipeline import batches, eval_batches
from rmjax.data.stories import activitynet as module
from rmjax.data.stories.activitynet import (
    ADVICE,
    TYPES,
    open_activitynet,
    question_only,
    sample_frames,
)
from rmjax.data.stories.text import tokenize
from tests import FIXTURES

FIXTURE = FIXTURES / "activitynet-qa"
FILES = [f"{split}_{kind}.json" for split in ("train", "val", "test") for kind in "qa"]
# {split: [(video, question, answer, type)]}; the questions of a video are not side by side.
QA = {
    "train": [
        ("aa", "is it night", "no", 3),
        ("-b", "is it day", "no", 3),
        ("aa", "is it day", "yes", 3),
        ("-b", "is the man's hat red", "yes", 3),
        ("aa", "what color is the hat", "black", 4),
        ("v_c", "what color is the car", "azure", 4),
        ("v_c", "is it late", "no", 3),
        ("v_c", "what color is the sky", "black", 4),
        ("aa", "how many men are there", "zero", 7),
    ],
    "val": [("d", "what color is it", "red", 4)],
    "test": [
        ("e", "what is behind the man", "hill", 1),
        ("f", "what color is the hat", "black", 4),
        ("f", "is it raining", "no", 3),
        ("f", "why", "zero", 8),
    ],
}
LENGTHS = {"aa": 3, "-b": 7, "v_c": 1, "d": 12, "e": 5, "f": 40}


def write(directory, qa=QA):
    directory.mkdir(exist_ok=True)
    for split, rows in qa.items():
        questions, answers = [], []
        for number, (video, question, answer, kind) in enumerate(rows):
            name = f"v_{video}_{number}"
            questions.append(dict(video_name=video, question=question, question_id=name))
            answers.append(dict(answer=answer, type=kind, question_id=name))
        (directory / f"{split}_q.json").write_text(json.dumps(questions))
        (directory / f"{split}_a.json").write_text(json.dumps(answers[::-1]))
    return str(directory)


def features_of(directory, lengths=LENGTHS, width=4):
    """Writes a file for each video, and returns {video: f32 [frames, width]}.

    A file has one array or two, and its name has a prefix or none.
    """
    directory.mkdir(exist_ok=True)
    rng, videos = np.random.default_rng(0), {}
    for number, (video, length) in enumerate(lengths.items()):
        videos[video] = rng.normal(size=(length, width)).astype(np.float32)
        others = {"times": np.arange(length)} if number % 2 else {}
        name = f"{'v_' * (number % 3 == 0)}{video}.npz"
        np.savez(directory / name, features=videos[video], **others)
    np.savez(directory / "not-asked-about.npz", np.zeros(1))
    return videos


def places(tmp_path):
    return write(tmp_path / "qa"), str(tmp_path / "features"), str(tmp_path / "cache")


@pytest.fixture
def made(tmp_path):
    """(source of 9 frames in segments of 4, {video: frames})."""
    videos = features_of(tmp_path / "features")
    return open_activitynet(*places(tmp_path), segment_length=4, frames=9, answers=4), videos


def test_the_fixture(tmp_path):
    np.savez(tmp_path / "v_abcdefghijk.npz", np.ones((30, 8), np.float32))
    source = open_activitynet(str(FIXTURE), str(tmp_path), str(tmp_path / "cache"))
    assert source.questions[:7] == (
        "words",
        0,
        len(source.vocabulary),
        "class",
        2,
        "accuracy",
        False,
    )
    assert source.classes == ["black", "yes"]
    assert source.videos == dict.fromkeys(("train", "valid", "test"), ["abcdefghijk"])
    assert (source.num_items, source.max_items) == (0, 200)
    assert (source.num_queries, source.feature_width) == (2, 8)
    assert source.positions_at_end and source.stream_id("valid").tolist() == [0]
    assert source.metadata["counts"]["test"] == {"videos": 1, "questions": 2, "outside": 0}
    example = source.fetch("test", np.array([0]))
    assert example["items"].shape == (1, 10, 20, 8) and example["item_mask"].sum() == 30
    query = example["query"][0]
    words = [" ".join(source.vocabulary[word] for word in row[row > 0]) for row in query]
    assert words == ["is the person indoors", "what color is the hat"]
    assert example["word_mask"].sum(-1).tolist() == [[4, 5]] and example["query_mask"].all()
    assert example["target"].tolist() == [[1, 0]] and example["example_id"].tolist() == [0]


def test_an_example_is_a_video_with_all_its_questions(made):
    source, videos = made
    # "zero" is as frequent as "azure", and is not among the first four.
    assert source.classes == ["no", "black", "yes", "azure"]
    assert source.videos == {"train": ["aa", "-b", "v_c"], "valid": ["d"], "test": ["e", "f"]}
    for split, ours in (("train", "train"), ("val", "valid"), ("test", "test")):
        examples = source.fetch(ours, np.arange(source.size(ours)))
        for row, video in enumerate(source.videos[ours]):
            asked = [r for r in QA[split] if r[0] == video]
            asked = [r for r in asked if r[2] in source.classes or split != "train"]
            mask = [i < len(asked) for i in range(source.num_queries)]
            assert examples["query_mask"][row].tolist() == mask
            for place, (_, question, answer, kind) in enumerate(asked):
                words = tokenize(question)
                words = [word if word in source.vocabulary else "<unk>" for word in words]
                query = examples["query"][row, place][examples["word_mask"][row, place]]
                assert [source.vocabulary[word] for word in query] == words
                target = source.classes.index(answer) if answer in source.classes else 4
                assert examples["target"][row, place] == target
                groups = {name for name, of in source.groups(ours).items() if of[row, place]}
                assert groups == {TYPES[kind]}
            frames = videos[video][sample_frames(len(videos[video]), 9)]
            items, mask = examples["items"][row], examples["item_mask"][row]
            np.testing.assert_array_equal(items[mask], frames)
            assert mask.ravel().tolist() == [i < len(frames) for i in range(12)]
            assert not items[~mask].any()
    assert examples["items"].dtype == np.float32 and examples["items"].shape == (2, 3, 4, 4)
    counts = {split: tuple(counts.values()) for split, counts in source.metadata["counts"].items()}
    # (videos, questions, outside)
    assert counts == {"train": (3, 9, 1), "valid": (1, 1, 1), "test": (2, 4, 2)}


def test_the_log_counts_answers_outside_the_classes(tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    question_only(write(tmp_path), str(tmp_path / "cache"), answers=4)
    for message in (
        "valid: 1 questions of 1 videos; the answers to 1 questions (counted as wrong) are not",
        "train: 9 questions of 3 videos; the answers to 1 questions (left out) are not among the 4",
    ):
        assert message in caplog.text


def test_batches(made):
    source, videos = made
    settings = dict(seed=0, batch_size=2, segment_length=4, negatives=3)
    batch = next(batches(source, "train", num_steps=1, **settings))
    assert batch.items.shape == (2, 3, 4, 4) and batch.query.shape == (2, source.num_queries, 5)
    assert batch.position is None and batch.negative_mask.all()
    for row, index in enumerate(batch.example_id):
        own = source.videos["train"][index]
        others = np.concatenate([frames for video, frames in videos.items() if video != own])
        assert all((frame == others).all(1).any() for frame in batch.negative_items[row])
    asked = sum(int(batch.query_mask.sum()) for batch in eval_batches(source, "test", **settings))
    assert asked == len(QA["test"])


@pytest.mark.parametrize("frames", [1, 2, 20])
@pytest.mark.parametrize("count", [1, 2, 3, 19, 20, 21, 39, 40, 58, 977])
def test_frames_are_spread_evenly(count, frames):
    taken = sample_frames(count, frames).tolist()
    if count <= frames:
        assert taken == list(range(count))
    else:
        assert taken == [round(i * (count - 1) / (frames - 1)) if i else 0 for i in range(frames)]
        assert taken == sorted(set(taken)) and taken[0] == 0
        assert frames == 1 or taken[-1] == count - 1


@pytest.mark.parametrize("room", [1, 2])
def test_frames_are_read_once_while_there_is_room_for_them(tmp_path, room):
    features_of(tmp_path / "features")
    ram_bytes = room * 9 * 4 * 4
    source = open_activitynet(*places(tmp_path), segment_length=4, frames=9, ram_bytes=ram_bytes)
    first = source.fetch("test", np.arange(2))["items"]
    other_process = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(other_process.fetch("test", np.arange(2))["items"], first)
    for path in (tmp_path / "features").iterdir():
        path.unlink()
    if room == 2:
        np.testing.assert_array_equal(source.fetch("test", np.arange(2))["items"], first)
    else:
        with pytest.raises(ValueError, match="e.npz: cannot be read as .npz .*No such file"):
            source.fetch("test", np.arange(2))


def test_h5(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is optional: pip install h5py")
    features_of(tmp_path / "features")
    frames = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    for path in (tmp_path / "features").glob("*f.npz"):
        path.unlink()
    with h5py.File(tmp_path / "features" / "v_f.h5", "w") as file:
        file["anything"] = frames
    source = open_activitynet(*places(tmp_path))
    examples = source.fetch("test", np.array([1]))
    np.testing.assert_array_equal(examples["items"][examples["item_mask"]], frames)
    (tmp_path / "features" / "v_f.h5").write_bytes(b"nothing")
    source = open_activitynet(*places(tmp_path))
    with pytest.raises(ValueError, match="v_f.h5: cannot be read as .h5"):
        source.fetch("test", np.array([1]))


@pytest.mark.parametrize("suffix", [".npy", ".h5", ".hdf5"])
def test_a_file_of_any_kind_for_each_video(tmp_path, suffix):
    h5py = pytest.importorskip("h5py", reason="h5py is optional: pip install h5py")
    videos, where = features_of(tmp_path / "features"), places(tmp_path)
    for path in (tmp_path / "features").glob("*.npz"):
        (path.parent / f"._{path.stem}{suffix}").write_bytes(b"\0\5\x16\7")
        array = videos.get(path.stem, videos.get(path.stem.removeprefix("v_")))
        if array is None:
            continue
        path.unlink()
        if suffix == ".npy":
            np.save(path.with_suffix(suffix), array)
            continue
        with h5py.File(path.with_suffix(suffix), "w") as file:
            file.create_dataset("features", data=array, chunks=True, compression="gzip")
            file["times"] = np.arange(3)
    examples = open_activitynet(*where).fetch("test", np.array([1]))
    np.testing.assert_array_equal(examples["items"][examples["item_mask"]], videos["f"])
    np.save(tmp_path / "features" / "x.npy", np.zeros((2, 4)))
    np.savez(tmp_path / "features" / "x.npz", np.zeros((2, 4)))
    with pytest.raises(ValueError, match="x.npz and x.npy are of one video: remove one of them"):
        open_activitynet(*where)


@pytest.mark.parametrize("grouped", [True, False])
def test_one_h5_file_of_all_videos(tmp_path, grouped):
    h5py = pytest.importorskip("h5py", reason="h5py is optional: pip install h5py")
    path, videos = tmp_path / "sub_activitynet_v1-3.c3d.hdf5", features_of(tmp_path / "features")
    where = write(tmp_path / "qa"), str(path), str(tmp_path / "cache")
    with h5py.File(path, "w") as file:
        for number, (video, array) in enumerate(videos.items()):
            name = f"{'v_' * (number % 2)}{video}"
            file[f"{name}/c3d_features" if grouped else name] = array
            if grouped and number % 2:
                file[f"{name}/times"] = np.arange(len(array))
    source = open_activitynet(*where)
    for split, names in source.videos.items():
        examples = pickle.loads(pickle.dumps(source)).fetch(split, np.arange(len(names)))
        for row, video in enumerate(names):
            items = examples["items"][row][examples["item_mask"][row]]
            np.testing.assert_array_equal(items, videos[video])
    with h5py.File(path, "a") as file:
        del file["v_f"]
    message = f"{path.name}: 1 of 6 videos have no features: f; expected a folder"
    with pytest.raises(FileNotFoundError, match=message):
        open_activitynet(*where)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read as .hdf5"):
        open_activitynet(*where)


def test_h5_files_lead_to_no_other_file(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is optional: pip install h5py")
    videos, where = features_of(tmp_path / "features"), places(tmp_path)
    (path,) = (tmp_path / "features").glob("*f.npz")
    path.unlink()
    path, other = path.with_suffix(".h5"), str(tmp_path / "other.h5")
    np.zeros(40 * 4, np.float32).tofile(tmp_path / "other")
    with h5py.File(other, "w") as file:
        file["features"] = videos["f"]
    layout = h5py.VirtualLayout((40, 4), np.float32)
    layout[:] = h5py.VirtualSource(other, "features", (40, 4))
    external = [(str(tmp_path / "other"), 0, h5py.h5f.UNLIMITED)]

    def dataset(*args, **options):
        return lambda file: file.create_dataset("features", *args, **options)

    def link(target):
        return lambda file: file.__setitem__("features", target)

    no_array = "features is no array of numbers"
    elsewhere = "features has its numbers in other files"
    for store, message in (
        (dataset((40, 4), "f4", external=external), elsewhere),
        (lambda file: file.create_virtual_dataset("features", layout), elsewhere),
        (link(h5py.ExternalLink(other, "features")), "is a link .ExternalLink.: copy"),
        (link(h5py.SoftLink("/other")), "features is a link .SoftLink.: copy"),
        (lambda file: file.create_group("features"), no_array),
        (dataset(data=h5py.Empty("f4")), no_array),
        (dataset(data=["a", "b"]), no_array),
        (dataset((1 << 40, 4), "f4", chunks=(4, 4)), "of 17,592,186,044,416 bytes"),
    ):
        with h5py.File(path, "w") as file:
            store(file)
        source = open_activitynet(*where)
        with pytest.raises(ValueError, match=f"f.h5: cannot be read as .h5 .*{message}"):
            source.fetch("test", np.array([1]))


def test_arrays_of_gigabytes_are_refused_before_allocation(made, tmp_path, monkeypatch):
    source, _ = made
    (path,) = (tmp_path / "features").glob("*f.npz")
    for shape in ((1 << 36, 4), (1 << 70, 4), (-1, 4)):
        header = io.BytesIO()
        fields = dict(descr="<f4", fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(header, fields)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("features.npy", header.getvalue() + bytes(64))
        message = r"f.npz: cannot be read as .npz \(an array \[.* bytes; at most"
        with pytest.raises(ValueError, match=message):
            source.fetch("test", np.array([1]))
    np.savez_compressed(path, np.zeros((100, 4), np.float32))
    monkeypatch.setattr(module, "MOST_BYTES", 1700)  # the array alone has 1,600
    message = r"an array \[1728\] of 1,728 bytes; at most 1,700 are read"
    with pytest.raises(ValueError, match=message):
        source.fetch("test", np.array([1]))


def test_an_encrypted_archive_is_named(made, tmp_path):
    source, _ = made
    (path,) = (tmp_path / "features").glob("*f.npz")
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + place] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"f.npz: cannot be read as .npz \(.*encrypted"):
        source.fetch("test", np.array([1]))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: b"\xef\xbb\xbf" + content + b"\n\n", ""),
        (lambda content: content.decode().encode("utf-16"), ""),
        (lambda content: content.replace(b"is it day", b"is it day \xe9"), "2 bytes are not UTF-8"),
    ],
)
def test_json_files_with_marks_blank_lines_and_other_encodings(
    made, tmp_path, change, message, caplog
):
    source, _ = made
    path = tmp_path / "qa" / "train_q.json"
    path.write_bytes(change(path.read_bytes()))
    other = question_only(str(tmp_path / "qa"), str(tmp_path / "cache"), answers=4)
    assert (f"{path}: {message}" in caplog.text) == bool(message)
    queries = [s.fetch("train", np.arange(3))["query"] for s in (source, other)]
    np.testing.assert_array_equal(*queries)


def test_h5_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "abcdefghijk.h5").write_bytes(b"")
    message = r"abcdefghijk.h5: h5py, .* pip install 'rmjax\[video\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        open_activitynet(str(FIXTURE), str(tmp_path), str(tmp_path / "cache"))


def test_the_question_only_reference_is_a_plain_count(tmp_path):
    rng, answers = np.random.default_rng(0), ["no", "yes", "two", "red", "five"]

    def some(count, videos):
        words = rng.choice(["is", "it", "red", "who"], (count, 4), p=[0.4, 0.3, 0.2, 0.1])
        rows = []
        for row, w in enumerate(words):
            answer = answers[min(rng.geometric(0.4), 5) - 1]
            rows.append((f"{videos}{row % 7}", " ".join(w[: 1 + row % 4]), answer, 8))
        return rows

    qa = {"train": some(200, "a"), "val": some(20, "b"), "test": some(30, "c")}
    source = question_only(write(tmp_path, qa), str(tmp_path / "cache"), answers=4)
    assert len(source.classes) == 4
    got = source.references("test")["question only"]
    assert got.dtype == np.int32 and got.shape == (7, source.num_queries)
    backed_off = 0
    for row, video in enumerate(source.videos["test"]):
        for place, (_, question, *_) in enumerate(r for r in qa["test"] if r[0] == video):
            words = question.split()
            while True:
                same = [r[2] for r in qa["train"] if r[1].split()[: len(words)] == words]
                same = Counter(answer for answer in same if answer in source.classes)
                if same:
                    break
                words, backed_off = words[:-1], backed_off + 1
            # `max` returns the first of equally frequent classes.
            expected = max(source.classes, key=lambda answer: same[answer])
            assert source.classes[got[row, place]] == expected
    assert backed_off > 5


def test_question_only_has_streams_without_an_item(tmp_path):
    source = question_only(write(tmp_path), str(tmp_path / "cache"))
    examples = source.fetch("train", np.arange(3))
    assert not examples["item_mask"].any() and examples["query_mask"].sum() == 9
    assert source.num_items == len(source.vocabulary) and source.questions.words == 0


def broken(directory, name, change):
    """Writes the files, and changes the text of one of them."""
    write(directory)
    path = directory / name
    path.write_text(change(path.read_text()))
    return path


def constant(text):
    return lambda content: text


def with_entry(**changes):
    return lambda content: json.dumps([json.loads(content)[0] | changes, *json.loads(content)[1:]])


BROKEN = [  # (file, change of its text, message after the name of the file)
    ("val_a.json", constant("[]"), r": expected a list of entries, found '\[\]'"),
    ("val_q.json", constant("{}"), ": expected a list of entries, found '{}'"),
    ("train_q.json", lambda content: content[:-9], ": no whole JSON: line 1, column"),
    ("train_q.json", constant("[" * 100_000), ": JSON that cannot be read: nested too deep"),
    ("train_a.json", constant("9" * 5000), ": JSON that cannot be read: .*4300 digits"),
    ("train_a.json", with_entry(type=10**4000), ", question 'v_aa_8', key 'type': expected 0 to 8"),
    ("train_a.json", with_entry(type=9), ", question 'v_aa_8', key 'type': .* 0 to 8, found 9"),
    ("train_a.json", with_entry(type="3"), ", entry 1, key 'type': expected int, found '3'"),
    ("train_a.json", with_entry(answer=1), ", entry 1, key 'answer': expected str, found 1"),
    ("train_q.json", with_entry(question=None), ", entry 1, key 'question': .* str, found None"),
    ("test_q.json", with_entry(video_name=7), ", entry 1, key 'video_name': .* str, found 7"),
    ("test_q.json", with_entry(question_id="v_f_2"), ", entry 3: .* 'v_f_2' occurs twice"),
    ("val_q.json", constant('["why"]'), ", entry 1, key 'question_id': .* str, found 'why'"),
]


def test_a_question_without_an_answer_is_named(tmp_path):
    def change(content):
        return json.dumps([entry for i, entry in enumerate(json.loads(content)) if i != 2])

    broken(tmp_path / "qa", "test_a.json", change)
    message = "test_q.json: question 'v_f_1' of video 'f' has no answer in .*test_a.json; take both"
    with pytest.raises(ValueError, match=message):
        question_only(str(tmp_path / "qa"), str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name, change, message", BROKEN)
def test_a_broken_file_is_named_and_leaves_nothing(tmp_path, name, change, message):
    broken(tmp_path / "qa", name, change)
    with pytest.raises(ValueError, match=name + message):
        question_only(str(tmp_path / "qa"), str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_an_error_of_a_missing_file_names_the_download(tmp_path):
    for name in FILES:
        write(tmp_path / "qa")
        (tmp_path / "qa" / name).unlink()
        with pytest.raises(FileNotFoundError) as error:
            question_only(str(tmp_path / "qa"), str(tmp_path / "cache"))
        assert name in str(error.value) and ADVICE in str(error.value)
    (tmp_path / "clone").mkdir()
    write(tmp_path / "clone" / "dataset")
    assert question_only(str(tmp_path / "clone"), str(tmp_path / "cache")).size("train") == 3


def test_missing_features_are_named(tmp_path):
    qa, cache = write(tmp_path / "qa"), str(tmp_path / "cache")
    for features, cause in (("", "it is empty"), (str(tmp_path / "none"), "no such folder")):
        message = f"config.data.activitynet.features={features}: {cause}; expected a folder .*.npz"
        with pytest.raises(FileNotFoundError, match=message):
            open_activitynet(qa, features, cache)
    features_of(tmp_path / "features", {"aa": 3, "f": 2})
    message = "features: 4 of 6 videos have no features: -b, v_c, d, e; expected a f"
    with pytest.raises(FileNotFoundError, match=message):
        open_activitynet(qa, str(tmp_path / "features"), cache)
    (tmp_path / "empty").mkdir()
    message = "6 of 6 videos have no features: aa, -b, v_c, d, e, ...; expected a f"
    with pytest.raises(FileNotFoundError, match=message):
        open_activitynet(qa, str(tmp_path / "empty"), cache)


NAN = np.ones((40, 4), np.float32)
NAN[10, 2] = np.nan  # the third of nine frames: round(2 * 39 / 8)
NUMBERS = r"expected numbers \[frames, F\], found "
ONE_ARRAY = "expected one array, or one named 'features', found "
WRONG = [  # (arrays in the file of video f, message)
    ([np.ones((5, 3), np.float32)], "expected features of width 4, as in .*v_aa.npz, found 3; ext"),
    ([np.ones((5, 2, 2), np.float32)], NUMBERS + r"float32 \[5, 2, 2\]"),
    ([np.ones(4, np.float32)], NUMBERS + r"float32 \[4\]"),
    ([np.ones((0, 4), np.float32)], NUMBERS + r"float32 \[0, 4\]"),
    ([np.full((2, 4), "a")], NUMBERS + r"<U1 \[2, 4\]"),
    ([NAN], "expected finite features, found nan or inf in frame 10; extract them again"),
    ([NAN, NAN], ONE_ARRAY + r"\['arr_0', 'arr_1'\]"),
    ([], ONE_ARRAY + r"\[\]"),
    ([np.array([{}])], "cannot be read as .npz .*allow_pickle"),
]


@pytest.mark.parametrize("arrays, message", WRONG)
def test_wrong_features_name_their_file(made, tmp_path, arrays, message):
    source, _ = made
    (path,) = (tmp_path / "features").glob("*f.npz")
    np.savez(path, *arrays)
    with pytest.raises(ValueError, match=f"f.npz: {message}"):
        source.fetch("test", np.array([1]))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="f.npz: cannot be read as .npz .*; extract it again"):
        source.fetch("test", np.array([1]))


def test_sizes_below_one(tmp_path):
    features_of(tmp_path / "features")
    for option in ("segment_length", "frames", "answers"):
        with pytest.raises(ValueError, match=f"{option}=0.* expected 1 or more"):
            open_activitynet(*places(tmp_path), **{option: 0})
