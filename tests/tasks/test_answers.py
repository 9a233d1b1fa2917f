"""All forms of questions, answers and streams.

Questions are words, kinds or items; answers are clicks, classes or choices; streams have ids or
features.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import tasks
from rmjax.data.source import Description, Questions
from rmjax.tasks import rehearsing
from rmjax.types import Batch
from tests.runs import tiny
from tests.small import noise

B, T, N, Q, W, A, C, F, ITEMS = 4, 6, 10, 3, 5, 7, 4, 5, 30
WORDS = Questions("words", answer="class", classes=6, metric="accuracy")
CHOICES = Questions("words", answer="choice", metric="mrr")
KINDS = {
    "words-class": (WORDS, ITEMS, {}),
    "words-choice": (CHOICES, ITEMS, {"reason.head": "mlp"}),
    "kind-class": (WORDS._replace(query="kind", kinds=5), ITEMS, {}),
    "features-class": (WORDS._replace(words=20), 0, {"rehearsal.sampled_items": 6}),
    "item-click-widths": (Questions(), ITEMS, {"machine.item_dim": 6, "machine.slot_dim": 4}),
}


@functools.cache
def built(name: str):
    """The task, its parameters, the frozen teacher, and jitted losses and scores.

    Both functions take (params, batch).
    """
    questions, num_items, changes = KINDS[name]
    if "machine.item_dim" in changes:
        changes = changes | {"machine.kind": "continual", "machine.subspaces": 2}
    config = tiny(**{"reason.hops": 2, "rehearsal.fragments": 2, **changes})
    width = 0 if num_items else F
    described = Description(num_items, T * N, questions=questions, feature_width=width)
    task, teacher = tasks.make_task(config, described), tasks.make_teacher(config, described)
    params, frozen = noise(task.init), noise(teacher.init, 1)["sampler"]
    key = jax.random.key(0)

    @jax.jit
    def losses(params, data):
        return {k: v[1] for k, v in task.losses(params, frozen, (), data, key)[0].items()}

    return task, params, frozen, losses, jax.jit(task.scores)


def data(name: str, seed: int = 0) -> Batch:
    """A batch whose masked entries differ by seed, while all other entries are the same."""
    questions, num_items, _ = KINDS[name]
    rng, fill = np.random.default_rng(0), np.random.default_rng(seed + 1)
    ids = lambda top, *shape: rng.integers(0, top, shape).astype(np.int32)

    def masked(values, mask, top):
        integers = values.dtype == np.int32
        other = fill.integers(0, top, values.shape) if integers else fill.normal(size=values.shape)
        mask = mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
        return np.where(mask, values, other).astype(values.dtype)

    item_mask = rng.random((B, T, N)) < 0.8
    item_mask[1, 3:] = False
    features = lambda *shape: rng.normal(size=(*shape, F)).astype(np.float32)
    draw = functools.partial(ids, num_items) if num_items else features
    items, negatives = draw(B, T, N), draw(B, 8)
    query_mask = np.arange(Q) < np.array([[3], [2], [3], [1]])
    word_mask = (np.arange(W) < rng.integers(1, W + 1, (B, Q, 1))) & query_mask[..., None]
    candidate_mask = np.arange(W) < rng.integers(1, W + 1, (B, A, 1))
    choice_mask = (np.arange(C) < rng.integers(2, C + 1, (B, Q, 1))) & query_mask[..., None]
    tops = {"item": num_items, "kind": questions.kinds, "words": questions.words or num_items}
    top = tops[questions.query]
    words, choice = questions.query == "words", questions.answer == "choice"
    asked = (ids(top, B, Q, W), word_mask) if words else (ids(top, B, Q), query_mask)
    items, query = masked(items, item_mask, num_items), masked(*asked, top)
    made = dict(
        items=items,
        item_mask=item_mask,
        query=query,
        query_mask=query_mask,
        target=masked(ids(2, B, Q), query_mask, 2),
        negative_items=negatives,
        negative_mask=np.ones((B, 8), bool),
        example_id=np.arange(B, dtype=np.int32),
        position=masked(ids(T + 1, B, Q), query_mask, T + 1),
        word_mask=word_mask if words else None,
        candidates=masked(ids(ITEMS, B, A, W), candidate_mask, ITEMS) if choice else None,
        candidate_mask=candidate_mask if choice else None,
        choices=masked(ids(A, B, Q, C), choice_mask, A) if choice else None,
        choice_mask=choice_mask if choice else None,
    )
    return jax.tree.map(jnp.asarray, Batch(**made))


# Other tests run these questions from data to table already.
ALSO_RUN = ("words-class", "kind-class", "features-class", "item-click-widths")


@pytest.fixture(
    params=[pytest.param(k, marks=pytest.mark.slow if k in ALSO_RUN else ()) for k in KINDS]
)
def name(request):
    return request.param


def test_padding_of_every_kind_changes_no_loss(name):
    _, params, _, losses, scores = built(name)
    first, other = data(name), data(name, 1)
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert any((x != y).any() for x, y in leaves)
    chex.assert_trees_all_equal(losses(params, first), losses(params, other))
    asked = np.asarray(first.query_mask)
    chex.assert_trees_all_equal(scores(params, first)[asked], scores(params, other)[asked])


def test_terms_count_unmasked_entries_and_train_all_parameters(name):
    task, params, frozen, losses, _ = built(name)
    batch = data(name)
    terms = losses(params, batch)
    assert terms["reason"][1] == batch.query_mask.sum()
    assert terms["recollection"][1] > 0 and terms["familiarity"][1] > 0

    @jax.jit
    @jax.grad
    def slope(params):
        terms, _ = task.losses(params, frozen, (), batch, jax.random.key(0))
        return sum(total for _, (total, _) in terms.values())

    gradient = slope(params)
    chex.assert_tree_all_finite(gradient)
    still = [path for path, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(g)]
    assert not still, f"nothing trains {still}"


def test_rows_and_questions_are_independent(name):
    _, params, _, _, scores = built(name)
    batch, order = data(name), np.array([2, 0, 3, 1])
    got, mask = scores(params, batch), np.asarray(batch.query_mask)
    permuted = scores(params, jax.tree.map(lambda x: x[order], batch))
    chex.assert_trees_all_close(permuted[mask[order]], got[order][mask[order]], atol=1e-5)
    names = "query", "query_mask", "target", "position", "word_mask", "choices", "choice_mask"
    turned = {k: v[:, ::-1] for k in names if (v := getattr(batch, k)) is not None}
    other = scores(params, batch.replace(**turned))[:, ::-1]
    chex.assert_trees_all_close(other[mask], got[mask], atol=1e-5)


def test_answers_from_a_memory_equal_those_of_the_batch(name):
    """Notebooks and services call `answer`, which takes memories and questions but no stream."""
    task, params, _, _, scores = built(name)
    batch = data(name).replace(position=None)
    memory = jax.jit(task.memorize)(params, batch).memory
    rest = ("word_mask", "candidates", "candidate_mask", "choices", "choice_mask")
    asked = {k: v for k in rest if (v := getattr(batch, k)) is not None}
    mask = batch.query_mask
    got = task.answer(params, memory, batch.query, mask, **asked)
    chex.assert_trees_all_close(got[mask], scores(params, batch)[mask], atol=1e-5)


def test_each_question_may_have_a_memory_of_its_own(name):
    task, params, _, _, scores = built(name)
    batch = data(name)
    memory = jax.jit(task.memorize)(params, batch).asked
    rest = ("word_mask", "candidates", "candidate_mask", "choices", "choice_mask")
    fields = {k: v for k in rest if (v := getattr(batch, k)) is not None}
    asked, mask = (params, memory, batch.query, batch.query_mask), batch.query_mask
    got = task.answer(*asked, per_question=True, **fields)
    chex.assert_trees_all_close(got[mask], scores(params, batch)[mask], atol=1e-5)
    with pytest.warns(DeprecationWarning, match="per_question="):  # the old name
        chex.assert_trees_all_equal(task.answer(*asked, each=True, **fields), got)


def test_the_answer_of_the_teacher_depends_on_the_question(name):
    """A stream of one segment gives the same e for all questions; only q in [e; q] differs."""
    questions, num_items, changes = KINDS[name]
    described = Description(num_items, questions=questions, feature_width=0 if num_items else F)
    changes = {k: v for k, v in changes.items() if "machine" not in k}
    teacher = tasks.make_teacher(tiny(**changes), described)
    params, batch = noise(teacher.init, 2), data(name)
    one = batch.replace(item_mask=batch.item_mask.at[:, 1:].set(False), position=None)
    if questions.answer == "choice":  # all questions get the same choices
        choices = one.choices[:, :1].repeat(Q, 1)
        one = one.replace(choices=choices, choice_mask=jnp.ones_like(one.choice_mask))
    scores = np.asarray(jax.jit(teacher.scores)(params, one))[0]
    scores = scores - scores[..., :1] if scores.ndim > 1 else scores
    assert np.abs(scores[0] - scores[1]).max() > 0.01


def test_the_teacher_gets_the_drawn_question():
    """If only the second question is asked, the first one does not change what is rehearsed."""
    _, params, _, losses, _ = built("kind-class")
    batch = data("kind-class").replace(position=None)
    batch = batch.replace(query_mask=jnp.asarray([[False, True, False]] * B))
    changed = lambda which, kind: batch.replace(query=batch.query.at[:, which].set(kind))
    asked = [changed(which, kind) for which in (0, 1) for kind in range(5)]
    drawn = [float(losses(params, one)["recollection"][0]) for one in asked]
    assert len(set(drawn[:5])) == 1 and len(set(drawn[5:])) > 1


def test_the_scale_of_features_does_not_matter():
    _, params, _, _, scores = built("features-class")
    batch = data("features-class")
    larger = batch.replace(items=100 * batch.items)
    chex.assert_trees_all_close(scores(params, larger), scores(params, batch), atol=1e-3)


def test_the_order_of_the_candidates_does_not_matter():
    _, params, _, losses, scores = built("words-choice")
    batch, order = data("words-choice"), np.random.default_rng(3).permutation(A)
    place = jnp.asarray(np.argsort(order))
    pool = batch.replace(
        candidates=batch.candidates[:, order],
        candidate_mask=batch.candidate_mask[:, order],
        choices=place[batch.choices],
    )
    mask = np.asarray(batch.choice_mask)
    chex.assert_trees_all_close(scores(params, pool)[mask], scores(params, batch)[mask], atol=1e-6)
    assert np.isneginf(scores(params, batch)[~mask]).all()
    chex.assert_trees_all_close(losses(params, pool), losses(params, batch), rtol=1e-5)


def test_a_question_changes_the_order_of_candidates():
    """One linear layer on [q; a] cannot do this, so it is refused."""
    _, params, _, _, scores = built("words-choice")
    batch = data("words-choice")
    choices = jnp.broadcast_to(jnp.arange(C), (B, Q, C))
    same = batch.replace(choices=choices, choice_mask=jnp.ones((B, Q, C), bool))
    logits = np.asarray(scores(params, same))[0]
    differences = logits - logits[:, :1]
    assert np.abs(differences[0] - differences[1]).max() > 0.01
    with pytest.raises(ValueError, match="config.reason.head='mlp'"):
        tasks.make_task(tiny(), Description(ITEMS, T * N, questions=KINDS["words-choice"][0]))


def test_frames_are_compared_with_valid_frames_of_their_own_stream():
    """All frames differ, so `same` marks exactly the drawn frames that are the truth."""
    task, params, _, _, _ = built("features-class")
    batch, key = data("features-class"), jax.random.key(0)
    r, keys = dataclasses.replace(task.rehearsal, sampled_items=40), jax.random.split(key, B)

    @jax.jit
    def drawn():
        uniform, valid = dataclasses.replace(r, sampler="uniform"), batch.item_mask.any(-1)
        chosen = rehearsing.choose_segments(uniform, keys, None, None, batch, valid)
        cut = rehearsing.cut_fragments(r, keys, batch, chosen)
        return cut, rehearsing.alternatives(r, task.machine, params, cut, batch, (key, keys))

    cut, (target, others, same) = drawn()
    alike = jnp.broadcast_to(batch.items[:1], batch.items.shape)  # rows differ only in their draws
    twins = batch.replace(items=alike, item_mask=jnp.ones_like(batch.item_mask))
    theirs = rehearsing.alternatives(r, task.machine, params, cut, twins, (key, keys))[1]
    assert (np.asarray(theirs)[0] != np.asarray(theirs)[1]).any()
    table = np.asarray(task.machine.embed(params["machine"], batch.items)) / np.sqrt(8)
    for row in range(B):
        own = table[row][np.asarray(batch.item_mask[row])]
        distance = np.abs(np.asarray(others)[row, 0][:, None] - own).max(-1)
        assert (distance.min(1) < 1e-5).all() and len(set(distance.argmin(1))) > 10
    asked = np.asarray(cut.hidden_mask)
    equal = np.abs(np.asarray(others)[:, :, None] - np.asarray(target)[..., None, :]).max(-1) < 1e-6
    np.testing.assert_array_equal(np.asarray(same)[asked], equal[asked])
    assert 0 < equal[asked].sum() < equal[asked].size / 4
