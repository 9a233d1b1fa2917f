"""The command line as people use it: what it prints, how it exits, how it stops and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from signal import SIGINT, SIGTERM

import pytest

from rmjax.run.workdir import EXIT_PREEMPTED, lock
from tests import ROOT
from tests.runs import lines

# The run sends the signal to itself: no test waits for a moment that a busy machine may miss.
CARD = """
import os, signal
from tests import runs
from rmjax import config as configs
from tests import ROOT

def get_config(arg=""):
    moment, _, name = os.environ.get("SIGNAL_BEFORE", "").partition(":")
    if moment:
        runs.before(moment, lambda: os.kill(os.getpid(), getattr(signal, name)))
    configs.options(arg, ["gru"])
    return runs.tiny(**(runs.PLAIN if arg == "gru" else {}))
"""

COLUMNS = [
    "memory",
    "test",
    "AUC",
    "95%",
    "from",
    "to",
    "gain,",
    "familiarity",
    "gain,",
    "recollection",
    "spread",
]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    path = tmp_path_factory.mktemp("card") / "card.py"
    path.write_text(CARD)
    return path


@pytest.fixture(scope="module")
def start(card):
    """start(module, *arguments, signal="<moment>:<name>") -> the process; all share what they compile."""

    def start(module: str, *arguments: str, signal: str = "") -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "SIGNAL_BEFORE": signal,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(card.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", f"rmjax.{module}", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=card.parent
        )

    return start


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """-> exit code, stdout, stderr; which never holds a traceback."""
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, err


SIGNALS = [
    "teacher step 3:SIGINT",
    "model validation 8:SIGTERM",
]  # other moments: test_train.py, and tests/drills


def test_a_signal_ends_it_in_order_and_the_same_line_goes_on(start, card, tmp_path):
    line = ["main", f"--config={card}", f"--workdir={tmp_path}"]
    for signal in SIGNALS:
        code, out, err = finish(start(*line, signal=signal))
        assert (code, out) == (EXIT_PREEMPTED, "") and "run the same line again to go on" in err, (
            signal
        )
    code, out, _ = finish(start(*line))
    steps = [entry["step"] for entry in lines(tmp_path) if entry["kind"] == "train"]
    assert code == 0 and steps == [*range(1, 7), *range(1, 13)]
    head, rule, *rows = out.splitlines()
    assert head.split() == COLUMNS and set(rule) == {"-", " "}
    assert [row.split("  ")[0] for row in rows] == [
        "rehearsal",
        "oracle, full history",
        "oracle, last 20 clicks",
    ]
    assert finish(start(*line))[:2] == (0, out)
    assert finish(start(*line, "--mode=eval"))[:2] == (0, out)


def test_a_second_process_is_told_who_is_there(start, card, tmp_path):
    with lock(tmp_path):
        code, out, err = finish(start("main", f"--config={card}", f"--workdir={tmp_path}"))
    assert (code, out) == (1, "")
    assert f"lock is held by pid {os.getpid()} on " in err and "or use another workdir" in err


MISTAKES = {  # what is wrong -> arguments, the cause, the cure
    "key": (["--config.train.bach_size=3"], "train.bach_size: no such key", "did you mean config.train.batch_size?"),
    "value": (["--config.train.batch_size=0"], "config.train.batch_size = 0: must be a whole number", "at least 1"),
    "type": (["--config.train.batch_size=many"], "config.train.batch_size = 'many'", "must be a whole number"),
    "option": (["--config={card}:grru"], "config option 'grru': no such option", "there are gru"),
    "file": (["--config={card}.no"], "card.py.no: no such file", "did you mean"),
    "section": (["--steps=3"], "--steps: no such flag", "did you mean --config.probe.steps or --config.teacher.steps"),
    "data": (["--config.data.name=movielens", "--config.data.dir=nowhere"], "nowhere", "https://grouplens.org"),
    "devices": (["--config.train.devices=2"], "config.train.devices = 2, but there are 1", "CpuDevice"),
    "argument": (["train"], "unexpected arguments: train", "options are flags, such as --mode=eval"),
    "mode": (["--mode=test"], "--mode=test", "train|eval|explain"),
    "untrained": (["--mode=eval"], "run has no checkpoint of the model", "train first, with --mode=train"),
    "workdir": (["--workdir="], "--workdir is missing", "name a directory"),
    "address": (["--workdir=gs://b/x"], "--workdir=gs://b/x is an address", "mount it (gcsfuse, s3fs, NFS)"),
    "pattern": (["--workdir=runs/lr[1]"], "--workdir=runs/lr[1] has '[' in its whole path", "use a name without"),
}  # fmt: skip


ALIKE = ("value", "type", "option", "argument", "devices", "workdir", "pattern")  # end as others do


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in MISTAKES]
)
def test_a_mistake_is_answered_in_a_line_that_says_what_to_do(start, card, tmp_path, name):
    arguments, cause, cure = MISTAKES[name]
    arguments = [argument.format(card=card) for argument in arguments]
    code, out, err = finish(
        start("main", f"--config={card}:gru", f"--workdir={tmp_path / 'run'}", *arguments)
    )
    told = [text for text in err.splitlines() if cause in text]
    assert code != 0 and told, (code, err)
    assert cure in (err if name in ("file", "argument", "mode") else told[0]), err
    assert out == ""


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_signal_during_the_imports_asks_for_the_same_line_again(tmp_path, number):
    """The first import that takes long sends it."""
    (tmp_path / "jax.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    line = [sys.executable, "-m", "rmjax.main", "--config=none.py", "--workdir=none"]
    done = subprocess.run(
        line, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == EXIT_PREEMPTED and "run the same line again" in done.stderr
    assert "Traceback" not in done.stderr


def test_histories_that_are_none_are_named(start):
    code, out, err = finish(start("load_test", "--histories=100,many"))
    assert code == 1 and not out and "--histories=['100', 'many']: must be whole numbers" in err


def test_explain_prints_what_a_run_would_cost(start, card):
    """On as many devices as are asked for, here a mesh of two times two."""
    mesh = [f"--config.train.{key}" for key in ("devices=4", "mapping=mesh", "model_devices=2")]
    code, out, err = finish(start("main", f"--config={card}", "--mode=explain", *mesh))
    assert code == 0, err
    told = json.loads(out)
    assert told["memory_bytes_per_stream"] == 132 and told["devices"] == 4
    assert told.keys() == {
        *(
            "parameters",
            "memory_bytes_per_stream",
            "flops_per_step",
            "matmul_flops_per_step",
            "collectives",
        ),
        *("bytes_per_device", "peak_bytes_per_device", "compile_seconds", "devices", "batch_size"),
    }
    held = told["bytes_per_device"]
    table = 4 * 8 * (9 * 2 * 3 + 4)  # half of the item table, and of each of its moments
    assert held["parameters"] == 4 * told["parameters"] - table // 2
    assert held["optimizer"] == 2 * held["parameters"] + 2 * 4  # two steps are counted
    assert told["collectives"]["all-reduce"]["bytes"] >= held["parameters"]


@pytest.mark.skipif(sys.platform != "linux", reason="sets what glibc and Linux know")
@pytest.mark.parametrize(
    ("platform", "tunables", "told"),
    [
        ("cpu", None, "GLIBC_TUNABLES=glibc.malloc.hugetlb=1, jax_cpu_enable_async_dispatch=False"),
        (
            "cpu",
            "glibc.malloc.perturb=0",
            "GLIBC_TUNABLES=glibc.malloc.perturb=0, jax_cpu_enable_async_dispatch=False",
        ),
        ("cuda", None, "nothing set"),
    ],
)
def test_a_process_without_an_accelerator_is_set_up_and_says_so(platform, tunables, told):
    """It begins again, under the same id; what the user has set stays."""
    program = """if True:
        import os
        from rmjax.run import environment
        print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), environment.prepare(), sep=chr(10))
        import jax
        print(jax.config.read("jax_cpu_enable_async_dispatch"))"""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)} | (
        {"GLIBC_TUNABLES": tunables} if tunables else {}
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env
    )
    pid, now, said, asynchronous = process.communicate(timeout=120)[0].splitlines()
    assert int(pid) == process.pid and said == f"environment: {told}"
    assert now == str(tunables or ("glibc.malloc.hugetlb=1" if platform == "cpu" else None))
    assert asynchronous == str(platform != "cpu")


def test_bench_prints_every_number_it_promises(start, card):
    arguments = [f"--config={card}:gru", "--repeats=3", "--history=12", "--history=1000"]
    code, out, _ = finish(start("bench", *arguments))
    told = json.loads(out)
    assert code == 0
    streaming = told.pop("streaming")
    assert isinstance(told.pop("environment"), str) and told.pop("device") == "cpu"
    assert told.keys() == {
        *(
            "parameters",
            "memory_bytes_per_stream",
            "flops_per_step",
            "matmul_flops_per_step",
            "devices",
            "batch_size",
        ),
        *(
            "compile_seconds",
            "step_ms",
            "step_ms_fastest",
            "streams_per_second",
            "items_per_second",
        ),
        *("queries_per_second", "items_behind_questions_per_second", "shapes"),
        *(
            "peak_bytes_compiled_per_device",
            "peak_bytes_process",
            "matmul_flops_per_second",
            "share_of_matmul_rate",
        ),
    }
    assert all(value > 0 for value in told.values()), told
    assert told["step_ms_fastest"] <= told["step_ms"]
    assert told["items_per_second"] == pytest.approx(40 * told["streams_per_second"])
    assert told["queries_per_second"] == pytest.approx(
        4 * told["streams_per_second"]
    )  # all at the end
    assert told["items_behind_questions_per_second"] == pytest.approx(4 * told["items_per_second"])
    assert told["streams_per_second"] == pytest.approx(8e3 / told["step_ms"])
    assert told["share_of_matmul_rate"] < 1
    assert streaming.keys() == {
        f"batch_{batch}_after_{history}" for batch in (1, 256) for history in (12, 1000)
    }
    for timing in streaming.values():
        assert timing.pop("memory_bytes_per_stream") == 72
        assert timing.keys() == {"write_segment_ms", "answer_query_ms"} and min(timing.values()) > 0


@pytest.mark.slow
def test_bench_times_steps_of_memoria(start):
    arguments = [f"--config={ROOT}/configs/memoria_bench.py:tiny"]
    sizes = {"steps": 4, "first": 2, "batch": 2, "working": 2, "remind_short_term": 2, "dim": 4}
    code, out, _ = finish(
        start("bench", *arguments, *(f"--config.memoria.tiny.{k}={v}" for k, v in sizes.items()))
    )
    told = json.loads(out)
    assert code == 0 and told.keys() == {"environment", "tiny"}
    assert told["tiny"].keys() == {
        "reminded",
        "all_short_term",
        "exp, reminded",
        "exp, all_short_term",
    }
    for timing in told["tiny"].values():
        assert 0 < timing["step_ms_fastest"] <= timing["step_ms"]
        assert timing["capacity"] == 2 + 64 + 102 and timing["last_step"]["reminded"] == 2
    ratios = {
        name: timing["times_as_fast_as_released"]
        for name, timing in told["tiny"].items()
        if len(timing) == 8
    }
    assert ratios == {
        "all_short_term": pytest.approx(3.6 / told["tiny"]["all_short_term"]["step_ms"])
    }


@pytest.mark.parametrize(
    "override, told",
    [
        ("memoria.tiny.dim=0", "MemoriaConfig.dim=0: must be a whole number, at least 1"),
        (
            "memoria.tiny.first=600",
            "config.memoria.tiny: needs batch >= 1 and 0 <= first < steps, got (1, 600, 600)",
        ),
        ("memory.tiny.dim=3", "config.memory.tiny.dim: no such key"),
        ("memoria.tiny.dmi=3", "config.memoria.tiny.dmi: no such key"),
    ],
)
def test_bench_names_what_cannot_be_a_row_of_memoria(start, override, told):
    process = start(
        "bench", f"--config={ROOT}/configs/memoria_bench.py:tiny", f"--config.{override}"
    )
    code, out, err = finish(process)
    assert code == 1 and told in err and not out


@pytest.mark.parametrize(
    ("module", "more"), [("bench", []), ("load_test", []), ("ablate", ["--table=rm5"])]
)
def test_a_signal_ends_every_program_at_once(start, card, module, more):
    stopping = card.with_name("stopping.py")
    stopping.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code, _, err = finish(start(module, f"--config={stopping}", *more))
    assert code == EXIT_PREEMPTED and "Stopped: run the same line again" in err
