"""Two rules for the weight of the rehearsal: a limit of its gradient, and a share for labels."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.run import training
from rmjax.run.mapping import make_mapped
from rmjax.run.step import TrainState
from tests.run.test_devices import gradients
from tests.run.test_train import stopped
from tests.runs import lines, saved, tiny
from tests.small import batch, noise, recommendation, rehearsal, small

ROWS = 8
FEW = {
    "train.steps": 4,
    "train.eval_every": 2,
    "train.save_every": 2,
    "machine.kind": "gru",
    "rehearsal.sampler": "uniform",
}


def build(reason: float = 1.0, **how):
    """A task whose memory is cheap to compile, and whose rehearsal outweighs its answers."""
    options = rehearsal(**{"sampler": "uniform", "recollection": 5.0, "dropout": 0.0} | how)
    return recommendation(small("gru").machine, options, reason=reason)


@functools.cache
def first_step(mapping: str = "pmap", devices: int = 1, microbatch: int = 0, sparse=False, **how):
    """The gradient and the metrics of the first step."""
    task = build(**how)
    state = TrainState(jnp.zeros((), jnp.int32), noise(build().init), gradients().init(1.0))
    state = state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.params))
    pieces = (lambda rows, items: microbatch) if microbatch else None
    settings = dict(mapping=mapping, devices=devices, microbatch=pieces, sparse_items=sparse)
    mapped = make_mapped(task, gradients(), 0, **settings)
    after, _, metrics = mapped.train_step(mapped.put(state), (), (), batch(batch=ROWS))
    return jax.device_get((mapped.get(after.opt_state), mapped.get(metrics)))


def norm(grads) -> float:
    """The norm over the arrays of the machine that answers and rehearsal train."""
    return float(np.sqrt(sum(np.square(np.float64(x)).sum() for x in shared(grads))))


def shared(grads) -> list[np.ndarray]:
    """The arrays that both gradients reach."""
    both = (first_step(recollection=0.0, familiarity=0.0)[0], first_step(reason=0.0)[0])
    leaves = zip(*map(jax.tree.leaves, (*both, grads)), strict=True)
    return [x for a, b, x in leaves if np.any(a) and np.any(b)]


def test_without_a_limit_the_gradient_is_that_of_the_sum():
    plain = first_step()
    chex.assert_trees_all_equal(first_step(balance=float("inf")), plain)
    assert build().limit is None and "rehearsal_ratio" not in plain[1]
    loose, metrics = first_step(balance=1e6)
    chex.assert_trees_all_close(loose, plain[0], rtol=1e-5, atol=1e-7)
    assert metrics["loss"] == pytest.approx(plain[1]["loss"], rel=1e-6)


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_the_rehearsal_is_scaled_to_the_ratio(ratio):
    """The gradient is that of the answers plus the rehearsal's, which is as long as allowed."""
    answers, rehearsed = first_step(recollection=0.0, familiarity=0.0)[0], first_step(reason=0.0)[0]
    before = norm(rehearsed) / norm(answers)
    got, metrics = first_step(balance=ratio)
    assert before > 1.5 and metrics["rehearsal_ratio"] == pytest.approx(before, rel=1e-4)
    rest = jax.tree.map(np.subtract, got, answers)
    assert norm(rest) == pytest.approx(ratio * norm(answers), rel=1e-4)
    expected = jax.tree.map(lambda x: x * ratio / before, rehearsed)
    chex.assert_trees_all_close(shared(rest), shared(expected), rtol=1e-3, atol=1e-6)
    # What the rehearsal trains alone keeps its gradient, which no answer competes with.
    chex.assert_trees_all_close(got["rehearsal"], rehearsed["rehearsal"], rtol=1e-4, atol=1e-6)


BOTH = {"balance": 0.25, "labels": 1.5}


@pytest.mark.parametrize("layout", [("pmap", 4, 1, False), ("mesh", 8, 0, True)])
def test_both_rules_are_the_same_on_devices_in_pieces_and_in_sparse_steps(layout):
    """The limit and the share are those of the batch, not those of a device or of a piece."""
    got, expected = first_step(*layout, **BOTH), first_step(**BOTH)
    assert expected[1]["rehearsal_ratio"] > 0.5
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "how", [{"labels": 0.5}, {"labels": 100.0}, {"labels": 0.5, "schedule": lambda step: 0.25}]
)
def test_weights_fall_with_the_questions_of_a_stream(how):
    asked = np.asarray(batch(batch=ROWS).query_mask).sum() / ROWS
    factor = min(1.0, how["labels"] / asked) * (0.25 if "schedule" in how else 1.0)
    task = build(**how)
    counts = {"streams": jnp.float32(ROWS), "reason": jnp.float32(asked * ROWS)}
    for name, weight in (("recollection", 5.0), ("familiarity", 0.5)):
        assert float(task.rehearsal.weight(name)(0, counts)) == pytest.approx(weight * factor)


def test_the_loss_has_the_weights_of_the_batch():
    asked = np.asarray(batch(batch=ROWS).query_mask).sum() / ROWS
    metrics = first_step(**BOTH)[1]
    rehearsed = 5.0 * metrics["recollection"] + 0.5 * metrics["familiarity"]
    expected = metrics["reason"] + 1.5 / asked * rehearsed
    assert asked > 1.5 and metrics["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_limited_run_that_stops_continues_as_if_it_had_not(tmp_path):
    config = tiny(**FEW, **{"rehearsal.balance": 0.1})
    training.train(config, tmp_path / "one")
    stopped(config, tmp_path / "two", "model step 3")
    training.train(config, tmp_path / "two")
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    chex.assert_trees_all_equal(saved(tmp_path / "two", "model"), saved(tmp_path / "one", "model"))
    steps = [line for line in lines(tmp_path / "one") if line["kind"] == "train"]
    assert len(steps) == 4 and all(line["rehearsal_ratio"] > 0 for line in steps)
