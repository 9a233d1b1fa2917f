"""Long preparations log their progress, and end when the run is asked to stop."""

from __future__ import annotations

import os
import signal
import time

import pytest

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_ends_with_the_run(number):
    with pytest.raises(progress.Stopped, match="asked to stop while copying"), Preemption():
        progress.Progress("copying").step()
        os.kill(os.getpid(), number)
        progress.Progress("copying").step()
    progress.Progress("copying").step()
