"""A table of the papers, row by row: python -m rmjax.ablate --config=configs/synthetic.py:local --table=cm1 --seeds=3.

Every row, setting and seed is a run of rmjax.main of its own, in a workdir of its own below --workdir; what is finished
is not run again, so the same line goes on where it stopped. `--config.<key>=<value>` holds for all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from rmjax import config as configs
from rmjax.evaluation import metrics
from rmjax.io import atomic, paths, text
from rmjax.run import kept, reporting
from rmjax.run.workdir import EXIT_PREEMPTED, Preemption, lock
from rmjax.tasks import is_sequence
from rmjax.tools.tables import TABLES, Table

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Path of a config file, what the rows are changes of."
)
_TABLE = flags.DEFINE_enum("table", None, list(TABLES), "Which table of the papers.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, ... of every row.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs go, and table.json.")
_ROWS = flags.DEFINE_list("rows", [], "Only these rows, by name; all by default.")
_SETTINGS = flags.DEFINE_list(
    "settings", [], "Only in these settings of the table; all by default."
)

Results = dict[
    tuple[str, str, int], list[dict[str, Any]]
]  # (setting, row, seed) -> rows of the run's final table


class Job(NamedTuple):
    setting: str
    row: str
    seed: int
    workdir: Path
    flags: list[str]


def jobs(table: Table, workdir: Path, seeds: int) -> list[Job]:
    """Every run, in the order in which they are made: whole seeds, so that a table cut short has every row. Where rows
    share a teacher it is the first row's.
    """
    made = []
    for seed in range(seeds):
        for setting, common in table.settings.items():
            first: Path | None = None
            for name, row in table.rows.items():
                folder = workdir / f"seed{seed}" / slug(setting) / slug(name)
                values = {**common, **row.changes, "seed": seed}
                if table.share_teacher and first:
                    values["teacher.dir"] = str(first)
                first = first or folder
                made.append(
                    Job(
                        setting,
                        name,
                        seed,
                        folder,
                        [f"--config.{k}={v}" for k, v in values.items()],
                    )
                )
    return made


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(job: Job, given: Sequence[str], stop: Preemption) -> list[dict[str, Any]] | None:
    """The rows of a run's final table; None where it failed, which is logged. What it says goes to log.txt.

    Raises:
      SystemExit: it was asked to stop, or this process was: the exit code of a run that is to be started again.
    """
    results = job.workdir / "results.json"
    if not results.exists():
        job.workdir.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "rmjax.main",
            "--unread=warn",
            *given,
            *job.flags,
            f"--workdir={job.workdir}",
        ]
        path = job.workdir / "log.txt"
        with path.open("a") as log:
            code = wait(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), stop)
        if stop.requested or code == EXIT_PREEMPTED:
            raise SystemExit(EXIT_PREEMPTED)
        if code or not results.exists():
            last = path.read_text(errors="replace").strip().rpartition("\n")[2]
            logging.error("%s failed with exit code %s (%s); see %s", job.workdir, code, last, path)
            return None
    return text.read_json(results, "remove it, and the same line makes it anew")


def wait(process: subprocess.Popen, stop: Preemption) -> int:
    """The exit code; a run whose table is asked to stop is asked once, and then saves and leaves."""
    asked = False
    while True:
        if stop.requested and not asked:
            process.terminate()
            asked = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.5)


def check_fits(table: Table, config: Any) -> None:
    """Raises ValueError if the table changes what the config's data never read: its rows would all be one."""
    name = config.data.name
    other = (
        ("machine", "rehearsal", "reason", "teacher")
        if is_sequence(config)
        else ("model", "memoria")
    )
    changes = [*table.settings.values(), *(row.changes for row in table.rows.values())]
    for key in dict.fromkeys(itertools.chain.from_iterable(changes)):
        section, inner = key.split(".")[:2]
        source = inner if section == "data" and inner in configs.SOURCES else name
        if section in other or source != name:
            card = source if source != name else "synthetic" if is_sequence(config) else "sorting"
            raise ValueError(
                f"--table: {table.source} changes config.{key}, which config.data.name = {name!r} does not "
                f"read. Take another --config, such as configs/{card}.py"
            )


def check_same_config(config: Any, workdir: Path) -> None:
    """Raises ValueError, naming the fields, if the table here was begun with another config."""
    path, now = workdir / "ablation.json", json.loads(config.to_json())
    if path.exists():
        kept.refuse_other(
            workdir,
            text.read_json(path, "use another --workdir, or remove it if --config is the same"),
            now,
        )
    else:
        atomic.write(path, json.dumps(now, indent=1))


def summary(table: Table, results: Results, data: str) -> list[dict[str, Any]]:
    """One line for each setting and row: mean +- std over its seeds, and the paper's number, of every measure."""
    lines = []
    for setting in table.settings:
        readers: dict[str, list[dict[str, Any]]] = {}
        for name in table.rows:
            for (its_setting, its_row, _), found in results.items():
                if (its_setting, its_row) == (setting, name):
                    readers.setdefault(name, []).append(found[0])
                    for other in found[1:]:
                        readers.setdefault(other["memory"], []).append(other)
        ordered = [
            *(n for n in table.rows if n in readers),
            *(n for n in readers if n not in table.rows),
        ]
        for name in ordered:
            line: dict[str, Any] = {"setting": setting} if setting else {}
            line |= {"row": name, "seeds": len(readers[name]) if name in table.rows else 0}
            paper = table.rows[name].paper.get(setting or data, {}) if name in table.rows else {}
            for measure in (k for k in readers[name][0] if k not in ("memory", "low", "high")):
                values = [float(found[measure]) for found in readers[name] if measure in found]
                line[measure.removeprefix("test_")] = spread(values, name in table.rows)
                if measure in paper:
                    line[f"{measure.removeprefix('test_')}, paper"] = f"{paper[measure]:.4f}"
            lines.append(line)
    return lines


