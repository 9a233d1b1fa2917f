import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rmjax.data.stories.narrativeqa import (
    ADVICE,
    NAMES,
    open_narrativeqa,
    read_rows,
    split_sentences,
)
from tests import FIXTURES

FIXTURE = FIXTURES / "narrativeqa"
SPLITS = ("train", "valid", "test")
DOCUMENTS, QAPS, SUMMARIES = NAMES


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def source(cache):
    return open_narrativeqa(str(FIXTURE), cache, min_count=1)


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(FIXTURE, tmp_path / "narrativeqa"))


def text_of(source, items, mask):
    rows = (row[kept] for row, kept in zip(items, mask, strict=True))
    return [" ".join(source.vocabulary[i] for i in row) for row in rows]


def known(source, text):
    return " ".join(word if word in source.vocabulary else "<unk>" for word in text.split())


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_one_story_word_for_word(source):
    # A document that no question is about gives no story.
    assert [source.size(split) for split in SPLITS] == [2, 1, 1]
    story = {name: values[0] for name, values in source.fetch("train", np.array([1])).items()}
    segments = text_of(source, story["items"], story["item_mask"])
    assert segments == [
        "ann draws a map of mr mill s mill with the barn the loft the shed the attic the road",
        "the river the bridge the well and the gate on it",
        "the miller hides it",
        "who finds it",
        "ann",
    ]
    assert text_of(source, story["query"], story["word_mask"]) == [
        "who draws the map",
        "who hides it",
        "whose mill is it",
        "who in the end finds it",
        "how",
    ]
    candidates = text_of(source, story["candidates"], story["candidate_mask"])
    assert candidates == ["ann", "the miller", "the miller s", "<unk>"]  # '?!' has no word
    assert story["target"].tolist() == [0, 1, 2, 0, 3]
    assert source.also("train")[1].tolist() == [1, 0, -1, -1, -1]
    assert story["choices"].tolist() == [[0, 1, 2, 3]] * 5
    assert story["choice_mask"].all() and story["query_mask"].all()
    assert "position" not in story and source.positions_at_end
    assert (
        source.questions[:7] == ("words", 0, 0, "choice", 0, "mrr", False) and source.classes == []
    )


def test_answers_equal_those_of_the_file(source):
    asked = {split: {} for split in SPLITS}
    for _, row in read_rows(FIXTURE / QAPS, ()):
        asked[row["set"]].setdefault(row["document_id"], []).append(row)

    def plain(text):
        words = re.sub(r" +", " ", re.sub(r"[^a-z ]", "", text.lower())).strip()
        return known(source, words) or "<unk>"

    for split, documents in asked.items():
        examples = source.fetch(split, np.arange(source.size(split)))
        assert len(documents) == source.size(split)
        by_name = sorted(documents.values(), key=lambda rows: rows[0]["document_id"])
        for row, questions in enumerate(by_name):
            e = {name: values[row] for name, values in examples.items()}
            pool = text_of(source, e["candidates"], e["candidate_mask"])
            assert e["query_mask"].sum() == len(questions)
            for q, question in enumerate(questions):
                choices = e["choices"][q][e["choice_mask"][q]]
                assert sorted(pool[c] for c in choices) == sorted(text for text in pool if text)
                assert pool[choices[e["target"][q]]] == plain(question["answer1_tokenized"])
                also = source.also(split)[row, q]
                assert also < 0 or pool[choices[also]] == plain(question["answer2_tokenized"])
            assert (source.also(split)[row, len(questions) :] == -1).all()


def test_sizes_vocabulary_and_groups(source, cache):
    assert (source.num_queries, source.max_items) == (5, 39)
    counts = Counter()
    for row in range(2):
        e = source.fetch("train", np.array([row]))
        masks = dict(items="item_mask", query="word_mask", candidates="candidate_mask")
        for name, mask in masks.items():
            counts.update(source.vocabulary[i] for i in e[name][e[mask]])
    del counts["<unk>"]
    assert source.vocabulary == ["<unk>", *sorted(counts, key=lambda word: (-counts[word], word))]
    often = open_narrativeqa(str(FIXTURE), cache).vocabulary
    assert often == [word for word in source.vocabulary if counts[word] >= 2 or word == "<unk>"]
    groups = source.groups("train")
    assert groups["gutenberg"].tolist() == [[True] * 2 + [False] * 3, [False] * 5]
    assert groups["movie"].tolist() == [[False] * 5, [True] * 5]


