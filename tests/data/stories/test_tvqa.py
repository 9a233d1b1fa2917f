import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rmjax.data.stories.tvqa import ADVICE, ANSWERS, NAMES, open_tvqa
from tests import FIXTURES

FIXTURE = FIXTURES / "tvqa"
SPLITS = ("train", "valid", "test")
TRAIN, VAL, SUBTITLES = NAMES
SEED = 3  # holds out a clip with one question


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def source(cache):
    return open_tvqa(str(FIXTURE), cache, SEED, min_count=1)


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(FIXTURE, tmp_path / "tvqa"))


def rows(name, directory=FIXTURE):
    return [json.loads(line) for line in (directory / name).read_text().split("\n") if line]


def clips(source, split):
    """{clip: (example, questions)}; an example is identified by its questions."""
    asked = {}
    for row in rows(VAL if split == "test" else TRAIN):
        asked.setdefault(row["vid_name"], []).append(row)
    texts = {clip: [known(source, q["q"]) for q in questions] for clip, questions in asked.items()}
    examples = source.fetch(split, np.arange(source.size(split)))
    named = {}
    for row in range(source.size(split)):
        example = {name: values[row] for name, values in examples.items()}
        questions = lines(source, example["query"], example["word_mask"])
        same = (clip for clip, text in texts.items() if text == questions)
        name = next(clip for clip in same if clip not in named)
        named[name] = example, asked[name]
    return named


def lines(source, words, mask):
    kept = (row[present] for row, present in zip(words, mask, strict=True))
    text = [" ".join(source.vocabulary[i] for i in row) for row in kept]
    return [line for line in text if line]


def known(source, text):
    words = "".join(c for c in text.lower() if c.isalnum() or c in " '").replace(" ' ", " ").split()
    return " ".join(word if word in source.vocabulary else "<unk>" for word in words) or "<unk>"


@pytest.mark.parametrize("seed", range(4))
def test_every_clip_is_in_one_split_with_all_subtitles_and_questions(cache, seed):
    source = open_tvqa(str(FIXTURE), cache, seed, min_count=1, segment_length=6)
    assert [source.size(split) for split in SPLITS] == [3, 1, 2] and source.positions_at_end
    subtitles = {
        row["vid_name"]: " ".join(line["text"] for line in row["sub"]) for row in rows(SUBTITLES)
    }
    named = {split: clips(source, split) for split in SPLITS}
    trained = {row["vid_name"] for row in rows(TRAIN)}
    assert sorted([*named["train"], *named["valid"]]) == sorted(trained)
    assert set(named["test"]) == {row["vid_name"] for row in rows(VAL)}
    for split in SPLITS:
        for clip, (e, questions) in named[split].items():
            text = known(source, subtitles[clip]).split() if subtitles.get(clip) else []
            ids = [source.vocabulary.index(word) for word in text]
            assert e["items"][e["item_mask"]].tolist() == ids
            full, rest = divmod(len(text), 6)
            assert [n for n in e["item_mask"].sum(-1) if n] == [6] * full + [rest] * (rest > 0)
            pool = lines(source, e["candidates"], e["candidate_mask"])
            for q, question in enumerate(questions):
                assert e["choice_mask"][q].all() and e["target"][q] == question["answer_idx"]
                answers = [known(source, question[a]) for a in ANSWERS]
                assert [pool[c] for c in e["choices"][q]] == answers
            assert e["query_mask"].sum() == len(questions)


def test_one_clip_word_for_word(source):
    e, _ = clips(source, "train")["castle_s01e01_seg01_clip_01"]
    text = (
        "bo one lantern two lanterns three lanterns four lanterns five lanterns six ada don't "
        "count them again bo why"
    )
    assert lines(source, e["items"], e["item_mask"]) == [text]
    candidates = ["a red cup", "a map", "her hat", "nothing", "a lantern"]
    assert lines(source, e["candidates"], e["candidate_mask"]) == candidates
    assert source.questions[:7] == ("words", 0, 0, "choice", 0, "accuracy", False)
    assert source.groups("train") == {} and (source.also("train") == -1).all()


def test_a_clip_without_subtitles_is_an_empty_stream(source, cache, caplog):
    open_tvqa(str(FIXTURE), cache, SEED, min_count=1)
    examples = {clip: e for split in SPLITS for clip, (e, _) in clips(source, split).items()}
    empty = {clip for clip, e in examples.items() if not e["item_mask"].any()}
    # One is not in the file of subtitles; the other has an entry without lines.
    assert empty == {"s02e03_seg02_clip_07", "s02e03_seg02_clip_08"}
    counts = source.metadata["without_subtitles"]
    assert sum(counts.values()) == 2 and counts["test"] == 0
    for split, count in counts.items():
        message = f"TVQA {split}: {count} of {source.size(split)} clips have no subtitles."
        assert (message in caplog.text) == (count > 0)


def test_max_words_keeps_the_first_words(cache):
    source = open_tvqa(str(FIXTURE), cache, SEED, min_count=1, max_words=4)
    e, _ = clips(source, "test")["castle_s01e02_seg01_clip_00"]
    assert lines(source, e["items"], e["item_mask"]) == ["<unk> <unk> <unk> the"]
    assert source.max_items == 4


