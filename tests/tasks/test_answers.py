"""Questions of words, kinds and items; answers that are clicks, classes or choices; streams of ids and of features."""

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
KINDS = {
    "words-class": (WORDS, ITEMS, {}),
    "words-choice": (
        Questions("words", answer="choice", metric="mrr"),
        ITEMS,
        {"reason.head": "mlp"},
    ),
    "kind-class": (
        Questions("kind", kinds=5, answer="class", classes=6, metric="accuracy"),
        ITEMS,
        {},
    ),
    "features-class": (WORDS._replace(words=20), 0, {"rehearsal.sampled_items": 6}),
    "item-click-widths": (Questions(), ITEMS, {"machine.item_dim": 6, "machine.slot_dim": 4}),
}


@functools.cache
def built(name: str):
    """-> task, parameters, the frozen teacher, jitted losses(params, batch) and scores(params, batch)."""
    questions, num_items, changes = KINDS[name]
    if "machine.item_dim" in changes:
        changes = changes | {"machine.kind": "continual", "machine.subspaces": 2}
    config = tiny(**{"reason.hops": 2, "rehearsal.fragments": 2, **changes})
    described = Description(
        num_items, T * N, questions=questions, feature_width=0 if num_items else F
    )
    task, teacher = tasks.make_task(config, described), tasks.make_teacher(config, described)
    params, frozen = noise(task.init), noise(teacher.init, 1)["sampler"]
    key = jax.random.key(0)
    losses = jax.jit(
        lambda params, data: {
            k: v[1] for k, v in task.losses(params, frozen, (), data, key)[0].items()
        }
    )
    return task, params, frozen, losses, jax.jit(task.scores)


