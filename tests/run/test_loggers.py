"""Loggers are chosen by name, closed at the end, and have no step twice. Trackers are fakes."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types

import pytest
from absl import logging

import rmjax
from rmjax import config as configs
from rmjax.registry import LOGGERS
from rmjax.run import reporting, training
from rmjax.run.loggers import tensorboard
from rmjax.types import LoggerContext
from tests.runs import PLAIN, tiny


class Wandb:
    """Behaves as W&B: steps rise, and a late step is dropped."""

    def __init__(self):
        self.runs, self.given = {}, []

    def init(self, *, id, resume, **given):
        assert resume == "allow"
        self.given.append(given)
        run = self.runs.setdefault(id, types.SimpleNamespace(rows={}, open=False))
        run.open = True

        def log(values, step):
            if step >= max(run.rows, default=0):
                run.rows[step] = run.rows.get(step, {}) | values

        return types.SimpleNamespace(log=log, finish=lambda: setattr(run, "open", False))


Metric = dataclasses.make_dataclass("Metric", ["key", "value", "timestamp", "step"])


class Mlflow:
    """Behaves as MLflow: every value is kept."""

    def __init__(self):
        self.runs, self.experiments = {}, {}

    def get_experiment_by_name(self, name):
        if name not in self.experiments:
            return None
        return types.SimpleNamespace(experiment_id=self.experiments[name])

    def create_experiment(self, name):
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment, run_name):
        run_id = str(len(self.runs))
        self.runs[run_id] = types.SimpleNamespace(
            name=run_name, experiment=experiment, metrics=[], status="RUNNING"
        )
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def log_dict(self, run, values, file):
        self.runs[run].config = values

    def update_run(self, run, status):
        self.runs[run].status = status

    def log_batch(self, run, metrics):
        self.runs[run].metrics += metrics

    def get_metric_history(self, run, name):
        return [metric for metric in self.runs[run].metrics if metric.key == name]

    def set_terminated(self, run):
        self.runs[run].status = "FINISHED"


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    fake = Mlflow()
    package = types.SimpleNamespace(MlflowClient=lambda: fake)
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(sys.modules, "mlflow.entities", types.SimpleNamespace(Metric=Metric))
    return fake


def write(workdir, loggers, start, stop, stage="model", more=()):
    config = tiny(**{"train.loggers": loggers})
    writer = reporting.open_loggers(config, workdir, stage, start, more=more)
    for step in range(start + 1, stop + 1):
        writer.write("train", step, {"loss": step / 2})
    if stop == 4:
        writer.write("valid", 4, {"auc": 0.5})
    writer.close()


def test_names_are_checked_and_must_differ():
    for names in ("", "jsonl", "jsonl,wandb,mlflow", "tensorboard, jsonl"):
        assert tiny(**{"train.loggers": names})
    for names in ("jsonl,wand", "jsonl,jsonl"):
        words = "must be a string, names, none of them twice, of jsonl, tensorboard, wandb, mlflow"
        with pytest.raises(ValueError, match=words):
            tiny(**{"train.loggers": names})


def test_only_the_loggers_that_are_named_write(tmp_path, wandb):
    write(tmp_path, "wandb", 0, 2)
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "tensorboard").exists()
    assert list(wandb.runs.values())[0].rows == {1: {"train/loss": 0.5}, 2: {"train/loss": 1.0}}
    write(tmp_path / "none", "", 0, 2)
    assert not (tmp_path / "none").exists()


def test_wandb_has_each_step_once_after_a_stop(tmp_path, wandb):
    write(tmp_path, "wandb", 0, 5, "teacher")
    write(tmp_path, "wandb", 0, 4)
    write(tmp_path, "wandb", 2, 6)  # killed after step 4, continues from step 2
    of_teacher, of_model = wandb.runs.values()
    assert [*of_teacher.rows] == [1, 2, 3, 4, 5] and [*of_model.rows] == [1, 2, 3, 4, 5, 6]
    assert of_model.rows[4] == {"train/loss": 2.0, "valid/auc": 0.5} and not of_model.open
    given = wandb.given[-1]
    assert given["project"] == "rmjax" and given["config"]["train"]["loggers"] == "wandb"
    write(tmp_path, "wandb", 0, 1)  # starts over
    assert len(wandb.runs) == 3


def test_mlflow_has_each_step_once_after_a_stop(tmp_path, mlflow):
    write(tmp_path / "new", "mlflow", 0, 4)
    write(tmp_path / "new", "mlflow", 2, 6)
    (run,) = mlflow.runs.values()
    steps = [(metric.key, metric.step) for metric in run.metrics]
    assert sorted(steps) == [*[("train/loss", step) for step in range(1, 7)], ("valid/auc", 4)]
    assert run.status == "FINISHED" and run.config["train"]["loggers"] == "mlflow"
    write(tmp_path / "new", "mlflow", 0, 1)
    assert len(mlflow.runs) == 2 and mlflow.experiments == {"rmjax": "0"}


def test_a_server_that_fails_does_not_end_the_run(tmp_path, mlflow, caplog):
    def gone(*args, **kwargs):
        raise ConnectionError("no route")

    logging.set_verbosity(logging.INFO)
    mlflow.log_batch = mlflow.set_terminated = gone
    write(tmp_path, "mlflow,jsonl", 0, 2)
    assert "mlflow: step 2 is not logged: no route" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_mlflow_gets_only_the_marks_that_it_allows(tmp_path, mlflow):
    writer = reporting.open_loggers(tiny(**{"train.loggers": "mlflow"}), tmp_path)
    writer.write("valid", 1, {"under_5%": 1, "answer 1 alone": math.nan})
    names = [metric.key for metric in mlflow.runs["0"].metrics]
    assert names == ["valid/under_5_", "valid/answer 1 alone"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_and_open_loggers_are_closed(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    closed = []
    monkeypatch.setattr("rmjax.run.loggers.jsonl.Lines.close", lambda self: closed.append(self))
    words = rf"config\.train\.loggers: {name} .* pip install 'rmjax\[{name}\]'"
    with pytest.raises(ImportError, match=words):
        write(tmp_path, f"jsonl,{name}", 0, 1)
    assert len(closed) == 1


class Recorder:
    def __init__(self):
        self.rows, self.closed = [], 0

    def write(self, kind, step, values):
        self.rows.append((kind, step, values))

    def close(self):
        self.closed += 1


def test_loggers_of_the_caller_outlive_a_stage(tmp_path):
    mine = Recorder()
    write(tmp_path, "", 0, 1, "teacher", more=[mine])
    write(tmp_path, "", 0, 1, more=[mine])
    loss = {"loss": 0.5}
    assert mine.rows == [("teacher/train", 1, loss), ("model/train", 1, loss)] and not mine.closed


def test_a_registered_logger_is_used_by_name_and_may_change_later(tmp_path, monkeypatch):
    made = {}

    @dataclasses.dataclass(frozen=True)
    class Settings:
        """No settings."""

    monkeypatch.setattr(LOGGERS, "_registered", {})
    rmjax.register_logger("mine", Settings)(
        lambda settings, context: made.setdefault(context.stage, Recorder())
    )
    short = {"train.steps": 2, "train.eval_every": 2, "train.save_every": 1}
    config = tiny(**PLAIN, **short, **{"train.loggers": "mine"})
    training.train(config, tmp_path)
    assert [row[:2] for row in made["model"].rows] == [("train", 1), ("train", 2), ("valid", 2)]
    assert made["model"].closed == 1 and not (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "results.json").unlink()
    config.train.loggers = "jsonl"
    training.train(config, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())


def test_the_project_is_read_only_with_a_tracker():
    assert configs.reads(tiny(**{"train.loggers": "jsonl,wandb"}), "logger.project")
    assert not configs.reads(tiny(), "logger.project")


def test_tags_of_tensorboard_have_only_characters_that_it_takes(tmp_path, caplog):
    caplog.set_level("INFO")
    board = tensorboard.Events(LoggerContext(tmp_path, {}, "model"))
    board.write("groups/gender (male, 18-24)", 1, {"hr@10": 0.5})
    board.close()
    assert "illegal" not in caplog.text
