"""The tables over all registered memories: their results beside their costs, and tuned values."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from rmjax.io import atomic, text
from rmjax.machines import Costs
from rmjax.registry import METRICS
from rmjax.run import reporting
from rmjax.run.workdir import EXIT_PREEMPTED, Preemption
from rmjax.tools.jobs import Job, jobs, slug, wait
from rmjax.tools.tables import Table

HISTORY = 1000  # items that a stream has when one more write and one answer are timed
REPEATS = 20  # timed train steps
Line = dict[str, Any]
CAPTION = (
    "Mean and sample std over seeds. State: floating-point numbers a stream; bytes: all of it. "
    "Parameters: without the item table. FLOPs: of writing one item. Times, in milliseconds: a "
    "train step; writing one segment, and answering one question, of one stream."
)


def finish(
    table: Table,
    workdir: Path,
    seeds: int,
    given: Sequence[str],
    stop: Preemption,
    command: Sequence[str],
) -> list[Line]:
    """Times the rows that have results; prints the table; writes memories.json, .md and .png.

    Args:
      table: the table `memories`.
      workdir: folder of its runs.
      seeds: number of seeds.
      given: flags that all runs share.
      stop: whether this process was asked to stop.
      command: the arguments of `python -m rmjax.ablate`, for memories.md.

    Returns:
      One line for each row, of numbers.

    Raises:
      SystemExit: this process was asked to stop.
    """
    lines, rows = [], finished(table, workdir, seeds)
    machine = this_machine() if rows else ""
    for name, results in rows.items():
        times = timed(table, name, workdir, given, stop, machine)
        lines.append({"memory": name} | numbers([row for _, row in results]) | times)
    if lines:
        atomic.write(workdir / "memories.json", json.dumps(lines, indent=1))
        atomic.write(
            workdir / "memories.md",
            markdown(lines, shlex.join(["python", "-m", "rmjax.ablate", *command])),
        )
        draw(lines, workdir / "memories.png")
        print(f"\n{reporting.table([shown(line) for line in lines])}\n{CAPTION}")
    return lines


def finished(table: Table, workdir: Path, seeds: int) -> dict[str, list[tuple[Job, Line]]]:
    """The finished runs of each row: {row: [(run, first row of its final table)]}."""
    rows: dict[str, list[tuple[Job, Line]]] = {}
    for job in jobs(table, workdir, seeds):
        path = job.workdir / "results.json"
        if path.exists():
            first = text.read_json(path, "remove it, and run the same command again")[0]
            rows.setdefault(job.row, []).append((job, first))
    return rows


def numbers(results: Sequence[Line]) -> Line:
    """The measure of the config, over seeds, and the costs of the machine.

    Args:
      results: the first rows of the final tables, one for each seed.

    Returns:
      'seeds', 'measure' (its name), 'mean', 'std' (None for one seed), 'values', and the fields of
      `machines.Costs`.
    """
    measure = next(key for key in results[0] if key.startswith("test_"))
    values = [row[measure] for row in results]
    return {
        "seeds": len(values),
        "measure": measure.removeprefix("test_"),
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
        **{name: results[0].get(name) for name in Costs._fields},
    }


def this_machine() -> str:
    """The device and the kind of CPU of this machine.

    Another process asks JAX, since an accelerator's memory is needed by the benches.
    """
    code = "import jax; from rmjax.run import environment as e; "
    code += "print(jax.devices()[0].device_kind, e.machine(), sep=', ')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip().rpartition("\n")[2]


def timed(
    table: Table,
    name: str,
    workdir: Path,
    given: Sequence[str],
    stop: Preemption,
    machine: str,
) -> dict[str, float]:
    """Times a row by `python -m rmjax.bench`, unless this was done before on such a machine.

    Args:
      table: the table.
      name: of the row.
      workdir: folder of the table; the row's bench/<name>.json is kept in it.
      given: flags that all runs share.
      stop: whether this process was asked to stop.
      machine: where the row is timed, see `this_machine`.

    Returns:
      step_ms, write_ms and answer_ms; {} if the bench failed, which is logged.

    Raises:
      SystemExit: this process was asked to stop.
    """
    path = workdir / "bench" / f"{slug(name)}.json"
    cure = "remove it, and run the same command again"
    if not path.exists() or text.read_json(path, cure).get("machine") != machine:
        path.parent.mkdir(exist_ok=True)
        changes = [f"--config.{key}={value}" for key, value in table.rows[name].changes.items()]
        command = [sys.executable, "-m", "rmjax.bench", f"--repeats={REPEATS}"]
        command += [f"--history={HISTORY}", *given, *changes]
        log, out = path.with_suffix(".log"), path.with_suffix(".out")
        logging.info("timing %s", name)
        with log.open("w") as errors, out.open("w") as output:
            code = wait(subprocess.Popen(command, stdout=output, stderr=errors), stop)
        if stop.requested:
            raise SystemExit(EXIT_PREEMPTED)
        if code:
            logging.error("the bench of %s failed with exit code %s; see %s", name, code, log)
            return {}
        measures = text.read_json(out, cure) | {"machine": machine}
        atomic.write(path, json.dumps(measures, indent=1))
        out.unlink()
    measures = text.read_json(path, cure)
    streaming = measures["streaming"][f"batch_1_after_{HISTORY}"]
    return {
        "step_ms": measures["step_ms"],
        "write_ms": streaming["write_segment_ms"],
        "answer_ms": streaming["answer_query_ms"],
    }


def shown(line: Line) -> dict[str, str | int]:
    """A line as it is printed: short names and numbers, so that it fits 100 columns."""
    std = "" if line["std"] is None else f" +- {line['std']:.4f}"
    time = lambda name: reporting.short(line.get(name))
    return {
        "memory": line["memory"],
        "seeds": line["seeds"],
        line["measure"]: f"{line['mean']:.4f}{std}",
        "state": prefixed(line["state_floats"]),
        "bytes": prefixed(line["state_bytes"]),
        "params": prefixed(line["parameters"]),
        "FLOPs": prefixed(line["flops_per_item"]),
        "step ms": time("step_ms"),
        "write ms": time("write_ms"),
        "read ms": time("answer_ms"),
    }


def prefixed(value: int | None) -> str:
    """Three digits and a prefix: 2560 gives '2.56k'; None gives '-'."""
    if value is None:
        return "-"
    power = 0 if value < 1000 else min(3, int(math.log10(value)) // 3)
    return f"{value / 1000**power:.3g}{['', 'k', 'M', 'G'][power]}"


def markdown(lines: Sequence[Line], command: str) -> str:
    """The table as Markdown, with the command that made it."""
    rows = [shown(line) for line in lines]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, ["---", *["---:"] * (len(names) - 1)]]
    cells += [[str(row.get(name, "-")) for name in names] for row in rows]
    body = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"    {command}\n\n{body}\n\n{CAPTION}\n"


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draws the measure against the bytes of a stream's state; without matplotlib, logs it.

    Args:
      lines: as `finish` returns them.
      path: of the figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.info("no %s: matplotlib is not installed (pip install 'rmjax[plots]')", path)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        if line["state_bytes"] is None:
            continue  # results of an older version have no costs
        place = line["state_bytes"], line["mean"]
        axes.errorbar(*place, yerr=line["std"] or 0.0, marker="o", capsize=3)
        axes.annotate(line["memory"], place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="bytes of a stream's memory", ylabel=lines[0]["measure"])
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def choose_best(table: Table, workdir: Path, seeds: int, data: str) -> dict[str, Line]:
    """Chooses each row's setting by the validation split; prints it and writes tuned.json.

    Args:
      table: the table `tune`.
      workdir: folder of its runs.
      seeds: number of seeds; a setting counts with the mean over those that are finished.
      data: config.data.name, which tuned.json and the entry of `systems.TUNED` name.

    Returns:
      {row: changes of its best setting}, without the choice of loggers.
    """
    best, lines = {}, []
    for name, results in finished(table, workdir, seeds).items():
        measure = numbers([row for _, row in results])["measure"]
        sign = -1 if less_is_better(measure) else 1
        scores: dict[str, list[float]] = {}
        for job, _ in results:
            scores.setdefault(job.setting, []).append(validated(job.workdir, measure, sign))
        means = {setting: statistics.mean(values) for setting, values in scores.items()}
        chosen = max(means, key=lambda setting: sign * means[setting])
        best[name] = {
            key: value for key, value in table.settings[chosen].items() if key != "train.loggers"
        }
        lines.append({"memory": name, "best": chosen, f"valid {measure}": means[chosen]})
    if best:
        atomic.write(workdir / "tuned.json", json.dumps({data: best}, indent=1))
        print(f"\n{reporting.table(lines)}")
        print(f"\nThe entry of systems.TUNED:\n{json.dumps({data: best}, indent=4)}")
    return best


def less_is_better(measure: str) -> bool:
    """Whether the best value of a metric is its smallest."""
    kind = METRICS[measure]
    return bool(kind.make(kind.settings()).less_is_better)


def validated(workdir: Path, measure: str, sign: int) -> float:
    """The best value of a measure on the validation split of a run.

    Args:
      workdir: of the run.
      measure: its name.
      sign: 1 if the largest value is the best, -1 if the smallest is.

    Returns:
      The value.

    Raises:
      ValueError: metrics.jsonl of the run has no such value.
    """
    path = workdir / "metrics.jsonl"
    valid = [
        entry.get(measure)
        for stage, kind, _, entry in reporting.read_metrics(path)
        if (stage, kind) == ("model", "valid")
    ]
    values = [value for value in valid if isinstance(value, (int, float))]  # NaN is a string
    if not values:
        raise ValueError(
            f"{path} has no validation {measure}: remove the folder {workdir}, and run the same "
            "command again"
        )
    return float(max(values, key=lambda value: sign * value))