@pytest.mark.parametrize("length, most", [(20, 3), (7, 64), (5, 2)])
def test_long_sentences_are_cut_and_long_summaries_end(source, cache, length, most):
    sizes = dict(segment_length=length, max_segments=most)
    other = open_narrativeqa(str(FIXTURE), cache, min_count=1, **sizes)
    long, cut = (s.fetch("train", np.array([1])) for s in (source, other))
    lengths = []
    for words in (31, 4, 3, 1):
        lengths += [length] * (words // length) + [words % length] * (words % length > 0)
    assert [n for n in cut["item_mask"][0].sum(-1) if n] == lengths[:most]

    def words_of(source, e):
        return " ".join(text_of(source, e["items"][0], e["item_mask"][0])).split()

    words = words_of(other, cut)
    assert words == words_of(source, long)[: len(words)]


def test_split_sentences():
    sentences = [["mr", "a"], ["b", "4", "5"], ["c"], ["d"]]
    assert split_sentences("Mr. A . B 4.5 ! C ? ! . D") == sentences
    assert split_sentences(" . ") == []


COLUMN = "a column of this name"
WRONG = [  # (file, text, replacement, line, field, expected)
    (QAPS, "document_id,", "document,", 1, "document_id", f"{COLUMN}, found 'document,set"),
    (QAPS, "answer1_tokenized", "a1", 1, "answer1_tokenized", COLUMN),
    (QAPS, ",the wrong door\n", "\n", 3, "answer2_tokenized", "8 fields, found 'bbbb"),
    (QAPS, ",A key .\n", ",A key .,more\n", 4, "after the last", "8 fields"),
    (QAPS, "test", "dev", 4, "set", "one of train, valid, test, found 'dev'"),
    (QAPS, "c" * 40, "f" * 40, 4, "document_id", "an id that documents.csv has, found 'ffff"),
    (SUMMARIES, "c" * 40, "f" * 40, 4, "document_id", "an id that summaries.csv has, found 'ccc"),
    (SUMMARIES, "Bo finds a key.,Bo finds a key .", ".,.", 6, "summary", "words, found '.'"),
    (DOCUMENTS, ",Fade out", "", 4, "story_end", "10 fields"),
    (DOCUMENTS, "set", "Set", 1, "set", COLUMN),
]


@pytest.mark.parametrize("name, old, new, line, field, expected", WRONG)
def test_a_malformed_row_is_named(copy, name, old, new, line, field, expected):
    edit(copy / name, old, new)
    wrong = copy / (QAPS if "documents.csv" in expected or "summaries.csv" in expected else name)
    with pytest.raises(ValueError) as error:
        open_narrativeqa(str(copy), str(copy / "cache"))
    assert str(error.value).startswith(f"{wrong}, line {line}, field {field}: expected {expected}")
    assert not [path for path in (copy / "cache").rglob("*") if path.is_file()]


def test_a_quote_without_end_is_named(copy):
    (copy / QAPS).write_text((copy / QAPS).read_text() + '"' + "a" * 200_000)
    message = "qaps.csv, line 13, field document_id: expected a row of CSV, found 'field l"
    with pytest.raises(ValueError, match=message):
        open_narrativeqa(str(copy), str(copy / "cache"))


def test_a_short_quote_without_end_is_named(copy):
    (copy / QAPS).write_text((copy / QAPS).read_text() + 'a,train,"b,c,d,e,f,g\n')
    message = "qaps.csv, line 13, field document_id: .* found 'unexpected end of data"
    with pytest.raises(ValueError, match=message):
        open_narrativeqa(str(copy), str(copy / "cache"))


def test_a_file_that_is_cut_gives_an_error_or_a_warning(tmp_path, caplog):
    for name in NAMES:
        content, short, ends = (FIXTURE / name).read_bytes(), tmp_path / "short.csv", 0
        for cut in range(0, len(content), 7):
            caplog.clear()
            short.write_bytes(content[:cut])
            try:
                list(read_rows(short, ("document_id", "set")))
            except ValueError as error:
                assert str(error).startswith(f"{short}, line ")
                continue
            ends += content[:cut].endswith(b"\n")  # nothing shows that lines are missing
            assert content[:cut].endswith(b"\n") or "the last, has no end" in caplog.text
        assert ends < content.count(b"\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content + b"\r\n\n",
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: content.decode().encode("utf-16"),
    ],
)
def test_files_with_marks_blank_lines_and_other_encodings(copy, source, change, caplog):
    for name in NAMES:
        (copy / name).write_bytes(change((copy / name).read_bytes()))
    other = open_narrativeqa(str(copy), str(copy / "cache"), min_count=1)
    assert other.vocabulary == source.vocabulary
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for split in SPLITS:
        indices = np.arange(source.size(split))
        examples = other.fetch(split, indices)
        for name, values in source.fetch(split, indices).items():
            np.testing.assert_array_equal(examples[name], values)


def test_letters_of_another_encoding_are_counted(copy, caplog):
    edit(copy / QAPS, "Who lights", "Who l\u00efghts")
    (copy / QAPS).write_bytes((copy / QAPS).read_text("utf-8").encode("latin-1"))
    open_narrativeqa(str(copy), str(copy / "cache"))
    assert f"{copy / QAPS}: 1 bytes are not UTF-8" in caplog.text


def test_a_set_without_questions(copy):
    lines = (copy / QAPS).read_text().splitlines(True)
    (copy / QAPS).write_text("".join(line for line in lines if ",valid," not in line))
    message = "qaps.csv: expected questions in every set, found none in 'valid'"
    with pytest.raises(ValueError, match=message):
        open_narrativeqa(str(copy), str(copy / "cache"))


def test_an_error_of_a_missing_file_names_the_download(copy):
    (copy / SUMMARIES).unlink()
    for directory in ("", str(copy), str(copy / "none")):
        with pytest.raises(FileNotFoundError) as error:
            open_narrativeqa(directory, str(copy / "cache"))
        assert all(part in str(error.value) for part in (SUMMARIES, directory, ADVICE))
    assert "https://github.com/google-deepmind/narrativeqa" in ADVICE
