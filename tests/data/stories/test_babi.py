import io
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from rmjax.data.pipeline import eval_batches
from rmjax.data.stories import babi as module
from rmjax.data.stories.babi import ADVICE, open_babi, parse
from tests import FIXTURES

FIXTURE = FIXTURES / "babi"
RELEASE = FIXTURE / "tasks_1-20_v1-2"
TASKS = "1,3,8"
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def source(cache):
    return open_babi(str(FIXTURE), cache, tasks=TASKS)


@pytest.fixture(scope="module")
def alone(cache):
    return open_babi(str(FIXTURE), cache, tasks=TASKS, per_question=True)


def raw(name):
    """Reads a file independently: for each story, (statements before, question, answer) tuples."""
    stories = []
    for line in (RELEASE / name).read_text().split("\n")[:-1]:
        number, text = line.split(" ", 1)
        if number == "1":
            stories.append(([], []))
        statements, asked = stories[-1]
        if "\t" in text:
            question, answer, _ = text.split("\t")
            asked.append(([words(s) for s in statements], words(question), answer))
        else:
            statements.append(text)
    return [asked for _, asked in stories]


def words(text):
    return "".join(c for c in text.lower() if c.isalnum() or c in "' ").split()


@pytest.fixture(scope="module")
def stories():
    three = raw("en-10k/qa3_three-supporting-facts_train.PARTIAL-3.txt")
    eight = raw("en-10k/qa8_lists-sets_train.txt")
    tests = ("en-10k/qa3_three-supporting-facts_test.txt", "en-10k/qa8_lists-sets_test.txt")
    return {
        "train": raw("en-valid-10k/qa1_train.txt") + three[:-1] + eight[:-1],
        "valid": raw("en-valid-10k/qa1_valid.txt") + three[-1:] + eight[-1:],
        "test": raw("en-valid-10k/qa1_test.txt") + raw(tests[0]) + raw(tests[1]),
    }


def text_of(source, items, mask):
    """The words of each segment that has any."""
    rows = (row[kept] for row, kept in zip(items, mask, strict=True) if kept.any())
    return [[source.vocabulary[i] for i in row] for row in rows]


def joined(segments):
    return [word for segment in segments for word in segment]


def every(source, split):
    return source.fetch(split, np.arange(source.size(split)))


def test_one_story_word_for_word(source):
    story = source.fetch("train", np.array([1]))
    segments = text_of(source, story["items"][0], story["item_mask"][0])
    assert [" ".join(segment) for segment in segments] == [
        "bo walked to the barn",
        "cy moved to the attic",
        "ann's hat isn't on the hook in the attic where cy who is 12 put",
        "it down",
    ]
    questions = text_of(source, story["query"][0], story["word_mask"][0])
    assert questions == [["where", "is", who] for who in ("bo", "cy")]
    assert story["position"][0].tolist() == [1, 4, 0]
    assert story["query_mask"][0].tolist() == [True, True, False]
    assert [source.classes[c] for c in story["target"][0, :2]] == ["barn", "attic"]
    assert story["target"][0, 2] == 0 and not story["items"][~story["item_mask"]].any()
    assert not story["query"][~story["word_mask"]].any()


