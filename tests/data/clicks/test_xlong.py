import codecs
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorflow_datasets.core import shuffle

from rmjax.data import records
from rmjax.data.clicks.xlong import ADVICE, FIELDS, NUM_ITEMS, XLongBuilder, open_xlong, parse_line
from tests import FIXTURES

FIXTURE = FIXTURES / "xlong"
TRAIN, TEST = "train_corpus_total_dual.txt", "test_corpus_total_dual.txt"


def fields_of(name):
    return [line.split("\t") for line in (FIXTURE / name).read_text().splitlines()]


def write(directory, train, test=None):
    for name, lines in ((TRAIN, train), (TEST, test or fields_of(TEST))):
        (directory / name).write_text("".join("\t".join(line) + "\n" for line in lines))


def test_every_line_is_an_example_of_two_questions(tmp_path):
    source = open_xlong(str(FIXTURE), str(tmp_path), seed=0)
    assert (source.num_items, source.max_items, source.num_queries) == (NUM_ITEMS, 1000, 2)
    assert source.positions_at_end
    lines = fields_of(TEST)
    examples = source.fetch("test", np.arange(len(lines)))
    assert "position" not in examples
    for row, line in enumerate(lines):
        assert examples["items"][row].tolist() == [int(item) for item in line[2].split(",")]
        assert examples["query"][row].tolist() == [int(line[3]), int(line[4])]
    assert (examples["target"] == [1, 0]).all() and examples["query_mask"].all()
    assert (examples["length"] == 1000).all()
    assert examples["example_id"].tolist() == list(range(len(lines)))
    integers = ("items", "length", "query", "target", "example_id")
    assert all(examples[name].dtype == np.int32 for name in integers)


@pytest.mark.parametrize("seed", range(4))
def test_valid_has_a_tenth_of_the_users_and_train_the_others(tmp_path, seed):
    template = fields_of(TRAIN)[0]
    users = [uid for uid in range(40) for _ in range(1 + uid % 3)]
    write(tmp_path, [[str(i), str(uid), *template[2:]] for i, uid in enumerate(users)])
    source = open_xlong(str(tmp_path), str(tmp_path / "cache"), seed)
    train, valid = set(source.stream_id("train")), set(source.stream_id("valid"))
    assert len(valid) == 4 and not train & valid and train | valid == set(range(40))
    assert source.size("train") + source.size("valid") == len(users)
    again = open_xlong(str(tmp_path), str(tmp_path / "cache"), seed)
    np.testing.assert_array_equal(source.stream_id("valid"), again.stream_id("valid"))
    other = open_xlong(str(tmp_path), str(tmp_path / "cache"), seed + 1)
    assert valid != set(other.stream_id("valid"))


def test_the_folder_above_data_is_accepted(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "xlong").symlink_to(FIXTURE)
    source = open_xlong(str(tmp_path), str(tmp_path / "cache"), 0)
    assert source.size("test") == len(fields_of(TEST))


LONG = ",".join(["1"] * 1000)
# (column, or None for the complete line; new text; field, expected and actual of the error)
WRONG = [
    (0, "x1", "index", "an integer", "'x1'"),
    (1, "20000", "uid", "an integer in [0, 20000)", "'20000'"),
    (1, "1.5", "uid", "an integer in [0, 20000)", "'1.5'"),
    (1, "1,2", "uid", "one id", "'2: 1,2'"),
    (2, LONG + ",1", "history", "1000 comma-separated ids", "'1001: 1,1"),
    (2, LONG[2:], "history", "1000 comma-separated ids", "'999: 1,1"),
    (2, LONG[:-1] + "3269017", "history", "an integer in [0, 3269017)", "'3269017'"),
    (2, LONG[:-1] + "-1", "history", "an integer in [0, 3269017)", "'-1'"),
    (2, LONG[:-1], "history", "an integer in [0, 3269017)", "''"),
    (2, LONG[:-1] + "1_0", "history", "an integer in [0, 3269017)", "'1_0'"),
    (3, "", "pos item", "an integer in [0, 3269017)", "''"),
    (3, "3269017", "pos item", "an integer in [0, 3269017)", "'3269017'"),
    (3, "9223372036854775808", "pos item", "an integer in [0, 3269017)", "'9223372036854775808'"),
    (4, "1" * 5000, "neg item", "an integer in [0, 3269017)", "'1111"),
    (2, LONG[:-1] + "1" * 5000, "history", "an integer in [0, 3269017)", "'1111"),
    (4, "4,5", "neg item", "one id", "'2: 4,5'"),
    (5, "1,2", "pos item side", "184 comma-separated ids", "'2: 1,2'"),
    (6, "7", "neg item side", "184 comma-separated ids", "'1: 7'"),
    (6, "7," * 183, "neg item side", "184 comma-separated ids", "'183: 7,7"),
    (None, "", "uid", "7 tab-separated fields", "'1: '"),
    (None, "1\t2\t3", "pos item", "7 tab-separated fields", r"'3: 1\t2\t3'"),
    (None, "\t" * 7, "neg item side", "7 tab-separated fields", "'8: "),
]


