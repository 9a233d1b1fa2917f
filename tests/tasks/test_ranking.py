"""Questions whose answer is an item: from streams to ranks, offline and live."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import tasks
from rmjax.data.pipeline import eval_batches
from rmjax.data.source import Description
from rmjax.machines.live import current_memory, feed, open_stream
from rmjax.tasks.ranking import cumulative_weights
from tests.runs import tiny
from tests.shop import Shop, ShopSource
from tests.small import noise

SHOP = Shop(users=6, items=40, shortest=4, longest=17)
N = 4


@functools.cache
def built(kind: str, question: str, exclude_seen: bool = False, **changes):
    """The source, the task, random parameters, a batch, and jitted scores."""
    source = ShopSource(SHOP, queries=3, exclude_seen=exclude_seen)
    keys = {"machine.kind": kind, "ranking.question": question, "data.segment_length": N}
    config = tiny(**keys, **{name.replace("__", "."): value for name, value in changes.items()})
    task = tasks.make_task(config, source)
    settings = dict(seed=0, batch_size=6, segment_length=N)
    batch = jax.tree.map(jnp.asarray, next(iter(eval_batches(source, "train", **settings))))
    return source, task, noise(task.init), batch, jax.jit(task.scores)


@pytest.mark.parametrize(
    "kind, question, exclude_seen", [("rehearsal", "last", True), ("gru", "next", False)]
)
def test_ranks_are_those_of_a_live_stream_that_stops_at_the_question(kind, question, exclude_seen):
    """Also the items behind the last full segment are known, and nothing after the question."""
    source, task, params, batch, scores = built(kind, question, exclude_seen)
    ranks, machine = np.asarray(scores(params, batch)), task.machine
    streams = source.fetch("train", np.arange(6))
    empty = open_stream(machine, params["machine"], 1, N)

    @jax.jit
    def live(items, mask):
        stream = feed(machine, params["machine"], empty, items, mask)
        memory = current_memory(machine, params["machine"], stream)
        query = task.answers.asked_live(stream, jnp.zeros((1, 1), jnp.int32))
        return task.answer(params, memory, query, jnp.ones((1, 1), bool))[0, 0]

    asked = np.argwhere(streams["query_mask"])
    assert len({int(p) % N for p in streams["position"][streams["query_mask"]]}) > 2
    for row, q in asked:
        before, target = streams["position"][row, q], streams["target"][row, q]
        items = streams["items"][row : row + 1]
        logits = np.asarray(live(items, np.arange(items.shape[1])[None] < before))
        seen = set(items[0, :before].tolist()) if exclude_seen else set()
        left = [v for v in range(40) if v != target and v not in seen]
        assert ranks[row, q] == 1 + (logits[left] > logits[target]).sum()
    assert len({*ranks[streams["query_mask"]]}) > 4


def test_the_best_items_of_a_memory_are_those_of_its_scores():
    _, task, params, batch, _ = built("gru", "last")
    memory = jax.jit(task.memorize)(params, batch).memory
    query, mask = jnp.array([[3, -1]] * 6), jnp.ones((6, 2), bool)
    value, ids = jax.jit(task.top_k, static_argnums=4)(params, memory, query, mask, 5)
    logits = jax.jit(task.answer)(params, memory, query, mask)
    np.testing.assert_array_equal(ids, np.argsort(-np.asarray(logits), -1)[..., :5])
    exclude = jnp.asarray(ids[:, 0, :2])
    _, others = task.top_k(params, memory, query, mask, 5, exclude)
    assert not np.isin(others[:, 0], ids[:, 0, :2]).all(-1).any()
    np.testing.assert_array_equal(others[:, 0, :3], ids[:, 0, 2:])


@pytest.mark.parametrize("drawn", [False, True])
def test_a_loss_reads_only_rows_among_its_item_ids(drawn):
    changes = {"ranking__full_softmax": 0, "ranking__negatives": 4} if drawn else {}
    changes |= {"rehearsal__recollection": 0.0, "rehearsal__familiarity": 0.0}
    _, task, params, batch, _ = built("gru", "last", ranking__table="shared", **changes)
    batch = dataclasses.replace(batch, items=batch.items % 5, target=batch.target % 9)
    key = jax.random.key(3)
    loss = lambda params: task.losses(params, (), (), batch, key)[0]["reason"][1][0]
    moved = np.abs(jax.jit(jax.grad(loss))(params)["machine"]["embed"]).max(1) > 0
    touched = np.isin(np.arange(40), task.item_ids(batch, key, 40))
    assert not (moved & ~touched).any() and touched.all() != drawn


def total(task, params, frozen, batch):
    terms = task.losses(params, frozen, (), batch, jax.random.key(0))[0]
    return sum(s / jnp.maximum(n, 1) for _, (s, n) in terms.values())


def finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_a_teacher_ranks_items_and_trains():
    source, _, _, batch, _ = built("gru", "last")
    teacher = tasks.make_teacher(tiny(**{"ranking.question": "last"}), source)
    params = noise(teacher.init)
    both = jax.jit(lambda p: (jax.grad(lambda p: total(teacher, p, (), batch))(p),
                              teacher.scores(p, batch)))  # fmt: skip
    gradient, ranks = both(params)
    assert finite(gradient) and np.abs(gradient["head"]["embed"]).max() > 0
    assert ((np.asarray(ranks) >= 1) & (np.asarray(ranks) <= 40)).all()


SLOW = ("continual", "buffer", "multihop_reason", "directly_reason")


@pytest.mark.parametrize(
    "kind", ["rehearsal", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)]
)
def test_every_machine_rehearses_and_ranks_with_finite_gradients(kind):
    widths = {"machine__item_dim": 6, "machine__slot_dim": 4, "machine__subspaces": 2}
    changes = widths if kind == "continual" else {}
    _, task, params, batch, _ = built(kind, "last", rehearsal__sampler="uniform", **changes)
    gradient = jax.jit(jax.grad(lambda p: total(task, p, (), batch)))(params)
    assert finite(gradient) and np.abs(gradient["encoder"]["kinds"]).max() > 0


def test_weights_of_negatives_are_counts_that_fit_32_bits():
    np.testing.assert_array_equal(cumulative_weights(np.array([0, 3, 1])), [1, 5, 7])
    large = cumulative_weights(np.array([2**40, 2**39, 0]))
    assert large.dtype == np.int32 and large[0] / large[-1] == pytest.approx(2 / 3, abs=1e-6)


def test_what_cannot_be_ranked_is_refused():
    asked = ShopSource(SHOP).questions
    make = lambda config, **more: tasks.make_task(
        config, Description(40, 17, questions=asked, **more)
    )
    few = {"ranking.full_softmax": 10}
    with pytest.raises(ValueError, match="counts no item; set 'uniform'"):
        make(tiny(**few))
    make(tiny(**few, **{"ranking.draw": "uniform"}))
    with pytest.raises(ValueError, match="items must be ids"):
        tasks.make_task(tiny(), Description(0, 17, questions=asked, feature_width=3))
    last = tiny(**{"ranking.question": "last"})
    with pytest.raises(ValueError, match="the questions of this data are item: set 'next'"):
        tasks.make_task(last, Description(40, 17, questions=asked._replace(query="item")))
    clicks = tasks.make_task(tiny(), Description(40, 17))
    with pytest.raises(ValueError, match="trained to answer: click"):
        clicks.top_k({}, None, None, None, 3)