@pytest.mark.parametrize("segment_length", [1, 3, 5, 15])
def test_every_question_follows_what_the_file_has_before_it(cache, stories, segment_length):
    source = open_babi(str(FIXTURE), cache, tasks=TASKS, segment_length=segment_length)
    assert [source.size(split) for split in SPLITS] == [5, 3, 4]
    assert [len(stories[split]) for split in SPLITS] == [5, 3, 4]
    for split in SPLITS:
        examples = every(source, split)
        assert examples["example_id"].tolist() == list(range(source.size(split)))
        for row, asked in enumerate(stories[split]):
            assert examples["query_mask"][row].sum() == len(asked)
            for q, (statements, question, answer) in enumerate(asked):
                position = examples["position"][row, q]
                lengths = [-(-len(statement) // segment_length) for statement in statements]
                assert position == sum(lengths)
                written = examples["items"][row, :position], examples["item_mask"][row, :position]
                assert joined(text_of(source, *written)) == joined(statements)
                query = (examples[name][row, q : q + 1] for name in ("query", "word_mask"))
                assert text_of(source, *query) == [question]
                assert source.classes[examples["target"][row, q]] == answer


def test_a_question_alone_follows_its_part_of_the_story(source, alone):
    assert alone.positions_at_end and not source.positions_at_end and alone.num_queries == 1
    for split in SPLITS:
        stories, single, row = every(source, split), every(alone, split), 0
        assert "position" not in single
        items, mask = stories["items"], stories["item_mask"]
        for story in range(source.size(split)):
            for q in np.flatnonzero(stories["query_mask"][story]):
                before = (np.arange(items.shape[1]) < stories["position"][story, q])[:, None]
                assert alone.stream_id(split)[row] == story
                np.testing.assert_array_equal(single["items"][row], items[story] * before)
                np.testing.assert_array_equal(single["item_mask"][row], mask[story] & before)
                for name in ("query", "word_mask", "query_mask", "target"):
                    np.testing.assert_array_equal(single[name][row, 0], stories[name][story, q])
                row += 1
        assert row == alone.size(split)


def test_words_classes_groups_and_where_splits_come_from(source, alone):
    assert source.vocabulary[0] == "<unk>" and source.num_items == len(set(source.vocabulary))
    classes = "shed mill barn attic loft lamp,map nothing lamp map map,lamp"
    assert " ".join(source.classes) == classes
    assert source.questions[:7] == ("words", 0, 0, "class", len(source.classes), "error", False)
    assert source.metadata["splits"]["qa1"] == "en-valid-10k"
    assert "last tenth" in source.metadata["splits"]["qa8"]
    assert source.metadata["partial"] == {"qa3": 3}
    assert source.num_queries == 3 and source.max_items == 28 and not source.positions_at_end

    def sizes_of(source, split):
        return {name: int(mask.sum()) for name, mask in source.groups(split).items()}

    sizes = {split: sizes_of(source, split) for split in SPLITS}
    assert sizes["train"] == {"qa1": 6, "qa3": 2, "qa8": 2}
    assert sizes["valid"] == {"qa1": 1, "qa3": 1, "qa8": 1}
    assert sizes["test"] == {"qa1": 3, "qa3": 1, "qa8": 2}
    for split in SPLITS:
        assert (sum(source.groups(split).values()) == every(source, split)["query_mask"]).all()
        assert sizes_of(alone, split) == sizes[split]


def test_an_archive_gives_the_same_data_as_the_folder(tmp_path, source, cache):
    archives = [tmp_path / f"babi.tar{end}" for end in ("", ".gz", ".xz")]
    for path, mode in zip(archives, ("w", "w:gz", "w:xz"), strict=True):
        with tarfile.open(path, mode) as archive:
            archive.add(RELEASE, RELEASE.name)
    for path in (*archives, RELEASE):
        other = open_babi(str(path), str(tmp_path), tasks=TASKS)
        assert other.vocabulary == source.vocabulary and other.classes == source.classes
        for split in SPLITS:
            for name, values in every(source, split).items():
                np.testing.assert_array_equal(every(other, split)[name], values)


def test_max_sentences_keeps_the_last_sentences(source, stories, cache):
    short = open_babi(str(FIXTURE), cache, tasks="3", max_sentences=2)
    examples = every(short, "train")
    ((first, second),) = stories["train"][3:4]
    assert examples["items"].shape[1] == 2
    assert text_of(short, examples["items"][0], examples["item_mask"][0]) == second[0][-2:]
    assert examples["position"][0].tolist() == [0, 2]  # the last two of six sentences
    assert len(first[0]) == 3
    alone = open_babi(str(FIXTURE), cache, tasks="3", max_sentences=2, per_question=True)
    alone = every(alone, "train")
    for row, asked in enumerate((first, second)):
        assert text_of(short, alone["items"][row], alone["item_mask"][row]) == asked[0][-2:]
    longest = max(len(asked[-1][0]) for asked in stories["train"])
    same = open_babi(str(FIXTURE), cache, tasks=TASKS, max_sentences=longest)
    for name in ("items", "position"):
        np.testing.assert_array_equal(every(same, "train")[name], every(source, "train")[name])


def test_batches_are_cut_to_their_bucket(source):
    bucket, segments = source.buckets("train")
    settings = dict(seed=0, batch_size=2, segment_length=15, negatives=4)
    batches = list(eval_batches(source, "train", **settings))
    assert {batch.items.shape[1] for batch in batches} == {segments[b] for b in bucket}
    seen = np.concatenate([batch.example_id for batch in batches])
    assert sorted(seen[seen < source.size("train")]) == list(range(source.size("train")))
    words = sum(int(batch.item_mask.sum()) for batch in batches)
    assert words == every(source, "train")["item_mask"].sum()


AFTER = "a tab and an answer after the question"
ID = "a number, a space and a sentence"
FACTS = "one more tab and numbers from 1 to 1"
LIST = "a word, or several separated by commas"
END = "a question at its end (the file may be cut short: fetch it again)"
NO_END = "a question before its end"
WRONG = [  # (lines, line number, field, expected, found)
    ("1 A b.\n2 Where is A?\n", 2, "answer", AFTER, "Where is A?"),
    ("1 A b.\n2 Where? \t\t1\n", 2, "answer", "an answer after the tab", r"Where? \t\t1"),
    ("1 A b.\n3 B c.\n", 2, "ID", "1 or 2", "3"),
    ("1 A b.\n2 C?\tb\t1\n2 D?\tb\t1\n", 3, "ID", "1 or 3", "2"),
    ("2 A b.\n", 1, "ID", "1", "2"),
    ("1 A b.\nx B c.\n", 2, "ID", ID, "x B c."),
    ("1 A b.\n\n2 C?\tb\t1\n", 2, "ID", ID, ""),
    ("9" * 5000 + " A b.\n", 1, "ID", ID, "9" * 60 + "..."),
    ("", 1, "ID", "a line", "an empty file"),
    ("1 A b.\n\n", 1, "story", NO_END, "none"),
    ("1 A b.\n2 C?\tb\n", 2, "supporting facts", FACTS, ""),
    ("1 A b.\n2 C?\tb\t\n", 2, "supporting facts", FACTS, ""),
    ("1 A b.\n2 C?\tb\t2\n", 2, "supporting facts", FACTS, "2"),
    ("1 A b.\n2 C?\tb\tx\n", 2, "supporting facts", FACTS, "x"),
    ("1 A b.\n2 C?\tb c\t1\n", 2, "answer", LIST, "b c"),
    ("1 A b.\n2 C?\t,\t1\n", 2, "answer", LIST, ","),
    ("1 A b.\n2 C?\tb\t1\n3 D e.\n", 3, "story", END, "3 D e."),
    ("1 A b.\n2 .\n", 2, "sentence", "words", "."),
    ("1 A b.\n2 \tc\t1\n", 2, "sentence", "words", ""),
    ("1 A b.\n2 C?\tb\t1\n1 A b.\n2 C d.\n", 3, "story", NO_END, "none"),
    ("1 A b.\n1 C d.\n2 C?\td\t1\n", 1, "story", NO_END, "none"),
]


@pytest.mark.parametrize("text, line, field, expected, value", WRONG)
def test_a_malformed_line_is_named(text, line, field, expected, value):
    with pytest.raises(ValueError) as error:
        parse(Path("en/qa1.txt"), text, 0, {})
    place = f"en/qa1.txt, line {line}, field {field}"
    assert str(error.value) == f"{place}: expected {expected}, found '{value}'"


def release(folder, change=lambda content: content):
    """Makes a folder with task 8 of en-10k, in which one file is changed."""
    shutil.copytree(RELEASE / "en-10k", folder / "en-10k", ignore=lambda *_: ["qa1_", "qa3_"])
    path = folder / "en-10k" / "qa8_lists-sets_train.txt"
    path.write_bytes(change(path.read_bytes()))
    return path


def test_a_file_cut_anywhere_gives_an_error_or_a_warning(tmp_path, caplog):
    for path in sorted((RELEASE / "en-10k").glob("qa8_*.txt")):
        content, end = path.read_bytes(), 0
        for cut in range(len(content)):
            caplog.clear()
            short = tmp_path / path.name
            short.write_bytes(content[:cut])
            try:
                parse(*module.read_files((short,), ())[f"{tmp_path.name}/{path.name}"], 0, {})
            except ValueError as error:
                assert str(error).startswith(f"{short}, line ")
                continue
            lines = content[:cut].split(b"\n")
            if lines[-1]:
                assert f"{short}: line {len(lines)}, the last, has no end" in caplog.text
            else:  # nothing shows that lines are missing
                assert b"\t" in lines[-2]
                end += 1
        assert end < content.count(b"\n")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: b"\xef\xbb\xbf" + content, ""),
        (lambda content: content + b"\n \r\n", ""),
        (lambda content: content.replace(b"\n", b"\r\n"), ""),
        (lambda content: content.decode().encode("utf-16"), ""),
        (lambda content: content.rstrip(), "has no end"),
        (lambda content: content.replace(b".", b".\xe9"), "bytes are not UTF-8"),
    ],
)
def test_text_files_with_marks_blank_lines_and_other_encodings(tmp_path, caplog, change, message):
    read = {}
    for name, how in (("a", lambda content: content), ("b", change)):
        (tmp_path / name).mkdir()
        path = release(tmp_path / name, how)
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7")
        read[name] = open_babi(str(tmp_path / name), str(tmp_path / "cache"), tasks="8")
    assert message in caplog.text and bool(message) == ("qa8_lists-sets_train" in caplog.text)
    assert read["a"].vocabulary == read["b"].vocabulary and read["a"].classes == read["b"].classes
    for name, values in every(read["a"], "train").items():
        np.testing.assert_array_equal(every(read["b"], "train")[name], values)