@pytest.mark.parametrize("column, text, field, expected, actual", WRONG)
def test_a_malformed_line_is_named(column, text, field, expected, actual):
    line = fields_of(TRAIN)[0]
    line = text.split("\t") if column is None else [*line[:column], text, *line[column + 1 :]]
    with pytest.raises(ValueError) as error:
        parse_line("\t".join(line), Path("a/b.txt"), 17)
    says = f"a/b.txt, line 17, field {field}: expected {expected}, found {actual}"
    assert str(error.value).startswith(says)


def test_a_malformed_line_leaves_nothing_and_a_repaired_file_is_read_again(tmp_path):
    lines = fields_of(TRAIN)
    write(tmp_path, [*lines, ["nonsense"]])
    says = f"{TRAIN}, line {len(lines) + 1}, field {FIELDS[1]}: expected 7"
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            open_xlong(str(tmp_path), str(tmp_path / "cache"), 0)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    write(tmp_path, lines)
    source = open_xlong(str(tmp_path), str(tmp_path / "cache"), 0)
    assert source.size("train") + source.size("valid") == len(lines)
    write(tmp_path, lines[:-1])  # other data under the same name is prepared again
    source = open_xlong(str(tmp_path), str(tmp_path / "cache"), 0)
    assert source.size("train") + source.size("valid") == len(lines) - 1


def test_byte_order_marks_and_line_ends_change_nothing(tmp_path, caplog):
    lines, test = fields_of(TRAIN), (FIXTURE / TEST).read_bytes()
    variants = [codecs.BOM_UTF8 + test, test.replace(b"\n", b"\r\n")]
    variants += [test + b"\n\r\n \n", test.rstrip(b"\n")]
    want = open_xlong(str(FIXTURE), str(tmp_path / "cache"), 0).fetch("test", np.arange(2))
    for number, data in enumerate(variants):
        assert "has no end" not in caplog.text
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, lines)
        (folder / TEST).write_bytes(data)
        source = open_xlong(str(folder), str(tmp_path / "cache"), 0)
        assert source.size("test") == len(fields_of(TEST))
        for name, values in source.fetch("test", np.arange(2)).items():
            np.testing.assert_array_equal(values, want[name])
    assert f"line {len(fields_of(TEST))}, the last, has no end" in caplog.text


def test_one_user_and_an_empty_file_are_refused(tmp_path):
    write(tmp_path, fields_of(TRAIN)[:1])
    with pytest.raises(ValueError, match="expected two users or more"):
        open_xlong(str(tmp_path), str(tmp_path / "cache"), 0)
    (tmp_path / TEST).write_text("")
    says = f"{TEST}, line 1, field index: expected a line, found 'an empty file'"
    with pytest.raises(ValueError, match=says):
        open_xlong(str(tmp_path), str(tmp_path / "cache2"), 0)


def test_missing_files_say_where_they_come_from(tmp_path):
    (tmp_path / TRAIN).write_text("")
    for directory in ("", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError) as error:
            open_xlong(directory, str(tmp_path), 0)
        assert all(part in str(error.value) for part in (TEST, directory, ADVICE))
    assert "Tianchi" in ADVICE and "--config=configs/xlong.py" in ADVICE


def test_the_second_of_two_concurrent_preparations_takes_the_result_of_the_first(
    tmp_path, monkeypatch
):
    generate, nested = XLongBuilder._generate_examples, []

    def during(self, split, path):
        for key, example in generate(self, split, path):
            if not nested:
                nested.append(True)
                files = self.builder_config.files
                nested.append(records.prepare(XLongBuilder, str(tmp_path), files=files))
            yield key, example

    monkeypatch.setattr(XLongBuilder, "_generate_examples", during)
    source = open_xlong(str(FIXTURE), str(tmp_path), 0)
    assert nested[1].is_dir() and source.size("test") == len(fields_of(TEST))
    assert [path for path in nested[1].parent.iterdir()] == [nested[1]]


def test_large_splits_do_not_spill_through_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    assert open_xlong(str(FIXTURE), str(tmp_path), 0).size("test") == len(fields_of(TEST))
    assert shuffle.MAX_MEM_BUFFER_SIZE == 1  # as it was


def test_preparation_prints_nothing_and_imports_no_tensorflow(tmp_path):
    program = f"""
import sys
from absl import logging
logging.set_verbosity(logging.INFO)
import numpy as np
from rmjax.data.clicks.xlong import open_xlong
for _ in range(2):
    open_xlong({str(FIXTURE)!r}, {str(tmp_path)!r}, 0).fetch("train", np.arange(2))
assert not [name for name in sys.modules if name.split(".")[0] in ("tensorflow", "jax")]
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *others = done.stderr.strip().splitlines()
    assert done.stdout == "" and "Preparing xlong, once, from" in first
    sizes = "INFO:absl:XLong: train 3 examples (50%), valid 1 examples (16.7%), test 2 examples"
    assert others == [f"{sizes} (33.3%)."] * 2
