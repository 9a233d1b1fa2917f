"""The tables over all registered memories: their rows, lines, files, and tuned values."""

from __future__ import annotations

import json
import sys

import pytest

from rmjax import config
from rmjax.registry import MACHINES
from rmjax.run.workdir import Preemption
from rmjax.tools import ablate, memories, systems, tables
from rmjax.tools.tables import NO_REHEARSAL, Row, Table
from tests.runs import set_key

COSTS = {
    "state_floats": 2560,
    "state_bytes": 10244,
    "parameters": 796288,
    "item_parameters": 128000,
    "flops_per_item": 1725476,
}
SMALL = Table("Memories", {"RM": Row({"machine.kind": "rehearsal"}), "gru": Row(NO_REHEARSAL)})
BENCH = {
    "step_ms": 12.5,
    "streaming": {"batch_1_after_1000": {"write_segment_ms": 0.5, "answer_query_ms": 0.25}},
}


def finished_run(workdir, score, valid=()):
    """Writes the files of a finished run that the tables read."""
    workdir.mkdir(parents=True)
    row = {"memory": "m", "test_accuracy": score, "low": 0.0, "high": 1.0, "early": score} | COSTS
    oracle = {"memory": "oracle", "test_accuracy": 1.0, "early": 1.0}
    (workdir / "results.json").write_text(json.dumps([row, oracle]))
    lines = [
        {"stage": "teacher", "kind": "valid", "step": 1, "accuracy": 0.99},
        {"stage": "model", "kind": "train", "step": 1, "loss": 3.0},
        *({"stage": "model", "kind": "valid", "step": 1, "accuracy": v} for v in valid),
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def benches(monkeypatch):
    """Replaces the bench by a process that prints `BENCH`; returns the command lines."""
    commands, original = [], memories.subprocess.Popen

    def started(command, **options):
        commands.append(command[2:])
        return original([sys.executable, "-c", f"print({json.dumps(BENCH)!r})"], **options)

    monkeypatch.setattr(memories.subprocess, "Popen", started)
    monkeypatch.setattr(memories, "this_machine", lambda: "cpu, x86_64")
    return commands


def test_every_registered_machine_has_a_row_that_is_a_valid_config():
    for name in tables.BUILT:
        table = tables.table_of(name)
        kinds = [row.changes["machine.kind"] for row in table.rows.values()]
        assert kinds == ["rehearsal", "continual", *MACHINES]
        rehearsing = [
            row for row in table.rows.values() if not NO_REHEARSAL.items() & row.changes.items()
        ]
        assert rehearsing == [table.rows["RM"], table.rows["CM"]]
        for common in table.settings.values():
            for row in table.rows.values():
                assert not common.keys() & row.changes.keys()
                changed = config.base()
                for key, value in {**common, **row.changes}.items():
                    set_key(changed, key, value)
                config.validate(changed)


def test_memories_have_a_result_beside_their_costs(tmp_path, benches, capsys, monkeypatch):
    for seed, score in enumerate((0.5, 0.75)):
        finished_run(tmp_path / f"seed{seed}" / "rm", score)
    finished_run(tmp_path / "seed0" / "gru", 0.25)
    with Preemption() as stop:
        given = ["--config=card.py"]
        command = ["--table=memories", *given, "--seeds=2", "--rows=RM,gru", "--workdir=a b"]
        finish = lambda: memories.finish(SMALL, tmp_path, 2, given, stop, command)
        lines, again = finish(), finish()
        monkeypatch.setattr(memories, "this_machine", lambda: "another, x86_64")
        finish()
    assert lines == again == json.loads((tmp_path / "memories.json").read_text())
    assert len(benches) == 4  # what was timed is timed again on another machine only
    assert json.loads((tmp_path / "bench" / "rm.json").read_text())["machine"] == "another, x86_64"
    assert benches[0][0] == "rmjax.bench" and "--config.machine.kind=rehearsal" in benches[0]
    first, second = lines
    assert first["mean"] == 0.625 and first["std"] == pytest.approx(0.1768, abs=1e-4)
    assert first.items() >= COSTS.items() and first["values"] == [0.5, 0.75]
    assert second["std"] is None and second["seeds"] == 1
    assert (first["step_ms"], first["write_ms"], first["answer_ms"]) == (12.5, 0.5, 0.25)
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in printed if not line.startswith("Mean"))
    assert "RM          2  0.6250 +- 0.1768" in "\n".join(printed)
    text = (tmp_path / "memories.md").read_text()
    assert (
        "| RM | 2 | 0.6250 +- 0.1768 | 2.56k | 10.2k | 796k | 1.73M | 12.5 | 0.5 | 0.25 |" in text
    )
    options = "--table=memories --config=card.py --seeds=2 --rows=RM,gru '--workdir=a b'"
    assert f"    python -m rmjax.ablate {options}\n" in text


