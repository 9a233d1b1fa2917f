"""Tests of AUC by counting pairs, of metric files after a kill, and of rates without pauses."""

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from rmjax import config as configs
from rmjax.evaluation.metrics import auc, bootstrap, macro_f1
from rmjax.run.reporting import Progress, open_loggers, table


def count_pairs(scores, labels):
    won = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return sum(won) / len(won) if won else math.nan


entries = st.lists(
    st.tuples(
        st.sampled_from([-math.inf, -1.0, 0.0, 1e-30, 0.5, 2.0, math.inf]),
        st.integers(0, 1),
        st.booleans(),
    )
)


@settings(max_examples=200, deadline=None)
@given(entries)
def test_auc_counts_pairs(rows):
    scores, labels, mask = (
        (np.array(c) for c in zip(*rows, strict=True)) if rows else (np.zeros(0),) * 3
    )
    mask = mask.astype(bool)
    np.testing.assert_equal(auc(scores, labels), count_pairs(scores, labels))
    np.testing.assert_equal(auc(scores, labels, mask), count_pairs(scores[mask], labels[mask]))


def test_auc_keeps_neighbouring_floats_apart():
    scores = np.float32([1.0, np.nextafter(np.float32(1), np.float32(2))])
    assert auc(scores, [0, 1]) == 1.0
    assert auc(-scores, [0, 1]) == 0.0


def test_auc_takes_any_shape_and_ignores_masked_entries():
    scores = np.array([[0.1, np.nan], [0.9, 0.2]])
    mask = np.array([[True, False], [True, True]])
    assert auc(scores, [[0, 1], [1, 0]], mask) == 1.0
    assert math.isnan(auc(scores, [[0, 1], [1, 0]]))


def test_auc_of_one_class_is_nan():
    assert math.isnan(auc([0.1, 0.2], [1, 1])) and math.isnan(auc([], []))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_macro_f1_is_the_mean_of_harmonic_means_of_precision_and_recall(pairs):
    scores = []
    for c in range(3):
        right = sum(chosen == target == c for chosen, target in pairs)
        precision = right / max(1, sum(chosen == c for chosen, _ in pairs))
        recall = right / max(1, sum(target == c for _, target in pairs))
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    chosen, target = np.array(pairs).T
    assert macro_f1(chosen, target, 3) == pytest.approx(sum(scores) / 3)


def test_bootstrap_draws_users_not_entries():
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(40), 6)
    labels = np.tile([0, 1], 120)
    scores = rng.normal(size=240).round(1) + 0.8 * labels + np.repeat(rng.normal(size=40), 6)
    low, high = bootstrap(scores, labels, users, resamples=50, level=0.9, seed=3)
    draws = np.random.default_rng(3)
    areas = []
    for _ in range(50):
        rows = np.concatenate([np.flatnonzero(users == u) for u in draws.integers(40, size=40)])
        areas.append(count_pairs(scores[rows], labels[rows]))
    np.testing.assert_allclose([low, high], np.quantile(areas, [0.05, 0.95]), rtol=1e-12)
    assert low < auc(scores, labels) < high
    assert (low, high) == bootstrap(scores, labels, users, resamples=50, level=0.9, seed=3)
    names = np.array([f"user {u}" for u in range(40)])[users]
    assert bootstrap(scores, labels, names, seed=3)[0] > 0


def test_bootstrap_intervals_cover_the_truth_at_their_level():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(100):
        scores = rng.normal(size=200) + np.tile([0, 1], 100)
        low, high = bootstrap(
            scores, np.tile([0, 1], 100), np.repeat(np.arange(100), 2), resamples=200, seed=trial
        )
        covered += low <= 0.7602499 <= high  # P(N(1, 2) > 0)
    assert 88 <= covered <= 100


def test_bootstrap_of_one_class_is_nan():
    assert np.isnan(bootstrap([0.1, 0.2], [1, 1], [0, 1])).all()


