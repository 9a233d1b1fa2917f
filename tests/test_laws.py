"""The laws of every memory machine: each law once, over one table of machines."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import machines
from rmjax.machines import memorize
from tests.small import (
    ITEMS,
    MACHINES,
    SLOTS,
    Small,
    answers,
    batch,
    keys,
    noise,
    recommendation,
    rehearsal,
    small,
    stream,
)

QUERY = np.array([[7, 9], [9, 3], [7, 7]], np.int32)
close = chex.assert_trees_all_close
same = chex.assert_trees_all_equal


CASES = [
    pytest.param(
        n, marks=pytest.mark.slow if n in ("rehearsal-bigru", "rehearsal-fused", "nutm") else ()
    )
    for n in MACHINES
]


@pytest.fixture(params=CASES)
def case(request) -> Small:
    return small(request.param)


LONG = 500  # segments


def in_blocks(name: str) -> Small:
    """The machine, which writes in blocks and computes them again."""
    return small(name, block=3, remat=True)


def rows(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


# Law 1: streaming = batch.


def test_any_split_of_a_stream_gives_the_same_memory(case):
    items, mask = stream()
    once = case.run(case.params, items, mask, key=keys(3))
    # Parts of 0 to 3 segments: each length is a program to compile.
    for cuts in ((1,), (2,), (3,), (1, 1), (0, 3, 4), (1, 2, 3)):
        memory, aux = case.machine.init_memory(case.params, 3), (0.0, 0.0)
        for part in zip(np.split(items, cuts, 1), np.split(mask, cuts, 1), strict=True):
            memory, _, added = case.run(case.params, *part, memory=memory, key=keys(3))
            aux = (aux[0] + added[0], aux[1] + added[1])
        close((memory, aux), (once.memory, once.aux), atol=1e-5)


def test_a_memory_at_a_position_holds_the_segments_before_it(case):
    items, mask = stream()
    positions = np.array([[0, 4, 2], [1, 1, 3], [3, 0, 2]])
    asked = case.run(case.params, items, mask, positions=positions).asked
    for row, q in np.ndindex(positions.shape):
        before = mask & (np.arange(4) < positions[row, q])[:, None]
        expected = rows(case.run(case.params, items, before).memory, row)
        close(rows(asked, (row, q)), expected, atol=1e-5)


def test_dropout_is_drawn_for_each_stream_and_each_segment():
    machine, params, run = small("rehearsal")[:3]
    items, mask = (np.repeat(x[1:2], 2, 0) for x in stream())
    alike = run(params, items, mask, key=jnp.stack([keys(1)[0]] * 2)).memory.slots
    assert (alike[0] == alike[1]).all()
    unlike = run(params, items, mask, key=keys(2)).memory.slots
    plain = run(params, items, mask).memory.slots
    assert (unlike[0] != unlike[1]).any() and (unlike[0] != plain[0]).any()
    # The second of two equal segments draws other dropout.
    twice = np.repeat(items[:, :1], 2, 1), np.ones((2, 2, 4), bool)
    both = run(params, *twice, key=keys(2), memory=machine.init_memory(params, 2)).memory
    first = run(params, *(x[:, :1] for x in twice), key=keys(2)).memory
    rewound = first.replace(segments=first.segments * 0)
    again = run(params, *(x[:, 1:] for x in twice), key=keys(2), memory=rewound).memory
    assert (both.slots != again.slots).any()


# Law 2: padding is inert and rows are independent.


def test_rows_are_independent(case):
    items, mask = stream()
    plain = case.exact(case.params, items, mask).memory
    drawn = case.run(case.params, items, mask, key=keys(3)).memory
    order = np.array([2, 0, 1])
    moved = items[order], mask[order]
    same(case.exact(case.params, *moved).memory, rows(plain, order))
    same(case.run(case.params, *moved, key=keys(3)[order]).memory, rows(drawn, order))
    others = zip((items, mask), stream(1), strict=True)
    replaced = [np.concatenate([x[:1], y[1:]]) for x, y in others]
    same(rows(case.exact(case.params, *replaced).memory, 0), rows(plain, 0))
    key = jnp.concatenate([keys(3)[:1], keys(3, 1)[1:]])
    same(rows(case.run(case.params, *replaced, key=key).memory, 0), rows(drawn, 0))


@pytest.mark.parametrize("garbage", [2**31 - 1, -1, -(2**31), ITEMS])
def test_padded_values_change_neither_memory_nor_answers_nor_gradients(case, garbage):
    items, mask = stream()
    filled = np.where(mask, items, garbage).astype(np.int32)
    zeros = np.where(mask, items, 0)
    expected = case.exact(case.params, zeros, mask).memory
    same(case.exact(case.params, filled, mask).memory, expected)
    learned = case.learn(case.params, filled, mask, QUERY)
    same(learned, case.learn(case.params, zeros, mask, QUERY))
    chex.assert_tree_all_finite(learned)


def test_an_empty_segment_returns_the_memory_bit_for_bit(case):
    items, mask = stream()
    memory = case.exact(case.params, items, mask).memory
    after = case.exact(case.params, items, np.zeros_like(mask), memory=memory).memory
    same(after, memory)
    mask[1] = False  # beside rows that are written
    after = case.exact(case.params, items, mask, memory=memory).memory
    same(rows(after, 1), rows(memory, 1))
    assert (after.segments == memory.segments + mask.any(-1).sum(-1)).all()


def test_a_padded_row_adds_nothing_to_aux(case):
    items, mask = stream()
    mask[1] = False
    alone = [mask & (np.arange(3) == row)[:, None, None] for row in (0, 2)]
    drawn = {"key": keys(3)}  # some machines draw what their loss asks for
    parts = [case.run(case.params, items, only, **drawn).aux for only in alone]
    memory, _, total = case.run(case.params, items, mask, **drawn)
    close(total, jax.tree.map(lambda *x: sum(x), *parts), rtol=1e-5)
    assert (total[0] > 0) == (total[1] > 0) == case.machine.has_loss
    assert not any(case.exact(case.params, items, np.zeros_like(mask), memory=memory).aux)


def test_padding_to_another_shape_changes_nothing(case):
    items, mask = stream()
    memory = case.run(case.params, items, mask, key=keys(3)).memory
    longer = [np.insert(x, [0, 2, 4, 4], 0, axis=1) for x in (items, mask)]
    more = [np.concatenate([x, x[:2] * 0]) for x in longer]
    padded = case.run(case.params, *more, key=jnp.concatenate([keys(3), keys(2)])).memory
    close(rows(padded, slice(3)), memory, atol=1e-6)


@pytest.mark.parametrize("name", MACHINES)
def test_shorter_segments_use_the_first_positions(name):
    machine, params, run = small(name)[:3]
    items, mask = stream()
    short = np.arange(mask.shape[2]) < 2  # of four
    padded = run(params, items, mask & short).memory
    close(run(params, items[..., :2], mask[..., :2]).memory, padded, atol=1e-6)


def test_longer_segments_are_refused_with_both_numbers():
    machine = machines.make("rehearsal", ITEMS, dim=16)
    params = jax.eval_shape(machine.init, jax.random.key(0))
    shapes = jax.ShapeDtypeStruct((3, 2, 25), np.int32), jax.ShapeDtypeStruct((3, 2, 25), bool)
    with pytest.raises(ValueError, match="rows of 25 .* positions for 20: .*segment_length"):
        jax.eval_shape(functools.partial(memorize, machine), params, *shapes)


def test_masked_queries_change_no_other_answer(case):
    memory = case.exact(case.params, *stream()).memory
    mask, read = np.array([[1, 0], [1, 0], [1, 1]], bool), case.read
    query = np.asarray(case.machine.embed(case.params, QUERY))
    garbage = read(case.params, memory, np.where(mask[..., None], query, 1e9), mask)
    assert (garbage[mask] == read(case.params, memory, query, mask)[mask]).all()
    chex.assert_tree_all_finite(garbage)


def test_the_order_of_questions_does_not_matter(case):
    memory = case.exact(case.params, *stream()).memory
    mask, read = np.ones(QUERY.shape, bool), case.read
    query = np.asarray(case.machine.embed(case.params, QUERY))
    expected = read(case.params, memory, query, mask)[:, ::-1]
    close(read(case.params, memory, query[:, ::-1], mask), expected, atol=1e-6)


# Law 3: scan = Python loop = jitted = one stream at a time.


def test_scan_equals_a_loop_and_one_stream_at_a_time(case):
    machine, params = case.machine, case.params
    items, mask = stream()
    scanned = case.run(params, items, mask).memory

    @jax.jit
    def write(memory, items, mask):
        features = machine.encode(params, items[:, None], mask[:, None])
        features = jax.tree.map(lambda x: x[:, 0], features)
        return machine.write(params, memory, features, mask)[0]

    looped = machine.init_memory(params, 3)
    for t in range(4):
        looped = write(looped, items[:, t], mask[:, t])
    close(looped, scanned, atol=1e-5)
    one = lambda x, m: memorize(machine, params, x[None], m[None]).memory
    single = jax.jit(jax.vmap(one))(items, mask)
    close(rows(single, (slice(None), 0)), scanned, atol=1e-5)


def test_results_without_jit_are_the_same():
    machine, params, run = small("gru")[:3]
    close(memorize(machine, params, *stream()).memory, run(params, *stream()).memory, atol=1e-5)


@pytest.mark.parametrize("name", MACHINES)
def test_blocks_and_remat_change_neither_answers_nor_gradients(name):
    params, (items, mask) = small(name).params, stream()
    loose = {"rtol": 1e-5, "atol": 5e-5}  # other programs round otherwise; gradients reach 10
    expected = small(name).learn(params, items, mask, QUERY)
    items, mask = (np.pad(x, ((0, 0), (0, LONG - 4), (0, 0))) for x in (items, mask))
    close(in_blocks(name).learn(params, items, mask, QUERY), expected, **loose)


def test_gradients_of_a_large_batch_are_the_sum_of_smaller_batches():
    _, params, _, _, learn, _ = small("rehearsal")
    data = *stream(batch=600, segments=3), np.tile(QUERY, (200, 1)), keys(600)
    parts = [learn(params, *(x[i : i + 100] for x in data)) for i in range(0, 600, 100)]
    close(learn(params, *data), jax.tree.map(lambda *x: sum(x), *parts), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["rehearsal", "gru"])
def test_truncated_gradients_pass_through_the_last_segments(name):
    """Gradients stop where the number of segments up to the last one is a multiple.

    They equal those of a memory that is a constant up to that place.
    """
    case, (items, mask) = small(name), stream(2, segments=5)
    key = keys(3)
    mask[:] = True

    @functools.partial(jax.jit, static_argnums=0)
    def learn(segments, params, items, mask):
        how = dict(key=key, gradient_segments=segments, block=2)
        loss = lambda p: jnp.sin(answers(case.machine, p, items, mask, QUERY, **how)).sum()
        return jax.grad(loss)(params)

    @jax.jit
    def by_hand(params):
        before = machines.memorize(case.machine, params, items[:, :3], mask[:, :3], key=key).memory
        before = jax.lax.stop_gradient(before)

        def loss(p):
            after = memorize(case.machine, p, items[:, 3:], mask[:, 3:], before, key).memory
            query, asked = case.machine.embed(p, QUERY), jnp.ones(QUERY.shape, bool)
            return jnp.sin(case.machine.read(p, after, query, asked)).sum()

        return jax.grad(loss)(params)

    gap = np.zeros_like  # empty segments do not count
    padded = [
        np.concatenate([x[:, :2], gap(x[:, :1]), x[:, 2:], gap(x[:, :2])], 1) for x in (items, mask)
    ]
    two, five, full = (learn(n, case.params, *padded) for n in (2, 5, 0))
    close(learn(2, case.params, items, mask), two, atol=1e-5)
    close(two, by_hand(case.params), atol=1e-5)
    close(five, full, atol=1e-6)
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), two, full)
    assert max(jax.tree.leaves(differences)) > 1e-4


@pytest.mark.parametrize("block", [1, 3])
def test_blocks_draw_the_same_dropout(block):
    data = small("rehearsal").params, *stream(), None, keys(3)
    expected = small("rehearsal").run(*data).memory
    close(small("rehearsal", block=block).run(*data).memory, expected, atol=1e-5)


# Law 4: the memory never depends on the questions.


def check_blind(case: Small, position: bool) -> None:
    """Scores without a query's part are the same for other queries, targets and negatives."""

    def read(params, memory, query, query_mask, key=None):
        slots, mask = case.machine.slots(params, memory)
        total = jnp.where(mask[..., None], slots, 0).sum((1, 2))
        return jnp.broadcast_to(total[:, None, None], (*query.shape[:2], 8))

    def embed(params, items):  # the head sees nothing of the query
        return jnp.zeros((*items.shape, 8))

    blind = case.machine._replace(read=read, embed=embed)
    task = recommendation(blind, rehearsal(recollection=0, familiarity=0))
    params = noise(task.init)
    one, other = batch(0, position=position), batch(1)
    changed = {"query": other.query, "negative_items": other.negative_items}
    asked = one.replace(target=1 - one.target, **changed)
    scores = jax.jit(task.scores)
    same(scores(params, asked), scores(params, one))


