"""Two processes that are timed in turns: what speaks the protocol, and what judges the times.

The protocol is lines on stdin and stdout. A process warms up and prints a line of JSON,

    {"ready": true, ...}

whose other fields go into the record. For each line `go` on its stdin it does its work and prints
the seconds that it took:

    {"seconds": 0.123}

At the end of stdin it leaves. Other lines on stdout are ignored. `speak` is this side of the
protocol. `python -m rmjax.tools.turns --timer=timed --turn=0 SCRIPT ARGUMENTS` speaks it for a
script that has a function timed(call, ...): the script runs unchanged, but the call that it would
time waits for `go`. `--turn=1` chooses the second call of the timer.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

LEAST_SECONDS = 1.0  # of one repeat: shorter work is done several times
# Before a repeat, not timed: threads that wake on one core take a while to spread over all of them.
AWAKE_SECONDS = 0.5
SETTLE = 0.3  # seconds before a repeat, in which the threads of the other process fall asleep
LEAVE = 10.0  # seconds in which a process must leave after the end of its stdin
CONFIDENCE = 0.95
Fields = dict[str, Any]  # of a JSON object


def speak(
    call: Callable[[], object],
    ready: Fields | None = None,
    given: TextIO = sys.stdin,
    out: TextIO = sys.stdout,
) -> list[float]:
    """Times `call` for every line `go`, see the module.

    The call is repeated for a second, after half a second that is not timed. So the times are those
    of work that goes on, as a training or a server's does.

    Args:
      call: the work; it returns when the work is done.
      ready: more fields of the first line.
      given: the lines to read.
      out: where to write.

    Returns:
      The seconds of one call, for every repeat.
    """
    begin = time.perf_counter()
    for _ in range(3):
        begin = time.perf_counter()
        call()
    seconds = max(time.perf_counter() - begin, 1e-9)
    calls, before = (math.ceil(some / seconds) for some in (LEAST_SECONDS, AWAKE_SECONDS))
    print(json.dumps({"ready": True, "calls": calls} | (ready or {})), file=out, flush=True)
    times = []
    for line in given:
        if line.strip() != "go":
            continue
        for _ in range(before):
            call()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls)
        print(json.dumps({"seconds": times[-1]}), file=out, flush=True)
    return times


class Speaker:
    """A process that speaks the protocol, in a session of its own.

    Args:
      command: its arguments.
      wait: seconds until it must be ready, and until a repeat must end.

    Attributes:
      ready: its first line.

    Raises:
      RuntimeError: it ends before it is ready, or it is not ready in time; has its last lines.
    """

    def __init__(self, command: Sequence[str], wait: float = 900.0):
        self._command, self._wait = shlex.join(command), wait
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `close`
        # On a GPU two processes share its memory.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.ready = self._next("ready")
        except BaseException:
            self.close()
            raise

    @property
    def session(self) -> int:
        """The number of the process, which is that of its session."""
        return self._process.pid

    def repeat(self) -> float:
        """Has the process do its work once.

        Returns:
          The seconds that it says the work took.

        Raises:
          RuntimeError: it ends or does not answer.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: `_next` says so
        return float(self._next("seconds")["seconds"])

    def close(self) -> None:
        """Ends the process; if it does not leave, with all that it started."""
        assert self._process.stdin is not None
        if self._process.poll() is None:
            try:
                self._process.stdin.close()
                self._process.wait(LEAVE)
            except (OSError, subprocess.TimeoutExpired):
                os.killpg(self.session, signal.SIGKILL)
                self._process.wait()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _next(self, key: str) -> Fields:
        """The next line that is a JSON object with a key."""
        last, end = "", time.monotonic() + self._wait
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise self._failure(
                    f"no line with {key!r} in {self._wait:g} seconds", last
                ) from None
            if line is None:
                raise self._failure(f"it ended without a line with {key!r}", last)
            last = line
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            if isinstance(fields, dict) and key in fields:
                return fields

    def _failure(self, cause: str, last: str) -> RuntimeError:
        self._errors.seek(0)
        lines = f"{self._errors.read()[-2000:]}\n{last}".strip()
        return RuntimeError(
            f"{self._command}: {cause}. The process must speak the protocol of "
            f"rmjax.tools.turns. Its last lines: {lines or 'none'}"
        )