def archived(path, name, content, **attributes):
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        for attribute, value in ({"size": len(content)} | attributes).items():
            setattr(member, attribute, value)
        archive.addfile(member, io.BytesIO(content))
    return str(path)


def test_links_and_large_members_of_an_archive_are_refused(tmp_path, monkeypatch):
    path, cache, name = tmp_path / "x.tar.gz", str(tmp_path / "cache"), "en-10k/qa1_a_train.txt"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        archived(path, name, b"", type=kind, linkname="/etc/hostname")
        with pytest.raises(ValueError, match=re.escape(f"{path / name}: a link or a device")):
            open_babi(str(path), cache)
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    archived(path, name, b" " * 101)
    message = f"{path / name}: 101 bytes, but no file of a task has over 100"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_babi(str(path), cache)
    archived(path, "x", b" " * (1 << 21), type=tarfile.GNUTYPE_LONGNAME)
    with pytest.raises(ValueError, match=re.escape(f"{path}: the archive is damaged")):
        open_babi(str(path), cache)


def test_a_malformed_file_leaves_nothing(tmp_path):
    shutil.copytree(RELEASE, tmp_path / "release")
    path = tmp_path / "release" / "en-valid-10k" / "qa1_valid.txt"
    path.write_text(path.read_text().replace("\t", " "))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2, field answer")):
        open_babi(str(tmp_path / "release"), str(tmp_path / "cache"), tasks="1")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    shutil.copy(RELEASE / "en-valid-10k" / "qa1_valid.txt", path)
    one = tmp_path / "release" / "en-10k" / "qa8_lists-sets_train.txt"
    one.write_text("".join(one.read_text().splitlines(True)[:6]))
    message = f"{one}, line 1, field story: expected two stories or more"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_babi(str(tmp_path / "release"), str(tmp_path / "cache"), tasks="8")


