"""What the recommendation task computes from a batch: its terms, its counts, and what each may look at."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmjax.run.step import init_state, make_train_step
from tests.small import ITEMS, Spy, batch, noise, recommendation, rehearsal, small, teacher

REHEARSED = ("recollection", "familiarity")


@functools.cache
def jitted(sampler: str = "teacher", **settings):
    """-> losses(batch, key) without the weights, scores(batch)."""
    task = recommendation(small("gru").machine, rehearsal(sampler=sampler, **settings))
    params, frozen = noise(task.init), teacher()[1]["sampler"]
    losses = jax.jit(
        lambda data, key: {
            name: term[1] for name, term in task.losses(params, frozen, (), data, key)[0].items()
        }
    )
    return losses, jax.jit(lambda data: task.scores(params, data))


def rows(data, index):
    return jax.tree.map(lambda x: x[index], data)


def test_each_term_has_its_weight_and_none_is_computed_in_vain():
    task = recommendation(
        small("gru").machine, rehearsal(recollection=0.3, familiarity=0.7), reason=2.0
    )
    weights = {}

    def losses(task, params):
        terms, _ = task.losses(params, teacher()[1]["sampler"], (), batch(), jax.random.key(0))
        weights.update({name: weight for name, (weight, _) in terms.items()})
        return [term[1] for term in terms.values()]

    jax.eval_shape(functools.partial(losses, task), noise(task.init))
    assert weights == {"reason": 2.0, "recollection": 0.3, "familiarity": 0.7}
    for off in REHEARSED:
        weights.clear()
        task = recommendation(small("gru").machine, rehearsal(**{off: 0.0}))
        jax.eval_shape(functools.partial(losses, task), noise(task.init))
        assert weights.keys() == {"reason", *REHEARSED} - {off}
    task = recommendation(small("gru").machine, rehearsal(recollection=0.0, familiarity=0.0))
    assert noise(task.init).keys() == {"machine", "head", "encoder"}


def test_every_term_counts_what_there_is():
    data = batch()
    data = data.replace(negative_mask=jnp.ones_like(data.negative_mask))
    terms = jitted()[0](data, jax.random.key(0))
    segments = np.asarray(data.item_mask.any(-1).sum(-1))
    found = np.minimum(-(-segments // 2), 2) + np.minimum(segments // 2, 2)  # two of each half
    assert (
        segments.min() < 4
        and terms["reason"][1] == data.query_mask.sum()
        and terms["recollection"][1] == found.sum()
    )
    assert 0 < terms["familiarity"][1] <= found.sum()
    full = data.replace(item_mask=jnp.ones_like(data.item_mask))
    assert jitted()[0](full, jax.random.key(0))["familiarity"][1] == 4 * 4
    none = jitted()[0](
        data.replace(negative_mask=jnp.zeros_like(data.negative_mask)), jax.random.key(0)
    )
    assert none["familiarity"][1] == 0 and none["recollection"][1] == found.sum()


def test_a_row_without_questions_or_items_counts_for_nothing():
    data, losses, key = batch(position=True), jitted()[0], jax.random.key(0)
    without = data.replace(query_mask=data.query_mask.at[0].set(False))
    garbage = without.replace(
        items=data.items.at[0].set(3),
        query=data.query.at[0].set(-1),
        target=data.target.at[0].set(9),
    )
    chex.assert_trees_all_equal(losses(garbage, key), losses(without, key))
    empty = losses(data.replace(item_mask=data.item_mask & False), key)
    assert all(empty[name][0] == 0 == empty[name][1] for name in REHEARSED)


@pytest.mark.parametrize("sampler", ["teacher", "uniform"])
def test_nothing_after_the_question_is_rehearsed(sampler):
    """The stream after a question's position may be anything, at any key."""
    losses = jitted(sampler)[0]
    data = batch(position=True)
    data = data.replace(position=jnp.broadcast_to(jnp.array([3, 1, 5, 0])[:, None], (4, 2)))
    later = jnp.arange(8)[:, None] >= data.position[:, :1, None]
    other = data.replace(
        items=jnp.where(later, (data.items + 17) % ITEMS, data.items),
        item_mask=jnp.where(later, True, data.item_mask),
    )
    for seed in range(5):
        one, two = (losses(x, jax.random.key(seed)) for x in (data, other))
        chex.assert_trees_all_equal(one, two)
    assert (
        one["recollection"][1]
        == jnp.minimum(4, (data.item_mask.any(-1) & ~later[..., 0]).sum(-1)).sum()
    )


def test_answers_at_a_position_are_those_of_the_stream_cut_there():
    scores, data = jitted()[1], batch(position=True)
    got = scores(data)
    for q in range(2):
        before = jnp.arange(8)[:, None] < data.position[:, q, None, None]
        cut = data.replace(
            item_mask=data.item_mask & before, position=jnp.full_like(data.position, 8)
        )
        chex.assert_trees_all_close(got[:, q], scores(cut)[:, q], atol=1e-5)
    at_the_end = scores(data.replace(position=jnp.full_like(data.position, 8)))
    chex.assert_trees_all_close(at_the_end, scores(data.replace(position=None)), atol=1e-5)


def test_questions_of_one_memory_are_answered_each_for_itself():
    scores, data = jitted()[1], batch()
    chex.assert_trees_all_close(
        scores(data)[:, ::-1], scores(data.replace(query=data.query[:, ::-1])), atol=1e-6
    )
    beside = scores(data.replace(query=data.query.at[:, 1].set(2**31 - 1)))
    chex.assert_trees_all_equal(beside[:, 0], scores(data)[:, 0])