class Load(NamedTuple):
    """Counters of a moment.

    Attributes:
      seconds: of the clock.
      busy: processor seconds that all processes had since the machine started.
      own: the part of these that the processes of the measurement had.
    """

    seconds: float
    busy: float
    own: float


def load(sessions: Collection[int], root: Path = Path("/proc")) -> Load | None:
    """Reads the load of the machine.

    Args:
      sessions: of the processes that belong to the measurement; this process belongs to it too.
      root: the folder of the kernel's files.

    Returns:
      The counters; None where the kernel has no such files.
    """
    tick = 1.0 / os.sysconf("SC_CLK_TCK")
    try:
        total = (root / "stat").read_text().partition("\n")[0]
    except OSError:
        return None
    own = 0
    for stat in root.glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process has ended
        # state, parent, group, session, ...; user and system time, then those of ended children
        if int(fields[3]) in sessions or int(stat.parent.name) == os.getpid():
            own += sum(map(int, fields[11:15]))
    return Load(time.monotonic(), busy_ticks(total) * tick, own * tick)


def busy_ticks(line: str) -> int:
    """Processor time that was used, from the first line of /proc/stat.

    Args:
      line: 'cpu', then user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice.

    Returns:
      All but idle, iowait and the guests', whose time is in user and nice already.
    """
    ticks = list(map(int, line.split()[1:]))
    user, nice, system, _, _, irq, softirq, steal = (ticks + [0] * 8)[:8]
    return user + nice + system + irq + softirq + steal


def other_load(pairs: Sequence[tuple[Load | None, Load | None]]) -> float | None:
    """The mean number of cores that other processes used.

    Args:
      pairs: the load before and after each repeat.

    Returns:
      Cores, at least 0; None if it is not known.
    """
    seconds = busy = own = 0.0
    for before, after in pairs:
        if before is None or after is None:
            return None
        seconds += after.seconds - before.seconds
        busy += after.busy - before.busy
        own += after.own - before.own
    return max(0.0, busy - own) / seconds if seconds else None


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """An interval of the median that holds for any distribution (order statistics).

    Args:
      values: independent measurements; at least one.

    Returns:
      The narrowest symmetric interval of at least `CONFIDENCE`, else the range of the values; and
      its confidence.
    """
    ordered, n = sorted(values), len(values)
    # The chance that at most k of n values fall below the median, which then lies below the
    # (k + 1)-th value.
    tail = lambda k: sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    k = 0
    while k + 1 < n / 2 and 1 - 2 * tail(k + 1) >= CONFIDENCE:
        k += 1
    return ordered[k], ordered[n - 1 - k], max(0.0, 1 - 2 * tail(k))


def judge(pairs: Sequence[tuple[float, float]], other: float | None, most_load: float) -> Fields:
    """Compares the times of two processes that took turns.

    Args:
      pairs: (seconds of this package, seconds of the other process), one for each turn.
      other: cores that other processes used meanwhile; None: not known.
      most_load: the largest load at which times are compared.

    Returns:
      ratios: the other's seconds over ours, so that above 1 this package is faster; their median,
      interval and confidence; and the verdict: 'faster', 'slower', 'no difference shown', or
      'not judged: ...'.
    """
    ratios = [theirs / ours for ours, theirs in pairs]
    low, high, confidence = median_interval(ratios)
    if other is None:
        verdict = "not judged: the load of the machine is not known"
    elif other > most_load:
        verdict = f"not judged: other processes used {other:.2f} cores, the bound is {most_load:g}"
    elif confidence < CONFIDENCE:
        verdict = f"not judged: {len(pairs)} pairs are too few, take at least 6"
    elif low > 1.0:
        verdict = "faster"
    else:
        verdict = "slower" if high < 1.0 else "no difference shown"
    return {
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "confidence": confidence,
        "other_load": other,
        "most_load": most_load,
        "verdict": verdict,
    }


