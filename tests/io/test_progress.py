"""Long preparations log their progress, and end when the run is asked to stop."""

from __future__ import annotations

import io
import os
import re
import signal
import time

import pytest
import tqdm

from rmjax.io import progress
from rmjax.run.workdir import Preemption


def test_a_line_every_ten_seconds(monkeypatch, caplog):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    copying = progress.Progress("copying", total=50_000_000)
    counting = progress.Progress("counting", unit="stories", size=1)
    with caplog.at_level("INFO"):
        for _ in range(25):
            clock[0] += 1
            copying.step(1_500_000)
            counting.step()
    assert [record.getMessage() for record in caplog.records] == [
        "copying: 15.0 of 50.0 MB, 1.5 MB/s",
        "counting: 10 stories, 1.0 stories/s",
        "copying: 30.0 of 50.0 MB, 1.5 MB/s",
        "counting: 20 stories, 1.0 stories/s",
    ]


def test_a_bar_shows_numbers_without_tails(monkeypatch):
    shown = io.StringIO()
    bar = lambda doing, total, unit: tqdm.tqdm(total=total, file=shown, mininterval=0)
    monkeypatch.setattr(progress.terminal, "bar", bar)
    copying = progress.Progress("copying", total=9_900_000)
    for _ in range(33):
        copying.step(300_000)
    copying.close()
    assert " 3/10 " in shown.getvalue() and " 10/10 " in shown.getvalue()
    assert not re.search(r"\d\.\d+/10", shown.getvalue())


def test_a_watched_bar_is_closed(monkeypatch):
    closed = []
    monkeypatch.setattr(progress.Progress, "close", lambda self: closed.append(self))
    assert list(progress.watch("ab", "reading", "letters")) == ["a", "b"]
    watched = progress.watch("ab", "reading", "letters")
    next(watched)
    watched.close()
    assert len(closed) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_ends_with_the_run(number):
    with pytest.raises(progress.Stopped, match="asked to stop while copying"), Preemption():
        progress.Progress("copying").step()
        os.kill(os.getpid(), number)
        progress.Progress("copying").step()
    progress.Progress("copying").step()