def opened(workdir, start=0, stage="train"):
    return open_loggers(configs.base(), workdir, stage, start)


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_lines_are_json_at_full_precision(tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    writer = opened(tmp_path)
    loss = np.float32(0.1)
    writer.write(
        "train", 3, {"loss": loss, "bad": math.nan, "worse": -math.inf, "count": 7, "third": 1 / 3}
    )
    writer.write("eval", 3, {"auc": np.array(0.75)}, text="given text")
    train, evaluation = lines(tmp_path)
    writer.close()
    numbers = {"loss": float(loss), "bad": "nan", "worse": "-inf", "count": 7, "third": 1 / 3}
    assert train == {"stage": "train", "kind": "train", "step": 3} | numbers
    assert evaluation == {"stage": "train", "kind": "eval", "step": 3, "auc": 0.75}
    messages = [r.getMessage() for r in caplog.records if r.name == "absl"]
    assert messages == [
        "train step 3 | loss 0.1 bad nan worse -inf count 7 third 0.3333",
        "given text",
    ]


def write_steps(workdir, start, stop, stage="train"):
    writer = opened(workdir, start, stage)
    for step in range(start + 1, stop + 1):
        writer.write("train", step, {"loss": step / 2})
    writer.close()


@pytest.mark.parametrize(
    "half", ['{"stage": "train", "kind": "tr', '{"stage": "train", "kind": "eval", "step": 3}']
)
def test_a_restored_run_writes_the_same_file_as_one_without_a_stop(tmp_path, half):
    for folder, stops in (("once", [9]), ("killed", [6, 8, 9])):
        write_steps(tmp_path / folder, 0, 5, "teacher")
        restored = 0
        for stop in stops:
            write_steps(tmp_path / folder, restored, stop)
            if stop != 9:
                with (tmp_path / folder / "metrics.jsonl").open("a") as file:
                    file.write(half)
            restored = 4
    assert [entry["step"] for entry in lines(tmp_path / "once")] == [*range(1, 6), *range(1, 10)]
    assert lines(tmp_path / "killed") == lines(tmp_path / "once")


def test_starting_over_removes_step_0_too(tmp_path):
    for _ in range(2):
        writer = opened(tmp_path)
        writer.write("eval", 0, {"auc": 0.5})
        writer.close()
    assert len(lines(tmp_path)) == 1


def events(folder):
    for file in sorted(folder.iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            yield Event.FromString(data[place + 12 : place + 12 + size])
            place += size + 16


def test_tensorboard_drops_later_steps(tmp_path):
    write_steps(tmp_path, 0, 6)
    write_steps(tmp_path, 4, 5)
    seen = list(events(tmp_path / "tensorboard" / "train"))
    assert [e.step for e in seen if e.session_log.status == 1][-1] == 5
    scalars = [
        (e.step, e.summary.value[0].tag, e.summary.value[0].simple_value)
        for e in seen
        if e.summary.value
    ]
    assert (5, "train/loss", 2.5) in scalars and len(scalars) == 7


class Clock:
    time = 100.0

    def __call__(self):
        return self.time


def test_rates_leave_out_compilation_and_pauses():
    clock = Clock()
    progress = Progress(2000, 18, clock)
    clock.time += 50  # compilation
    progress.tick(31, 496)
    assert all(math.isnan(rate) for rate in progress.rates().values())
    assert progress.line(1.0, {}).endswith("ETA ?")
    for step in range(101):
        clock.time += 0.1
        progress.tick(31, 496)
        if step % 10 == 0:
            with progress.pause():
                clock.time += 30
    rates = progress.rates()
    assert rates == pytest.approx(
        {"steps_per_second": 10, "streams_per_second": 310, "queries_per_second": 4960}
    )
    terms = {"recollection": 4.1, "familiarity": 0.69, "reason": np.float32(0.65)}
    assert progress.line(1.234, terms) == (
        "step 120/2000 6.0% | 310 streams/s 4960 queries/s"
        " | loss 1.234 (recollection 4.1 familiarity 0.69 reason 0.65) | ETA 3m08s"
    )


def test_rates_are_since_the_last_line_and_the_eta_is_over_all_steps():
    clock = Clock()
    progress = Progress(4, 0, clock)
    for seconds in (9, 1):
        clock.time += seconds
        progress.tick(10, 10)
    progress.line(0.0, {})
    clock.time += 3
    progress.tick(30, 60)
    assert list(progress.rates().values()) == pytest.approx([1 / 3, 10, 20])
    assert progress.line(0.0, {}).endswith("ETA 2s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (100, "1m40s"), (7500, "2h05m"), (273600, "3d04h")],
)
def test_eta_in_words(seconds, text):
    clock = Clock()
    progress = Progress(3, 0, clock)
    progress.tick(1, 1)
    clock.time += seconds
    progress.tick(1, 1)
    assert progress.line(0.0, {}).endswith(f"ETA {text}")


def test_table_is_aligned():
    rows = [
        {"memory": "rehearsal", "auc": 0.87654, "bytes": 12345},
        {"memory": "gru", "auc": 0.5, "note": "slow"},
    ]
    assert table(rows) == (
        "memory        auc  bytes  note\n"
        "---------  ------  -----  ----\n"
        "rehearsal  0.8765  12345  -\n"
        "gru           0.5      -  slow"
    )


def test_a_full_disk_is_named(tmp_path):
    writer = opened(tmp_path)
    cause = r"metrics.jsonl: \d+ bytes could not be written \(no space is left\)"
    refused = pytest.raises(OSError, match=f"{cause}: free space .* the same line goes on")
    with Path("/dev/full").open("ab", buffering=0) as writer.loggers[0]._file, refused:
        writer.write("train", 1, {"loss": 0.5})
    writer.close()


def test_a_partly_written_line_is_reported_as_a_full_disk(tmp_path):
    class Nearly:
        write, close = staticmethod(lambda data: len(data) - 1), staticmethod(lambda: None)

    writer = opened(tmp_path)
    writer.loggers[0]._file = Nearly()
    with pytest.raises(OSError, match="no space is left"):
        writer.write("train", 1, {"loss": 0.5})
    writer.close()


def test_a_full_disk_is_named_where_tensorboard_meets_it(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = opened(tmp_path, stage="model")
    monkeypatch.setattr(writer.loggers[1]._board, "flush", full)
    with pytest.raises(OSError, match="tensorboard/model: .*no space is left"):
        writer.write("train", 1, {"loss": 0.5})
    writer.close()


def test_a_wide_table_continues_below_with_its_first_column():
    rows = [{"memory": name} | {f"column {i}": i / 7 for i in range(12)} for name in ("a", "b")]
    shown = table(rows, width=60)
    assert all(len(line) <= 60 for line in shown.splitlines())
    blocks = shown.split("\n\n")
    assert len(blocks) > 1 and all(block.splitlines()[2].startswith("a") for block in blocks)
    assert shown.split().count("0.1429") == 2  # every value stands once
