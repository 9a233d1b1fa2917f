"""Tables of the papers by one command: which runs are made, and what is printed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rmjax import config, tasks
from rmjax.data import make_source
from rmjax.registry import MACHINES
from rmjax.run import parameters, reporting, training
from rmjax.run.workdir import EXIT_PREEMPTED, Preemption
from rmjax.tools import ablate, ledger
from rmjax.tools.jobs import Job, in_order
from rmjax.tools.tables import NO_REHEARSAL, TABLES, Row, Table
from tests import ROOT
from tests.runs import saved, set_key, tiny

SMALL = Table(
    "a table",
    {"one": Row({}, {"x": {"early": 0.5}}), "Two (L_a)": Row({"machine.slots": 3})},
    {"x": {"data.segment_length": 5}, "y": {"data.segment_length": 7}},
)


CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="two cores that can be chosen are needed")
AT_ONCE = pytest.mark.parametrize("at_once", [1, pytest.param(2, marks=two_cores)])


CARD = """
from tests.runs import PLAIN, tiny
from tests import ROOT

def get_config():
    return tiny(**PLAIN | {"train.steps": 1, "train.eval_every": 1})
"""


def changed(card, *changes):
    for values in changes:
        for key, value in values.items():
            set_key(card, key, value)
    return card


def get_card(name, arg=""):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](arg)


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_valid_changes_of_a_config(name):
    for common in TABLES[name].settings.values():
        for row in TABLES[name].rows.values():
            if row.changes.get("machine.kind", "gru") in MACHINES:
                config.validate(changed(config.base(), common, row.changes))


@pytest.mark.parametrize("card", ["", "local"])
@pytest.mark.parametrize("row", ["BERT", "RoBERTa"])
def test_a_plain_bert_reads_one_segment(card, row):
    """Without a memory, the answer after a document's last segment would ignore the others."""
    data = changed(get_card("hyperpartisan", card), TABLES["mem3"].rows[row].changes).data
    assert data.hyperpartisan.max_segments == 1


@pytest.mark.parametrize(
    "name, arg",
    [("books", ""), ("sorting", ""), ("sorting", "local"), ("wikitext103", "50")]
    + [(name, arg) for name in ("wikitext103", "pg19", "enwik8") for arg in ("", "local")],
)
def test_all_memories_are_as_long_as_a_segment(name, arg):
    """Memoria section 4.2: rows compare. With `model.memory` 0, other memories are a segment."""
    card = get_card(name, arg)
    engrams = card.memoria.working + card.memoria.remind_short_term + card.memoria.remind_long_term
    assert card.model.memory == 0
    assert card.data.segment_length - 3 < engrams <= card.data.segment_length


def test_the_numbers_are_those_of_the_papers():
    full = TABLES["cm1"].rows["CM (Full)"].paper
    printed = {"early": 0.2842, "later": 0.3171, "test_accuracy": 0.3007}
    assert full["consecutive"] == pytest.approx(printed)
    for row in TABLES["cm1"].rows.values():
        for numbers in row.paper.values():
            # "All" is the mean of the halves, except for one slip of the paper.
            mean = (numbers["early"] + numbers["later"]) / 2
            slip = numbers["early"] == pytest.approx(0.3216)
            assert numbers["test_accuracy"] == pytest.approx(mean, abs=5e-4) or slip
    accuracies = [row.paper["4 segments"]["test_accuracy"] for row in TABLES["mem6"].rows.values()]
    gains = [accuracy - accuracies[0] for accuracy in accuracies[1:]]
    assert gains == pytest.approx([0.4350, 0.4647, 0.4608])  # the sums of the paper's gains
    assert TABLES["rm1"].rows["DMSDNC"].paper == {"babi": {"test_error": 0.0153}}
    assert TABLES["rm4"].rows["MIMN"].paper == TABLES["cm5"].rows["MIMN"].paper
    assert TABLES["cm1"].rows["DNC"].changes["train.clip"] == 10.0
    assert TABLES["rm5"].rows["w/o. rehearsal"].paper["xlong"] == {"test_auc": 0.8745}
    assert TABLES["rm5"].rows["only L_rec"].changes == {
        "rehearsal.familiarity": NO_REHEARSAL["rehearsal.familiarity"]
    }