def data(name: str, seed: int = 0) -> Batch:
    """What is masked out holds other things for every seed; what is there does not."""
    questions, num_items, _ = KINDS[name]
    rng, fill = np.random.default_rng(0), np.random.default_rng(seed + 1)
    ids = lambda top, *shape: rng.integers(0, top, shape).astype(np.int32)

    def masked(values, mask, top):
        other = (
            fill.integers(0, top, values.shape)
            if values.dtype == np.int32
            else fill.normal(size=values.shape)
        )
        mask = mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
        return np.where(mask, values, other).astype(values.dtype)

    item_mask = rng.random((B, T, N)) < 0.8
    item_mask[1, 3:] = False
    items = (
        ids(num_items, B, T, N) if num_items else rng.normal(size=(B, T, N, F)).astype(np.float32)
    )
    negatives = ids(num_items, B, 8) if num_items else rng.normal(size=(B, 8, F)).astype(np.float32)
    query_mask = np.arange(Q) < np.array([[3], [2], [3], [1]])
    word_mask = (np.arange(W) < rng.integers(1, W + 1, (B, Q, 1))) & query_mask[..., None]
    candidate_mask = np.arange(W) < rng.integers(1, W + 1, (B, A, 1))
    choice_mask = (np.arange(C) < rng.integers(2, C + 1, (B, Q, 1))) & query_mask[..., None]
    top = {"item": num_items, "kind": questions.kinds, "words": questions.words or num_items}[
        questions.query
    ]
    words, choice = questions.query == "words", questions.answer == "choice"
    made = dict(
        items=masked(items, item_mask, num_items),
        item_mask=item_mask,
        query=masked(ids(top, B, Q, W), word_mask, top)
        if words
        else masked(ids(top, B, Q), query_mask, top),
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


ALSO_RUN = (
    "words-class",
    "kind-class",
    "features-class",
    "item-click-widths",
)  # whole runs of such questions are tests already


@pytest.fixture(
    params=[pytest.param(k, marks=pytest.mark.slow if k in ALSO_RUN else ()) for k in KINDS]
)
def name(request):
    return request.param


def test_padding_of_every_kind_changes_no_loss(name):
    _, params, _, losses, scores = built(name)
    first, other = data(name), data(name, 1)
    assert any(
        (x != y).any() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    )
    chex.assert_trees_all_equal(losses(params, first), losses(params, other))
    asked = np.asarray(first.query_mask)
    chex.assert_trees_all_equal(scores(params, first)[asked], scores(params, other)[asked])


def test_every_term_counts_what_is_there_and_has_a_gradient(name):
    task, params, frozen, losses, _ = built(name)
    batch = data(name)
    terms = losses(params, batch)
    assert (
        terms["reason"][1] == batch.query_mask.sum()
        and terms["recollection"][1] > 0
        and terms["familiarity"][1] > 0
    )

    @jax.jit
    @jax.grad
    def slope(params):
        return sum(
            total
            for _, (total, _) in task.losses(params, frozen, (), batch, jax.random.key(0))[
                0
            ].values()
        )

    found = slope(params)
    chex.assert_tree_all_finite(found)
    still = [path for path, g in jax.tree_util.tree_leaves_with_path(found) if not np.any(g)]
    assert not still, f"nothing trains {still}"


def test_rows_and_questions_are_answered_each_for_itself(name):
    _, params, _, _, scores = built(name)
    batch, order = data(name), np.array([2, 0, 3, 1])
    got, mask = scores(params, batch), np.asarray(batch.query_mask)
    permuted = scores(params, jax.tree.map(lambda x: x[order], batch))
    chex.assert_trees_all_close(permuted[mask[order]], got[order][mask[order]], atol=1e-5)
    of_questions = (
        "query",
        "query_mask",
        "target",
        "position",
        "word_mask",
        "choices",
        "choice_mask",
    )
    turned = {k: v[:, ::-1] for k in of_questions if (v := getattr(batch, k)) is not None}
    chex.assert_trees_all_close(
        scores(params, batch.replace(**turned))[:, ::-1][mask], got[mask], atol=1e-5
    )


def test_an_answer_from_a_memory_is_that_of_the_batch(name):
    """`answer` is what notebooks and services call: memories and questions, no stream."""
    task, params, _, _, scores = built(name)
    batch = data(name).replace(position=None)
    memory = jax.jit(task.memorize)(params, batch).memory
    rest = ("word_mask", "candidates", "candidate_mask", "choices", "choice_mask")
    asked = {k: v for k in rest if (v := getattr(batch, k)) is not None}
    chex.assert_trees_all_close(
        task.answer(params, memory, batch.query, batch.query_mask, **asked)[batch.query_mask],
        scores(params, batch)[batch.query_mask],
        atol=1e-5,
    )


def test_the_teacher_answers_from_the_question_too(name):
    """Of one segment it always finds the same, e; the rest of [e; q] is left to tell questions apart."""
    questions, num_items, changes = KINDS[name]
    described = Description(num_items, questions=questions, feature_width=0 if num_items else F)
    teacher = tasks.make_teacher(
        tiny(**{k: v for k, v in changes.items() if "machine" not in k}), described
    )
    params, batch = noise(teacher.init, 2), data(name)
    one = batch.replace(item_mask=batch.item_mask.at[:, 1:].set(False), position=None)
    if questions.answer == "choice":  # the same ones for every question
        one = one.replace(
            choices=one.choices[:, :1].repeat(Q, 1), choice_mask=jnp.ones_like(one.choice_mask)
        )
    scores = np.asarray(jax.jit(teacher.scores)(params, one))[0]
    scores = scores - scores[..., :1] if scores.ndim > 1 else scores
    assert np.abs(scores[0] - scores[1]).max() > 0.01


def test_the_teacher_is_asked_the_drawn_question():
    """Where only the second question is asked, what the first one says changes nothing that is rehearsed."""
    _, params, _, losses, _ = built("kind-class")
    batch = data("kind-class").replace(position=None)
    batch = batch.replace(query_mask=jnp.asarray([[False, True, False]] * B))
    asked = [
        batch.replace(query=batch.query.at[:, which].set(kind))
        for which in (0, 1)
        for kind in range(5)
    ]
    drawn = [float(losses(params, one)["recollection"][0]) for one in asked]
    assert len(set(drawn[:5])) == 1 and len(set(drawn[5:])) > 1


def test_features_have_one_scale():
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


def test_a_question_changes_the_order_of_its_candidates():
    """With one linear layer on [q; a] it could not, so that is refused."""
    _, params, _, _, scores = built("words-choice")
    batch = data("words-choice")
    same = batch.replace(
        choices=jnp.broadcast_to(jnp.arange(C), (B, Q, C)), choice_mask=jnp.ones((B, Q, C), bool)
    )
    logits = np.asarray(scores(params, same))[0]
    differences = logits - logits[:, :1]
    assert np.abs(differences[0] - differences[1]).max() > 0.01
    with pytest.raises(ValueError, match="config.reason.head='mlp'"):
        tasks.make_task(tiny(), Description(ITEMS, T * N, questions=KINDS["words-choice"][0]))


def test_frames_are_told_from_valid_frames_of_their_own_stream():
    """Frames are all different here: `same` marks just the drawn ones that are the truth."""
    task, params, _, _, _ = built("features-class")
    batch, key = data("features-class"), jax.random.key(0)
    r, keys = dataclasses.replace(task.rehearsal, sampled_items=40), jax.random.split(key, B)

    @jax.jit
    def drawn():
        chosen = rehearsing.choose_segments(
            dataclasses.replace(r, sampler="uniform"),
            keys,
            None,
            None,
            batch,
            batch.item_mask.any(-1),
        )
        cut = rehearsing.cut_fragments(r, keys, batch, chosen)
        return cut, rehearsing.alternatives(r, task.machine, params, cut, batch, (key, keys))

    cut, (target, others, same) = drawn()
    alike = jnp.broadcast_to(batch.items[:1], batch.items.shape)  # rows draw each for itself
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
