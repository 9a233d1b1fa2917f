"""The options of the rehearsal: which items are masked, and which others they are compared with."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmjax import config as configs
from rmjax import tasks
from rmjax.data import make_source
from rmjax.data.pipeline import batches
from rmjax.rehearsal import fragments
from rmjax.run import kept, step
from rmjax.tasks import rehearsing
from tests.runs import tiny
from tests.small import DIM, batch, keys, noise, recommendation, rehearsal, small, teacher

J = 6


@functools.cache
def drawn(negatives: str, **how):
    """The task, its parameters, a batch, its fragments, and their alternatives."""
    options = rehearsal(negatives=negatives, sampled_items=J, sampler="uniform", **how)
    task = recommendation(small("gru").machine, options)
    params, data, r = noise(task.init), batch(), task.rehearsal

    @jax.jit
    def alternatives():
        segments = rehearsing.choose_segments(r, keys(4), None, None, data, data.item_mask.any(-1))
        cut = rehearsing.cut_fragments(r, keys(4, 1), data, segments)
        both = jax.random.key(2), keys(4, 2)
        return cut, rehearsing.alternatives(r, task.machine, params, cut, data, both)

    return task, params, data, *alternatives()


def ids_of(params, rows: np.ndarray) -> np.ndarray:
    """The ids of items with these features."""
    table = np.asarray(small("gru").machine.embed(params["machine"], None)) * DIM**-0.5
    distance = np.abs(np.asarray(rows)[..., None, :] - table).max(-1)
    assert (distance.min(-1) < 1e-6).all()
    return distance.argmin(-1)


@pytest.mark.parametrize("negatives", ["stream", "partner"])
def test_alternatives_come_from_one_stream(negatives):
    _, params, data, cut, (_, others, same) = drawn(negatives)
    ids = ids_of(params, others)[:, 0]
    truth = np.take_along_axis(*map(np.asarray, (cut.items, cut.hidden_at)), 2)
    outside = np.zeros(same.shape, bool)
    for row in range(4):
        own = np.asarray(data.items[row][np.asarray(data.item_mask[row])])
        partner = np.asarray(data.negative_items[row])
        if negatives == "stream":
            assert set(ids[row]) <= set(own) and (len(own) < 5 or len(set(ids[row])) > 1)
        else:
            assert (ids[row] == partner).all()
            outside[row] = ~np.asarray(data.negative_mask[row])
    np.testing.assert_array_equal(same, (ids[:, None, None] == truth[..., None]) | outside)


def test_near_alternatives_are_the_most_similar_drawn_items():
    task, params, _, cut, (target, others, same) = drawn("near")
    assert others.shape[0] == task.rehearsal.pool == 4 * J
    truth = np.take_along_axis(*map(np.asarray, (cut.items, cut.hidden_at)), 2)
    ids, similar = ids_of(params, others), np.einsum("...d,jd->...j", target, others)
    for place in np.ndindex(truth.shape):
        rivals = ids != truth[place]
        kept_ones = ~np.asarray(same)[place]
        assert not kept_ones[~rivals].any() and J <= kept_ones.sum() <= rivals.sum()
        assert similar[place][kept_ones].min() >= similar[place][rivals & ~kept_ones].max()


@pytest.mark.parametrize("detach", [True, False])
def test_detached_features_are_not_trained_by_recollection(detach):
    task, params, data, cut, _ = drawn("uniform", detach_items=detach)

    def total(params):
        both, machine = (jax.random.key(2), keys(4, 2)), task.machine
        compared = rehearsing.alternatives(task.rehearsal, machine, params, cut, data, both)
        target, others, _ = compared
        return jnp.sin(target).sum() + jnp.sin(others).sum()

    slope = jax.jit(jax.grad(total))(params)["machine"]["embed"]
    assert bool(jnp.any(slope)) != detach


@pytest.mark.parametrize("span", [1, 2, 5])
def test_masked_items_lie_in_runs(span):
    among = np.ones((300, 10), bool)
    picked = np.asarray(fragments._pick(jax.random.key(0), among, np.full(300, 4), span))
    assert (picked.sum(1) == 4).all()
    broken = [sum(0 < run.sum() < span for run in np.split(row, 10 // span)) for row in picked]
    assert max(broken) <= 1 and (span != 2 or np.mean(broken) == 0)  # 4 is two full runs of 2
    assert 90 < picked[:, 0].sum() < 150  # 120 expected


def test_a_run_from_before_sum_pairs_continues_with_a_mean(tmp_path):
    old = json.loads(configs.base().to_json())
    new = old | {"rehearsal": old["rehearsal"] | {"sum_pairs": True}}
    old = old | {"rehearsal": {k: v for k, v in old["rehearsal"].items() if k != "sum_pairs"}}
    with pytest.raises(ValueError, match=r"config\.rehearsal\.sum_pairs was False, now True"):
        kept.refuse_other(tmp_path, old, new)


@pytest.mark.parametrize(
    "schedule, factors", [("falling", (1.0, 0.5, 0.0)), ("rising", (0.0, 0.5, 1.0))]
)
def test_weights_change_over_the_steps(schedule, factors):
    steps = {"train.steps": 4, "rehearsal.sampler": "uniform"}
    config = tiny(**{"rehearsal.schedule": schedule} | steps)
    source = make_source(config.data, 0)
    task, optimizer = tasks.make_task(config, source), optax.sgd(0.0)
    stepped = jax.jit(step.make_train_step(task, optimizer, 0))
    state = step.init_state(task, optimizer, jax.random.key(0))
    settings = dict(seed=0, batch_size=8, segment_length=10, num_steps=1)
    (data,) = batches(source, **settings)
    for factor, number in zip(factors, (0, 2, 4), strict=True):
        metrics = stepped(state.replace(step=jnp.asarray(number)), (), (), data)[2]
        rehearsed = config.rehearsal.recollection * metrics["recollection"]
        rehearsed += config.rehearsal.familiarity * metrics["familiarity"]
        expected = float(metrics["reason"] + factor * rehearsed)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_sum_pairs_sums_over_pairs():
    """CM Eq. 5 sums over a stream's pairs; RM takes the mean over all pairs."""
    terms, key = {}, jax.random.key(0)
    for summed in (False, True):
        task, params, data, _, _ = drawn("uniform", sum_pairs=summed)
        losses = jax.jit(lambda params, data, task=task: task.losses(params, (), (), data, key))
        terms[summed] = losses(params, data)[0]["familiarity"][1]
    assert terms[True][0] == terms[False][0] and 0 < terms[True][1] <= 4 < terms[False][1]