def test_a_task_without_official_splits_validates_on_the_last_tenth(tmp_path):
    shutil.copytree(RELEASE, tmp_path / "release")
    (tmp_path / "release" / "en-valid-10k" / "qa1_valid.txt").unlink()
    source = open_babi(str(tmp_path / "release"), str(tmp_path / "cache"), tasks="1")
    origin = "en-10k, the last tenth of its training stories as valid"
    assert source.metadata["splits"]["qa1"] == origin
    assert [source.size(split) for split in SPLITS] == [3, 1, 2]


def test_some_tasks_keep_the_words_and_answers_of_all(source, cache):
    eight = open_babi(str(FIXTURE), cache, tasks="8")
    assert eight.vocabulary == source.vocabulary and eight.classes == source.classes
    for split in SPLITS:
        assert list(eight.groups(split)) == ["qa8"]
        rows = np.flatnonzero(source.groups(split)["qa8"].any(1))
        assert 0 < len(rows) < source.size(split) and len(rows) == eight.size(split)
        mine, other = every(eight, split), source.fetch(split, rows)
        masks = dict(items="item_mask", query="word_mask")
        masks |= dict(target="query_mask", position="query_mask")
        for name, mask in masks.items():
            for row in range(len(rows)):
                kept, other_kept = (
                    mine[name][row][mine[mask][row]],
                    other[name][row][other[mask][row]],
                )
                np.testing.assert_array_equal(kept, other_kept)