def test_every_seed_is_complete_before_the_next(tmp_path):
    jobs = ablate.jobs(SMALL, tmp_path, 2)
    assert [(job.seed, job.setting, job.row) for job in jobs] == [
        (seed, setting, row) for seed in (0, 1) for setting in "xy" for row in SMALL.rows
    ]
    assert jobs[3].workdir == tmp_path / "seed0" / "y" / "two-l-a"
    assert len({job.workdir for job in jobs}) == 8
    values = ("data.segment_length=7", "machine.slots=3", "seed=0")
    assert jobs[3].flags == [f"--config.{value}" for value in values]


@pytest.mark.parametrize("names", [("a b", "A-b"), ("++",), ("", "-")])
def test_rows_without_a_folder_of_their_own_are_refused(names, tmp_path):
    table = Table("t", {name: Row({}) for name in names})
    with pytest.raises(ValueError, match="folder of their own|no letter"):
        ablate.jobs(table, tmp_path, 1)


def test_rows_share_the_teacher_of_the_first_row_of_a_seed(tmp_path):
    jobs = ablate.jobs(SMALL._replace(share_teacher=True), tmp_path, 2)
    taken = [flag for job in jobs for flag in job.flags if "teacher.dir" in flag]
    assert taken == [f"--config.teacher.dir={jobs[i].workdir}" for i in (0, 2, 4, 6)]


def test_rows_begin_with_a_run_that_all_settings_of_a_seed_share(tmp_path):
    rows = {"plain": Row({}), "after": Row({}, start="first")}
    table = SMALL._replace(rows=rows, starts={"first": {"reason.weight": 0.0}})
    jobs = ablate.jobs(table, tmp_path, 2)
    assert [(job.seed, job.setting, job.row) for job in jobs][:6] == [
        *((0, "", "first"), (0, "x", "plain"), (0, "x", "after")),
        *((0, "y", "plain"), (0, "y", "after"), (1, "", "first")),
    ]
    assert jobs[0].flags == ["--config.reason.weight=0.0", "--config.seed=0"]
    for job in jobs:
        taken = [flag.partition("=")[2] for flag in job.flags if "start_from" in flag]
        start = tmp_path / f"seed{job.seed}" / "starts" / "first"
        assert taken == ([str(start)] if job.row == "after" else [])
        assert (job.workdir == start) == (job.row == "first")
    assert ablate.choose(table, ["after"]).starts and not ablate.choose(table, ["plain"]).starts


def test_rows_of_a_setting_go_on_from_the_setting_before(tmp_path):
    rows = {"a": Row({}), "b": Row({}, start="first")}
    table = SMALL._replace(rows=rows, starts={"first": {}}, onward=True)
    jobs = ablate.jobs(table, tmp_path, 2)
    for seed in range(2):
        own = {(job.setting, job.row): job for job in jobs if job.seed == seed}
        for row, first in (("a", ()), ("b", (own["", "first"].workdir,))):
            assert own["x", row].needs == first
            assert own["y", row].needs == (own["x", row].workdir,)
            assert f"--config.train.start_from={own['x', row].workdir}" in own["y", row].flags
    for chosen in (["x"], ["y", "x"], []):
        assert {*ablate.choose(table, [], chosen).settings} == {*(chosen or table.settings)}
    with pytest.raises(ValueError, match="take 'x,y'"):
        ablate.choose(table, [], ["y"])


def test_the_runs_that_rows_begin_with_have_no_line(tmp_path, runs):
    table = SMALL._replace(
        rows={"a": Row({}), "b": Row({}, start="first")}, starts={"first": {}}, baseline="a"
    )
    jobs = ablate.jobs(table, tmp_path, 2)
    with Preemption() as stop:
        assert ablate.run_all(table, jobs, [], tmp_path, "synthetic", stop) == 0
        assert len(runs) == len(jobs) == 10
        assert ablate.run_all(table, jobs, [], tmp_path, "synthetic", stop) == 0
    assert len(runs) == 10  # finished runs are not made again, starts included
    lines = json.loads((tmp_path / "table.json").read_text())
    assert [line["row"] for line in lines] == ["a", "b", "oracle"] * 2


