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
    """{clip: (example, its questions)}, each found by its questions."""
    asked = {}
    for row in rows(VAL if split == "test" else TRAIN):
        asked.setdefault(row["vid_name"], []).append(row)
    examples = source.fetch(split, np.arange(source.size(split)))
    found = {}
    for row in range(source.size(split)):
        example = {name: values[row] for name, values in examples.items()}
        questions = lines(source, example["query"], example["word_mask"])
        name = next(
            clip
            for clip, questions_of in asked.items()
            if questions == [known(source, question["q"]) for question in questions_of]
            and clip not in found
        )
        found[name] = example, asked[name]
    return found


def lines(source, words, mask):
    text = [
        " ".join(source.vocabulary[i] for i in row[there])
        for row, there in zip(words, mask, strict=True)
    ]
    return [line for line in text if line]


def known(source, text):
    words = "".join(c for c in text.lower() if c.isalnum() or c in " '").replace(" ' ", " ").split()
    return " ".join(word if word in source.vocabulary else "<unk>" for word in words) or "<unk>"


@pytest.mark.parametrize("seed", range(4))
def test_every_clip_is_in_one_split_with_all_that_is_said_and_asked(cache, seed):
    source = open_tvqa(str(FIXTURE), cache, seed, min_count=1, segment_length=6)
    assert [source.size(split) for split in SPLITS] == [3, 1, 2] and source.positions_at_end
    said = {
        row["vid_name"]: " ".join(line["text"] for line in row["sub"]) for row in rows(SUBTITLES)
    }
    found = {split: clips(source, split) for split in SPLITS}
    assert sorted([*found["train"], *found["valid"]]) == sorted(
        {row["vid_name"] for row in rows(TRAIN)}
    )
    assert set(found["test"]) == {row["vid_name"] for row in rows(VAL)}
    for split in SPLITS:
        for clip, (e, questions) in found[split].items():
            text = known(source, said[clip]).split() if said.get(clip) else []
            assert e["items"][e["item_mask"]].tolist() == [
                source.vocabulary.index(word) for word in text
            ]
            full, rest = divmod(len(text), 6)
            assert [n for n in e["item_mask"].sum(-1) if n] == [6] * full + [rest] * (rest > 0)
            pool = lines(source, e["candidates"], e["candidate_mask"])
            for q, question in enumerate(questions):
                assert e["choice_mask"][q].all() and e["target"][q] == question["answer_idx"]
                assert [pool[c] for c in e["choices"][q]] == [
                    known(source, question[a]) for a in ANSWERS
                ]
            assert e["query_mask"].sum() == len(questions)


def test_one_clip_word_for_word(source):
    e, _ = clips(source, "train")["castle_s01e01_seg01_clip_01"]
    assert lines(source, e["items"], e["item_mask"]) == [
        "bo one lantern two lanterns three lanterns four lanterns five lanterns six ada don't count them again bo why"
    ]
    assert lines(source, e["candidates"], e["candidate_mask"]) == [
        "a red cup",
        "a map",
        "her hat",
        "nothing",
        "a lantern",
    ]
    assert source.questions == ("words", 0, 0, "choice", 0, "accuracy", False)
    assert source.groups("train") == {} and (source.also("train") == -1).all()


def test_a_clip_without_subtitles_is_an_empty_stream(source, cache, caplog):
    open_tvqa(str(FIXTURE), cache, SEED, min_count=1)
    found = {clip: e for split in SPLITS for clip, (e, _) in clips(source, split).items()}
    empty = {clip for clip, e in found.items() if not e["item_mask"].any()}
    assert empty == {
        "s02e03_seg02_clip_07",
        "s02e03_seg02_clip_08",
    }  # not in the file, and without a line there
    counts = source.metadata["without_subtitles"]
    assert sum(counts.values()) == 2 and counts["test"] == 0
    for split, count in counts.items():
        assert (
            f"TVQA {split}: {count} of {source.size(split)} clips have no subtitles." in caplog.text
        ) == (count > 0)


def test_the_first_words(cache):
    source = open_tvqa(str(FIXTURE), cache, SEED, min_count=1, max_words=4)
    e, _ = clips(source, "test")["castle_s01e02_seg01_clip_00"]
    assert (
        lines(source, e["items"], e["item_mask"]) == ["<unk> <unk> <unk> the"]
        and source.max_items == 4
    )


def many(directory, count):
    row = rows(TRAIN)[0]
    made = [
        json.dumps(row | {"vid_name": f"clip_{i:03}", "q": f"who is {i}"})
        for i in range(count)
        for _ in range(2)
    ]
    (directory / TRAIN).write_text("\n".join(made))


