"""Reproduces a table of the papers, row by row.

    python -m rmjax.ablate --config=configs/synthetic.py:local --table=cm1 --seeds=3

Every combination of row, setting and seed is one run of rmjax.main, with its own folder below
--workdir. Finished runs are not run again, so the same command continues where it stopped.
`--config.<key>=<value>` applies to all runs. `--at_once=N` makes N runs at a time on a CPU, each
on cores of its own. A small model gains by it, since it does not fill many cores.
`--record=docs/results/records/cm1.json` writes the numbers of all seeds into a record, from which
the documents are made. Two tables have a row for every registered memory:

    # All memories beside one another, with their costs, as Markdown, JSON and a figure:
    python -m rmjax.ablate --config=configs/synthetic.py:local --table=memories --seeds=3
    # The search for the learning rates and clips that this table uses:
    python -m rmjax.ablate --config=configs/synthetic.py:local --table=tune --seeds=1
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rmjax import command_line
from rmjax import config as configs
from rmjax.evaluation import metrics
from rmjax.io import atomic, paths, text
from rmjax.machines import Costs
from rmjax.registry import SOURCES
from rmjax.run import kept, reporting
from rmjax.run.evaluate import column_name
from rmjax.run.workdir import EXIT_PREEMPTED, Preemption, lock
from rmjax.tasks import is_sequence
from rmjax.tools import curves, ledger, memories, systems, tables
from rmjax.tools.jobs import Job, in_order, jobs, wait
from rmjax.tools.tables import BUILT, TABLES, Table

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Path of a config file; every row is a change of this config."
)
_TABLE = flags.DEFINE_enum("table", None, [*TABLES, *BUILT], "Which table.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, ... of every row.", lower_bound=1)
_AT_ONCE = flags.DEFINE_integer(
    "at_once", 1, "Number of runs at a time on a CPU, each on cores of its own.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs and of table.json.")
_ROWS = flags.DEFINE_list("rows", [], "Names of the rows to run; all by default.")
_SETTINGS = flags.DEFINE_list(
    "settings", [], "Names of the table's settings to run; all by default."
)
_ORIGINAL = flags.DEFINE_bool(
    "original", False, "Rows have the hyper-parameters that their systems were published with."
)
_TUNED = flags.DEFINE_string(
    "tuned", None, "For --table=memories: tuned.json of a run of --table=tune on the same data."
)

_RECORD = flags.DEFINE_string(
    "record", None, "A record of results (see docs/results/records) that receives the numbers."
)

# A table may continue with other values of these keys. No run computes something else by them.
MAY_CHANGE = (
    "train.log_every", "train.loggers", "train.keep_last", "train.keep_best", "data.cache_dir",
    "data.ram_bytes", "data.workers", "data.prefetch",
)  # fmt: skip
COSTS = [column_name(field) for field in Costs._fields]  # columns
Line = dict[str, Any]  # {column: value}, one line of a table
Results = dict[tuple[str, str, int], list[Line]]  # {(setting, row, seed): the run's final table}


def run(job: Job, given: Sequence[str], stop: Preemption) -> list[Line] | None:
    """Executes one run, unless it is finished already. The run's output goes to log.txt.

    Args:
      job: the run.
      given: flags of rmjax.main that all runs share.
      stop: whether this process was asked to stop.

    Returns:
      The run's final table; None if the run failed, which is logged.

    Raises:
      SystemExit: the run or this process was asked to stop. The exit code asks for a restart.
      ValueError: results.json of the run is damaged.
    """
    if stop.requested:
        raise SystemExit(EXIT_PREEMPTED)
    results = job.workdir / "results.json"
    if not results.exists():
        job.workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "rmjax.main", "--unread=warn"]
        command += [*given, *job.flags, f"--workdir={job.workdir}"]
        path = job.workdir / "log.txt"
        with path.open("a") as log:
            code = wait(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), stop)
        if stop.requested or code == EXIT_PREEMPTED:
            raise SystemExit(EXIT_PREEMPTED)
        if code or not results.exists():
            last = path.read_text(errors="replace").strip().rpartition("\n")[2]
            logging.error("%s failed with exit code %s (%s); see %s", job.workdir, code, last, path)
            return None
    return text.read_json(results, "remove it, and run the same command again")


def check_fits(table: Table, config: ConfigDict) -> None:
    """Checks that the config's data read every key that the table changes.

    Otherwise all rows would be the same run.

    Args:
      table: the table to run.
      config: the config that the rows change.

    Raises:
      ValueError: a key is not read; names the key and a config that fits.
    """
    name = config.data.name
    memories, sequences = ("machine", "rehearsal", "reason", "teacher"), ("model", "memoria")
    unread = memories if is_sequence(config) else sequences  # sections of the config
    sources = {SOURCES.section_of(source): source for source in SOURCES}
    own = SOURCES.section_of(configs.source_of(config))
    changes = [*table.settings.values(), *(row.changes for row in table.rows.values())]
    changes += table.starts.values()
    for key in dict.fromkeys(itertools.chain.from_iterable(changes)):
        section, inner = key.split(".")[:2]
        elsewhere = section == "data" and inner in sources and inner != own
        if section in unread or elsewhere:
            card = "synthetic" if is_sequence(config) else "sorting"
            if elsewhere:
                card = "xlong" if inner == "simulated" else sources[inner]
            raise ValueError(
                f"--table: {table.source} changes config.{key}, which config.data.name = {name!r} "
                f"does not read. Take another --config, such as configs/{card}.py"
            )


def check_valid(table: Table, config: ConfigDict) -> None:
    """Checks the config of every run, so that no mistake is found after hours of other runs.

    Args:
      table: the rows and settings to run.
      config: the config that they change.

    Raises:
      ValueError: a config is not valid; names the start, or the row and its setting, and the cause.
    """
    runs = [(f"start {name!r}", changes) for name, changes in table.starts.items()]
    runs += [
        (f"row {name!r}" + (f", {setting!r}" if setting else ""), {**common, **row.changes})
        for setting, common in table.settings.items()
        for name, row in table.rows.items()
    ]
    for place, changes in runs:
        changed = config.copy_and_resolve_references()
        try:
            changed.update_from_flattened_dict(changes)
            configs.validate(changed)
        except (ValueError, TypeError, KeyError) as error:
            cure = "change --config, or choose other --rows or --settings"
            raise ValueError(f"--table: the {place}: {error}; {cure}") from error


def check_same_config(config: ConfigDict, workdir: Path) -> None:
    """Keeps the config in ablation.json, or compares it with the one that began the table.

    A single run may continue with its data in another place. A table may not: its finished runs
    stay, so its rows could be of different data or start weights.

    Args:
      config: the config that the rows change.
      workdir: folder of all runs.

    Raises:
      ValueError: the table was begun with another config; names the fields.
    """
    path, values = workdir / "ablation.json", json.loads(config.to_json())
    if path.exists():
        cure = "use another --workdir, or remove it if --config is the same"
        free = lambda key: key in MAY_CHANGE or key.startswith(("logger.", "probe."))
        kept.refuse_other(workdir, text.read_json(path, cure), values, free)
    else:
        atomic.write(path, json.dumps(values, indent=1))


def check_same_rows(name: str, table: Table, workdir: Path) -> None:
    """Keeps a table's changes in rows.json, or compares them with those that began the folder.

    A folder from before a table had starts has none in rows.json, and may continue.

    Args:
      name: of the table.
      table: the table, with tuned values if it has any.
      workdir: folder of all runs.

    Raises:
      ValueError: the folder was begun with another table, or a row or setting with other changes.
    """
    path = workdir / "rows.json"
    before = text.read_json(path, "remove it if the rows are the same") if path.exists() else {}
    if before and "rows" not in before:  # an older version kept the rows alone
        before = {"rows": before}
    current: dict[str, object] = {
        "table": name,
        "share_teacher": table.share_teacher,
        "onward": table.onward,
    }
    for what, value in current.items():
        if before.get(what, value) != value:
            raise ValueError(
                f"{workdir} was begun with {what} = {before[what]!r}, now it is {value!r}: use "
                "another --workdir"
            )
    changes = {
        "rows": {row: dict(value.changes) for row, value in table.rows.items()},
        "settings": {setting: dict(value) for setting, value in table.settings.items()},
        "starts": {start: dict(value) for start, value in table.starts.items()},
    }
    for what, values in json.loads(json.dumps(changes)).items():
        old = {key: configs.renamed(one) for key, one in before.get(what, {}).items()}
        for key in values:
            if old.get(key, values[key]) != values[key]:
                raise ValueError(
                    f"{workdir}: the {what[:-1]} {key!r} was begun with {old[key]}, now it is "
                    f"{values[key]}: use another --workdir, or remove the folders of the "
                    f"{what[:-1]} and its entry in {path}"
                )
        current[what] = old | values
    atomic.write(path, json.dumps(current, indent=1))


def summary(table: Table, results: Results, data: str) -> list[Line]:
    """Summarises the finished runs.

    Args:
      table: the table.
      results: the final tables of the finished runs.
      data: name of the data, which finds the paper's numbers if the table has no settings.

    Returns:
      One line for each setting and row: for every measure the mean +- std over the seeds, and the
      paper's number; then the costs of a machine. References, such as an oracle, have lines too,
      with 0 seeds.
    """
    lines = []
    for setting in table.settings:
        for name, runs in readers_of(table, results, setting).items():
            line: Line = {"setting": setting} if setting else {}
            line |= {"row": name, "seeds": len(runs) if name in table.rows else 0}
            paper = table.rows[name].paper.get(setting or data, {}) if name in table.rows else {}
            for measure in (k for k in runs[0] if k not in ("memory", "low", "high")):
                if measure in Costs._fields:
                    line[column_name(measure)] = runs[0][measure]
                    continue
                values = [float(row[measure]) for row in runs if measure in row]
                line[_heading(measure)] = spread(values, name in table.rows)
                if measure in paper:
                    line[f"{_heading(measure)}, paper"] = f"{paper[measure]:.4f}"
            lines.append(line)
    return lines


def _heading(measure: str) -> str:
    """The heading of a measure: 'test_auc' gives 'auc', a memory gain is in words."""
    if measure.startswith("memory_"):
        return column_name(measure)
    return measure.removeprefix("test_")


def _test_key(columns: Iterable[str]) -> str:
    """The column of the test measure: the first that begins with 'test_'."""
    return next(key for key in columns if key.startswith("test_"))


def readers_of(table: Table, results: Results, setting: str) -> dict[str, list[Line]]:
    """Collects the lines of the final tables by who answered.

    Args:
      table: the table.
      results: the final tables of the finished runs.
      setting: one of the table's settings.

    Returns:
      {name: one line for each seed}: the finished rows in their order, then references.
    """
    readers: dict[str, list[Line]] = {}
    for name in table.rows:
        for rows in (rows for key, rows in results.items() if key[:2] == (setting, name)):
            readers.setdefault(name, []).append(rows[0])
            for other in rows[1:]:
                readers.setdefault(other["memory"], []).append(other)
    return dict(sorted(readers.items(), key=lambda item: item[0] not in table.rows))


def record_of(table: Table, results: Results, data: str, command: Sequence[str]) -> ledger.Record:
    """The numbers of the finished runs, as a record of results.

    Args:
      table: the table.
      results: the final tables of the finished runs.
      data: as in `summary`.
      command: the arguments of `python -m rmjax.ablate`.

    Returns:
      The record: a table for each setting with the values of all seeds, and one of the paired
      differences if the table has a baseline. A wide table has one for all settings. It has no
      prose.
    """
    tables: list[ledger.Numbers] = []
    if table.wide and results:
        tables.append({"name": "", "digits": ledger.DIGITS, "rows": _wide_rows(table, results)})
    for setting in () if table.wide else table.settings:
        rows: list[ledger.Row] = []
        for name, runs in readers_of(table, results, setting).items():
            row: dict[str, str | ledger.Cell] = {"row": name}
            paper = table.rows[name].paper.get(setting or data, {}) if name in table.rows else {}
            for measure in (k for k in runs[0] if k not in ("memory", "low", "high")):
                if measure in Costs._fields:
                    row[column_name(measure)] = {"mean": runs[0][measure], "digits": 0}
                    continue
                values = [float(run[measure]) for run in runs if measure in run]
                same = name not in table.rows  # a reference is the same for every seed
                cell = ledger.Cell(mean=values[0]) if same else ledger.Cell(values=values)
                if measure in paper:
                    cell["paper"] = float(f"{paper[measure]:.6g}")  # percents were divided
                row[_heading(measure)] = cell
            rows.append(row)
        if rows:
            tables.append({"name": setting, "digits": ledger.DIGITS, "rows": rows})
    differences = compare(table, results)
    if differences:
        named = f"Differences from {table.baseline!r}, paired by seed"
        tables.append({"name": named, "rows": list(map(_difference_row, differences))})
    seeds = sorted({seed for _, _, seed in results})
    commands = [shlex.join(["python", "-m", "rmjax.ablate", *command])]
    return {"title": table.source, "commands": commands, "seeds": seeds, "tables": tables}


def _wide_rows(table: Table, results: Results) -> list[ledger.Row]:
    """The test measure alone: a line for each setting, and a column for each row of the table."""
    lines: list[ledger.Row] = []
    for setting in table.settings:
        line: dict[str, str | ledger.Cell] = {ledger.SETTING: setting}
        for name in table.rows:
            if runs := readers_of(table, results, setting).get(name):
                line[name] = ledger.Cell(values=[float(run[_test_key(run)]) for run in runs])
        if len(line) > 1:
            lines.append(line)
    return lines


def _difference_row(line: Line) -> ledger.Row:
    """A line of `compare` as a row of a record, under a name of its own."""
    parts = (line.get("setting"), line["row"], line["measure"])
    numbers = {name: ledger.Cell(mean=line[name]) for name in ("difference", "95% from", "to")}
    return {"row": ", ".join(filter(None, parts)), **numbers, "seeds": str(line["seeds"])}


def compare(table: Table, results: Results) -> list[Line]:
    """Compares each row with the table's baseline, seed by seed.

    The rows of one seed have the same data in the same order.

    Args:
      table: the table.
      results: the final tables of the finished runs.

    Returns:
      One line for each setting, other row and compared measure that the runs have: the mean
      difference over the seeds that both rows have, and the 95% bootstrap interval over these
      seeds. A row with fewer than two such seeds has no line. [] if the table has no baseline.
    """
    lines = []
    for setting in table.settings:
        for name in table.rows:
            seeds = sorted(key[2] for key in results if key[:2] == (setting, name))
            pairs = [
                (results[setting, name, seed][0], results[setting, table.baseline, seed][0])
                for seed in seeds
                if (setting, table.baseline, seed) in results
            ]
            if name == table.baseline or len(pairs) < 2:
                continue
            test = _test_key(pairs[0][0])
            # Other data than those of the table's own card may lack some measures.
            columns = set.intersection(*(set(row) for row, _ in pairs))
            further = [m for m in table.compared if columns.issuperset(m.split(" - "))]
            for measure in [test, *further]:
                values = np.array([[_value(row, measure) for row in pair] for pair in pairs])
                low, mean, high = metrics.paired(*values.T)
                line: Line = {"setting": setting} if setting else {}
                line |= {"row": name, "against": table.baseline, "seeds": len(pairs)}
                line |= {"measure": _heading(measure), "difference": mean}
                lines.append(line | {"95% from": low, "to": high})
    return lines


def _value(row: Line, measure: str) -> float:
    """A column of a row, or the difference of two: see `Table.compared`."""
    first, *second = (float(row[name]) for name in measure.split(" - "))
    return first - sum(second)


def spread(values: list[float], seeds: bool) -> str:
    """Formats values as mean +- sample std; the std is left out if `seeds` is false.

    Args:
      values: one a seed.
      seeds: false for references, which are the same for every seed.

    Returns:
      The text, with four decimals.
    """
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} +- {statistics.stdev(values):.4f}" if seeds and len(values) > 1 else mean


def main(argv: Sequence[str]) -> int:
    """Runs the command after the flags are parsed; returns the exit code."""
    del argv
    logging.set_verbosity(logging.INFO)
    assert _TABLE.value is not None
    config, name = _CONFIG.value, _TABLE.value
    folder = f"runs/{name}-original" if _ORIGINAL.value else f"runs/{name}"
    try:
        workdir = paths.resolve_checkpoint(_WORKDIR.value or folder, "--workdir")
        configs.validate(config)
        record = paths.resolve(_RECORD.value, "--record") if _RECORD.value else None
        if record and record.exists():
            ledger.read(record)  # a damaged record is named before hours of runs
        data = configs.source_of(config)  # the paper's numbers for XLong are of its own data
        full = prepared(name, config.data.name, _TUNED.value, _ORIGINAL.value)
        check_fits(full, config)
        table = choose(full, _ROWS.value, _SETTINGS.value)
        check_valid(table, config)
        with lock(workdir), Preemption() as stop:
            check_same_config(config, workdir)
            check_same_rows(name, table, workdir)
            todo, given = jobs(table, workdir, _SEEDS.value), given_flags()
            code = run_all(table, todo, given, workdir, data, stop, record, _AT_ONCE.value)
            if name == "memories":
                memories.finish(table, workdir, _SEEDS.value, given, stop, sys.argv[1:])
            elif name == "tune":
                memories.choose_best(table, workdir, _SEEDS.value, config.data.name)
            return code
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", error)
        return 1


def prepared(name: str, data: str, tuned: str | None, original: bool) -> Table:
    """Builds a table with the hyper-parameters that were asked for.

    Args:
      name: of the table.
      data: config.data.name, which names the tuned values.
      tuned: path of a tuned.json; None: the values of `systems.TUNED`.
      original: rows have the published hyper-parameters of their systems.

    Returns:
      The table.

    Raises:
      ValueError: `tuned` is for another table than 'memories', or for other data, or the file is
        damaged.
      FileNotFoundError: `tuned` does not exist.
    """
    table = tables.table_of(name)
    if tuned and name != "memories":
        raise ValueError(f"--tuned: --table={name} has no tuned values; only 'memories' has")
    if name == "memories":
        values = systems.TUNED.get(data, {})
        if values and not tuned:
            logging.info(
                "rates were tuned on configs/synthetic.py:discrete,local; for other sizes, "
                "--table=tune searches and --tuned= takes what it found"
            )
        if tuned:
            path = paths.resolve(tuned, "--tuned")
            kept_values = text.read_json(path, "run --table=tune again")
            if not isinstance(kept_values, dict) or data not in kept_values:
                raise ValueError(
                    f"{path} has the values of {', '.join(kept_values)}, and none of "
                    f"config.data.name = {data!r}: run --table=tune again with this --config"
                )
            values = {row: configs.renamed(one) for row, one in kept_values[data].items()}
            for row in values:
                if row not in table.rows:
                    raise ValueError(f"{path}: no row {row!r}; there are {', '.join(table.rows)}")
        table = tables.tuned(table, values)
    return tables.original(table) if original else table


def choose(table: Table, rows: Sequence[str], settings: Sequence[str] = ()) -> Table:
    """Selects rows and settings of a table.

    Args:
      table: the table.
      rows: names of rows; [] keeps all.
      settings: names of settings; [] keeps all.

    Returns:
      The table with these rows and settings only.

    Raises:
      ValueError: the table has no such row or setting, or one that others need is left out.
    """
    for what, named, known in (("row", rows, table.rows), ("setting", settings, table.settings)):
        for name in named:
            if name not in known:
                names = ", ".join(filter(None, known))
                raise ValueError(f"--{what}s: there is no {what} {name!r}; there are {names}")
    first = next(iter(table.rows))
    if rows and table.share_teacher and first not in rows:
        raise ValueError(f"--rows: add {first!r}: the other rows use the teacher of this row")
    order = list(table.settings)
    needed = order[: max(map(order.index, settings), default=-1) + 1]
    if table.onward and {*settings} != {*needed}:
        raise ValueError(
            "--settings: rows of a setting begin with what they learned in the setting before it: "
            f"take {','.join(needed)!r}"
        )
    chosen = lambda items, names: {k: v for k, v in items.items() if k in names or not names}
    kept_rows = chosen(table.rows, rows)
    begun = {row.start for row in kept_rows.values()}
    starts = {name: changes for name, changes in table.starts.items() if name in begun}
    return table._replace(rows=kept_rows, settings=chosen(table.settings, settings), starts=starts)


def given_flags() -> list[str]:
    """Returns the flags that rmjax.main gets too: --import, --config, --config.<key>."""
    flag = flags.FLAGS["config"]
    overrides = config_flags.get_override_values(flag)
    imported = ",".join(command_line.IMPORT.value)
    modules = [f"--import={imported}"] if imported else []
    return [
        *modules,
        f"--config={config_flags.get_config_filename(flag)}",
        *(f"--config.{k}={v}" for k, v in overrides.items()),
    ]


def run_all(
    table: Table,
    todo: list[Job],
    given: Sequence[str],
    workdir: Path,
    data: str,
    stop: Preemption,
    record: Path | None = None,
    at_once: int = 1,
) -> int:
    """Executes the runs; whenever one ends, logs and writes the table of the finished runs.

    In the end the figure is drawn, if the table has one.

    Args:
      table: the table.
      todo: the runs.
      given: flags of rmjax.main that all runs share.
      workdir: folder of table.json and differences.json.
      data: name of the data, see `summary`.
      stop: whether this process was asked to stop.
      record: the record that receives the numbers; None: none does. A record is left as it is if a
        run failed, since it would lose rows.
      at_once: number of runs at a time.

    Returns:
      The exit code: 1 if a run failed, otherwise 0.

    Raises:
      SystemExit: as `run`.
    """
    results: Results = {}
    failed = False

    def one(job: Job) -> list[Line] | None:
        number = todo.index(job) + 1
        logging.info("%d of %d: %s %s, seed %d", number, len(todo), job.setting, job.row, job.seed)
        return run(job, given, stop)

    def give_up() -> None:
        stop.requested = True  # so the other runs save and end

    with contextlib.closing(in_order(todo, one, at_once, give_up)) as runs:
        for job, rows in runs:
            failed |= rows is None
            if rows is None or job.row not in table.rows:  # a start has no line
                continue
            results[job.setting, job.row, job.seed] = rows
            lines = summary(table, results, data)
            atomic.write(workdir / "table.json", json.dumps(lines, indent=1))
            logging.info("%s\n%s", table.source, reporting.tables(lines, COSTS))
    print(reporting.tables(summary(table, results, data), COSTS))
    differences = compare(table, results)
    if differences:
        atomic.write(workdir / "differences.json", json.dumps(differences, indent=1))
        print(f"\n{reporting.table(differences)}")
    else:  # the file may be from runs that were removed
        (workdir / "differences.json").unlink(missing_ok=True)
    if table.curve:
        draw(table, todo, results, workdir)
    if record and failed:
        logging.error("%s is as before, since a run failed", record)
    elif record:
        ledger.keep(record, record_of(table, results, data, sys.argv[1:]))
    return int(failed)


def draw(table: Table, todo: list[Job], results: Results, workdir: Path) -> None:
    """Draws the measure against the numbers in the names of columns, see `curves.keep`.

    Args:
      table: a table with a curve.
      todo: the runs.
      results: the final tables of the finished runs.
      workdir: folder of the figure.
    """
    rows: dict[str, list[list[Line]]] = {}
    for job in todo:
        key = job.setting, job.row, job.seed
        if key in results:
            name = ", ".join(filter(None, [job.row, job.setting]))
            rows.setdefault(name, []).append(results[key])
    made = curves.curves(rows, table.curve)
    if not made:
        logging.warning("no figure: the results have no columns such as '4%s'", table.curve)
        return
    columns = next(iter(rows.values()))[0][0]
    measure = _test_key(columns).removeprefix("test_")
    curves.keep(made, table.curve, workdir, table.source, measure)
    print(f"\n{curves.markdown(made, table.curve)}")


def cli() -> None:
    """Runs the command `python -m rmjax.ablate`."""
    flags.mark_flags_as_required(["config", "table"])
    command_line.check_flags(sys.argv)
    app.run(main, flags_parser=command_line.parse_flags)