def many(directory, count):
    row = rows(TRAIN)[0]
    made = (row | {"vid_name": f"clip_{i:03}", "q": f"who is {i}"} for i in range(count))
    made = (json.dumps(question) for question in made)
    (directory / TRAIN).write_text("\n".join(f"{line}\n{line}" for line in made))


@pytest.mark.parametrize("fraction, held_out", [(0.1, 4), (0.5, 20), (0.0, 1)])
def test_the_seed_draws_the_validation_clips(copy, fraction, held_out):
    many(copy, 40)
    trained = {}
    for seed in (0, 1):
        options = dict(min_count=1, valid_fraction=fraction)
        source = open_tvqa(str(copy), str(copy / "cache"), seed, **options)
        assert (source.size("valid"), source.size("train")) == (held_out, 40 - held_out)
        e = source.fetch("train", np.arange(40 - held_out))
        assert (e["query_mask"].sum(1) == 2).all()
        trained[seed] = set(lines(source, e["query"][:, 0], e["word_mask"][:, 0]))
        assert len(trained[seed]) == 40 - held_out
    assert trained[0] != trained[1]


EMPTY = '{"vid_name": "s02e03_seg02_clip_08", "sub": []}'
NO_COLON = "JSON (Expecting ':' delimiter)"
CASTLE = '"vid_name": "castle_s01e02'
WRONG = [  # (file, text, replacement, line, key, expected, part of the value)
    (TRAIN, '"q": "Where does', '"q: "Where does', 2, "line", NO_COLON, '{"a0": "A red cup"'),
    (TRAIN, '"a3": "Bo", ', "", 3, "a3", "a string", "no such key"),
    (TRAIN, '"a0": "The clerk"', '"a0": 7', 3, "a0", "a string", "7"),
    (TRAIN, '"answer_idx": 3', '"answer_idx": 5', 4, "answer_idx", "0 to 4", "5"),
    (TRAIN, '"answer_idx": 3', '"answer_idx": "3"', 4, "answer_idx", "0 to 4", "3"),
    (TRAIN, ', "answer_idx": 3', "", 4, "answer_idx", "0 to 4", "None"),
    (VAL, CASTLE, CASTLE.replace("_name", ""), 2, "vid_name", "a string", "no such key"),
    (SUBTITLES, '"sub": []', '"subs": []', 3, "sub", "a list", "None"),
    (SUBTITLES, '"text": ""', '"words": ""', 2, "sub", "lines that have a text", '"{'),
    (SUBTITLES, EMPTY, "[]", 3, "line", "a JSON object", "[]"),
    (SUBTITLES, EMPTY, "", 3, "line", "JSON (Expecting value)", ""),
]


@pytest.mark.parametrize("name, old, new, line, key, expected, value", WRONG)
def test_a_malformed_line_is_named(copy, name, old, new, line, key, expected, value):
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        open_tvqa(str(copy), str(copy / "cache"), 0)
    place = f"{copy / name}, line {line}, field {key}"
    assert str(error.value).startswith(f"{place}: expected {expected}, found ")
    assert value in str(error.value)
    assert not [path for path in (copy / "cache").rglob("*") if path.is_file()]


UNREADABLE = [("[" * 100_000, "recursion"), ("1" * 5000, "4300 digits")]


@pytest.mark.parametrize("content, cause", UNREADABLE, ids=["nested", "long"])
def test_a_line_that_cannot_be_read_is_named(copy, content, cause):
    (copy / VAL).write_text((copy / VAL).read_text().rstrip() + "\n" + content)
    with pytest.raises(ValueError, match=rf"{VAL}, line 3, field line: expected JSON \(.*{cause}"):
        open_tvqa(str(copy), str(copy / "cache"), 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: b"\xef\xbb\xbf" + content, ""),
        (lambda content: content.rstrip() + b"\n\n \r\n", ""),
        (lambda content: content.decode().encode("utf-16"), ""),
        (lambda content: content.replace(b"Who is", b"Who \xe9 is"), "1 bytes are not UTF-8"),
    ],
)
def test_files_with_marks_blank_lines_and_other_encodings(copy, source, change, message, caplog):
    (copy / VAL).write_bytes(change((copy / VAL).read_bytes()))
    other = open_tvqa(str(copy), str(copy / "cache"), SEED, min_count=1)
    assert (f"{copy / VAL}: {message}" in caplog.text) == bool(message)
    for name, values in source.fetch("test", np.arange(2)).items():
        np.testing.assert_array_equal(other.fetch("test", np.arange(2))[name], values)


def test_too_little_data(copy):
    many(copy, 1)
    message = "expected two clips or more, since one is held out for 'valid', found 1"
    with pytest.raises(ValueError, match=message):
        open_tvqa(str(copy), str(copy / "cache"), 0)
    (copy / VAL).write_text("")
    message = f"{VAL}, line 1, field q: expected a question, found 'an empty file'"
    with pytest.raises(ValueError, match=message):
        open_tvqa(str(copy), str(copy / "cache"), 0)


def test_an_error_of_a_missing_file_names_the_download(copy):
    (copy / SUBTITLES).unlink()
    for directory in ("", str(copy), str(copy / "none")):
        with pytest.raises(FileNotFoundError) as error:
            open_tvqa(directory, str(copy / "cache"), 0)
        assert all(part in str(error.value) for part in (SUBTITLES, directory, ADVICE))
    assert "tvqa.cs.unc.edu" in ADVICE