@pytest.mark.parametrize("fraction, held_out", [(0.1, 4), (0.5, 20), (0.0, 1)])
def test_valid_is_a_part_of_the_clips_that_the_seed_draws(copy, fraction, held_out):
    many(copy, 40)
    trained = {}
    for seed in (0, 1):
        source = open_tvqa(
            str(copy), str(copy / "cache"), seed, min_count=1, valid_fraction=fraction
        )
        assert (source.size("valid"), source.size("train")) == (held_out, 40 - held_out)
        e = source.fetch("train", np.arange(40 - held_out))
        assert (e["query_mask"].sum(1) == 2).all()
        trained[seed] = set(lines(source, e["query"][:, 0], e["word_mask"][:, 0]))
        assert len(trained[seed]) == 40 - held_out
    assert trained[0] != trained[1]


WRONG = [  # (file, text, its replacement, line, key, what was expected, what was found)
    (
        TRAIN,
        '"q": "Where does',
        '"q: "Where does',
        2,
        "line",
        "JSON (Expecting ':' delimiter)",
        '{"a0": "A red cup"',
    ),
    (TRAIN, '"a3": "Bo", ', "", 3, "a3", "a text", "'no such key'"),
    (TRAIN, '"a0": "The clerk"', '"a0": 7', 3, "a0", "a text", "'7'"),
    (TRAIN, '"answer_idx": 3', '"answer_idx": 5', 4, "answer_idx", "0 to 4", "'5'"),
    (TRAIN, '"answer_idx": 3', '"answer_idx": "3"', 4, "answer_idx", "0 to 4", "'3'"),
    (TRAIN, ', "answer_idx": 3', "", 4, "answer_idx", "0 to 4", "'None'"),
    (
        VAL,
        '"vid_name": "castle_s01e02',
        '"vid": "castle_s01e02',
        2,
        "vid_name",
        "a text",
        "'no such key'",
    ),
    (SUBTITLES, '"sub": []', '"subs": []', 3, "sub", "a list", "'None'"),
    (SUBTITLES, '"text": ""', '"said": ""', 2, "sub", "lines that have a text", '"{'),
    (
        SUBTITLES,
        '{"vid_name": "s02e03_seg02_clip_08", "sub": []}',
        "[]",
        3,
        "line",
        "a JSON object",
        "'[]'",
    ),
    (
        SUBTITLES,
        '{"vid_name": "s02e03_seg02_clip_08", "sub": []}',
        "",
        3,
        "line",
        "JSON (Expecting value)",
        "''",
    ),
]


@pytest.mark.parametrize("name, old, new, line, key, expected, found", WRONG)
def test_a_malformed_line_is_named(copy, name, old, new, line, key, expected, found):
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        open_tvqa(str(copy), str(copy / "cache"), 0)
    assert str(error.value).startswith(
        f"{copy / name}, line {line}, field {key}: expected {expected}, found "
    )
    assert found.strip("'") in str(error.value)
    assert not [path for path in (copy / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "content, cause", [("[" * 100_000, "recursion"), ("1" * 5000, "4300 digits")]
)
def test_json_that_cannot_be_read_is_named(copy, content, cause):
    (copy / VAL).write_text((copy / VAL).read_text().rstrip() + "\n" + content)
    with pytest.raises(ValueError, match=rf"{VAL}, line 3, field line: expected JSON \(.*{cause}"):
        open_tvqa(str(copy), str(copy / "cache"), 0)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda content: b"\xef\xbb\xbf" + content, ""),
        (lambda content: content.rstrip() + b"\n\n \r\n", ""),
        (lambda content: content.decode().encode("utf-16"), ""),
        (lambda content: content.replace(b"Who is", b"Who \xe9 is"), "1 bytes are not UTF-8"),
    ],
)
def test_files_as_people_have_them(copy, source, change, said, caplog):
    (copy / VAL).write_bytes(change((copy / VAL).read_bytes()))
    other = open_tvqa(str(copy), str(copy / "cache"), SEED, min_count=1)
    assert (f"{copy / VAL}: {said}" in caplog.text) == bool(said)
    for name, values in source.fetch("test", np.arange(2)).items():
        np.testing.assert_array_equal(other.fetch("test", np.arange(2))[name], values)


def test_too_little_data(copy):
    many(copy, 1)
    with pytest.raises(
        ValueError, match="expected two clips or more, to hold one out for 'valid', found 1"
    ):
        open_tvqa(str(copy), str(copy / "cache"), 0)
    (copy / VAL).write_text("")
    with pytest.raises(
        ValueError, match=f"{VAL}, line 1, field q: expected a question, found 'an empty file'"
    ):
        open_tvqa(str(copy), str(copy / "cache"), 0)


def test_missing_files_say_where_they_come_from(copy):
    (copy / SUBTITLES).unlink()
    for directory in ("", str(copy), str(copy / "none")):
        with pytest.raises(FileNotFoundError) as error:
            open_tvqa(directory, str(copy / "cache"), 0)
        assert (
            SUBTITLES in str(error.value)
            and directory in str(error.value)
            and ADVICE in str(error.value)
        )
    assert "tvqa.cs.unc.edu" in ADVICE