def test_a_stream_without_questions_is_rehearsed():
    """Its losses are those that it has with questions; only the answers lose it."""
    task = recommendation(small("gru").machine, rehearsal(sampler="uniform", dropout=0.0))
    params, data, key = noise(task.init), batch(), jax.random.key(0)
    losses = jax.jit(lambda data: task.losses(params, (), (), data, key)[0])
    silent = data.replace(query_mask=data.query_mask.at[0].set(False))
    asked, unasked = losses(data), losses(silent)
    for name in ("recollection", "familiarity"):
        np.testing.assert_allclose(unasked[name][1], asked[name][1], rtol=1e-6)
    assert unasked["reason"][1][1] == asked["reason"][1][1] - data.query_mask[0].sum()
    none = data.replace(query_mask=jnp.zeros_like(data.query_mask))
    slopes = jax.jit(
        jax.grad(lambda params: task.losses(params, (), (), none, key)[0]["recollection"][1][0])
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes(params)))


def test_a_teacher_chooses_nothing_without_a_question():
    task = recommendation(small("gru").machine, rehearsal(dropout=0.0))
    params, data, frozen = noise(task.init), batch(), teacher()[1]["sampler"]
    losses = jax.jit(lambda data: task.losses(params, frozen, (), data, jax.random.key(0))[0])
    none = data.replace(query_mask=jnp.zeros_like(data.query_mask))
    for name in ("recollection", "familiarity"):
        assert losses(data)[name][1][1] > 0 and losses(none)[name][1][1] == 0