def test_memory_is_blind_to_queries_targets_and_negatives(case):
    check_blind(case, position=True)


@pytest.mark.parametrize("name", ["rehearsal", "gru", "buffer", "decayed"])
def test_the_final_memory_is_blind_too(name):
    """Without positions, scores read the memory after the last segment."""
    check_blind(small(name), position=False)


# Law 5: one compilation, one shape.


def test_a_second_call_compiles_nothing_and_keeps_types(case):
    run = jax.jit(functools.partial(memorize, case.machine))  # no other test has called it
    first = case.machine.init_memory(case.params, 3)
    memory = run(case.params, *stream(), first, keys(3)).memory
    chex.assert_trees_all_equal_structs(first, memory)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, memory)
    run(case.params, *stream(1), memory, keys(3, 1))
    assert run._cache_size() == 1


def test_init_works_on_shapes_alone(case):
    key = jax.random.key(0)
    shapes, params = jax.eval_shape(case.machine.init, key), jax.jit(case.machine.init)(key)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)
    chex.assert_tree_all_finite(params)
    memory = jax.eval_shape(lambda params: case.machine.init_memory(params, 3), shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(memory, case.machine.init_memory(case.params, 3))


def test_memory_of_an_empty_stream_counts_no_segments(case):
    assert not case.machine.init_memory(case.params, 3).segments.any()


# Law 6: memory does not grow with the stream.


@pytest.mark.parametrize("name", MACHINES)
def test_bytes_of_memory_do_not_depend_on_the_length(name):
    machine, params = small(name)[:2]
    keeps_items = MACHINES[name][0] in ("buffer", "directly_reason", "multihop_reason")
    assert machine.constant_size != keeps_items
    if keeps_items:
        return

    def size(segments):
        run = lambda *x: memorize(machine, params, *x).memory
        shapes = jax.eval_shape(run, *stream(segments=segments))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    assert size(1) == size(2) == size(500)


@pytest.mark.parametrize("length", [3, 10, 40])
def test_a_full_buffer_drops_the_oldest_and_counts_them(length):
    machine = machines.make("buffer", ITEMS, dim=8, buffer_length=length, recent=length)
    params = machine.init(jax.random.key(0))
    items, mask = stream(segments=3)
    memory = jax.jit(lambda *x: memorize(machine, *x).memory)(params, items, mask)
    slots, slot_mask = machine.slots(params, memory)
    for row in range(3):
        written = items[row][mask[row]]
        kept = np.asarray(machine.embed(params, written[-length:]))
        assert memory.count[row] == len(written)
        assert memory.dropped[row] == max(0, len(written) - length)
        expected = np.concatenate([kept, kept.mean(0, keepdims=True)])
        close(slots[row][slot_mask[row]], expected, atol=1e-6)


# Law 7: gradients are finite, and reach as far back as the machine says.


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_with_half_the_segments_empty(name):
    items, mask = stream(batch=3, segments=LONG)
    mask[0, ::2], mask[1, 1::2] = False, False
    case = in_blocks(name)
    chex.assert_tree_all_finite(case.learn(case.params, items, mask, QUERY))


def test_gradients_are_finite_with_one_segment_and_without_any(case):
    items, mask = stream(segments=1)
    items, mask[0] = items % (ITEMS - 4), False
    items[0] = np.arange(ITEMS - 4, ITEMS)  # no other row and no query has them
    learned = case.learn(case.params, items, mask, QUERY)
    chex.assert_tree_all_finite(learned)
    gradients = np.asarray(learned[1]["embed"])
    assert not gradients[items[0]].any() and gradients[items[1:][mask[1:]]].all(-1).any()


def test_gradients_reach_as_far_back_as_the_machine_says(case):
    # Every segment has items of its own, and no query asks for them.
    items = np.tile(np.arange(16, 32, dtype=np.int32).reshape(4, 4), (3, 1, 1))
    mask = np.tile(np.arange(4)[:, None] < 3, (3, 1, 4))
    _, grads = case.learn(case.params, items, mask, QUERY)
    norms = np.abs(np.asarray(grads["embed"])[items[0, :3]]).max((1, 2))
    reach = case.machine.gradient_range
    # A memory that forgets fast hands on little; out of reach the gradient is exactly 0.
    assert ((norms > 1e-9) == [reach is None or 3 - t <= reach for t in range(3)]).all()


# Wrong arguments.


def test_make_names_wrong_kinds_and_options():
    names = "rehearsal, continual, gru, buffer, directly_reason, multihop_reason"
    with pytest.raises(ValueError, match=names):
        machines.make("hopfield", ITEMS)
    for name, wrong in {"encoder": "cnn", "normalize": "both", "heads": 3}.items():
        with pytest.raises(ValueError, match=name):
            machines.make("rehearsal", ITEMS, **SLOTS | {name: wrong})
    with pytest.raises(ValueError, match="subspaces = 3 must divide dim = 8"):
        machines.make("continual", ITEMS, dim=8, heads=2, subspaces=3)
    with pytest.raises(ValueError, match="has no option 'encoder'; there are dim, buffer_length"):
        machines.make("buffer", ITEMS, encoder="transformer")
    with pytest.raises(ValueError, match="recent"):
        machines.make("buffer", ITEMS, buffer_length=3, recent=4)
    with pytest.raises(ValueError, match="recent = 0 and pooled = False leave nothing to read"):
        machines.make("buffer", ITEMS, recent=0, pooled=False)
    with pytest.raises(ValueError, match="before = 3 must be below recent = 3"):
        machines.make("buffer", ITEMS, recent=3, before=3)


def test_make_names_settings_out_of_range():
    wrong = {"dim": "32", "slots": 0, "layers": -1, "heads": 0, "segment_length": 0}
    wrong |= {"dropout": 2.0, "timescale": -1}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} = {value!r}: must be a "):
            machines.make("rehearsal", ITEMS, **SLOTS | {name: value})
    with pytest.raises(ValueError, match="num_items = -3: must be a whole number, at least 0"):
        machines.make("gru", -3)
    message = "machine 'rehearsal' has no option 'slot'; there are dim, .*slots, layers"
    with pytest.raises(ValueError, match=message):
        machines.make("rehearsal", ITEMS, slot=4)
    message = "machine 'gru' has no option 'slots'; there are dim, history_sum"
    with pytest.raises(ValueError, match=message):
        machines.make("gru", ITEMS, slots=4)


def test_memorize_names_wrong_arguments():
    machine, params = small("gru")[:2]
    items, mask = stream()
    with pytest.raises(ValueError, match="are ids and must be whole numbers, got float32"):
        memorize(machine, params, items.astype(np.float32), mask)
    with pytest.raises(ValueError, match="needs items and mask as arrays"):
        memorize(machine, params, items.tolist(), mask.tolist())
    message = "memory has 5 streams, items have 3: give the same streams"
    with pytest.raises(ValueError, match=message):
        memorize(machine, params, items, mask, machine.init_memory(params, 5))


def test_memorize_names_wrong_shapes():
    machine, params = small("gru")[:2]
    with pytest.raises(ValueError, match=r"\(3, 4, 4\).*\(3, 16\)"):
        memorize(machine, params, stream()[0], np.ones((3, 16), bool))
