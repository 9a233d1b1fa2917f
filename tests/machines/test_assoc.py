"""STM, HPMN and MIMN against their definitions in NumPy float64, and what their papers promise."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import machines
from rmjax.machines import mimn, stm
from rmjax.machines.hpmn import covariance, every
from tests.oracles import close, f64
from tests.oracles import hpmn as hpmn_oracle
from tests.oracles import mimn as mimn_oracle
from tests.oracles import rehearsal as oracle
from tests.oracles import stm as stm_oracle
from tests.small import DIM, ITEMS, MACHINES, N, noise, small, stream

RNG = np.random.default_rng(0)
ASKED = np.ones((3, 2), bool)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def other(name: str, **changes):
    """The machine of a row of tests.small with other settings, and its parameters."""
    kind, settings = MACHINES[name]
    machine = machines.make(kind, ITEMS, **settings | changes)
    return machine, noise(machine.init)


def answer(machine, params, memory, query):
    return jax.jit(machine.read)(params, memory, query, ASKED)


# STM.


def test_stm_is_its_definition():
    case, (items, mask), query = small("stm"), stream(), normal(3, 2, DIM)
    params, memory = f64(case.params), case.run(case.params, items, mask).memory
    answers, slots = answer(*case[:2], memory, query), case.machine.slots(case.params, memory)[0]
    own, own_params = other("stm", reader="own")
    inferred, reader = answer(own, own_params, memory, query), f64(own_params["reader"])
    for row in range(3):
        written, relations, _ = stm_oracle.memorize(params, items[row], mask[row])
        close(memory.items[row], written)
        close(memory.relations[row], relations)
        expected = stm_oracle.slots(params, relations)
        close(slots[row], expected)
        hops = oracle.multihop(params["reader"], f64(query[row, 0]), expected, np.ones(4, bool))
        close(answers[row, 0], hops[0])
        close(inferred[row, 1], stm_oracle.read(reader, f64(query[row, 1]), relations))


def test_relations_are_products_of_matrices():
    """A second derivation: R_0[i] = tanh(q_i * K)^T V."""
    q, k, v = f64(normal(3, 3, 5))
    close(stm_oracle.related(q, k, v), [np.tanh(row * k).T @ v for row in q], atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_1_keeps_the_last_relations_or_the_sum_of_all(alpha):
    case, (items, mask) = small("stm"), stream()
    cell = case.params["cell"]
    params = case.params | {"cell": cell | {"alpha": jnp.array([alpha, 0.3, 0.2])}}
    memory = case.run(params, items, mask).memory
    for row in range(3):
        news = stm_oracle.memorize(f64(params), items[row], mask[row])[2]
        expected = news[-1] if alpha == 0 else f64(cell["relations"]) + sum(news)
        close(memory.relations[row], expected, atol=1e-4 * np.abs(expected).max())


def test_stm_stays_finite_over_a_thousand_items_at_any_alpha():
    params = stm.init_cell(jax.random.key(0), DIM, 2, 1.0) | {"alpha": jnp.array([1.5, 1.0, 1.0])}
    features = stm.Features(normal(1, 1000, DIM), normal(1, 1000, DIM), *[None] * 2)
    gates = features.item @ params["item_gates"]
    features = features._replace(share=np.full((1, 1000, 2), 0.5, "f4"), gates=gates)
    state = params["items"][None], params["relations"][None]
    write = jax.jit(functools.partial(stm.write_items, params))
    sizes = []
    for some in (100, 1000):
        last = write(state, features, np.arange(1000)[None] < some)
        sizes.append(float(jnp.linalg.norm(last[1])))
    assert 0 < sizes[1] < 20 * sizes[0]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.001, -3.0])
def test_alpha_1_learns_beyond_its_edges(alpha):
    value, slope = jax.value_and_grad(stm.clipped)(alpha)
    assert value == np.float32(np.clip(alpha, -1, 1)) and slope == 1


def test_a_pooled_segment_is_written_as_one_item():
    machine, params = other("stm", pool=True)
    case, (items, mask) = small("stm"), stream(segments=2)
    pooled = jax.jit(functools.partial(machines.memorize, machine))(params, items, mask).memory
    x = np.asarray(machine.embed(params, items))
    total = np.where(mask[..., None], x, 0).sum(2, keepdims=True)
    mean = total / np.maximum(mask.sum(2), 1)[..., None, None]
    # The means become the items of a table, and each segment has one of them.
    table = params | {"embed": jnp.asarray(mean).reshape(-1, DIM) / np.sqrt(DIM)}
    index = np.arange(6).reshape(3, 2, 1).repeat(N, 2)
    once = mask.any(2)[..., None] & (np.arange(N) == 0)
    written = case.run(table, index, once).memory
    close(pooled.relations, written.relations)
    close(pooled.items, written.items)


# HPMN.


@pytest.mark.parametrize("changes", [{}, {"levels": 4, "period": 3}], ids=str)
def test_hpmn_equals_the_step_form_and_the_batch_form(changes):
    if changes:
        machine, params = other("hpmn", **changes)
        run = jax.jit(functools.partial(machines.memorize, machine))
    else:
        machine, params, run = small("hpmn")[:3]
    period, levels = changes.get("period", 2), changes.get("levels", 3)
    items, mask = stream(segments=8)
    parts = [run(params, items[:, :4], mask[:, :4]).memory]
    parts.append(run(params, items[:, 4:], mask[:, 4:], parts[0]).memory)
    for segments, memory in zip((4, 8), parts, strict=True):
        slots, valid = machine.slots(params, memory)
        for row in range(3):
            kept = items[row, :segments][mask[row, :segments]]
            expected = hpmn_oracle.online(f64(params), kept, period)
            close(memory.hidden[row], expected)
            close(expected, hpmn_oracle.in_batches(f64(params), kept, period), atol=1e-12)
            assert valid[row].tolist() == [len(kept) >= period**level for level in range(levels)]
            assert (slots[row] == memory.hidden[row]).all()


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_the_next_gru_gets_each_pth_state_at_any_count(period):
    states, mask = np.arange(40.0).reshape(4, 10, 1), RNG.random((4, 10)) < 0.6
    count = np.array([0, 1, 5, 20])
    picked, valid = every(states, mask, count, period)
    assert picked.shape == (4, -(-10 // period), 1)
    for row in range(4):
        order = count[row] + np.cumsum(mask[row])
        expected = states[row][mask[row] & (order % period == 0)]
        np.testing.assert_array_equal(picked[row][valid[row]], expected)


def test_one_level_is_a_gru():
    machine, params = other("hpmn", levels=1)
    gru, gru_params = small("gru")[:2]
    params = params | {"grus": [gru_params["gru"]], "embed": gru_params["embed"]}
    memory = jax.jit(functools.partial(machines.memorize, machine))(params, *stream()).memory
    close(memory.hidden[:, 0], small("gru").run(gru_params, *stream()).memory.hidden)


def test_hpmn_reads_in_hops_and_pays_for_covariance():
    case, (items, mask), query = small("hpmn"), stream(), normal(3, 2, DIM)
    params, memory = f64(case.params), case.run(case.params, items, mask).memory
    answers = answer(*case[:2], memory, query)
    for row in range(3):
        slots = f64(memory.hidden[row])
        close(answers[row, 1], hpmn_oracle.read(params["reader"], f64(query[row, 1]), slots))
    close(covariance(memory.hidden), [hpmn_oracle.covariance(s) for s in f64(memory.hidden)])
    total, count = 0.0, 0
    for row, t in np.ndindex(3, 4):
        if mask[row, t].any():
            kept = items[row, : t + 1][mask[row, : t + 1]]
            total += 1e-5 * hpmn_oracle.covariance(hpmn_oracle.online(params, kept, 2))
            count += 1
    aux = case.run(case.params, items, mask).aux
    close(aux[0], total, atol=1e-9)
    assert aux[1] == count


# MIMN.


def test_mimn_is_its_definition():
    case, (items, mask), query = small("mimn"), stream(), normal(3, 2, DIM)
    params, (memory, _, aux) = f64(case.params), case.run(case.params, items, mask)
    answers = answer(*case[:2], memory, query)
    step = functools.partial(mimn_oracle.mimn, capacity=40)
    total, count = 0.0, 0
    for row in range(3):
        kept = items[row][mask[row]]
        expected = mimn_oracle.memorize(params, kept, step)
        for name, value in expected.items():
            close(getattr(memory, name)[row], value)
        history = oracle.embed(params, kept)
        close(memory.history[row], history.mean(0))
        read = mimn_oracle.read(params, expected, history, f64(query[row, 1]), 40)
        close(answers[row, 1], read)
        for t in np.flatnonzero(mask[row].any(-1)):
            before = items[row, : t + 1][mask[row, : t + 1]]
            usage = mimn_oracle.memorize(params, before, step)["usage"]
            total += 1e-3 * np.mean((usage - usage.mean()) ** 2 / len(usage))
            count += 1
    close(aux[0], total, atol=1e-7)
    assert aux[1] == count


def test_mimn_without_its_additions_is_a_neural_turing_machine():
    machine, params = other("mimn", utilization=0.0, induction=False, reader="attention")
    items, mask = stream()
    memory = jax.jit(functools.partial(machines.memorize, machine))(params, items, mask).memory
    for row in range(3):
        expected = mimn_oracle.memorize(f64(params), items[row][mask[row]], mimn_oracle.ntm)
        for name in ("slots", "read", "hidden"):
            close(getattr(memory, name)[row], expected[name])
    assert not machine.has_loss and machine.slots(params, memory)[0].shape == (3, 4, DIM)


def test_mimn_stops_gradients_where_the_released_code_does():
    cell = mimn.Cell(utilization=True, induction=True, capacity=40)
    params = noise(lambda key: cell.init(key, DIM, 4))
    case, (items, _) = small("mimn"), stream(segments=1)
    start = case.machine.init_memory(case.params, 3)
    slots, usage = 0.4 * normal(3, 4, DIM), RNG.random((3, 4)).astype(np.float32)
    x = case.machine.encode(case.params, items, items >= 0)
    first = jax.tree.map(lambda y: y[:, 0, 0], x)

    @jax.jit
    def jacobians(bias, slots, usage):
        def run(bias, slots, usage):
            memory = start.replace(slots=slots, usage=usage)
            new = cell.step(params | {"controls_bias": bias}, memory, first)
            names = "slots", "usage", "added", "channels"
            return {name: getattr(new, name) for name in names}

        return jax.jacrev(run, (0, 1, 2))(bias, slots, usage)

    of = jacobians(params["controls_bias"], slots, usage)
    reached = lambda name, of_what: np.abs(of[name][of_what]).max() > 0
    columns = lambda name: np.abs(of[name][0]).reshape(-1, 4 * DIM + 6).max(0) > 0
    place, spread = np.arange(4 * DIM + 6), slice(2 * DIM + 2, 2 * DIM + 6)
    # The usage teaches the shift and the power alone; what is added teaches no write weight.
    assert (columns("usage") == np.isin(place, place[spread])).all()
    assert (columns("added") == (place >= 3 * DIM + 6)).all()
    assert not reached("channels", 1)  # no gradient from a channel to the slot that it reads
    assert not reached("slots", 2)  # nor from the controls to the usage that the controller sees
    assert reached("slots", 1) and reached("usage", 2)


def test_the_first_slots_of_mimn_are_not_trained():
    case = small("mimn")

    def total(params):
        memory = case.machine.init_memory(params, 3)
        return memory.slots.sum() + memory.read.sum()

    slope = jax.grad(total)(case.params)["cell"]
    assert not slope["slots"].any() and slope["read"].all()


def test_a_channel_is_a_slot_once_it_took_a_step():
    case, (items, mask) = small("mimn"), stream()
    memory = case.run(case.params, items, mask).memory
    _, empty = case.machine.slots(case.params, case.machine.init_memory(case.params, 3))
    assert (empty == (np.arange(8) < 4)).all()
    assert (memory.steps.sum(1) == mask.sum((1, 2))).all() and (memory.steps == 0).any()
    assert (case.machine.slots(case.params, memory)[1][:, 4:] == (memory.steps > 0)).all()


def test_rebalanced_weights_sum_to_one():
    raw = 3 * normal(5, 3), 3 * normal(5, 1)
    weights = f64(jax.nn.softmax(5 * normal(5, 6)))
    weights[3], weights[4] = 1 / 6, np.eye(6)[2]  # the powers of equal weights all underflow
    shift, power = jax.nn.softmax(raw[0]), 4 * (1 + jax.nn.softplus(raw[1]))
    power = power.at[3].set(4 * 21)
    raw[1][3] = 20.0
    got = jax.jit(mimn.rebalance)(jnp.asarray(weights, jnp.float32), shift, power)
    close(got.sum(-1), np.ones(5))
    for row in range(5):
        close(got[row], mimn_oracle.rebalance(weights[row], f64(raw[0][row]), f64(raw[1][row, 0])))
    slopes = jax.jit(jax.grad(lambda *x: mimn.rebalance(*x)[:, 0].sum(), (0, 1, 2)))
    assert all(np.isfinite(x).all() for x in slopes(jnp.eye(6)[:5], shift, power))


# All three.


@pytest.mark.parametrize("name", ["stm", "hpmn", "mimn"])
def test_readers_have_names(name):
    with pytest.raises(
        ValueError, match="reader = 'mine': must be a string, one of attention, own"
    ):
        machines.make(name, ITEMS, reader="mine")