def test_the_start_of_a_row_is_a_run_of_the_table():
    for table in TABLES.values():
        for row in table.rows.values():
            assert not row.start or row.start in table.starts
        for changes in table.starts.values():
            config.validate(changed(config.base(), changes))


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("few", ("xlong", "local,few")),
        ("forgetting", ("synthetic", "local")),
        ("rehearsals", ("xlong", "local,few")),
        ("babi_alone", ("babi", "local")),
    ],
)
def test_every_run_reads_what_its_row_and_its_setting_change(name, card):
    table = TABLES[name]
    for common in table.settings.values():
        for row in table.rows.values():
            chosen = changed(get_card(*card), common, row.changes)
            config.validate(chosen)
            for key in {**common, **row.changes}:
                idle = key.startswith("rehearsal.") and row.changes == NO_REHEARSAL
                assert idle or not config.why_unread(chosen, key)


class Lines(list):
    """The command lines that were run."""

    code = 1


@pytest.fixture
def runs(monkeypatch):
    """Replaces runs: a process writes results that depend on its flags, or exits with `code`."""
    lines = Lines()
    code = """
import json, pathlib, sys
workdir = pathlib.Path([a for a in sys.argv if a.startswith('--workdir=')][0][10:])
seed = int([a for a in sys.argv if 'config.seed' in a][0].split('=')[1])
if 'two' in str(workdir) and seed == 1: sys.exit(CODE)
early = 0.5 + seed / 10
rows = [{'memory': 'm', 'test_accuracy': early + 0.1, 'low': 0, 'high': 1, 'early': early}]
rows.append({'memory': 'oracle', 'test_accuracy': 1.0, 'early': 1.0})
(workdir / 'results.json').write_text(json.dumps(rows))
"""
    original = ablate.subprocess.Popen

    def started(command, **options):
        lines.append(command[3:])
        program = code.replace("CODE", str(lines.code))
        return original([sys.executable, "-c", program, *command[3:]], **options)

    monkeypatch.setattr(ablate.subprocess, "Popen", started)
    return lines


def run_all(tmp_path, **options):
    jobs = ablate.jobs(SMALL, tmp_path, 2)
    given = ["--config=card.py"]
    with Preemption() as stop:
        return ablate.run_all(SMALL, jobs, given, tmp_path, "synthetic", stop, **options)


@AT_ONCE
def test_failed_runs_are_left_out_and_only_they_are_run_again(tmp_path, runs, capsys, at_once):
    assert run_all(tmp_path, at_once=at_once) == 1 and len(runs) == 8
    lines = json.loads((tmp_path / "table.json").read_text())
    assert [(line["setting"], line["row"], line["seeds"]) for line in lines] == [
        *(("x", "one", 2), ("x", "Two (L_a)", 1), ("x", "oracle", 0)),
        *(("y", "one", 2), ("y", "Two (L_a)", 1), ("y", "oracle", 0)),
    ]
    assert lines[0]["accuracy"] == "0.6500 +- 0.0707" and lines[0]["early"] == "0.5500 +- 0.0707"
    assert lines[0]["early, paper"] == "0.5000" and "early, paper" not in lines[3]
    assert lines[1]["accuracy"] == "0.6000" and lines[2]["accuracy"] == "1.0000"
    assert "0.6500 +- 0.0707" in capsys.readouterr().out
    (tmp_path / "differences.json").write_text("[]")  # from runs that were removed
    assert run_all(tmp_path) == 1 and len(runs) == 10
    assert not (tmp_path / "differences.json").exists()
    assert runs[0][:2] == ["--unread=warn", "--config=card.py"]
    first = [line[-1] for line in runs[:at_once]]  # runs at a time start in any order
    assert f"--workdir={tmp_path / 'seed0' / 'x' / 'one'}" in first