@pytest.mark.parametrize("position", [False, True])
def test_losses_of_parts_add_up(position):
    """What is drawn for an example does not depend on the batch it comes in; so devices may add."""
    losses, data, key = jitted()[0], batch(position=position), jax.random.key(3)
    parts = [losses(rows(data, part), key) for part in (slice(0, 2), slice(2, 4))]
    total = jax.tree.map(lambda *x: sum(x), *parts)
    chex.assert_trees_all_close(total, losses(data, key), rtol=1e-5)
    order = np.array([2, 0, 3, 1])
    chex.assert_trees_all_close(losses(rows(data, order), key), losses(data, key), rtol=1e-5)


def test_losses_are_drawn_from_key_and_example():
    losses, data = jitted()[0], batch()
    one = losses(data, jax.random.key(0))
    chex.assert_trees_all_equal(one, losses(data, jax.random.key(0)))
    for other in (
        losses(data, jax.random.key(1)),
        losses(data.replace(example_id=data.example_id + 1), jax.random.key(0)),
    ):
        assert (
            one["recollection"][0] != other["recollection"][0]
            and one["familiarity"][0] != other["familiarity"][0]
        )
        assert one["reason"] == other["reason"]  # this machine draws nothing


def test_the_drawn_question_is_an_asked_one_and_every_one_comes():
    """Only row 2's first question is asked; what its second would rehearse never shows."""
    losses, data = jitted()[0], batch(position=True)
    data = data.replace(position=jnp.array([[8, 0]] * 4))
    asked = data.replace(query_mask=jnp.array([[True, False]] * 4))
    counts = [losses(asked, jax.random.key(seed))["recollection"][1] for seed in range(8)]
    assert len(set(map(float, counts))) == 1 and counts[0] > 0
    both = data.replace(query_mask=jnp.ones((4, 2), bool))
    assert (
        len({float(losses(both, jax.random.key(seed))["recollection"][1]) for seed in range(8)}) > 2
    )


def test_the_teacher_sees_only_what_lies_before_the_question():
    task, params = teacher()
    scores, data = jax.jit(lambda data: task.scores(params, data)), batch(position=True)
    got = scores(data)
    for q in range(2):
        later = jnp.arange(8)[:, None] >= data.position[:, q, None, None]
        other = data.replace(
            items=jnp.where(later, 1, data.items), item_mask=data.item_mask | later
        )
        np.testing.assert_array_equal(scores(other)[:, q], got[:, q])
    assert (scores(data.replace(items=data.items + 1)) != got).any()


def test_what_the_teacher_attends_to_most_is_rehearsed():
    """It scores a segment by its items; the favourites of both halves reach the decoder, and no other."""
    data, task = batch(), recommendation(small("gru").machine)
    params, frozen = noise(task.init), jax.tree.map(jnp.zeros_like, teacher()[1]["sampler"])
    items = jnp.zeros_like(data.items).at[:, jnp.array([2, 7])].set(1)
    data = data.replace(items=items, item_mask=jnp.ones_like(data.item_mask))
    frozen |= {
        "embed": frozen["embed"].at[1].set(1.0),
        "fragment": jnp.eye(8),
        "score": jnp.ones(8),
    }
    decoder = Spy(task.rehearsal.decoder)
    task = recommendation(small("gru").machine, rehearsal(decoder, fragments=2))
    x = jax.jit(
        lambda: (task.losses(params, frozen, (), data, jax.random.key(0)), decoder.seen["x"])[1]
    )()
    chex.assert_trees_all_equal(
        x[:, :2],
        jnp.broadcast_to(task.machine.embed(params["machine"], jnp.array(1)), (4, 2, 4, 8)),
    )


def test_a_second_step_compiles_nothing_and_gradients_are_finite_without_anything_to_rehearse():
    task = recommendation(small("gru").machine)
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(task, optimizer, seed=0))
    frozen, data = teacher()[1]["sampler"], batch(position=True)
    state = jax.eval_shape(lambda: init_state(task, optimizer, jax.random.key(0)))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state).replace(
        params=noise(task.init)
    )
    for index, batch_ in enumerate(
        (
            data,
            data.replace(position=data.position * 0),
            data.replace(query_mask=data.query_mask & False),
        )
    ):
        after, _, metrics = step(state, (), frozen, batch_)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        chex.assert_tree_all_finite((after, metrics))
        state = after
        assert state.step == index + 1
    assert step._cache_size() == 1


def test_a_loss_of_the_machine_itself_counts_with_its_weight():
    """The mean over segments of the sum of their items, say, of rows that have any."""
    base = small("gru").machine

    def write(params, memory, features, mask, key=None):
        new, _ = base.write(params, memory, features, mask, key)
        alive = mask.any(-1)
        return new, (
            jnp.where(alive, memory.segments + 1.0, 0.0).sum(),
            alive.sum().astype(jnp.float32),
        )

    machine = base._replace(write=write, has_loss=True)
    plain = rehearsal(recollection=0.0, familiarity=0.0)
    task = recommendation(machine, plain, machine_loss=0.25)
    params, data = noise(task.init), batch()
    terms, _ = task.losses(params, (), (), data, jax.random.key(0))
    weight, (total, count) = terms["machine"]
    segments = np.asarray(data.item_mask).any(-1).sum(1)
    assert (
        weight == 0.25
        and count == segments.sum()
        and total == (segments * (segments + 1) / 2).sum()
    )
    assert (
        "machine"
        not in recommendation(base, plain).losses(params, (), (), data, jax.random.key(0))[0]
    )
