"""Steps that touch only a batch's rows of the item table: on those they are the ordinary step, the others wait."""

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
    """Candidates and questions in the words of the stream."""
    data, rng = batch(), np.random.default_rng(1)
    words = lambda *shape: jnp.asarray(rng.integers(0, ITEMS, shape), jnp.int32)
    asked = dict(word_mask=jnp.ones((4, 2, 3), bool), candidates=words(4, 5, 3))
    chosen = dict(choices=words(4, 2, 4) % 5, choice_mask=jnp.ones((4, 2, 4), bool))
    return data.replace(
        query=words(4, 2, 3), candidate_mask=jnp.ones((4, 5, 3), bool), **asked, **chosen
    )


@functools.cache
def step(sparse_items: bool):
    return jax.jit(make_train_step(task(), make_optimizer(1e-2, 1.0), 0, sparse_items=sparse_items))


def run(data, steps: int = 1, sparse_items: bool = False):
    state = jax.jit(lambda key: init_state(task(), make_optimizer(1e-2, 1.0), key))(
        jax.random.key(0)
    )
    for _ in range(steps):
        state, _, metrics = step(sparse_items)(state, (), teacher()[1]["sampler"], data)
    return state, metrics


def test_the_touched_rows_are_each_once_in_order_and_then_rows_of_nothing():
    found = sparse.touched(jnp.array([5, 2, -1, 99, 5, 7]), 10)
    np.testing.assert_array_equal(found, [0, 2, 5, 7, 9, 15])
    np.testing.assert_array_equal(sparse.touched(jnp.array([3, 3, 0, 1, 1, 2, 3]), 4), [0, 1, 2, 3])


@pytest.mark.parametrize("kind", ["clicks", "sentences", "all items", "teacher"])
def test_a_loss_looks_at_no_other_rows_than_it_says(kind):
    """What the table's gradient is not zero for, is among the ids."""
    data, its, frozen = batch(), task(), teacher()[1]["sampler"]
    if kind == "sentences":
        answers = Answers(SENTENCES, DIM, DIM, DIM)
        data, its = sentences(), dataclasses.replace(task(), answers=answers)
        frozen = noise(
            lambda key: {
                "sampler": teacher()[0].init(key)["sampler"],
                "e": answers.init_encoder(key),
            }
        )
        frozen = frozen["sampler"] | {"encoder": frozen["e"]}
    elif kind == "teacher":
        its, frozen = teacher()[0], ()
    elif kind == "all items":
        data = data.replace(items=data.items % 3)  # of many items nothing but a sample is read
    params, key = noise(its.init), jax.random.key(3)

    def loss(params):
        return sum(total for _, (total, _) in its.losses(params, frozen, (), data, key)[0].values())

    grads = jax.jit(jax.grad(loss))(params)
    table = functools.reduce(lambda tree, name: tree[name], its.table, grads)
    touched = np.unique(
        np.clip(jax.jit(its.item_ids, static_argnums=2)(data, key, ITEMS), 0, ITEMS - 1)
    )
    moved = np.flatnonzero(np.abs(np.asarray(table)).max(1))
    assert set(moved) <= set(touched) and len(moved) > len(touched) / 3


def test_it_is_the_ordinary_step_where_every_item_is_touched():
    data = batch(batch=8)
    every = jnp.arange(data.items.size, dtype=jnp.int32).reshape(data.items.shape) % ITEMS
    data = data.replace(items=every)
    (got, said), (expected, metrics) = (
        run(data, steps=4, sparse_items=how) for how in (True, False)
    )
    chex.assert_trees_all_close(said, metrics, rtol=1e-5)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_rows_that_are_not_touched_wait_and_the_others_move_as_ever():
    """From moments of zero the first step is the ordinary one, everywhere."""
    data = batch(batch=8)
    data = data.replace(items=data.items % 20)
    (first, said), (ordinary, metrics) = (run(data, sparse_items=how) for how in (True, False))
    chex.assert_trees_all_close((first, said), (ordinary, metrics), rtol=1e-5, atol=1e-6)

    other = data.replace(items=20 + data.items % 10, query=20 + data.query % 10)
    second, _, _ = step(sparse_items=True)(first, (), teacher()[1]["sampler"], other)
    ids = jax.jit(task().item_ids, static_argnums=2)(
        other, jax.random.fold_in(jax.random.key(0), 1), ITEMS
    )
    waits = np.setdiff1d(np.arange(ITEMS), ids)
    assert 5 < len(waits) < ITEMS - 10
    for before, after in zip(tables(first), tables(second), strict=True):
        np.testing.assert_array_equal(before[waits], after[waits])
        assert np.abs(before - after).max() > 0


def tables(state) -> list[np.ndarray]:
    """The item table and its two moments."""
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    found = [np.asarray(leaf) for path, leaf in leaves if sparse.ends(path, ("machine", "embed"))]
    assert len(found) == 3
    return found


def test_a_task_without_items_is_refused():
    class Terms(Task):
        def init(self, key):
            return {}

        losses = scores = init

    with pytest.raises(ValueError, match="Terms has no item table"):
        make_train_step(Terms(), optax.sgd(1.0), 0, sparse_items=True)
