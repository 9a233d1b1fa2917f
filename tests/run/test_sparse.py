"""A sparse step is the ordinary step on the rows that its batch touches; other rows wait."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmjax.data.source import Questions
from rmjax.machines import make
from rmjax.run import sparse
from rmjax.run.optimizer import make_optimizer
from rmjax.run.step import init_state, make_train_step
from rmjax.tasks.answers import Answers
from rmjax.types import Task
from tests.small import DIM, ITEMS, SLOTS, batch, noise, recommendation, rehearsal, teacher

SENTENCES = Questions(query="words", answer="choice")


def task():
    return recommendation(make("rehearsal", ITEMS, **SLOTS), rehearsal(fragments=2))


def sentences():
    """A batch whose candidates and questions use the words of the stream."""
    data, rng = batch(), np.random.default_rng(1)
    words = lambda *shape: jnp.asarray(rng.integers(0, ITEMS, shape), jnp.int32)
    asked = dict(word_mask=jnp.ones((4, 2, 3), bool), candidates=words(4, 5, 3))
    chosen = dict(choices=words(4, 2, 4) % 5, choice_mask=jnp.ones((4, 2, 4), bool))
    mask = jnp.ones((4, 5, 3), bool)
    return data.replace(query=words(4, 2, 3), candidate_mask=mask, **asked, **chosen)


@functools.cache
def step(sparse_items: bool):
    return jax.jit(make_train_step(task(), make_optimizer(1e-2, 1.0), 0, sparse_items=sparse_items))


def run(data, steps: int = 1, sparse_items: bool = False):
    init = jax.jit(lambda key: init_state(task(), make_optimizer(1e-2, 1.0), key))
    state = init(jax.random.key(0))
    for _ in range(steps):
        state, _, metrics = step(sparse_items)(state, (), teacher()[1]["sampler"], data)
    return state, metrics


def test_touched_ids_rise_without_repetition_and_end_with_numbers_of_no_row():
    ids = sparse.touched(jnp.array([5, 2, -1, 99, 5, 7]), 10)
    np.testing.assert_array_equal(ids, [0, 2, 5, 7, 9, 15])
    np.testing.assert_array_equal(sparse.touched(jnp.array([3, 3, 0, 1, 1, 2, 3]), 4), [0, 1, 2, 3])


@pytest.mark.parametrize("kind", ["clicks", "sentences", "all items", "teacher"])
def test_a_loss_reads_only_rows_among_its_item_ids(kind):
    """Every row of the table whose gradient is not zero is among the ids."""
    data, trained, frozen = batch(), task(), teacher()[1]["sampler"]
    if kind == "sentences":
        answers = Answers(SENTENCES, DIM, DIM, DIM)
        data, trained = sentences(), dataclasses.replace(task(), answers=answers)
        sampler = teacher()[0].init
        frozen = noise(
            lambda key: {"sampler": sampler(key)["sampler"], "e": answers.init_encoder(key)}
        )
        frozen = frozen["sampler"] | {"encoder": frozen["e"]}
    elif kind == "teacher":
        trained, frozen = teacher()[0], ()
    elif kind == "all items":
        data = data.replace(items=data.items % 3)  # many items are read only as a sample
    params, key = noise(trained.init), jax.random.key(3)

    def loss(params):
        terms, _ = trained.losses(params, frozen, (), data, key)
        return sum(total for _, (total, _) in terms.values())

    grads = jax.jit(jax.grad(loss))(params)
    table = functools.reduce(lambda tree, name: tree[name], trained.table, grads)
    ids = jax.jit(trained.item_ids, static_argnums=2)(data, key, ITEMS)
    touched = np.unique(np.clip(ids, 0, ITEMS - 1))
    moved = np.flatnonzero(np.abs(np.asarray(table)).max(1))
    assert set(moved) <= set(touched) and len(moved) > len(touched) / 3


def test_it_is_the_ordinary_step_if_every_item_is_touched():
    data = batch(batch=8)
    every = jnp.arange(data.items.size, dtype=jnp.int32).reshape(data.items.shape) % ITEMS
    data = data.replace(items=every)
    got, got_metrics = run(data, steps=4, sparse_items=True)
    expected, metrics = run(data, steps=4, sparse_items=False)
    chex.assert_trees_all_close(got_metrics, metrics, rtol=1e-5)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_untouched_rows_wait_and_the_others_move_as_in_the_ordinary_step():
    """With moments of zero, the first step is the ordinary one on all rows."""
    data = batch(batch=8)
    data = data.replace(items=data.items % 20)
    first, first_metrics = run(data, sparse_items=True)
    ordinary = run(data, sparse_items=False)
    chex.assert_trees_all_close((first, first_metrics), ordinary, rtol=1e-5, atol=1e-6)

    other = data.replace(items=20 + data.items % 10, query=20 + data.query % 10)
    second, _, _ = step(sparse_items=True)(first, (), teacher()[1]["sampler"], other)
    key = jax.random.fold_in(jax.random.key(0), 1)
    ids = jax.jit(task().item_ids, static_argnums=2)(other, key, ITEMS)
    waits = np.setdiff1d(np.arange(ITEMS), ids)
    assert 5 < len(waits) < ITEMS - 10
    for before, after in zip(tables(first), tables(second), strict=True):
        np.testing.assert_array_equal(before[waits], after[waits])
        assert np.abs(before - after).max() > 0


def tables(state) -> list[np.ndarray]:
    """The item table and its two moments."""
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    tables = [np.asarray(leaf) for path, leaf in leaves if sparse.ends(path, ("machine", "embed"))]
    assert len(tables) == 3
    return tables


def test_a_task_without_items_is_refused():
    class Terms(Task):
        def init(self, key):
            return {}

        losses = scores = init

    with pytest.raises(ValueError, match="Terms has no item table"):
        make_train_step(Terms(), optax.sgd(1.0), 0, sparse_items=True)