def compare(table: Table, results: Results) -> list[dict[str, Any]]:
    """How each row differs from the table's baseline, seed by seed: rows of a seed have the same data and order.

    Returns:
      One line for each setting and other row: the mean difference of the test measure over the seeds that both have,
      and its 95% bootstrap interval over seeds; [] without a baseline, or with fewer than two such seeds.
    """
    lines = []
    for setting in table.settings:
        for name in table.rows:
            seeds = sorted(s for its, row, s in results if (its, row) == (setting, name))
            pairs = [
                (results[setting, name, seed][0], results[setting, table.baseline, seed][0])
                for seed in seeds
                if (setting, table.baseline, seed) in results
            ]
            if name == table.baseline or len(pairs) < 2:
                continue
            measure = next(key for key in pairs[0][0] if key.startswith("test_"))
            low, mean, high = metrics.paired(
                *np.array([[row[measure], base[measure]] for row, base in pairs]).T
            )
            line: dict[str, Any] = {"setting": setting} if setting else {}
            line |= {"row": name, "against": table.baseline, "seeds": len(pairs)}
            lines.append(
                line
                | {
                    f"{measure.removeprefix('test_')}, difference": mean,
                    "95% from": low,
                    "to": high,
                }
            )
    return lines


def spread(values: list[float], seeds: bool) -> str:
    """Mean +- std (of the sample); references are the same for every seed."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} +- {statistics.stdev(values):.4f}" if seeds and len(values) > 1 else mean


def main(argv: Sequence[str]) -> int:
    del argv
    logging.set_verbosity(logging.INFO)
    assert _TABLE.value is not None
    config = _CONFIG.value
    try:
        workdir = paths.resolve_checkpoint(_WORKDIR.value or f"runs/{_TABLE.value}", "--workdir")
        configs.validate(config)
        check_fits(TABLES[_TABLE.value], config)
        table = choose(TABLES[_TABLE.value], _ROWS.value, _SETTINGS.value)
        data = (
            "simulated_clicks"
            if config.data.name == "xlong" and not config.data.dir
            else config.data.name
        )
        with lock(workdir), Preemption() as stop:
            check_same_config(config, workdir)
            return run_all(
                table, jobs(table, workdir, _SEEDS.value), given_flags(), workdir, data, stop
            )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", error)
        return 1


def choose(table: Table, rows: Sequence[str], settings: Sequence[str] = ()) -> Table:
    """The table with these rows and settings alone, all of them if none is named. Raises ValueError for one that it has
    not.
    """
    for what, named, there in (("row", rows, table.rows), ("setting", settings, table.settings)):
        for name in named:
            if name not in there:
                raise ValueError(
                    f"--{what}s: there is no {what} {name!r}; there are {', '.join(filter(None, there))}"
                )
    first = next(iter(table.rows))
    if rows and table.share_teacher and first not in rows:
        raise ValueError(f"--rows: add {first!r}, whose teacher the others take")
    kept = lambda all_of_them, names: {
        k: v for k, v in all_of_them.items() if k in names or not names
    }
    return table._replace(rows=kept(table.rows, rows), settings=kept(table.settings, settings))


def given_flags() -> list[str]:
    """The config file and what was changed of it, as flags of rmjax.main."""
    flag = flags.FLAGS["config"]
    overrides = config_flags.get_override_values(flag)
    modules = [f"--import={','.join(configs.IMPORT.value)}"] if configs.IMPORT.value else []
    return [
        *modules,
        f"--config={config_flags.get_config_filename(flag)}",
        *(f"--config.{k}={v}" for k, v in overrides.items()),
    ]


def run_all(
    table: Table, todo: list[Job], given: Sequence[str], workdir: Path, data: str, stop: Preemption
) -> int:
    """Runs what is not finished; the table so far is printed, and written, whenever a run ends. -> exit code."""
    results: Results = {}
    failed = False
    for number, job in enumerate(todo, 1):
        logging.info("%d of %d: %s %s, seed %d", number, len(todo), job.setting, job.row, job.seed)
        found = run(job, given, stop)
        failed |= found is None
        if found is None:
            continue
        results[job.setting, job.row, job.seed] = found
        lines = summary(table, results, data)
        atomic.write(workdir / "table.json", json.dumps(lines, indent=1))
        logging.info("%s\n%s", table.source, reporting.table(lines))
    print(reporting.table(summary(table, results, data)))
    differences = compare(table, results)
    if differences:
        (workdir / "differences.json").write_text(json.dumps(differences, indent=1))
        print(f"\n{reporting.table(differences)}")
    return int(failed)


def cli() -> None:
    """The command `python -m rmjax.ablate`."""
    flags.mark_flags_as_required(["config", "table"])
    configs.check_flags(sys.argv)
    app.run(main, flags_parser=configs.parse_flags)
