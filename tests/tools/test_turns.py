"""Two processes in turns: the judgement on made-up numbers, the load, and the protocol."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rmjax.tools import turns
from rmjax.tools.turns import Load
from tests import ROOT

FASTER = [(1.0, 1.5 + 0.01 * i) for i in range(7)]


@pytest.mark.parametrize(
    ("pairs", "load", "verdict"),
    [
        (FASTER, 0.0, "faster"),
        ([(b, a) for a, b in FASTER], 0.1, "slower"),
        ([(1.0, 0.8 + 0.1 * i) for i in range(7)], 0.05, "no difference shown"),
        (FASTER, 0.11, "not judged: other processes used 0.11 cores, the bound is 0.1"),
        (FASTER, None, "not judged: the load of the machine is not known"),
        (FASTER[:5], 0.0, "not judged: 5 pairs are too few, take at least 6"),
    ],
)
def test_the_verdict(pairs, load, verdict):
    judged = turns.judge(pairs, load, 0.1)
    assert judged["verdict"] == verdict
    assert judged["ratios"] == [theirs / ours for ours, theirs in pairs]
    assert judged["interval"][0] <= judged["ratio"] <= judged["interval"][1]
    assert judged["other_load"] == load and judged["most_load"] == 0.1


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9, 11])
def test_the_interval_of_the_median_counts_every_case(n):
    """Each value falls below or above the median with one half; all 2^n cases are counted."""
    values = list(range(n))
    low, high, confidence = turns.median_interval(values)
    k = values.index(low)
    assert high == values[n - 1 - k]

    def covered(k):
        below = [sum(case) for case in itertools.product((0, 1), repeat=n)]
        return sum(k < count < n - k for count in below) / 2**n

    assert confidence == pytest.approx(covered(k))
    if n >= 6:
        assert confidence >= turns.CONFIDENCE
        assert covered(k + 1) < turns.CONFIDENCE


def test_the_load_of_others_is_what_the_measurement_did_not_use(tmp_path):
    assert turns.busy_ticks("cpu  1 2 4 800 1600 8 16 32 1 2") == 1 + 2 + 4 + 8 + 16 + 32
    assert turns.busy_ticks("cpu 1 2 4 800") == 7
    (tmp_path / "stat").write_text("cpu  1000 0 0 5 0 0 0 0 0 0\ncpu0 1 1 1\n")
    rows = {7: (7, 100), 8: (7, 20), 9: (9, 300), os.getpid(): (1, 5)}  # {pid: (session, ticks)}
    for pid, (session, ticks) in rows.items():
        folder = tmp_path / str(pid)
        folder.mkdir()
        fields = f"S 1 {session} {session} 0 0 0 0 0 0 0 {ticks} 1 2 3 0"
        (folder / "stat").write_text(f"{pid} (a) b) {fields}\n")
        (folder / "status").write_text(f"Name:\ta\nVmHWM:\t    {pid} kB\n")
    tick = 1 / os.sysconf("SC_CLK_TCK")
    measured = turns.load({7}, tmp_path)
    assert measured.busy == pytest.approx(1000 * tick)
    assert measured.own == pytest.approx((100 + 20 + 5 + 3 * 6) * tick)
    assert turns.load({7}, tmp_path / "nowhere") is None
    assert turns.peak_bytes(7, tmp_path) == 1024 * (7 + 8)
    assert turns.peak_bytes(5, tmp_path) is None


def test_the_load_is_a_mean_over_the_repeats():
    first = Load(10.0, 100.0, 50.0), Load(12.0, 103.0, 51.0)  # 2 of 3 seconds are others'
    second = Load(20.0, 200.0, 60.0), Load(21.0, 202.0, 62.0)  # none
    assert turns.other_load([first, second]) == pytest.approx(2 / 3)
    assert turns.other_load([second]) == 0.0
    assert turns.other_load([first, (None, second[1])]) is None


SPEAKER = """
import json, sys
name, log, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
print("some noise"); print(json.dumps({"ready": True, "name": name}), flush=True)
for line in sys.stdin:
    open(log, "a").write(name)
    print(json.dumps({"other": 1})); print(json.dumps({"seconds": seconds}), flush=True)
"""


def test_the_processes_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "SETTLE", 0.0)
    log, lines = tmp_path / "log", []
    command = lambda name, seconds: [sys.executable, "-c", SPEAKER, name, str(log), str(seconds)]
    result = turns.compare(command("A", 0.5), command("B", 0.75), 6, 1e9, lines.append)
    assert log.read_text() == "AB" * 6
    assert result["ratios"] == [1.5] * 6 and result["seconds"] == [(0.5, 0.75)] * 6
    assert result["ours"]["name"] == "A" and result["theirs"]["name"] == "B"
    assert len(lines) == 6 and lines[0] == "pair 1: 500 ms and 750 ms, ratio 1.500"
    if sys.platform == "linux":
        assert result["verdict"] == "faster"
        assert result["ours"]["peak_bytes"] > 2**20


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import sys; sys.exit('no such card')", "ended without a line with 'ready'"),
        ("print('{\"seconds\": 1}')", "ended without a line with 'ready'"),
        ("import time; print('wait', flush=True); time.sleep(60)", "in 0.5 seconds"),
    ],
)
def test_a_process_that_does_not_speak_is_an_error_that_names_it(code, cause):
    with pytest.raises(RuntimeError) as error:
        turns.Speaker([sys.executable, "-c", code], wait=0.5 if "sleep" in code else 30)
    assert cause in str(error.value) and sys.executable in str(error.value)
    if "exit" in code:
        assert "no such card" in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_does_not_leave_is_ended_with_its_children(monkeypatch):
    code = """
import json, subprocess, time
child = subprocess.Popen(["sleep", "100"])
print(json.dumps({"ready": True, "child": child.pid}), flush=True)
time.sleep(100)
"""
    monkeypatch.setattr(turns, "LEAVE", 0.1)
    speaker = turns.Speaker([sys.executable, "-c", code], wait=30)
    stat = Path(f"/proc/{speaker.ready['child']}/stat")
    assert stat.exists()
    speaker.close()
    end = time.monotonic() + 10
    while stat.exists() and ") Z" not in stat.read_text():  # a zombie waits for its parent
        assert time.monotonic() < end
        time.sleep(0.01)


SCRIPT = """
import sys, time
if sys.version_info > (3,):
    LONG = int

def timed(call, device, seconds):
    raise AssertionError("the script's own timer ran")

def main():
    say = lambda text: (time.sleep(0.2), print(text))
    print(timed(lambda: say("first"), "cpu", 9), timed(lambda: say("second"), "cpu", 9))

if __name__ == "__main__":
    main()
"""


def test_a_script_that_times_its_calls_takes_turns(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    line = [sys.executable, "-m", "rmjax.tools.turns", "--turn=1", str(script), "--case", "x"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    speaker = subprocess.run(
        line, input="go\nstop\ngo\n", capture_output=True, text=True, env=environ, check=True
    )
    assert "first" not in speaker.stdout
    lines = [line for line in speaker.stdout.splitlines() if line != "second"]
    assert '"ready": true' in lines[0] and '"arguments": ["--case", "x"]' in lines[0]
    assert len(lines) == 4 and all("seconds" in line for line in lines[1:3])
    assert "'n': nan" in lines[3] and "'n': 2" in lines[3]
    script.write_text(SCRIPT.partition("if __name__")[0])
    with pytest.raises(ValueError, match="has no  if __name__"):
        turns.run_script(script, [], "timed", 0)
    with pytest.raises(ValueError, match="has no function 'clock'"):
        turns.run_script(script, [], "clock", 0)