def compare(
    ours: Sequence[str],
    theirs: Sequence[str],
    pairs: int,
    most_load: float,
    show: Callable[[str], object] = print,
) -> Fields:
    """Times two processes in turns: ours, theirs, ours, theirs, and so on.

    Both processes are warm before the first turn, and wait while the other one works.

    Args:
      ours: arguments of a process that speaks the protocol.
      theirs: arguments of the other process.
      pairs: number of turns of each.
      most_load: see `judge`.
      show: takes a line for every pair.

    Returns:
      What `judge` returns; seconds: the pairs; ours and theirs: what each process said when it was
      ready, with peak_bytes, the peak of its memory.

    Raises:
      RuntimeError: a process does not speak the protocol; says which one.
    """
    speakers: list[Speaker] = []
    try:
        for command in (ours, theirs):
            speakers.append(Speaker(command))
        sessions = {speaker.session for speaker in speakers}
        times, loads = [], []
        for number in range(pairs):
            pair = []
            for speaker in speakers:
                time.sleep(SETTLE)
                before = load(sessions)
                pair.append(speaker.repeat())
                loads.append((before, load(sessions)))
            times.append((pair[0], pair[1]))
            milliseconds = " and ".join(f"{1e3 * seconds:.4g} ms" for seconds in pair)
            show(f"pair {number + 1}: {milliseconds}, ratio {pair[1] / pair[0]:.3f}")
        peaks = [peak_bytes(speaker.session) for speaker in speakers]
    finally:
        for speaker in speakers:
            speaker.close()
    about = [speaker.ready | {"peak_bytes": p} for speaker, p in zip(speakers, peaks, strict=True)]
    named = dict(zip(("ours", "theirs"), about, strict=True))
    return judge(times, other_load(loads), most_load) | {"seconds": times} | named


def peak_bytes(session: int, root: Path = Path("/proc")) -> int | None:
    """The peak memory of the processes of a session, added up.

    Args:
      session: its number.
      root: the folder of the kernel's files.

    Returns:
      Bytes; None where the kernel has no such files.
    """
    total = 0
    for stat in root.glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) != session:
                continue
            status = (stat.parent / "status").read_text().splitlines()
        except OSError:
            continue  # the process has ended
        total += sum(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return total or None


def run_script(path: Path, arguments: Sequence[str], timer: str, turn: int) -> None:
    """Runs a script whose timer takes turns, see the module.

    Args:
      path: of the script. It must call its `main` under `if __name__ == "__main__"`.
      arguments: of the script.
      timer: name of its function timer(call, device, ...), which returns a dict of numbers.
      turn: which call of the timer takes turns, from 0; the others return NaN at once.

    Raises:
      ValueError: the script has no such function, or no such test of its name.
    """
    tree = ast.parse(path.read_text(), str(path))
    names = [getattr(node, "name", "") for node in tree.body]
    if timer not in names:
        raise ValueError(f"{path}: has no function {timer!r}; --timer names the one that times")
    place = next((i for i, node in enumerate(tree.body) if _tests_name(node)), None)
    if place is None:
        raise ValueError(f'{path}: has no  if __name__ == "__main__":  that runs it')
    tree.body[place:place] = ast.parse(f"{timer} = _takes_turns").body
    seen = 0

    def takes_turns(call: Callable[[], object], device: object = "cpu", *_: object) -> Fields:
        nonlocal seen
        seen += 1
        if seen != turn + 1:
            return dict.fromkeys(("median_ms", "fastest_ms", "n"), math.nan)
        torch = sys.modules.get("torch")

        def work() -> None:
            call()
            if torch is not None and str(device).startswith("cuda"):
                torch.cuda.synchronize()

        times = speak(work, {"script": path.name, "arguments": [*arguments]}) or [math.nan]
        milliseconds = statistics.median(times) * 1e3
        return {"median_ms": milliseconds, "fastest_ms": 1e3 * min(times), "n": len(times)}

    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    code = compile(ast.fix_missing_locations(tree), str(path), "exec")
    exec(code, {"__name__": "__main__", "__file__": str(path), "_takes_turns": takes_turns})


def _tests_name(node: ast.stmt) -> bool:
    """Whether a statement is `if __name__ == "__main__"`."""
    if not isinstance(node, ast.If):
        return False
    names = (part.id for part in ast.walk(node.test) if isinstance(part, ast.Name))
    return "__name__" in names


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command `python -m rmjax.tools.turns`, see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--timer", default="timed", help="the script's function that times a call")
    parser.add_argument("--turn", type=int, default=0, help="which call of the timer, from 0")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parsed = parser.parse_args(argv)
    run_script(parsed.script, parsed.arguments, parsed.timer, parsed.turn)


if __name__ == "__main__":
    main()
