"""The memory gain is zero where the memory is ignored, and large where it is needed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmjax import machines, tasks
from rmjax.data.source import Questions
from rmjax.evaluation import scoring
from rmjax.layers.transformer import Transformer
from rmjax.rehearsal.decoder import Decoder
from rmjax.run import evaluate, training
from rmjax.tasks.answers import Answers
from rmjax.tasks.reasoning import Reasoning
from rmjax.tasks.rehearsing import Rehearsal
from rmjax.types import Batch
from tests.runs import lines, tiny

FEW = {
    "train.steps": 4,
    "train.eval_every": 2,
    "rehearsal.sampler": "uniform",
    "machine.kind": "gru",
}


def test_a_memory_that_is_never_written_gains_nothing(tmp_path, monkeypatch, caplog):
    make = tasks.make_machine

    def ignored(config, source):
        machine = make(config, source)
        nothing = (jnp.zeros(()), jnp.zeros(()))
        write = lambda params, memory, features, mask, key=None: (memory, nothing)
        return machine._replace(write=write)

    monkeypatch.setattr(tasks, "make_machine", ignored)
    rows = training.train(tiny(**FEW | {"train.eval_every": 1, "train.steps": 5}), tmp_path)
    valid = [line for line in lines(tmp_path) if line["kind"] == "valid"]
    for line in (*valid, rows[0]):
        names = "memory_gain_recollection", "memory_gain_familiarity", "memory_spread"
        assert all(line[name] == 0 for name in names)
    # The warning comes after half of the steps and at the end, not at every evaluation.
    assert len(valid) == 5 and caplog.text.count("Rehearsal does not use the memory") == 2


@pytest.mark.parametrize(
    "changes, cure",
    [
        ({}, "Mask more (config.rehearsal.mask_ratio). Compare with harder items"),
        ({"rehearsal.mask_ratio": 1.0}, "or more). Compare with harder items"),
        ({"rehearsal.negatives": "partner"}, "or more). Mask more"),
        ({"rehearsal.mask_ratio": 1.0, "rehearsal.negatives": "partner"}, "Train longer, or"),
    ],
)
def test_the_warning_names_settings_that_can_still_change(changes, cure, caplog):
    evaluate.warn_of_gain(SimpleNamespace(config=tiny(**changes)), 0.01)
    assert cure in caplog.text


def test_a_run_without_rehearsal_has_no_gain(tmp_path):
    off = {"rehearsal.recollection": 0.0, "rehearsal.familiarity": 0.0}
    rows = training.train(tiny(**FEW | off), tmp_path)
    assert not any("memory" in name for line in lines(tmp_path) for name in line)
    assert not any("gain" in name for name in rows[0])


ITEMS, T, N, B = 64, 2, 5, 32


def random_streams(seed: int) -> Batch:
    """Streams of ten distinct items; without a memory nobody can know which."""
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(ITEMS)[: T * N] for _ in range(B)])
    items = items.reshape(B, T, N).astype(np.int32)
    return Batch(
        items=items,
        item_mask=np.ones(items.shape, bool),
        query=items[:, 0, :2],
        query_mask=np.ones((B, 2), bool),
        target=np.ones((B, 2), np.int32),
        negative_items=rng.integers(0, ITEMS, (B, 8)).astype(np.int32),
        negative_mask=np.ones((B, 8), bool),
        example_id=np.arange(B, dtype=np.int32),
    )


@pytest.fixture(scope="module")
def stores_everything():
    """The task and parameters of a buffer of all items, trained on fully masked fragments."""
    decoder = Decoder(Transformer(1, 2, 0.0))
    rehearsal = Rehearsal(
        decoder, fragments=2, mask_ratio=1.0, sampled_items=0, familiarity=0.0, sampler="uniform"
    )
    n = T * N
    machine = machines.make("buffer", ITEMS, dim=32, buffer_length=n, recent=n, pooled=False)
    task = Reasoning(machine, Answers(Questions(), 32, 32), rehearsal, N, reason=0.0)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, batch, key):
        def loss(params):
            weight, (total, count) = task.losses(params, (), (), batch, key)[0]["recollection"]
            return weight * total / count

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = task.init(jax.random.key(0))
    state = optimizer.init(params)
    for number in range(400):
        params, state = step(params, state, random_streams(number), jax.random.key(number))
    return task, params


def test_a_memory_of_everything_gains_much(stores_everything):
    task, params = stores_everything
    sums = jax.jit(task.rehearsals)(params, random_streams(1000), random_streams(1001))
    gain = scoring.memory_gain(sums)
    assert gain["memory_gain_recollection"] > 1 and gain["memory_spread"] > 0
    own, _, count = np.asarray(sums["recollection"]).sum(0)
    assert count == 2 * B and own / count < np.log(ITEMS) - 1  # log(T N) at best


def test_rows_are_independent_and_padding_counts_for_nothing(stores_everything):
    task, params = stores_everything
    both = dataclasses.replace(task.rehearsal, familiarity=0.5, mask_ratio=0.5)
    task = dataclasses.replace(task, rehearsal=both)
    own, other = random_streams(1), random_streams(2)
    together = jax.jit(task.rehearsals)(params, own, other)
    empty = other.replace(item_mask=other.item_mask & (np.arange(B) != 3)[:, None, None])
    apart = jax.jit(task.rehearsals)(params, own, empty)
    for name, sums in together.items():
        np.testing.assert_allclose(np.delete(apart[name], 3, 0), np.delete(sums, 3, 0), rtol=1e-5)
        assert not apart[name][3].any() and sums[3].all()