def test_a_figure_shows_the_measure_against_the_size(tmp_path):
    pytest.importorskip("matplotlib")
    line = {"memory": "m", "mean": 0.5, "std": None, "measure": "auc", **COSTS}
    old = line | dict.fromkeys(COSTS)
    memories.draw([line | {"std": 0.1}, line, old], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (2560, "2.56k"), (1_234_567, "1.23M"), (None, "-")]
)
def test_large_numbers_have_a_prefix(value, text):
    assert memories.prefixed(value) == text


def test_the_best_setting_is_chosen_by_the_validation_split(tmp_path, capsys):
    """The first setting is better on the test split, the second on the validation split."""
    grid = {
        f"rate {rate}": {"train.learning_rate": rate, "train.loggers": "jsonl"}
        for rate in (0.1, 0.2)
    }
    table = SMALL._replace(rows={"RM": SMALL.rows["RM"]}, settings=grid)
    for job in ablate.jobs(table, tmp_path, 2):
        second = job.setting == "rate 0.2"
        valid = (0.5, 0.8, 0.3) if second else (0.6, 0.7)
        finished_run(job.workdir, 0.1 if second else 0.9, valid)
        with (job.workdir / "metrics.jsonl").open("a") as lines:
            lines.write('{"stage": "model", "ki')  # of a killed process
    best = memories.choose_best(table, tmp_path, 2, "synthetic")
    assert best == {"RM": {"train.learning_rate": 0.2}}
    assert json.loads((tmp_path / "tuned.json").read_text()) == {"synthetic": best}
    assert '"synthetic": {' in capsys.readouterr().out
    (tmp_path / "seed0" / "rate-0-1" / "rm" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="has no validation accuracy: remove the folder"):
        memories.choose_best(table, tmp_path, 2, "synthetic")
    assert memories.less_is_better("error") and not memories.less_is_better("auc")


def test_memories_take_their_tuned_values(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"synthetic": {"gru": {"train.learning_rate": 0.5}}}))
    table = ablate.prepared("memories", "synthetic", str(path), False)
    assert table.rows["gru"].changes["train.learning_rate"] == 0.5
    assert table.rows["rmt"] == tables.memories().rows["rmt"]
    message = "tuned.json has the values of synthetic, and none of config.data.name = 'babi'"
    with pytest.raises(ValueError, match=message):
        ablate.prepared("memories", "babi", str(path), False)
    path.write_text('{"synthetic": {"gruu": {}}}')
    with pytest.raises(ValueError, match="no row 'gruu'; there are RM, CM"):
        ablate.prepared("memories", "synthetic", str(path), False)
    with pytest.raises(ValueError, match="--table=cm1 has no tuned values"):
        ablate.prepared("cm1", "synthetic", str(path), False)


def test_rows_are_not_continued_with_other_values(tmp_path):
    ablate.check_same_rows("memories", SMALL, tmp_path)
    ablate.check_same_rows("memories", SMALL._replace(rows=SMALL.rows | {"x": Row({})}), tmp_path)
    changed = tables.tuned(SMALL, {"gru": {"train.clip": 1.0}})
    with pytest.raises(ValueError, match="the row 'gru' was begun with .* now it is .*train.clip"):
        ablate.check_same_rows("memories", changed, tmp_path)


@pytest.mark.parametrize("kind", systems.ORIGINAL)
def test_published_values_are_valid(kind):
    table = tables.original(Table("t", {"row": Row(NO_REHEARSAL | {"machine.kind": kind})}))
    changes = table.rows["row"].changes
    assert changes.items() >= systems.ORIGINAL[kind].items()
    changed = config.base()
    for key, value in changes.items():
        set_key(changed, key, value)
    config.validate(changed)
    assert all(config.reads(changed, key) for key in systems.ORIGINAL[kind])