def test_rows_are_compared_with_the_baseline_seed_by_seed():
    table = SMALL._replace(baseline="one")
    auc = lambda row, seed: 0.6 + seed / 10 + (0.03 + seed / 100) * (row != "one")
    results = {
        (setting, row, seed): [{"memory": "m", "test_auc": auc(row, seed)}]
        for setting in "xy"
        for row in table.rows
        for seed in range(3)
    }
    del results["y", "one", 0]
    first, second = ablate.compare(table, results)
    names = [first[key] for key in ("setting", "row", "against", "seeds")]
    assert names == ["x", "Two (L_a)", "one", 3]
    # The mean of 0.03, 0.04, 0.05, although seeds are 0.1 apart.
    assert first["measure"] == "auc" and first["difference"] == pytest.approx(0.04)
    assert 0.03 <= first["95% from"] < 0.04 < first["to"] <= 0.05 + 1e-9
    early = {key: [{**row[0], "early": row[0]["test_auc"] * 2}] for key, row in results.items()}
    lines = ablate.compare(table._replace(compared=("early",)), early)
    assert [line["measure"] for line in lines] == ["auc", "early"] * 2
    assert lines[1]["difference"] == pytest.approx(2 * lines[0]["difference"])
    assert ablate.compare(table._replace(compared=("early",)), results) == [first, second]
    (line,) = ablate.compare(table._replace(compared=("early - test_auc",)), early)[1:2]
    assert line["measure"] == "early - test_auc"
    assert line["difference"] == pytest.approx(lines[0]["difference"])  # early gains twice as much
    assert second["seeds"] == 2 and second["difference"] == pytest.approx(0.045)
    assert ablate.compare(SMALL, results) == []


def test_costs_stand_beside_every_result():
    run = [{"memory": "m", "test_auc": 0.5, "state_floats": 2560, "flops_per_item": 7}]
    results = {("x", "one", seed): run for seed in range(2)}
    (line,) = ablate.summary(SMALL, results, "xlong")
    assert line["auc"] == "0.5000 +- 0.0000"
    assert line["state floats"] == 2560 and line["FLOPs per item"] == 7
    oracle = {"setting": "x", "row": "oracle", "seeds": 0, "auc": "1.0000"}
    first, second = reporting.tables([line, oracle], ablate.COSTS).split("\n\n")
    assert "oracle" in first and "2560" not in first
    assert second.splitlines()[2].split() == ["x", "one", "2560", "7"]
    assert reporting.tables([oracle], ablate.COSTS) == reporting.table([oracle])


@pytest.mark.parametrize("name", TABLES)
def test_a_baseline_is_a_row(name):
    assert not TABLES[name].baseline or TABLES[name].baseline in TABLES[name].rows


def test_a_stopped_run_stops_the_table_with_the_same_code(tmp_path, runs):
    runs.code = EXIT_PREEMPTED
    with pytest.raises(SystemExit) as stopped:
        run_all(tmp_path)
    assert stopped.value.code == EXIT_PREEMPTED and len(runs) == 6
    assert json.loads((tmp_path / "table.json").read_text())[0]["seeds"] == 2


def folders(*needs):
    """Three jobs; the last one needs those of the given numbers."""
    made = [Job("", name, 0, Path(name), []) for name in "abc"]
    return [*made[:2], made[2]._replace(needs=tuple(made[number].workdir for number in needs))]


@two_cores
def test_runs_at_the_same_time_have_cores_of_their_own():
    meet = threading.Barrier(2, timeout=20)

    def call(job):
        if job.row != "c":
            meet.wait()  # fails unless both run at the same time
        return os.sched_getaffinity(0)

    shares = {job.row: share for job, share in in_order(folders(), call, 2)}
    assert shares["a"] | shares["b"] == CORES == os.sched_getaffinity(0)
    assert not shares["a"] & shares["b"] and shares["c"] in (shares["a"], shares["b"])
    with pytest.raises(ValueError, match=f"may use {len(CORES)} cores"):
        list(in_order(folders(), call, len(CORES) + 1))


@two_cores
def test_a_run_waits_for_those_that_it_needs():
    ended = []

    def call(job):
        if job.row == "a":
            time.sleep(0.3)
        ended.append(job.row)
        return job.row

    assert [row for _, row in in_order(folders(0, 1), call, 2)] == ["a", "b", "c"]
    assert ended == ["b", "a", "c"]


@two_cores
def test_a_later_job_begins_while_one_waits():
    begun = threading.Event()
    a, b, c = folders()

    def call(job):
        if job.row == "a":
            assert begun.wait(20)  # c begins, although b is before it
        elif job.row == "c":
            begun.set()

    todo = [a, b._replace(needs=(a.workdir,)), c]
    assert [job.row for job, _ in in_order(todo, call, 2)] == ["a", "b", "c"]


