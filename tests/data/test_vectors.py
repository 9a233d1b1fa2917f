import gzip

import numpy as np
import pytest

from rmjax.data.vectors import read_vectors

WORDS = ("<pad>", "lamp", "who", "café", "lights")
FILE = "who 0.5 -1 2e-2\nthe 9 9 9\ncafé 1 2 3\n. . . 7 7 7\nat name@domain.com 7 7 7\nlamp 4 5 6 \nwho 8 8 8\n"
VECTORS = [[0, 0, 0], [4, 5, 6], [0.5, -1, 2e-2], [1, 2, 3], [0, 0, 0]]


@pytest.mark.parametrize("header", ["", "7 3\n"])
@pytest.mark.parametrize("name, opener", [("v.txt", open), ("v.txt.gz", gzip.open)])
def test_the_words_asked_for_by_id(tmp_path, name, opener, header):
    with opener(tmp_path / name, "wb") as file:
        file.write((header + FILE).encode())
    vectors, found = read_vectors(str(tmp_path / name), WORDS)
    assert vectors.dtype == np.float32 and found.tolist() == [False, True, True, True, False]
    np.testing.assert_array_equal(vectors, np.float32(VECTORS))


def test_a_word_of_spaces_is_not_its_first_word(tmp_path):
    (tmp_path / "v.txt").write_text(FILE)
    vectors, found = read_vectors(str(tmp_path / "v.txt"), ["at", "."])
    assert not found.any() and not vectors.any()


WRONG = [  # (text, line, what was expected, what was found)
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


@pytest.mark.parametrize("text, line, expected, found", WRONG)
def test_a_malformed_line_is_named(tmp_path, text, line, expected, found):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        read_vectors(str(tmp_path / "v.txt"), WORDS)
    assert str(error.value) == f"{tmp_path / 'v.txt'}, line {line}: expected {expected}, found {found}"


def test_missing_and_cut_off_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt' not found: expected a text file .*glove"):
        read_vectors(str(tmp_path / "none.txt"), WORDS)
    whole = gzip.compress(np.random.default_rng(0).bytes(4000).hex().encode())
    (tmp_path / "v.gz").write_bytes(whole[:-2000])
    with pytest.raises(ValueError, match="v.gz, after line 0: not a whole .gz file .*fetch it again"):
        read_vectors(str(tmp_path / "v.gz"), WORDS)
    (tmp_path / "v.gz").write_bytes(b"lamp 1 2 3\n")
    with pytest.raises(ValueError, match="v.gz, after line 0: not a whole .gz file"):
        read_vectors(str(tmp_path / "v.gz"), WORDS)
