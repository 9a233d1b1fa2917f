"""The recommendation task on a batch: its terms, their counts, and the inputs they depend on."""

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
    """The functions losses(batch, key), without the weights, and scores(batch)."""
    task = recommendation(small("gru").machine, rehearsal(sampler=sampler, **settings))
    params, frozen = noise(task.init), teacher()[1]["sampler"]

    @jax.jit
    def losses(data, key):
        return {k: v[1] for k, v in task.losses(params, frozen, (), data, key)[0].items()}

    return losses, jax.jit(lambda data: task.scores(params, data))


def rows(data, index):
    return jax.tree.map(lambda x: x[index], data)


def test_terms_have_their_weights_and_those_without_are_not_computed():
    weighted = rehearsal(recollection=0.3, familiarity=0.7)
    task = recommendation(small("gru").machine, weighted, reason=2.0)
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


def test_terms_count_segments_questions_and_fragments():
    data = batch()
    data = data.replace(negative_mask=jnp.ones_like(data.negative_mask))
    terms = jitted()[0](data, jax.random.key(0))
    segments = np.asarray(data.item_mask.any(-1).sum(-1))
    chosen = np.minimum(-(-segments // 2), 2) + np.minimum(segments // 2, 2)  # two of each half
    assert segments.min() < 4
    assert terms["reason"][1] == data.query_mask.sum()
    assert terms["recollection"][1] == chosen.sum()
    assert 0 < terms["familiarity"][1] <= chosen.sum()
    full = data.replace(item_mask=jnp.ones_like(data.item_mask))
    assert jitted()[0](full, jax.random.key(0))["familiarity"][1] == 4 * 4
    alone = data.replace(negative_mask=jnp.zeros_like(data.negative_mask))
    none = jitted()[0](alone, jax.random.key(0))
    assert none["familiarity"][1] == 0 and none["recollection"][1] == chosen.sum()


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
    """The stream after a question's position changes nothing, for any key."""
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
    segments = (data.item_mask.any(-1) & ~later[..., 0]).sum(-1)
    assert one["recollection"][1] == jnp.minimum(4, segments).sum()


def test_answers_at_a_position_equal_those_of_the_cut_stream():
    scores, data = jitted()[1], batch(position=True)
    got = scores(data)
    for q in range(2):
        before = jnp.arange(8)[:, None] < data.position[:, q, None, None]
        last = jnp.full_like(data.position, 8)
        cut = data.replace(item_mask=data.item_mask & before, position=last)
        chex.assert_trees_all_close(got[:, q], scores(cut)[:, q], atol=1e-5)
    at_the_end = scores(data.replace(position=jnp.full_like(data.position, 8)))
    chex.assert_trees_all_close(at_the_end, scores(data.replace(position=None)), atol=1e-5)


def test_questions_of_one_memory_are_independent():
    scores, data = jitted()[1], batch()
    turned = scores(data.replace(query=data.query[:, ::-1]))
    chex.assert_trees_all_close(scores(data)[:, ::-1], turned, atol=1e-6)
    beside = scores(data.replace(query=data.query.at[:, 1].set(2**31 - 1)))
    chex.assert_trees_all_equal(beside[:, 0], scores(data)[:, 0])


@pytest.mark.parametrize("position", [False, True])
def test_losses_of_parts_add_up(position):
    """The draws for an example do not depend on the rest of the batch, so devices may add."""
    losses, data, key = jitted()[0], batch(position=position), jax.random.key(3)
    parts = [losses(rows(data, part), key) for part in (slice(0, 2), slice(2, 4))]
    total = jax.tree.map(lambda *x: sum(x), *parts)
    chex.assert_trees_all_close(total, losses(data, key), rtol=1e-5)
    order = np.array([2, 0, 3, 1])
    chex.assert_trees_all_close(losses(rows(data, order), key), losses(data, key), rtol=1e-5)


def test_draws_depend_on_the_key_and_the_example():
    losses, data = jitted()[0], batch()
    one = losses(data, jax.random.key(0))
    chex.assert_trees_all_equal(one, losses(data, jax.random.key(0)))
    renamed = data.replace(example_id=data.example_id + 1)
    for other in losses(data, jax.random.key(1)), losses(renamed, jax.random.key(0)):
        assert all(one[name][0] != other[name][0] for name in REHEARSED)
        assert one["reason"] == other["reason"]  # this machine draws nothing


def test_only_asked_questions_are_drawn_and_all_of_them_are():
    """With only the first questions asked, nothing before the second questions is rehearsed."""
    losses, data = jitted()[0], batch(position=True)
    data = data.replace(position=jnp.array([[8, 0]] * 4))
    asked = data.replace(query_mask=jnp.array([[True, False]] * 4))
    counts = [losses(asked, jax.random.key(seed))["recollection"][1] for seed in range(8)]
    assert len(set(map(float, counts))) == 1 and counts[0] > 0
    both = data.replace(query_mask=jnp.ones((4, 2), bool))
    counts = [losses(both, jax.random.key(seed))["recollection"][1] for seed in range(8)]
    assert len(set(map(float, counts))) > 2


def test_the_teacher_reads_only_the_stream_before_the_question():
    task, params = teacher()
    scores, data = jax.jit(lambda data: task.scores(params, data)), batch(position=True)
    got = scores(data)
    for q in range(2):
        later = jnp.arange(8)[:, None] >= data.position[:, q, None, None]
        items = jnp.where(later, 1, data.items)
        other = data.replace(items=items, item_mask=data.item_mask | later)
        np.testing.assert_array_equal(scores(other)[:, q], got[:, q])
    assert (scores(data.replace(items=data.items + 1)) != got).any()


def test_the_segments_with_most_attention_of_the_teacher_are_rehearsed():
    """Segments are scored by their items; the decoder gets the best of either half only."""
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

    @jax.jit
    def decoded():
        task.losses(params, frozen, (), data, jax.random.key(0))
        return decoder.seen["x"]

    item = task.machine.embed(params["machine"], jnp.array(1))
    chex.assert_trees_all_equal(decoded()[:, :2], jnp.broadcast_to(item, (4, 2, 4, 8)))


def test_a_second_step_compiles_nothing_and_gradients_are_finite():
    task = recommendation(small("gru").machine)
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(task, optimizer, seed=0))
    frozen, data = teacher()[1]["sampler"], batch(position=True)
    state = jax.eval_shape(lambda: init_state(task, optimizer, jax.random.key(0)))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    state = state.replace(params=noise(task.init))
    no_past = data.replace(position=data.position * 0)
    no_questions = data.replace(query_mask=data.query_mask & False)
    for index, batch_ in enumerate((data, no_past, no_questions)):
        after, _, metrics = step(state, (), frozen, batch_)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        chex.assert_tree_all_finite((after, metrics))
        state = after
        assert state.step == index + 1
    assert step._cache_size() == 1


def test_a_loss_of_the_machine_has_its_weight():
    """The loss here is the number of a segment, a mean over segments with items."""
    base = small("gru").machine

    def write(params, memory, features, mask, key=None):
        new, _ = base.write(params, memory, features, mask, key)
        alive = mask.any(-1)
        total = jnp.where(alive, memory.segments + 1.0, 0.0).sum()
        return new, (total, alive.sum().astype(jnp.float32))

    machine = base._replace(write=write, has_loss=True)
    plain = rehearsal(recollection=0.0, familiarity=0.0)
    task = recommendation(machine, plain, machine_loss=0.25)
    params, data = noise(task.init), batch()
    terms, _ = task.losses(params, (), (), data, jax.random.key(0))
    weight, (total, count) = terms["machine"]
    segments = np.asarray(data.item_mask).any(-1).sum(1)
    assert weight == 0.25 and count == segments.sum()
    assert total == (segments * (segments + 1) / 2).sum()
    terms, _ = recommendation(base, plain).losses(params, (), (), data, jax.random.key(0))
    assert "machine" not in terms