@AT_ONCE
@pytest.mark.parametrize("needs", [(), (0,)])
def test_after_an_error_no_job_begins_and_the_others_are_asked_to_end(at_once, needs):
    begun, asked = [], threading.Event()

    def call(job):
        begun.append(job.row)
        if job.row == "a":
            raise SystemExit(EXIT_PREEMPTED)
        assert asked.wait(20)

    with pytest.raises(SystemExit) as stopped:
        list(in_order(folders(*needs), call, at_once, asked.set))
    assert stopped.value.code == EXIT_PREEMPTED
    assert asked.is_set() and "c" not in begun and len(begun) <= at_once


def test_after_an_error_of_the_caller_no_job_begins():
    begun, asked = [], threading.Event()
    with (
        pytest.raises(OSError),
        contextlib.closing(
            in_order(folders(0), lambda job: begun.append(job.row), 1, asked.set)
        ) as runs,
    ):
        next(runs)
        raise OSError
    assert asked.is_set() and begun == ["a"]


def test_rows_that_share_a_teacher_need_its_row(tmp_path):
    first, second = ablate.jobs(SMALL._replace(share_teacher=True, settings={"": {}}), tmp_path, 1)
    assert (first.needs, second.needs) == ((), (first.workdir,))
    rows = {"late": Row({}, start="early")}
    early, late = ablate.jobs(Table("t", rows, starts={"early": {}}), tmp_path, 1)
    assert (early.needs, late.needs) == ((), (early.workdir,))


