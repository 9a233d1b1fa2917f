"""A run that stops anywhere continues as if it had not; its results, costs and errors."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from rmjax import config as configs
from rmjax import machines, tasks
from rmjax.data import make_source
from rmjax.data.segments import segment
from rmjax.evaluation.metrics import auc
from rmjax.io import atomic
from rmjax.io.checkpoint import Checkpoints
from rmjax.io.cost import peak_bytes
from rmjax.reason import heads
from rmjax.run import evaluate, kept, parameters, resume, stages, training
from rmjax.run.mapping import make_mapped
from rmjax.run.optimizer import make_optimizer
from rmjax.run.step import init_state, make_train_step
from rmjax.run.workdir import Preemption
from rmjax.tools import explain
from tests.runs import PLAIN, before, compilations_kept, lines, saved, set_key, tiny
from tests.small import noise

COLUMNS = "memory test AUC 95% from to gain, familiarity gain, recollection spread"


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with compilations_kept(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir and the table of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, training.train(tiny(), workdir)


def stopped(config, workdir: Path, moment: str) -> str:
    """Runs until `moment`, at which the run is asked to stop; returns its message."""
    with pytest.MonkeyPatch.context() as patch:
        stop = Preemption()
        patch.setattr(training, "Preemption", lambda: stop)
        before(moment, lambda: setattr(stop, "requested", True), patch.setattr)
        with pytest.raises(stages.Preempted) as error:
            training.train(config, workdir)
        return str(error.value)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """The workdir of a model that stopped at step 7, with checkpoints of steps 4, 6 and 7."""
    workdir = tmp_path_factory.mktemp("halfway") / "run"
    stopped(tiny(), workdir, "model step 7")
    assert sorted(int(path.name) for path in (workdir / "model").iterdir()) == [4, 6, 7]
    return workdir


def assert_same_run(workdir: Path, expected: Path) -> None:
    assert lines(workdir) == lines(expected)
    for stage in ("teacher", "model"):
        chex.assert_trees_all_equal(saved(workdir, stage), saved(expected, stage))


# ---- the run


def test_the_table_has_the_machine_and_the_references(finished):
    workdir, rows = finished
    assert [row["memory"] for row in rows] == [
        "rehearsal",
        "oracle, full history",
        "oracle, last 20 clicks",
    ]
    for row in rows:
        assert 0 <= row["low"] <= row["test_auc"] <= row["high"] <= 1
    text = evaluate.show(rows)
    assert text.splitlines()[0].split() == COLUMNS.split()
    assert all(f"{row['test_auc']:.4g}" in text for row in rows)


def test_a_run_leaves_a_report_and_a_picture(finished):
    workdir, rows = finished
    page = (workdir / "report.html").read_text()
    assert "By length of history" in page and "40 to 40" in page
    assert "model: losses" in page and f"<td>{round(rows[0]['test_auc'], 4):.4g}</td>" in page
    assert (workdir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_every_step_and_evaluation_is_written_once(finished):
    expected = []
    for stage, steps in (("teacher", 6), ("model", 12)):
        for step in range(1, steps + 1):
            expected.append((stage, "train", step))
            if step % 4 == 0 or step == steps:
                expected.append((stage, "valid", step))
    entries = lines(finished[0])
    assert [(entry["stage"], entry["kind"], entry["step"]) for entry in entries] == expected
    model = [entry for entry in entries if entry["stage"] == "model" and entry["kind"] == "train"]
    for entry in model:
        assert entry.keys() == {"stage", "kind", "step", "loss", "grad_norm"} | REHEARSED
        total = entry["reason"] + entry["recollection"] + 0.5 * entry["familiarity"]
        assert math.isclose(entry["loss"], total, rel_tol=1e-5)


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    workdir, rows = finished
    written = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(training, "train_stage", None)
    assert training.train(tiny(), workdir) == rows
    assert (workdir / "metrics.jsonl").read_bytes() == written


def test_a_finished_run_can_be_read_on_a_read_only_file_system(finished, monkeypatch):
    folder, rows = finished

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for owner, names in ((atomic, "write"), (os, "ftruncate pwrite"), (Path, "mkdir write_text")):
        for name in names.split():
            monkeypatch.setattr(owner, name, refuse)
    assert training.train(tiny(), folder) == training.evaluate_only(tiny(), folder) == rows
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def valid_aucs(workdir: Path, stage: str) -> dict[int, float]:
    """The validated AUC of each step."""
    entries = [entry for entry in lines(workdir) if entry["kind"] == "valid"]
    return {entry["step"]: entry["auc"] for entry in entries if entry["stage"] == stage}


def test_the_best_parameters_are_tested(finished):
    """The best parameters are those of the validated step with the highest AUC, not the last."""
    scores = valid_aucs(finished[0], "model")
    best = max(scores, key=scores.get)
    config = tiny()
    with training.opened(config, finished[0]) as run:
        stage = stages.model_stage(run)
        like = stages.fresh_state(run, stage)
        with contextlib.closing(stages.open_checkpoints(run, stage)) as checkpoints:
            restored = parameters.restore_best(checkpoints, like.params)
            chex.assert_trees_all_equal(restored, checkpoints.restore(like, best)[1].params)


def test_the_newest_is_read_if_the_best_and_all_before_it_are_damaged(finished, tmp_path):
    folder = shutil.copytree(finished[0] / "model", tmp_path / "model")
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        best = checkpoints.best_step()
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    assert best < steps[-1]
    for step in steps:
        if step <= best:
            (folder / f"{step:09d}" / "SHA256SUMS").write_text("damaged")
    with training.opened(tiny(), finished[0]) as run:
        like = stages.fresh_state(run, stages.model_stage(run)).params
    best_left = parameters.read_best(folder, like)
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        newest = checkpoints.restore({"params": like}, steps[-1], part=True)[1]["params"]
    chex.assert_trees_all_equal(best_left, newest)


# ---- stopping and continuing

MOMENTS = [
    "teacher compilation",
    "teacher step 3",
    "teacher validation 4",
    "teacher validation 6",
    "model step 0",
    "model compilation",
    "model step 5",
    "model step 6",
    "model validation 8",
    "model validation 12",
    "test",
]


def test_a_run_stopped_at_any_moment_continues_as_if_it_had_not(finished, tmp_path):
    for moment in MOMENTS:
        message = stopped(tiny(), tmp_path, moment)
        assert "run the same line again to go on" in message, moment
        stage, kind, *number = moment.split() if moment != "test" else ("test", "")
        step = 1 if kind == "compilation" else int(number[0]) if number else None
        if step is None:
            assert stage == "test" and "evaluating on 'test'" in message
            continue
        assert f"in stage {stage!r} at step {step};" in message, moment
        newest = max(int(path.name) for path in (tmp_path / stage).iterdir())
        assert newest == step, moment  # nothing is lost
    assert training.train(tiny(), tmp_path) == finished[1]
    assert_same_run(tmp_path, finished[0])


def test_a_validation_stops_between_two_batches(tmp_path):
    stop = Preemption()
    run = stages.Run(tiny(), tmp_path, make_source(tiny().data, 0), stop)
    calls = []

    class Mapped:
        def scores(self, params, batch):
            calls.append(batch)
            stop.requested = True
            return np.zeros(batch.query.shape)

    with pytest.raises(stages.Preempted, match="evaluating on 'valid'"):
        evaluate.score_split(run, Mapped(), None, "valid")
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    finished, halfway, tmp_path, caplog, damage
):
    workdir = Path(shutil.copytree(halfway, tmp_path / "run"))
    files = (workdir / "model" / "000000007").rglob("*")
    largest = max(files, key=lambda path: path.stat().st_size)
    harm(largest, damage)
    with caplog.at_level(logging.INFO, "absl"):
        assert training.train(tiny(), workdir) == finished[1]
    assert f"{workdir}/model/000000007 is damaged: " in caplog.text and largest.name in caplog.text
    assert "model: going on from step 6 of 12" in caplog.text
    assert_same_run(workdir, finished[0])


def harm(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damage_to_any_file_of_a_checkpoint_is_detected(halfway, tmp_path):
    paths = (halfway / "model" / "000000007").rglob("*")
    names = [path.relative_to(halfway) for path in paths if path.is_file()]
    assert len(names) > 3
    for name, damage in itertools.product(names, ("truncated", "flipped")):
        workdir = Path(shutil.copytree(halfway, tmp_path / "run"))
        harm(workdir / name, damage)
        assert saved(workdir, step=7)[0] == 6, (name, damage)
        shutil.rmtree(workdir)


def test_a_run_continues_with_other_devices_and_mappings(tmp_path):
    """The losses stay the same, since nothing drawn depends on devices or mappings."""
    config = tiny(**PLAIN)
    training.train(config, tmp_path / "whole")
    stopped(config, tmp_path / "moved", "model step 5")
    mesh = {"train.mapping": "mesh", "train.devices": 4, "train.model_devices": 2}
    training.train(tiny(**PLAIN, **mesh), tmp_path / "moved")
    one, two = (lines(tmp_path / name) for name in ("whole", "moved"))
    assert [(e["kind"], e["step"]) for e in one] == [(e["kind"], e["step"]) for e in two]
    for a, b in zip(one, two, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4), a


# ---- what ends a run


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, save_every):
    """It ends before a later step is saved, and also if nothing is saved until the end."""
    wild = {"train.learning_rate": 1e30, "train.save_every": save_every, "train.eval_every": 100}
    config = tiny(**PLAIN, **wild)
    for _ in range(2):
        with pytest.raises(FloatingPointError) as error:
            training.train(config, tmp_path)
        message = str(error.value)
        assert "stage 'model', step 2: a loss is not finite" in message
        assert "reason " in message and "Lower config.train.learning_rate" in message
        assert [entry["step"] for entry in lines(tmp_path)] == [1]
        if save_every == 1:
            step, leaves = saved(tmp_path)
            assert step == 1
            params = {name: leaf for name, leaf in leaves.items() if name.startswith("params")}
            chex.assert_tree_all_finite(params)
        else:
            assert not list((tmp_path / "model").iterdir())


def test_another_config_is_refused(finished):
    workdir, source = finished[0], make_source(tiny().data, 0)
    for name, field in configs.SCHEMA.items():
        config = tiny()
        set_key(config, name, other(field.default))
        if kept.may_change(name):
            resume.check_same_config(config, workdir, source)
        else:
            words = f"config.{name} was .*, now .*: use another --workdir"
            with pytest.raises(ValueError, match=words):
                resume.check_same_config(config, workdir, source)
    assert set(kept.MAY_CHANGE) <= set(configs.SCHEMA)
    with pytest.raises(ValueError, match="config.machine.slots was 4, now 5"):
        training.train(tiny(**{"machine.slots": 5}), workdir)
    config = tiny(**{"train.keep_last": 5, "train.log_every": 3})
    assert training.train(config, workdir) == finished[1]


def other(value):
    """A value that no tiny config has."""
    if isinstance(value, bool):
        return not value
    return f"{value}?" if isinstance(value, str) else value + 12345


def test_a_config_binds_only_once_something_is_saved(tmp_path):
    """A run that was refused at its start may start again with a corrected config."""
    wrong = {"data.simulated.clicks_min": 45, "data.simulated.clicks_max": 45}
    with pytest.raises(ValueError, match="clicks_min=45"):
        training.train(tiny(**wrong), tmp_path)
    stopped(tiny(**PLAIN), tmp_path, "model step 0")
    with pytest.raises(ValueError, match="config.machine.kind was 'gru', now 'rehearsal'"):
        training.train(tiny(), tmp_path)


def test_batches_that_do_not_divide_among_the_devices_are_refused(tmp_path):
    for key in ("teacher.batch_size", "train.batch_size"):
        words = f"config.{key} = 9 does not divide among 8 devices"
        with pytest.raises(ValueError, match=words):
            training.train(tiny(**{key: 9, "train.devices": 0}), tmp_path)
    assert not (tmp_path / "teacher").exists()  # nothing was trained in vain
    many = {"train.batch_size": 16, "train.eval_batch_size": 16, "train.devices": 16}
    with pytest.raises(ValueError, match="config.train.devices = 16, but there are 8"):
        training.train(tiny(**many), tmp_path)


def test_microbatches_save_memory(tmp_path):
    """They divide the streams of a device. For the model, a CPU chooses a size if none is set."""
    config = tiny(**{"train.batch_size": 8, "train.microbatch": 2})
    run = stages.Run(config, tmp_path, make_source(config.data, 0), Preemption())
    assert stages.microbatch(run, 8)(8, 40) == 2
    words = "config.train.microbatch = 2 does not divide the 7 streams of a device"
    with pytest.raises(ValueError, match=words):
        stages.microbatch(run, 7)
    peaks = {}
    for mapping, rows in (("mesh", 4), ("pmap", 2)):
        config.train.mapping, config.train.devices, config.train.microbatch = mapping, 2, rows
        _, mapped, state, frozen, batch = stages.first_step(run)
        peaks[mapping, rows] = peak_bytes(mapped.compiled(state, (), frozen, batch))
    assert peaks["pmap", 2] < 0.8 * peaks["mesh", 4]
    config.train.microbatch = 0
    # The size is the divisor with the ratio nearest to what fits, or to 4. Streams have 40 items.
    few = ((0, 6, 3), (0, 32, 4), (320, 32, 8))
    for items, streams, rows in (*few, (10**9, 32, 32), (320, 11, 11), (400, 25, 5)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "CPU_ITEMS", items)
            assert stages.microbatch(run, streams)(streams, 40) == rows


def test_a_config_without_a_teacher_trains_none(tmp_path):
    for changes in ({"rehearsal.sampler": "uniform"}, PLAIN):
        config = tiny(**changes)
        assert tasks.make_teacher(config, make_source(config.data, 0)) is None


def test_a_teacher_from_another_run(finished, tmp_path):
    """It is not trained again. Its item table stays the same at every step; the rest learns."""
    config = tiny(**PLAIN, **{"teacher.share_items": True, "teacher.dir": str(finished[0])})
    training.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists()
    scores = valid_aucs(finished[0], "teacher")
    teacher = saved(finished[0], "teacher", max(scores, key=scores.get))[1]
    earlier, later = (saved(tmp_path / "run", step=step)[1] for step in (9, 12))
    table = teacher["params/sampler/embed"]
    for model in (earlier, later):
        np.testing.assert_array_equal(model["params/machine/embed"], table)
    assert (earlier["params/head/out"] != later["params/head/out"]).any()
    config.teacher.train_items = True
    training.train(config, tmp_path / "on")
    begun = saved(tmp_path / "on", step=9)[1]["params/machine/embed"]
    assert 0 < abs(begun - table).max() < 0.1  # nine steps at a small rate
    config.teacher.train_items = False
    shutil.copytree(finished[0] / "teacher", tmp_path / "halfway" / "teacher")
    for name in ("nowhere", "halfway"):  # the second run was stopped before its model's stage
        config.teacher.dir = str(tmp_path / name)
        words = f"{name}' holds no finished teacher: name a workdir with one"
        with pytest.raises(FileNotFoundError, match=words):
            training.train(config, tmp_path / "other")
    assert not (tmp_path / "nowhere").exists()


def test_a_run_begins_with_the_best_parameters_of_another(finished, tmp_path):
    """With a tiny rate it keeps them. It is a new run, so it begins at step 0."""
    others = {"train.learning_rate": 1e-12, "train.steps": 2, "train.eval_every": 2}
    first = {"train.start_from": str(finished[0]), "teacher.dir": str(finished[0])}
    config = tiny(**others, **first)
    training.train(config, tmp_path / "run")
    scores = valid_aucs(finished[0], "model")
    best = saved(finished[0], step=max(scores, key=scores.get))[1]
    begun = saved(tmp_path / "run")[1]
    params = [name for name in best if name.startswith("params/")]
    assert params
    for name in params:
        np.testing.assert_allclose(begun[name], best[name], atol=1e-7, err_msg=name)
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "train"] == [1, 2]
    for name, account in (("texts", {"words": "0123456789abcdef"}), ("world", {"items": 3})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"data": {"found": account}}))
    for name, error, words in (
        ("nowhere", FileNotFoundError, "start_from.*no checkpoint"),
        ("texts", ValueError, "other words"),
        ("world", ValueError, "data of 3 items, config.data has 58"),
    ):
        config.train.start_from = str(tmp_path / name)
        with pytest.raises(error, match=words):
            training.train(config, tmp_path / "other")
    others |= {"train.start_from": str(finished[0]), "rehearsal.sampler": "uniform"}
    words = "start_from.*other parameters.*the same machine.*params/machine"
    with pytest.raises(ValueError, match=words):
        training.train(tiny(**others, **{"machine.dim": 4}), tmp_path / "other")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_a_run_needs_the_other_run_only_at_its_start(finished, tmp_path):
    """If the other run is missing, the error comes before the teacher is trained."""
    other = shutil.copytree(finished[0], tmp_path / "other")
    config = tiny(**{"train.start_from": str(other)})
    training.train(config, tmp_path / "whole")
    stopped(config, tmp_path / "run", "model step 7")
    shutil.rmtree(other)
    training.train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="start_from.*no checkpoint"):
        training.train(config, tmp_path / "late")
    assert not (tmp_path / "late" / "teacher").exists()
    stopped(tiny(), tmp_path / "late", "teacher step 5")  # the model has saved nothing
    config.train.start_from = str(finished[0])
    stopped(config, tmp_path / "late", "model step 3")
    values = json.loads((tmp_path / "late" / "config.json").read_text())
    assert values["train"]["start_from"] == str(finished[0])


def test_the_schedule_is_that_of_the_config(tmp_path):
    """Adam's step on a constant gradient is the rate.

    After 9 of 12 steps the cosine leaves (1 + cos 3/4 pi) / 2 of it.
    """
    for schedule, share in (("cosine", 0.5 * (1 + math.cos(0.75 * math.pi))), ("constant", 1.0)):
        config = tiny(**PLAIN, **{"train.schedule": schedule})
        run = stages.Run(config, tmp_path, make_source(config.data, 0), Preemption())
        optimizer = stages.stage_optimizer(run, stages.model_stage(run))
        state = optimizer.init(np.zeros(1, np.float32))
        for _ in range(10):
            updates, state = optimizer.update(np.ones(1, np.float32), state)
        assert float(updates[0]) == pytest.approx(-1e-3 * share, rel=1e-3)


def test_other_data_are_refused(finished, tmp_path):
    """The folder may have another name, but not other contents."""
    workdir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    assert training.train(tiny(**{"data.dir": "elsewhere"}), workdir) == finished[1]
    values = json.loads((workdir / "config.json").read_text())
    values["data"]["found"]["test"] += 1
    (workdir / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="config.data.found.test was 16, now 15"):
        training.train(tiny(), workdir)


def test_an_evaluation_whose_score_was_not_saved_is_not_written_twice(finished, tmp_path):
    """The run stops in a validation. The next one is killed before the score is saved."""
    stopped(tiny(), tmp_path, "model validation 8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            training.train(tiny(), tmp_path)
    training.train(tiny(), tmp_path)
    assert_same_run(tmp_path, finished[0])


# ---- testing only


def test_a_workdir_without_a_model_cannot_be_tested(tmp_path):
    words = r"run has no checkpoint of the model: train first, with --mode=train"
    with pytest.raises(FileNotFoundError, match=words):
        training.evaluate_only(tiny(), tmp_path / "run")


def test_an_evaluation_gives_the_numbers_of_the_run(finished):
    written = (finished[0] / "metrics.jsonl").read_bytes()
    assert training.evaluate_only(tiny(), finished[0]) == finished[1]
    assert (finished[0] / "metrics.jsonl").read_bytes() == written


def test_a_trained_model_answers_questions(finished, tmp_path):
    """A notebook gets the scores of the table, even while the run is still writing."""
    workdir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (workdir / "model" / "000000099.tmp").mkdir()
    before = sorted(workdir.rglob("*"))
    task, params, source = training.trained(workdir)
    users = source.fetch("test", np.arange(15))
    items, mask = segment(users["items"], users["length"], 10)
    memory = machines.memorize(task.machine, params["machine"], items, mask).memory
    logits = task.answer(params, memory, users["query"], users["query_mask"])
    score = auc(logits, users["target"], users["query_mask"])
    assert score == pytest.approx(finished[1][0]["test_auc"], abs=1e-6)
    query = task.machine.embed(params["machine"], users["query"])
    read = task.machine.read(params["machine"], memory, query, users["query_mask"])
    np.testing.assert_array_equal(logits, heads.click(params["head"], read, query))
    assert sorted(workdir.rglob("*")) == before
    words = r"nowhere/config.json is missing: name a workdir that was trained"
    with pytest.raises(FileNotFoundError, match=words):
        training.trained(tmp_path / "nowhere")


def test_every_mapping_scores_alike_and_leaves_padding_out(tmp_path):
    config = tiny()
    run = stages.Run(config, tmp_path, make_source(config.data, 0), Preemption())
    stage = stages.model_stage(run)
    params, scored = stages.fresh_state(run, stage).params, []
    layouts = ("pmap", 1, 1), ("pmap", 2, 1), ("mesh", 2, 1), ("mesh", 4, 2)
    for mapping, devices, model_devices in layouts:
        how = dict(mapping=mapping, devices=devices, model_devices=model_devices)
        mapped = make_mapped(stage.task, make_optimizer(1e-3, 5.0), 0, **how)
        assert mapped.devices == devices // model_devices
        chex.assert_trees_all_equal(mapped.get(mapped.put(params)), params)
        scored.append(evaluate.score_split(run, mapped, mapped.put(params), "test"))
    first = scored[0]
    assert first["scores"].shape == (15, 4) and (first["example_id"] == np.arange(15)).all()
    assert np.std(first["scores"]) > 1e-3
    for got in scored[1:]:
        np.testing.assert_allclose(got.pop("scores"), first["scores"], rtol=0, atol=1e-6)
        rest = {name: value for name, value in first.items() if name != "scores"}
        chex.assert_trees_all_equal(got, rest)


# ---- the cost


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def transformer(d: int, tokens: int, attentions: int, layers: int = 1) -> int:
    """Counts positions, layers and a last norm.

    A layer has attentions with their norms, and a feed-forward of width 4 d with its norm.
    """
    attention = 3 * dense(d, d) + d * d + 2 * d  # keys have no bias
    layer = attentions * attention + dense(d, 4 * d) + dense(4 * d, d) + 2 * d
    return tokens * d + layers * layer + 2 * d


def test_explain_agrees_with_a_count_by_hand(monkeypatch):
    d, slots, length, items = 8, 4, 10, 9 * 2 * 3 + 4
    counts = {
        "items": items * d,
        "encoder": transformer(d, length, 1),
        "slots": slots * d,
        "Eq. 1": 2 * d * d + 2 * d,
        "Eq. 2": 2 * d * 3 * d + 4 * d,
        "reader": 2 * d * d + 2 * d + dense(2 * d, d),
        "head": dense(2 * d, 1),
        "decoder": transformer(d, 1 + length, 2),
        "tokens": 2 * d,
        "familiar": dense(d, 1),
    }
    # Eight CPU devices stand for accelerators, which hold all rows.
    monkeypatch.setattr(stages, "microbatch", None)
    costs = explain.report(tiny())
    assert costs["parameters"] == sum(counts.values())
    assert costs["memory_bytes_per_stream"] == 4 * slots * d + 4
    assert costs["flops_per_step"] > costs["matmul_flops_per_step"] > 0
    assert costs["peak_bytes_per_device"] > 3 * 4 * costs["parameters"]  # with Adam's two moments
    assert costs["compile_seconds"] > 0 and (costs["devices"], costs["batch_size"]) == (1, 8)


def test_work_grows_linearly_with_the_stream_and_the_memory_does_not_grow():
    costs = []
    for clicks in (100, 200, 300):
        stream = {"data.simulated.clicks_min": clicks, "data.simulated.clicks_max": clicks}
        config = tiny(**stream, **{"machine.block": 2})  # a loop over blocks has its body once
        run, task, state, frozen, batch = shapes(config)
        assert batch.items.shape == (8, clicks // 10, 10)
        costs.append(explain.step_costs(run, stages.model_stage(run), state, frozen, batch))
    for name in ("memory_bytes_per_stream", "parameters"):
        assert len({cost[name] for cost in costs}) == 1
    for name in ("flops_per_step", "matmul_flops_per_step"):
        one, two, three = (cost[name] for cost in costs)
        assert three - two == pytest.approx(two - one, rel=0.01) and two > 1.5 * one


# ---- a config change gives every row of RM's Tables 5 and 6, and every sweep

REHEARSED = {"reason", "recollection", "familiarity"}
VARIANTS = {  # name -> changes, loss terms
    "as printed": ({}, REHEARSED),
    "without rehearsal": (
        {"rehearsal.recollection": 0.0, "rehearsal.familiarity": 0.0},
        {"reason"},
    ),
    "only recollection": ({"rehearsal.familiarity": 0.0}, {"reason", "recollection"}),
    "only familiarity": ({"rehearsal.recollection": 0.0}, {"reason", "familiarity"}),
    "random fragments": ({"rehearsal.sampler": "uniform"}, REHEARSED),
    "bigru encoder": ({"machine.encoder": "bigru"}, REHEARSED),
    "mask ratio .15": ({"rehearsal.mask_ratio": 0.15}, REHEARSED),
    "mask all": ({"rehearsal.mask_ratio": 1.0}, REHEARSED),
    "replace all": ({"rehearsal.replace_ratio": 1.0}, REHEARSED),
    "3 slots": ({"machine.slots": 3}, REHEARSED),
    "5 slots": ({"machine.slots": 5}, REHEARSED),
    "1 fragment": ({"rehearsal.fragments": 1}, REHEARSED),
    "more fragments than segments": ({"rehearsal.fragments": 7}, REHEARSED),
    "segments of 5": ({"data.segment_length": 5}, REHEARSED),
    "segments of 8": ({"data.segment_length": 8}, REHEARSED),
    "3 layers": ({"machine.layers": 3, "rehearsal.layers": 2}, REHEARSED),
    "gru": ({"machine.kind": "gru"}, REHEARSED),
    "gru alone": (PLAIN | {"machine.history_sum": False}, {"reason"}),
    "buffer": ({"machine.kind": "buffer"}, REHEARSED),
    "buffer of the latest 20": (
        PLAIN | {"machine.kind": "buffer", "machine.buffer_length": 20},
        {"reason"},
    ),
    "buffer of the mean": (PLAIN | {"machine.kind": "buffer", "machine.recent": 0}, {"reason"}),
    "buffer of the latest": (
        PLAIN | {"machine.kind": "buffer", "machine.pooled": False, "machine.before": 2},
        {"reason"},
    ),
    "blocks of 2, computed again": ({"machine.block": 2, "machine.remat": True}, REHEARSED),
    "bfloat16": ({"train.compute_dtype": "bfloat16"}, REHEARSED),
    "fused scan": ({"machine.fused": "on"}, REHEARSED),
    "2 hops": ({"reason.hops": 2}, REHEARSED),
    "mlp head": ({"reason.head": "mlp"}, REHEARSED),
    "normalised over items": ({"machine.normalize": "items"}, REHEARSED),
    "dropout": ({"machine.dropout": 0.1}, REHEARSED),
    "against all items": ({"rehearsal.sampled_items": 0}, REHEARSED),
}
MIXED = {
    "machine.dropout": 0.1,
    "train.compute_dtype": "bfloat16",
    "machine.block": 3,
    "machine.remat": True,
}
STEPPED = {
    "segments of 8": PLAIN | {"data.segment_length": 8},
    "buffer": PLAIN | {"machine.kind": "buffer", "machine.buffer_length": 20},
    "dropout in bfloat16, in blocks": MIXED,
}


@functools.cache
def source_of(settings: str):
    return make_source(tiny().data, 0) if settings == tiny().data.simulated.to_json() else None


def shapes(config):
    """Returns run, task, shapes of state and frozen, and the first batch."""
    source = source_of(config.data.simulated.to_json()) or make_source(config.data, 0)
    run = stages.Run(config, Path(), source, Preemption())
    stage, teacher = stages.model_stage(run), tasks.make_teacher(config, source)
    optimizer = stages.stage_optimizer(run, stage)
    state = jax.eval_shape(lambda: init_state(stage.task, optimizer, jax.random.key(0)))
    frozen = () if teacher is None else jax.eval_shape(teacher.init, jax.random.key(0))["sampler"]
    data = stages.batches(
        source, **stages.data_settings(run), batch_size=stage.batch_size, num_steps=1
    )
    with contextlib.closing(data):
        return run, stage.task, state, frozen, next(data)


@functools.cache
def traced(name: str):
    """Returns the train step as text; shapes of the state before and after, and of the metrics."""
    run, task, state, frozen, batch = shapes(tiny(**VARIANTS[name][0]))
    step = make_train_step(task, stages.stage_optimizer(run, stages.model_stage(run)), 0)
    program, (after, _, metrics) = jax.make_jaxpr(step, return_shape=True)(state, (), frozen, batch)
    assert jax.eval_shape(task.scores, state.params, batch).shape == batch.query.shape
    return re.sub("0x[0-9a-f]+", "", str(program)), state, after, metrics


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_builds(name):
    _, before, after, metrics = traced(name)
    terms = VARIANTS[name][1]
    assert metrics.keys() == terms | {"loss", "grad_norm"}
    assert ("rehearsal" in before.params) == (terms != {"reason"})
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert {leaf.dtype for leaf in jax.tree.leaves(before.params)} == {np.dtype("float32")}


def test_all_variants_are_different_programs():
    """Every change of config has an effect."""
    programs = {traced(name)[0]: name for name in VARIANTS}
    assert sorted(programs.values()) == sorted(VARIANTS)


@pytest.mark.parametrize("name", STEPPED)
def test_a_step_of_a_variant_is_finite(name):
    run, task, *_ = shapes(tiny(**STEPPED[name]))
    stage, _, state, frozen, batch = stages.first_step(run)
    state = state.replace(params=noise(task.init))  # noise gives everything a gradient
    step = jax.jit(make_train_step(task, stages.stage_optimizer(run, stage), 0))
    after, _, metrics = step(state, (), frozen, batch)
    chex.assert_tree_all_finite((after, metrics))
    assert metrics["grad_norm"] > 0
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, state.params)
    assert all(jax.tree.leaves(moved)), moved


def test_losses_in_bfloat16_fall_as_those_in_float32_do():
    losses = {}
    for name in ("float32", "bfloat16"):
        run, *_ = shapes(tiny(**{"train.compute_dtype": name}))
        stage, _, state, frozen, batch = stages.first_step(run)
        step = jax.jit(make_train_step(stage.task, stages.stage_optimizer(run, stage), 0))
        seen = []
        for _ in range(4):
            state, _, metrics = step(state, (), frozen, batch)
            seen.append(float(metrics["loss"]))
        losses[name] = np.array(seen)
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)
    assert (losses["bfloat16"] != losses["float32"]).all()  # the format is used
    assert losses["bfloat16"][-1] < losses["bfloat16"][0]


@pytest.mark.parametrize(
    "name, precision",
    [("float32", "HIGHEST"), ("tensorfloat32", "HIGH"), ("bfloat16", "HIGH")],
)
def test_a_gpu_multiplies_as_the_config_says(monkeypatch, name, precision):
    x, plain = np.ones((2, 2), np.float32), lambda x: jax.numpy.matmul(x, x)
    assert stages.in_precision(plain, name) is plain  # a CPU has float32 alone
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    program = jax.make_jaxpr(stages.in_precision(plain, name))(x)
    assert program.eqns[-1].params["precision"] == (jax.lax.Precision[precision],) * 2
