"""A terminal gets plain lines and a bar; a pipe gets neither."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time

LINES = """
from absl import logging
logging.set_verbosity(logging.INFO)
from rmjax.io import terminal
terminal.plain_logs()
bar = terminal.bar("model", 4)
for step in range(4):
    bar.update()
    bar.refresh()
logging.info("halfway")
logging.warning("careful")
bar.close()
"""


def test_a_terminal_gets_a_bar_and_lines_without_a_prefix():
    parent, child = pty.openpty()
    os.set_blocking(parent, False)
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    subprocess.run([sys.executable, "-c", LINES], stderr=child, check=True)
    shown = os.read(parent, 1 << 20).decode()
    assert "model 100%" in shown and "4/4" in shown
    lines = [line for part in shown.splitlines() for line in part.split("\r")]
    assert "halfway" in lines and "Warning: careful" in lines


LOST = """
import os, sys
from absl import logging
from rmjax.io import terminal
terminal.plain_logs()
bar = terminal.bar("model", 4)
open(sys.argv[1], "w").close()
while os.path.exists(sys.argv[1]): pass
logging.warning("lost")
bar.update()
bar.refresh()
bar.close()
open(sys.argv[1] + ".done", "w").close()
"""


def test_a_terminal_that_is_lost_does_not_end_the_run(tmp_path):
    parent, child = pty.openpty()
    place = tmp_path / "open"
    command = [sys.executable, "-c", LOST, str(place)]
    process = subprocess.Popen(command, stderr=child)
    os.close(child)
    while not place.exists() and process.poll() is None:
        time.sleep(0.01)
    os.close(parent)
    place.unlink()
    process.wait(timeout=60)
    assert (tmp_path / "open.done").exists()


def test_a_pipe_gets_plain_lines_and_no_bar():
    done = subprocess.run([sys.executable, "-c", LINES], stderr=subprocess.PIPE, check=True)
    assert done.stderr.decode().splitlines() == ["INFO:absl:halfway", "WARNING:absl:careful"]
