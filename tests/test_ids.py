"""Ids out of range are clipped to the nearest id; a negative id never counts from the end."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.data.source import Questions
from rmjax.layers.embeddings import Rows, embed, look_up
from rmjax.machines import current_memory, feed, memorize, open_stream
from rmjax.models import bert, gpt2, transformer_xl
from rmjax.reason import heads
from rmjax.tasks.answers import Answers, questions_only
from tests.small import DIM, ITEMS, noise, recommendation, small
from tests.small import N as LENGTH

STRANGE = np.array([[-1, -2, 3, ITEMS]], np.int32)
NEAREST = np.array([[0, 0, 3, ITEMS - 1]], np.int32)


def same(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_tables_of_items():
    table = jnp.arange(2.0 * ITEMS).reshape(ITEMS, 2)
    some = Rows(jnp.array([0, 3, ITEMS - 1]), table[jnp.array([0, 3, ITEMS - 1])], ITEMS)
    for rows in (table, some):
        same(look_up(rows, STRANGE), table[NEAREST])
    params = {"embed": table, "project": jnp.ones((2, 3))}
    same(embed(params, jnp.asarray(STRANGE)), embed(params, jnp.asarray(NEAREST)))
    same(embed(params, None), embed(params, jnp.arange(ITEMS)))


@pytest.mark.parametrize("name", ["gru", "buffer"])
def test_machines_and_live_streams(name):
    machine, params = small(name).machine, small(name).params

    @functools.partial(jax.jit, static_argnums=0)
    def written(live, items):
        if live:
            stream = feed(machine, params, open_stream(machine, params, 1, LENGTH), items)
            memory = current_memory(machine, params, stream)
        else:
            mask = jnp.ones((1, 1, LENGTH), bool)
            memory = memorize(machine, params, items[:, None], mask).memory
        query, query_mask = machine.embed(params, items), items < ITEMS
        return machine.slots(params, memory), machine.read(params, memory, query, query_mask)

    for live in (False, True):
        same(written(live, STRANGE), written(live, NEAREST))


def test_questions():
    task = recommendation(small("gru").machine)
    params = noise(task.init)
    memory = task.machine.init_memory(params["machine"], 1)
    ask = jax.jit(lambda query: task.answer(params, memory, query, jnp.ones(query.shape, bool)))
    same(ask(jnp.asarray(STRANGE)), ask(jnp.asarray(NEAREST)))
    kinds = Answers(Questions(query="kind", kinds=3), DIM, DIM)
    encoder = noise(kinds.init_encoder)
    mask = jnp.ones((1, 3), bool)
    encode = lambda *query: kinds.encode(encoder, None, questions_only(jnp.array([query]), mask))
    same(encode(-1, 1, 9), encode(0, 1, 2))


def test_choices():
    answers = Answers(Questions(query="words", answer="choice"), DIM, DIM, hidden=4)
    encoder, head = noise(answers.init_encoder), noise(answers.init_head)
    table = noise(lambda key: jnp.zeros((ITEMS, DIM)))
    x = jnp.ones((1, 1, DIM))

    @jax.jit
    def logits(choices):
        asked = dict(
            candidates=jnp.array([[[1], [2], [3]]]),
            candidate_mask=jnp.ones((1, 3, 1), bool),
            choices=choices,
            choice_mask=jnp.ones((1, 1, 3), bool),
            word_mask=jnp.ones((1, 1, 1), bool),
        )
        batch = questions_only(jnp.array([[[1]]]), jnp.ones((1, 1), bool), **asked)
        return answers.logits(encoder, head, lambda items: look_up(table, items), x, x, batch)

    same(logits(jnp.array([[[-1, 1, 7]]])), logits(jnp.array([[[0, 1, 2]]])))


def test_positions_before_the_first_segment_do_not_see_the_last():
    machine, params = small("gru").machine, small("gru").params
    items = jnp.asarray(np.random.default_rng(0).integers(0, ITEMS, (1, 3, LENGTH)))
    mask = jnp.ones((1, 3, LENGTH), bool)
    asked = small("gru").run(params, items, mask, positions=jnp.array([[-1, 0, 3, 7]])).asked
    same(jax.tree.map(lambda x: x[:, 0], asked), jax.tree.map(lambda x: x[:, 1], asked))
    same(jax.tree.map(lambda x: x[:, 3], asked), jax.tree.map(lambda x: x[:, 2], asked))
    positions = jnp.array([[-1, 2]])
    empty = memorize(machine, params, items[:, :0], mask[:, :0], positions=positions).asked
    same(empty.hidden, np.zeros((1, 2, DIM)))


def test_a_target_out_of_range_is_no_answer():
    logits, mask = jnp.array([[[0.0, 2.0], [1.0, 0.0], [0.5, 0.5]]]), jnp.ones((1, 3), bool)
    right = jnp.array([[False, True, False]])
    actual = heads.cross_entropy(logits, jnp.array([[-1, 1, 2]]), mask)
    same(actual, heads.cross_entropy(logits, jnp.array([[0, 1, 0]]), right))


@pytest.mark.parametrize("model", [gpt2.GPT2, transformer_xl.TransformerXL])
def test_tokens_of_sequence_models(model):
    layer = model(gpt2.Sizes(vocabulary=ITEMS, positions=4, dim=8, layers=1, heads=2, dropout=0.0))
    mask = jnp.ones((1, 4), bool)
    given = None if model is gpt2.GPT2 else ()
    params = noise(lambda key: layer.init(key, NEAREST, mask, given))
    read = jax.jit(lambda tokens: layer.apply(params, tokens, mask, given)[0])
    same(read(STRANGE), read(NEAREST))


def test_tokens_and_types_of_bert():
    layer = bert.Embeddings(bert.Sizes(vocabulary=ITEMS, positions=4, dim=8, layers=1, heads=2))
    mask, types = jnp.ones((1, 4), bool), jnp.array([[-1, 0, 1, 5]])
    params = noise(lambda key: layer.init(key, NEAREST, mask))
    expected = layer.apply(params, NEAREST, mask, jnp.clip(types, 0, 1))
    same(layer.apply(params, STRANGE, mask, types), expected)