def test_a_signal_reaches_the_run_and_nothing_more_is_started(tmp_path, monkeypatch):
    """A signal that comes before the run can save is not a failure either."""
    original, started = subprocess.Popen, []

    def slow(command, **options):
        started.append(command)
        process = original([sys.executable, "-c", "import time; time.sleep(60)"], **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(ablate.subprocess, "Popen", slow)
    with pytest.raises(SystemExit) as stopped:
        run_all(tmp_path)
    assert stopped.value.code == EXIT_PREEMPTED and len(started) == 1


def test_rows_are_chosen_by_name_and_need_the_row_of_the_shared_teacher():
    assert list(ablate.choose(SMALL, ["Two (L_a)"]).rows) == ["Two (L_a)"]
    assert ablate.choose(SMALL, []) == SMALL
    with pytest.raises(ValueError, match="no row 'three'; there are one, Two"):
        ablate.choose(SMALL, ["three"])
    assert list(ablate.choose(SMALL, [], ["y"]).settings) == ["y"]
    with pytest.raises(ValueError, match="--settings: there is no setting 'z'; there are x, y"):
        ablate.choose(SMALL, [], ["z"])
    with pytest.raises(ValueError, match="add 'Full': the other rows use the teacher"):
        ablate.choose(TABLES["rm5"], ["only L_rec"])


def test_a_table_continues_with_the_same_config_only(tmp_path):
    ablate.check_same_config(tiny(), tmp_path)
    ablate.check_same_config(tiny(**{"train.log_every": 7, "probe.steps": 3}), tmp_path)
    with pytest.raises(ValueError, match="config.train.steps was 12, now 13"):
        ablate.check_same_config(tiny(**{"train.steps": 13}), tmp_path)
    for key in ("data.dir", "train.start_from", "data.table.path"):
        with pytest.raises(ValueError, match=f"config.{key} was '', now 'other'"):
            ablate.check_same_config(tiny(**{key: "other"}), tmp_path)


def test_a_folder_continues_with_the_same_table_only(tmp_path):
    one = SMALL._replace(settings={"x": SMALL.settings["x"]})
    ablate.check_same_rows("t", one, tmp_path)
    ablate.check_same_rows("t", SMALL, tmp_path)
    other = SMALL._replace(settings={"x": {"data.segment_length": 6}})
    with pytest.raises(ValueError, match="the setting 'x' was begun with .*: 5}, now it is .*: 6"):
        ablate.check_same_rows("t", other, tmp_path)
    with pytest.raises(ValueError, match="share_teacher = False, now it is True"):
        ablate.check_same_rows("t", SMALL._replace(share_teacher=True), tmp_path)
    with pytest.raises(ValueError, match="onward = False, now it is True"):
        ablate.check_same_rows("t", SMALL._replace(onward=True), tmp_path)
    with pytest.raises(ValueError, match="table = 't', now it is 'u'"):
        ablate.check_same_rows("u", SMALL, tmp_path)
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert list(kept["settings"]) == ["x", "y"]
    (tmp_path / "rows.json").write_text('{"one": {"seed": 1}}')  # as an older version wrote it
    with pytest.raises(ValueError, match="the row 'one' was begun with"):
        ablate.check_same_rows("t", SMALL, tmp_path)


def test_the_command_makes_a_real_run(tmp_path):
    """One row of a sweep, one step, with flags in both forms."""
    card = tmp_path / "card.py"
    card.write_text(CARD)
    line = ["--config", str(card), "--table=cm_slots", "--rows=K = 10", "--seeds=1"]
    line += ["--workdir=out", "--config.train.learning_rate=0.5", "--record=record.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "rmjax.ablate", *line]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].split()[:4] == ["K", "=", "10", "1"]
    kept = json.loads((tmp_path / "out" / "seed0" / "k-10" / "config.json").read_text())
    assert kept["train"]["learning_rate"] == 0.5 and kept["machine"]["slots"] == 10
    record = ledger.read(tmp_path / "record.json")
    assert record["title"] == "CM Figure 4" and record["seeds"] == [0]
    assert record["commands"][0].endswith(f"--table=cm_slots '--rows=K = 10' {' '.join(line[4:])}")
    assert record["tables"][0]["rows"][0]["row"] == "K = 10"


@pytest.mark.parametrize(
    ("card", "table", "cause"),
    [
        ("xlong", "mem1", "Memoria Table 1 changes config.model.kind"),
        ("xlong", "cm_long", "changes config.data.synthetic.facts"),
        ("sorting", "rm5", "changes config.rehearsal.recollection"),
        ("synthetic", "few", "changes config.data.simulated.targets"),
    ],
)
def test_a_table_of_other_data_is_refused(card, table, cause):
    base = config.base()
    base.data.name = card
    message = f"{cause}, which config.data.name = {card!r} does not read. Take"
    with pytest.raises(ValueError, match=re.escape(message)):
        ablate.check_fits(TABLES[table], base)


def test_a_config_that_is_not_valid_is_found_before_the_first_run():
    base, table = get_card("synthetic", "local"), TABLES["rehearsals"]
    kept = base.to_json()
    cause = "the row 'complete, near negatives': .* needs config.rehearsal.sampled_items above 0"
    with pytest.raises(ValueError, match=cause):
        ablate.check_valid(table, base)
    assert base.to_json() == kept
    base.rehearsal.sampled_items = 40
    ablate.check_valid(table, base)
    rows = {"a": Row({"machine.slots": 2})}
    heads = Table("A table", rows, {"x": {}, "y": {"machine.heads": 3}})
    with pytest.raises(ValueError, match="the row 'a', 'y': .*machine.heads"):
        ablate.check_valid(heads, base)
    begun = Table("A table", {"a": Row({}, start="b")}, starts={"b": {"machine.heads": 3}})
    with pytest.raises(ValueError, match="the start 'b': .*machine.heads.*; change --config"):
        ablate.check_valid(begun, base)


def test_tables_fit_their_own_data():
    tables = {"xlong": ("rm4", "rm5", "cm5"), "synthetic": ("cm1", "cm_long")}
    tables |= {"babi": ("rm1", "babi_alone")}
    tables |= {"sorting": ("mem4", "mem6")}
    tables |= {"recall": ("capacity",)}
    tables["xlong"] += ("few", "rehearsals")
    tables["synthetic"] += ("forgetting", "rehearsals")
    for card, names in tables.items():
        base = config.base()
        base.data.name = card
        for name in names:
            ablate.check_fits(TABLES[name], base)


def test_labels_may_follow_a_rehearsal_without_labels(tmp_path):
    """A run without rehearsal begins with the last parameters of one that only rehearsed."""
    few = TABLES["few"]
    cheap = {"machine.kind": "gru", "rehearsal.sampler": "uniform", "train.save_every": 1}
    steps = cheap | {"train.steps": 3, "teacher.share_items": False}
    first = tiny(**steps | dict(few.starts["rehearsal alone"]))
    training.train(first, tmp_path)
    after = tiny(**steps | dict(few.rows["rehearsal first"].changes))
    source = make_source(after.data, after.seed)
    start = parameters.read_start(tmp_path, source, tasks.make_task(after, source))
    step, leaves = saved(tmp_path, "model")
    assert step == 3 and any("rehearsal" in name for name in leaves) and "rehearsal" not in start
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": start}):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(leaf, leaves[name], err_msg=name)
