"""Text files as people have them."""

from __future__ import annotations

import codecs
import io

import pytest

from rmjax.io import text

LINES = [(1, "Ünïcode, 中文"), (2, ""), (3, "last")]
BODY = "Ünïcode, 中文\n\nlast\n"


@pytest.mark.parametrize(
    "data",
    [
        BODY.encode(),
        codecs.BOM_UTF8 + BODY.encode(),
        BODY.encode("utf-16"),
        codecs.BOM_UTF16_BE + BODY.encode("utf-16-be"),
        BODY.encode("utf-32"),
        BODY.replace("\n", "\r\n").encode(),
        BODY.encode() + b"\n\r\n \n",
        BODY.encode().rstrip(),
    ],
)
def test_lines_of_every_encoding(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    assert list(text.read_lines(tmp_path / "f")) == LINES
    assert text.read_text(tmp_path / "f").split() == BODY.split()


def test_bytes_of_another_encoding_are_counted(tmp_path, caplog):
    (tmp_path / "f").write_bytes("déjà vu\nné\n".encode("latin-1"))
    assert list(text.read_lines(tmp_path / "f")) == [(1, "d\ufffdj\ufffd vu"), (2, "n\ufffd")]
    assert "3 bytes are not UTF-8" in caplog.text and str(tmp_path / "f") in caplog.text
    caplog.clear()
    assert text.read_text(tmp_path / "f") == "d\ufffdj\ufffd vu\nn\ufffd\n"
    assert "3 bytes are not UTF-8" in caplog.text


def test_a_last_line_without_an_end(tmp_path, caplog):
    (tmp_path / "f").write_text("a\nb\n")
    list(text.read_lines(tmp_path / "f"))
    assert not caplog.text
    (tmp_path / "f").write_text("a\nb")
    list(text.read_lines(tmp_path / "f"))
    assert "line 2, the last, has no end" in caplog.text


def test_utf_16_cut_in_the_middle(tmp_path):
    (tmp_path / "f").write_bytes("a\nbc\n".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match="UTF-16"):
        list(text.read_lines(tmp_path / "f"))
    with pytest.raises(ValueError, match="UTF-16"):
        text.read_text(tmp_path / "f")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "the file is empty"),
        ('{"a": 1', "line 1, column 8"),
        ('{\n"a": nope}', "line 2"),
        ("[" * 100_000, "nested too deep"),
        ("1" * 5000, "4300 digits"),
    ],
)
def test_the_error_of_wrong_json_names_the_cause(tmp_path, content, message):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(ValueError, match=f"f.json: .*{message}"):
        text.read_json(tmp_path / "f.json")


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "f.json").write_bytes(codecs.BOM_UTF8 + b'{"a": [1]}')
    assert text.read_json(tmp_path / "f.json") == {"a": [1]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_any_encoding_as_utf_8(encoding):
    data = (BODY * 30_000).encode(encoding)
    stream, begin, end = text.as_utf8(io.BytesIO(data), len(data), "f")
    with stream:
        stream.seek(begin)
        assert stream.read(end - begin).decode() == BODY * 30_000 and not stream.read()


@pytest.mark.parametrize("data", [b"\xff\xfea", b"\xff\xfe\0\xd8a\0", b"\xff\xfe\0\0a\0\0"])
def test_wrong_bytes_after_a_mark_of_utf_16_or_utf_32(data):
    with pytest.raises(ValueError, match="f: begins as UTF-(16|32) and goes on otherwise"):
        text.as_utf8(io.BytesIO(data), len(data), "f")


def test_a_text_and_its_file_have_the_same_lines(tmp_path, caplog):
    path = tmp_path / "f"
    for body in ("", "\n", "a\n\nb\n", "a\r\nb\r\n\r\n \n", "a\u2028b\x0cc\n", "a\nb", "a\nb "):
        caplog.clear()
        path.write_bytes(body.encode())
        lines = [line for _, line in text.read_lines(path)]
        of_file = caplog.text
        caplog.clear()
        assert text.split_lines(text.decode(body.encode(), path), path) == lines
        assert bool(caplog.text) == bool(of_file) == body.endswith(("b", "b "))


def test_the_warning_of_an_unended_last_line_can_be_turned_off(tmp_path, caplog):
    (tmp_path / "f").write_text("{}\n{}")
    assert list(text.read_lines(tmp_path / "f", ended=False)) == [(1, "{}"), (2, "{}")]
    assert not caplog.text
