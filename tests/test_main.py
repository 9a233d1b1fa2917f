"""The command line as people use it: output, exit codes, stops and resumed runs."""

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

# The run sends the signal to itself, so no test depends on timing.
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

COLUMNS = "memory test AUC 95% from to gain, familiarity gain, recollection spread"


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    path = tmp_path_factory.mktemp("card") / "card.py"
    path.write_text(CARD)
    return path


@pytest.fixture(scope="module")
def start(card):
    """start(module, *arguments, signal="<moment>:<name>") -> the process.

    All processes share the cache of compiled programs.
    """

    def start(module: str, *arguments: str, signal: str = "") -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "SIGNAL_BEFORE": signal,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(card.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", f"rmjax.{module}", *arguments]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, env=environment, cwd=card.parent, **options)

    return start


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a process; stderr never has a traceback."""
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, err


# For other moments see test_train.py and tests/drills.
SIGNALS = ["teacher step 3:SIGINT", "model validation 8:SIGTERM"]


def test_a_signal_stops_a_run_and_the_same_line_resumes_it(start, card, tmp_path):
    line = ["main", f"--config={card}", f"--workdir={tmp_path}"]
    for signal in SIGNALS:
        code, out, err = finish(start(*line, signal=signal))
        assert (code, out) == (EXIT_PREEMPTED, ""), signal
        assert "run the same line again to go on" in err, signal
    code, out, _ = finish(start(*line))
    steps = [entry["step"] for entry in lines(tmp_path) if entry["kind"] == "train"]
    assert code == 0 and steps == [*range(1, 7), *range(1, 13)]
    (head, rule, *rows), costs = (part.splitlines() for part in out.split("\n\n"))
    assert "FLOPs per item" in costs[0]
    assert " ".join(head.split()) == COLUMNS and set(rule) == {"-", " "}
    names = ["rehearsal", "oracle, full history", "oracle, last 20 clicks"]
    assert [row.split("  ")[0] for row in rows] == names
    assert finish(start(*line, "--mode=eval"))[:2] == (0, out)


def test_a_second_process_learns_who_holds_the_workdir(start, card, tmp_path):
    with lock(tmp_path):
        code, out, err = finish(start("main", f"--config={card}", f"--workdir={tmp_path}"))
    assert (code, out) == (1, "")
    assert f"lock is held by pid {os.getpid()} on " in err and "or use another workdir" in err


MISTAKES = {  # name -> arguments, the cause, the cure
    "key": (["--config.train.bach_size=3"], "train.bach_size: no such key",
            "did you mean config.train.batch_size?"),
    "value": (["--config.train.batch_size=0"],
              "config.train.batch_size = 0: must be a whole number", "at least 1"),
    "type": (["--config.train.batch_size=many"], "config.train.batch_size = 'many'",
             "must be a whole number"),
    "unread": (["--config.reason.hops=2"], "config.reason.hops = 2: this run does not read it",
               "since config.machine.kind = 'gru': leave the flag out"),
    "option": (["--config={card}:grru"], "config option 'grru': no such option", "there are gru"),
    "file": (["--config={card}.no"], "card.py.no: no such file", "did you mean"),
    "section": (["--steps=3"], "--steps: no such flag",
                "did you mean --config.probe.steps or --config.teacher.steps"),
    "data": (["--config.data.name=movielens", "--config.data.dir=nowhere"], "nowhere",
             "https://grouplens.org"),
    "devices": (["--config.train.devices=2"], "config.train.devices = 2, but there are 1",
                "CpuDevice"),
    "argument": (["train"], "unexpected arguments: train",
                 "options are flags, such as --mode=eval"),
    "mode": (["--mode=test"], "--mode=test", "train|eval|explain"),
    "untrained": (["--mode=eval"], "run has no checkpoint of the model",
                  "train first, with --mode=train"),
    "workdir": (["--workdir="], "--workdir is missing", "name a directory"),
    "address": (["--workdir=gs://b/x"], "--workdir=gs://b/x is an address",
                "mount it (gcsfuse, s3fs, NFS)"),
    "pattern": (["--workdir=runs/lr[1]"], "--workdir=runs/lr[1] has '[' in its whole path",
                "use a name without"),
}  # fmt: skip
# These end as others do; they run with the slow tests.
ALIKE = ("value", "type", "option", "argument", "devices", "workdir", "pattern")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in MISTAKES]
)
def test_the_error_of_a_mistake_is_a_line_with_cause_and_cure(start, card, tmp_path, name):
    arguments, cause, cure = MISTAKES[name]
    arguments = [argument.format(card=card) for argument in arguments]
    workdir = f"--workdir={tmp_path / 'run'}"
    code, out, err = finish(start("main", f"--config={card}:gru", workdir, *arguments))
    lines_of_cause = [text for text in err.splitlines() if cause in text]
    assert code != 0 and lines_of_cause, (code, err)
    assert cure in (err if name in ("file", "argument", "mode") else lines_of_cause[0]), err
    assert out == ""


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_signal_during_the_imports_asks_for_the_same_line_again(tmp_path, number):
    """A module in place of jax sends the signal."""
    program = f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n"
    (tmp_path / "jax.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    line = [sys.executable, "-m", "rmjax.main", "--config=none.py", "--workdir=none"]
    options = dict(capture_output=True, text=True, check=False)
    done = subprocess.run(line, env=environment, cwd=tmp_path, **options)
    assert done.returncode == EXIT_PREEMPTED and "run the same line again" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_error_of_wrong_histories_names_them(start):
    code, out, err = finish(start("load_test", "--histories=100,many"))
    assert code == 1 and not out and "--histories=['100', 'many']: must be whole numbers" in err


def test_explain_prints_what_a_run_would_cost(start, card):
    """It simulates as many devices as the config asks for, here a mesh of two times two."""
    mesh = [f"--config.train.{key}" for key in ("devices=4", "mapping=mesh", "model_devices=2")]
    unread = ["--unread=warn", "--config.model.dim=8"]
    code, out, err = finish(start("main", f"--config={card}", "--mode=explain", *mesh, *unread))
    assert code == 0, err
    assert err.count("config.model.dim = 8") == 1  # though the program begins twice
    costs = json.loads(out)
    assert costs["memory_bytes_per_stream"] == 132 and costs["devices"] == 4
    assert costs.keys() == {
        "parameters", "memory_bytes_per_stream", "flops_per_step", "matmul_flops_per_step",
        "parameters_by_part",
        "collectives", "bytes_per_device", "peak_bytes_per_device", "compile_seconds", "devices",
        "batch_size",
    }  # fmt: skip
    parts = costs["parameters_by_part"]
    assert sum(parts.values()) == costs["parameters"] and {"machine", "item table"} < parts.keys()
    held = costs["bytes_per_device"]
    table = 4 * 8 * (9 * 2 * 3 + 4)  # a device holds half of the item table and of its moments
    assert held["parameters"] == 4 * costs["parameters"] - table // 2
    assert held["optimizer"] == 2 * held["parameters"] + 2 * 4  # and two counts of steps
    assert costs["collectives"]["all-reduce"]["bytes"] >= held["parameters"]


ASYNC = "jax_cpu_enable_async_dispatch=False"
GPU_FLAGS = (
    "XLA_FLAGS=--xla_gpu_experimental_enable_fusion_autotuner=false "
    "--xla_gpu_enable_triton_gemm=false"
)


@pytest.mark.skipif(sys.platform != "linux", reason="sets variables of glibc and Linux")
@pytest.mark.parametrize(
    ("platform", "tunables", "report"),
    [
        ("cpu", None, f"GLIBC_TUNABLES=glibc.malloc.hugetlb=1, {ASYNC}"),
        ("cpu", "glibc.malloc.perturb=0", f"GLIBC_TUNABLES=glibc.malloc.perturb=0, {ASYNC}"),
        ("tpu", None, "nothing set"),
        ("cuda", None, f"{GPU_FLAGS}, JAX_THREEFRY_GPU_KERNEL_LOWERING=true"),
    ],
)
def test_a_process_is_set_up_for_its_platform_and_reports_it(platform, tunables, report):
    """The process starts again under the same id; values that the user has set stay."""
    program = """if True:
        import os
        from rmjax.run import environment
        print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), environment.prepare(), sep=chr(10))
        import jax
        print(jax.config.read("jax_cpu_enable_async_dispatch"))"""
    ours = "GLIBC_TUNABLES", "XLA_FLAGS"
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)}
    env |= {"GLIBC_TUNABLES": tunables} if tunables else {}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    pid, variable, line, asynchronous = process.communicate(timeout=120)[0].splitlines()
    assert int(pid) == process.pid and line == f"environment: {report}"
    assert variable == str(tunables or ("glibc.malloc.hugetlb=1" if platform == "cpu" else None))
    assert asynchronous == str(platform != "cpu")


def test_bench_prints_every_documented_number(start, card):
    arguments = [f"--config={card}:gru", "--repeats=3", "--history=12", "--history=1000"]
    code, out, _ = finish(start("bench", *arguments))
    rates = json.loads(out)
    assert code == 0
    streaming = rates.pop("streaming")
    assert isinstance(rates.pop("environment"), str) and rates.pop("device") == "cpu"
    assert sum(rates.pop("parameters_by_part").values()) == rates["parameters"]
    assert rates.keys() == {
        "parameters", "memory_bytes_per_stream", "flops_per_step", "matmul_flops_per_step",
        "devices", "batch_size", "compile_seconds", "step_ms", "step_ms_fastest",
        "streams_per_second", "items_per_second", "queries_per_second",
        "items_behind_questions_per_second", "shapes", "peak_bytes_compiled_per_device",
        "peak_bytes_process", "matmul_flops_per_second", "share_of_matmul_rate",
    }  # fmt: skip
    assert all(value > 0 for value in rates.values()), rates
    assert rates["step_ms_fastest"] <= rates["step_ms"]
    # 40 items and 4 questions a stream; all questions come at the end.
    streams, items = rates["streams_per_second"], rates["items_per_second"]
    assert streams == pytest.approx(8e3 / rates["step_ms"])
    assert items == pytest.approx(40 * streams)
    assert rates["queries_per_second"] == pytest.approx(4 * streams)
    assert rates["items_behind_questions_per_second"] == pytest.approx(4 * items)
    assert rates["share_of_matmul_rate"] < 1
    cases = {f"batch_{batch}_after_{items}" for batch in (1, 256) for items in (12, 1000)}
    assert streaming.keys() == cases
    for timing in streaming.values():
        assert timing.pop("memory_bytes_per_stream") == 72
        assert timing.keys() == {"write_segment_ms", "answer_query_ms"} and min(timing.values()) > 0


@pytest.mark.slow
def test_bench_times_steps_of_memoria(start):
    card = f"--config={ROOT}/configs/memoria_bench.py:tiny"
    sizes = {"steps": 4, "first": 2, "batch": 2, "working": 2, "remind_short_term": 2, "dim": 4}
    keys = [f"--config.memoria.tiny.{key}={value}" for key, value in sizes.items()]
    code, out, _ = finish(start("bench", card, *keys))
    rates = json.loads(out)
    assert code == 0 and rates.keys() == {"environment", "tiny"}
    timings = rates["tiny"]
    variants = {"reminded", "all_short_term", "exp, reminded", "exp, all_short_term"}
    assert timings.keys() == variants
    for timing in timings.values():
        assert 0 < timing["step_ms_fastest"] <= timing["step_ms"]
        assert timing["capacity"] == 2 + 64 + 102 and timing["last_step"]["reminded"] == 2
    ratios = {
        name: timing["times_as_fast_as_released"]
        for name, timing in timings.items()
        if len(timing) == 8
    }
    assert ratios == {"all_short_term": pytest.approx(3.6 / timings["all_short_term"]["step_ms"])}


@pytest.mark.parametrize(
    ("override", "words"),
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
def test_the_error_of_a_wrong_row_of_memoria_names_the_value(start, override, words):
    card = f"--config={ROOT}/configs/memoria_bench.py:tiny"
    code, out, err = finish(start("bench", card, f"--config.{override}"))
    assert code == 1 and words in err and not out


@pytest.mark.parametrize(
    ("module", "more"), [("bench", []), ("load_test", []), ("ablate", ["--table=rm5"])]
)
def test_a_signal_ends_every_program_at_once(start, card, module, more):
    stopping = card.with_name("stopping.py")
    stopping.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code, _, err = finish(start(module, f"--config={stopping}", *more))
    assert code == EXIT_PREEMPTED and "Stopped: run the same line again" in err