@pytest.mark.parametrize("end, mode", [(".gz", "w:gz"), (".xz", "w:xz"), ("", "w")])
def test_a_damaged_archive_is_named(tmp_path, end, mode):
    path = tmp_path / f"babi.tar{end}"
    (tmp_path / "text").write_text("".join(f"{i} went to the {i * i}.\n" for i in range(5000)))
    with tarfile.open(path, mode) as archive:
        archive.add(tmp_path / "text", "en-10k/qa9_text.txt")
    content = path.read_bytes()
    damaged = [content[: len(content) // 2], b"nothing of the kind"]
    if end:  # a plain one has no checksum
        noise = np.random.default_rng(0).bytes(64)
        places = [int(share * len(content)) for share in np.linspace(0.1, 0.9, 20)]
        damaged += [content[:at] + noise + content[at + 64 :] for at in places]
        damaged += [content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged or cut short") as error:
            open_babi(str(path), str(tmp_path / "cache"))
        assert str(path) in str(error.value) and ADVICE in str(error.value)


def test_an_error_of_a_missing_file_names_the_download(tmp_path):
    (tmp_path / "en-10k").mkdir()
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "en-10k", "en-10k")
    for directory in ("", str(tmp_path), str(tmp_path / "none"), str(tmp_path / "other.tar")):
        with pytest.raises(FileNotFoundError) as error:
            open_babi(directory, str(tmp_path / "cache"))
        assert "en-10k/qa1_..._train.txt" in str(error.value) and ADVICE in str(error.value)
        assert (directory or "data.dir, which is empty") in str(error.value)
    for tasks, name in (("", "qa2_..._train.txt"), ("1,20", "qa20_..._train.txt")):
        message = re.escape(f"en-10k/{name} not found in {RELEASE}")
        with pytest.raises(FileNotFoundError, match=message):
            open_babi(str(FIXTURE), str(tmp_path / "cache"), tasks=tasks)
    with pytest.raises(FileNotFoundError, match="en/qa1_"):
        open_babi(str(FIXTURE), str(tmp_path / "cache"), subset="en", tasks="1")
    moved = shutil.copytree(RELEASE, tmp_path / "elsewhere", copy_function=shutil.copy2)
    message = re.escape(f"qa2_..._train.txt not found in {moved};")
    with pytest.raises(FileNotFoundError, match=message):  # prepared before, from another folder
        open_babi(str(moved), str(tmp_path / "cache"), tasks="2")
    half = tmp_path / "half" / "en-10k"
    half.mkdir(parents=True)
    shutil.copy(RELEASE / "en-10k" / "qa8_lists-sets_train.txt", half)
    message = re.escape(f"en-10k/qa1_..._train.txt not found in {half.parent},")
    with pytest.raises(FileNotFoundError, match=message):
        open_babi(str(half.parent), str(tmp_path / "cache"), tasks="8")
    assert "tasks_1-20_v1-2.tar.gz" in ADVICE


@pytest.mark.parametrize("tasks", ["9" * 5000, "0", "21", "1,,2", "one", "1;2", "-1", "1.5", ","])
def test_tasks_are_numbers(tasks, tmp_path):
    message = re.escape(f"tasks={tasks!r}: expected numbers from 1 to 20")
    with pytest.raises(ValueError, match=message):
        open_babi(str(FIXTURE), str(tmp_path), tasks=tasks)


def test_every_run_warns_of_a_partial_task(cache, caplog):
    for _ in range(2):
        caplog.clear()
        open_babi(str(FIXTURE), cache, tasks=TASKS)
        assert (
            "qa3: the training file is only a part of the release's, with 3 questions"
            in caplog.text
        )


@pytest.mark.parametrize("size", ["9" * 30, "9" * 5000])
def test_an_impossible_number_in_an_archive_header_is_named(tmp_path, size):
    path = tmp_path / "babi.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        note = tarfile.TarInfo("note")
        note.type, content = tarfile.XHDTYPE, f"{size} path=en-10k/qa1_a_train.txt\n".encode()
        note.size = len(content)
        archive.addfile(note, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("x"))
    with pytest.raises(ValueError, match=re.escape(f"{path}: the archive is damaged or cut short")):
        open_babi(str(path), str(tmp_path / "cache"))
