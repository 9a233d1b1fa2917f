import codecs
import gzip
import unicodedata

import numpy as np
import pytest

from rmjax.data.stories.vectors import read_vectors

WORDS = ("<pad>", "lamp", "who", "café", "lights")
FILE = (
    "who 0.5 -1 2e-2\nthe 9 9 9\ncafé 1 2 3\n. . . 7 7 7\nat name@domain.com 7 7 7\n"
    "lamp 4 5 6 \nwho 8 8 8\n"
)
VECTORS = [[0, 0, 0], [4, 5, 6], [0.5, -1, 2e-2], [1, 2, 3], [0, 0, 0]]


@pytest.mark.parametrize("header", ["", "7 3\n"])
@pytest.mark.parametrize("name, opener", [("v.txt", open), ("v.txt.gz", gzip.open)])
def test_vectors_are_returned_by_word_id(tmp_path, name, opener, header):
    with opener(tmp_path / name, "wb") as file:
        file.write((header + FILE).encode())
    vectors, known = read_vectors(str(tmp_path / name), WORDS)
    assert vectors.dtype == np.float32 and known.tolist() == [False, True, True, True, False]
    np.testing.assert_array_equal(vectors, np.float32(VECTORS))


def test_a_word_with_spaces_is_not_mistaken_for_another(tmp_path):
    (tmp_path / "v.txt").write_text(FILE)
    vectors, known = read_vectors(str(tmp_path / "v.txt"), ["at", ".", "the"])
    assert known.tolist() == [False, False, True] and not vectors[:2].any()


WRONG = [  # (text, line, expected, found)
    ("", 1, "a word and its vector", "0 fields: ''"),
    ("lamp\n", 1, "a word and its vector", "1 fields: 'lamp'"),
    ("lamp 1 2 3\nthe 1 2\n", 2, "a word and 3 numbers", "3 fields: 'the 1 2'"),
    ("lamp 1 2 3\nthe 1 2 3 4\n", 2, "a word and 3 numbers", "5 fields: 'the 1 2 3 4'"),
    ("2 3\nlamp 1 2 3\nthe 1\n", 3, "a word and 3 numbers", "2 fields: 'the 1'"),
    ("2 3\nlamp 1 2 3 4\n", 2, "a word and 3 numbers", "5 fields: 'lamp 1 2 3 4'"),
    ("the 1 2\n\nlamp 1 2\n", 2, "a word and 2 numbers", "0 fields: ''"),
    ("the 1 2\nlamp 1 x\n", 2, "a word and 2 finite numbers", "3 fields: 'lamp 1 x'"),
    ("the 1 2\nlamp nan 1\n", 2, "a word and 2 finite numbers", "3 fields: 'lamp nan 1'"),
]


@pytest.mark.parametrize("text, line, expected, value", WRONG)
def test_a_malformed_line_is_named(tmp_path, text, line, expected, value):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        read_vectors(str(tmp_path / "v.txt"), WORDS)
    place = f"{tmp_path / 'v.txt'}, line {line}"
    assert str(error.value) == f"{place}: expected {expected}, found {value}"


def test_missing_and_cut_off_files(tmp_path):
    message = "none.txt' not found: expected a text file .*glove"
    with pytest.raises(FileNotFoundError, match=message):
        read_vectors(str(tmp_path / "none.txt"), WORDS)
    content = gzip.compress(np.random.default_rng(0).bytes(4000).hex().encode())
    (tmp_path / "v.gz").write_bytes(content[:-2000])
    message = "v.gz, after line 0: not a whole .gz file .*fetch it again"
    with pytest.raises(ValueError, match=message):
        read_vectors(str(tmp_path / "v.gz"), WORDS)
    (tmp_path / "v.gz").write_bytes(b"lamp 1 2 3\n")
    with pytest.raises(ValueError, match="v.gz, after line 0: not a whole .gz file"):
        read_vectors(str(tmp_path / "v.gz"), WORDS)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_words_match_however_they_are_composed(tmp_path, mark):
    decomposed = unicodedata.normalize("NFD", "Café")
    lines = [f"{decomposed} 1 2", "i\u0307stanbul 3 4", "naï\u00adve 5 6", "Café 7 8"]
    (tmp_path / "v.txt").write_bytes(mark + "\n".join(lines).encode())
    vectors, known = read_vectors(str(tmp_path / "v.txt"), ["café", "istanbul", "naïve", "none"])
    assert known.tolist() == [True, True, True, False]
    assert vectors.tolist() == [[1, 2], [3, 4], [5, 6], [0, 0]]


def test_an_exact_match_wins_over_folded_matches(tmp_path):
    (tmp_path / "v.txt").write_text("Apple 1 2\nAPPLE 3 4\napple 5 6\napple 7 8\nAPPLE 9 9\n")
    assert read_vectors(str(tmp_path / "v.txt"), ["apple"])[0].tolist() == [[5, 6]]
    assert read_vectors(str(tmp_path / "v.txt"), ["APPLE"])[0].tolist() == [[3, 4]]


def test_the_log_counts_known_words_and_none_is_an_error(tmp_path, caplog):
    (tmp_path / "v.txt").write_text(FILE)
    with caplog.at_level("INFO"):
        read_vectors(str(tmp_path / "v.txt"), WORDS)
    assert "v.txt: 3 of 5 words found" in caplog.text
    message = "v.txt: 0 of 3 words found; the data have words such as 'lampe', 'wer'. Take a file"
    with pytest.raises(ValueError, match=message):
        read_vectors(str(tmp_path / "v.txt"), ["<unk>", "lampe", "wer"])


UTF16 = "is UTF-16, and word vectors are read as UTF-8: save it as UTF-8"
WIDTH = "line 2: expected a word and {} numbers, found 3 fields"
HEADERS = [  # (content, message)
    ("lamp 1 2\n".encode("utf-16"), UTF16),
    (b"9 999999999\nlamp 1 2\n", WIDTH.format(999999999)),
    (b"9" * 5000 + b" 2\nlamp 1 2\n", WIDTH.format(1)),
]


@pytest.mark.parametrize("content, message", HEADERS, ids=["utf-16", "wide", "long"])
def test_impossible_headers_and_encodings_are_refused(tmp_path, content, message):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_vectors(str(tmp_path / "v.txt"), WORDS)


@pytest.mark.parametrize(
    "values", ["1 2 1_0", "1 2 \r3", "1 2\t3 4", "1 2 1e39", "1 2 -1e400", "1 2 \u0663"]
)
def test_other_forms_of_numbers_and_too_large_ones_are_refused(tmp_path, values):
    (tmp_path / "v.txt").write_bytes(f"the 1 2 3\nlamp {values}\n".encode())
    with pytest.raises(ValueError, match=r"v\.txt, line 2: expected a word and 3 finite numbers"):
        read_vectors(str(tmp_path / "v.txt"), WORDS)
