"""Every preparation stops soon after a signal, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from rmjax.data import records
from rmjax.data.stories.text import Story, TextBuilder
from rmjax.data.texts import tokenizers
from rmjax.data.texts.hyperpartisan import open_hyperpartisan
from rmjax.io import progress, text
from rmjax.run import stages
from rmjax.run.workdir import EXIT_PREEMPTED, Preemption
from tests import ROOT
from tests.data.texts.opening import documents
from tests.data.texts.test_hyperpartisan import write as write_hyperpartisan


@pytest.fixture
def books(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / "books" / split).mkdir(parents=True)
        (tmp_path / "books" / split / "1.txt").write_text("a small lamp and a tall door " * 50_000)
    return tmp_path / "books"


def asks(patch, where, name, number, call):
    """Makes the `call`-th call of a function send this process a signal first."""
    right, calls = getattr(where, name), []

    def asking(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return right(*args, **kwargs)

    patch.setattr(where, name, asking)
    return calls


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "tokenizer, where, name, call",
    [
        ("bytes", tokenizers.Bytes, "encode", 3),
        ("words", tokenizers.text, "tokenize", 5),  # the vocabulary
        ("words", tokenizers.Words, "encode", 3),
        ("characters", tokenizers.Characters, "encode", 3),
    ],
)
def test_documents_stop_at_the_next_piece(
    tmp_path, monkeypatch, books, tokenizer, where, name, call
):
    calls = asks(monkeypatch, where, name, signal.SIGTERM, call)
    with pytest.raises(progress.Stopped), Preemption():
        documents("books", str(books), str(tmp_path / "cache"), tokenizer)
    assert len(calls) <= call + 1 and not files(tmp_path / "cache")


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch, books):
    def interrupts(self, string):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(tokenizers.Bytes, "encode", interrupts)
    with pytest.raises(KeyboardInterrupt), Preemption():
        documents("books", str(books), str(tmp_path / "cache"))
    assert not files(tmp_path / "cache")


class Made(TextBuilder):
    """A thousand stories of one word."""

    name = "made_slowly"

    def stories(self):
        story = Story([["lamp"]], [["lamp"]], [1], [0])
        return {"train": [story] * 1000, "valid": [story], "test": [story]}


def test_records_stop_at_the_next_story(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch, pytest.raises(progress.Stopped), Preemption():
        calls = asks(patch, np, "array", signal.SIGTERM, 9)
        records.prepare(Made, str(tmp_path / "cache"), files=(tmp_path / "file",))
    assert len(calls) < 50 and not files(tmp_path / "cache")
    prepared = records.prepare(Made, str(tmp_path / "cache"), files=(tmp_path / "file",))
    left = (tmp_path / "cache" / "made_slowly").iterdir()
    assert [path.name for path in left] == [prepared.parent.name]


def test_reading_lines_stops_within_a_thousand_lines(tmp_path):
    (tmp_path / "lines").write_text("a\n" * 5000)
    with pytest.raises(progress.Stopped, match="while reading .*lines"), Preemption():
        os.kill(os.getpid(), signal.SIGTERM)
        list(text.read_lines(tmp_path / "lines"))


@pytest.mark.parametrize(
    "where, name", [(tokenizers.text, "tokenize"), (tokenizers.Words, "encode")]
)
def test_hyperpartisan_stops_at_the_next_article(tmp_path, monkeypatch, where, name):
    directory = write_hyperpartisan(tmp_path / "data")
    calls = asks(monkeypatch, where, name, signal.SIGTERM, 2)
    with pytest.raises(progress.Stopped), Preemption():
        open_hyperpartisan(directory, str(tmp_path / "cache"))
    assert len(calls) <= 3 and not files(tmp_path / "cache")


COMMAND = """
import os, signal, sys
from rmjax.data.texts import tokenizers
encode, calls = tokenizers.Bytes.encode, []
def asking(self, string):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return encode(self, string)
tokenizers.Bytes.encode = asking
from rmjax import main
main.cli()
"""


def test_a_run_stopped_in_preparation_exits_like_one_stopped_in_training(tmp_path, books):
    options = [f"--config={ROOT}/configs/books.py", f"--config.data.dir={books}"]
    options += [f"--config.data.cache_dir={tmp_path / 'cache'}", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [sys.executable, "-c", COMMAND, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert "Stopped: asked to stop while making tokens; run the same line again" in done.stderr
    assert not files(tmp_path / "cache") and issubclass(stages.Preempted, progress.Stopped)
