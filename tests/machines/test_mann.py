"""DNC, NUTM and DMSDNC: oracles, and the laws of their parts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import machines
from rmjax.layers import addressing
from rmjax.machines import dnc, mann, nutm
from rmjax.types import Context
from tests.oracles import close, f64
from tests.oracles import mann as oracle
from tests.small import DIM, ITEMS, MACHINES, N, keys, noise, small, stream

RNG = np.random.default_rng(0)
SIZES = {"dim": DIM, "slots": 4, "read_heads": 2}


def same(one, other):
    """Compares the fields that two memories share."""
    shared = vars(one).keys() & vars(other).keys()
    jax.tree.map(close, *({name: vars(m)[name] for name in shared} for m in (one, other)))


@functools.cache
def plain():
    """The cell without links, programs and blocks."""
    machine = mann.make(ITEMS, mann.Settings(**SIZES), Context(N), mann.Access())
    machine = machine._replace(write=machines.scan.inert(machine.write))
    return jax.jit(functools.partial(machines.memorize, machine))


# Oracles.


@pytest.mark.parametrize(("name", "blocks"), [("dnc", 1), ("nutm", 1), ("dmsdnc", 2)])
def test_the_equations(name, blocks):
    """The memory is not empty before: rounding would decide the order of equal usages."""
    case, (items, mask) = small(name), stream()
    before = case.machine.init_memory(case.params, 3)
    usage, slots = RNG.random(before.usage.shape), RNG.normal(size=before.slots.shape)
    before = before.replace(usage=jnp.float32(usage), slots=jnp.float32(slots))
    memory = case.run(case.params, items, mask, memory=before).memory
    for row in range(3):
        start = oracle.empty(blocks, 4 // blocks, 2, DIM, DIM)
        start |= {"usage": usage[row], "slots": slots[row]}
        expected, _ = oracle.memorize(f64(case.params), start, items[row], mask[row], name)
        for field in vars(memory).keys() & expected.keys():
            close(getattr(memory, field)[row], expected[field], err_msg=field)


@pytest.mark.parametrize("everything", [False, True])
def test_the_refreshing_loss(everything):
    items, mask = stream(batch=2, segments=2)
    items[0, 0, :2] = 7  # an equal item is no alternative
    how = MACHINES["dmsdnc"][1] | {"refresh_rate": 1.0, "refresh_all": everything}
    machine, params = machines.make("dmsdnc", ITEMS, **how), small("dmsdnc").params
    aux = jax.jit(lambda *x: machines.memorize(machine, params, *x, key=keys(2)).aux)
    total, count = aux(items, mask)
    expected = 0.0
    for row in range(2):
        p, start = f64(params), oracle.empty(2, 2, 2, DIM, DIM)
        _, outputs = oracle.memorize(p, start, items[row], mask[row], "dmsdnc")
        expected += oracle.refresh(p, outputs, items[row], mask[row], everything)
    close(total, expected)
    assert machine.has_loss and count == mask.sum()
    total, count = aux(items, mask & [[[True]], [[False]]])  # an empty stream adds nothing
    assert count == mask[0].sum() and 0 < total < expected


def test_the_similarity_of_programs():
    for number in (2, 5):
        close(nutm.similarity(x := RNG.normal(size=(number, number))), oracle.similarity(x))
    case, (items, mask) = small("nutm"), stream()
    total, count = case.run(case.params, items, mask).aux
    parts = [oracle.similarity(f64(case.params["interface"][p]["keys"])) for p in ("read", "write")]
    assert case.machine.has_loss and count == mask.any(-1).sum()
    close(total, 0.1 * np.mean(parts) * count)


# Addressing.


@pytest.mark.parametrize("kind", ["random", "many", "equal", "empty", "full"])
def test_allocation(kind):
    usage = {"random": RNG.random(7), "equal": np.array([0.5, 0.2, 0.5, 0.2])}
    usage |= {"many": RNG.random(20) ** 0.1, "empty": np.zeros(20), "full": np.ones(20)}
    weights, slopes = jax.jit(jax.value_and_grad(lambda u: addressing.allocate(u).sum()))(
        jnp.asarray(usage[kind], jnp.float32)
    )
    close(addressing.allocate(usage[kind].astype(np.float32)), oracle.allocation(usage[kind]))
    assert weights <= 1 + 1e-6 and np.isfinite(slopes).all()


@pytest.mark.parametrize("slots", [5, 20])
def test_usages_that_differ_by_rounding_are_equal(slots):
    usage = jnp.full(slots, 0.25).at[::2].add(-6e-8)
    close(addressing.allocate(usage), oracle.allocation(np.full(slots, 0.25)))


@pytest.mark.parametrize(("fall", "way"), [(0.5, 1), (2.0, -1)])
def test_a_later_slot_comes_first_if_its_usage_is_smaller_by_a_tie_for_each_slot(fall, way):
    usage = 0.25 - fall * addressing.TIE * np.arange(20.0)
    expected = oracle.allocation(np.full(20, 0.25))[::way]
    close(addressing.allocate(jnp.asarray(usage, jnp.float32)), expected, rtol=3e-4)


def test_an_empty_memory_is_like_nothing_and_has_finite_gradients():
    memory, key, strength = jnp.zeros((3, 4)), jnp.ones((1, 4)), jnp.ones(1)
    weights, back = jax.vjp(addressing.content, memory, key, strength)
    close(weights, np.full((1, 3), 1 / 3))
    assert all(np.isfinite(x).all() for x in back(jnp.ones((1, 3))))


def test_gradients_of_usage_pass_through_free_gates_alone():
    usage, written, read, free = (
        jnp.full(3, 0.5),
        jnp.full(3, 0.3),
        jnp.full((2, 3), 0.2),
        jnp.ones(2),
    )
    loss = lambda *x: addressing.update_usage(*x).sum()
    _, to_written, _, to_free = jax.grad(loss, (0, 1, 2, 3))(usage, written, read, free)
    assert not to_written.any() and (to_free < 0).all()


def with_gates(params, **gates):
    """The parameters of a machine with one linear interface, whose write gates are constant."""
    layer = dict(params["interface"])
    for name, value in gates.items():
        place = {"allocate": -2, "write": -1}[name]
        layer["bias"] = layer["bias"].at[place].set(value)
        layer["kernel"] = layer["kernel"].at[:, place].set(0.0)
    return params | {"interface": layer}


def test_a_closed_write_gate_leaves_the_slots():
    case, (items, mask) = small("dnc"), stream()
    memory = case.run(case.params, items, mask).memory
    params = with_gates(case.params, write=-1e9)
    after = case.run(params, items, mask, memory=memory).memory
    np.testing.assert_array_equal(after.slots, memory.slots)
    assert (after.hidden != memory.hidden).any()


def test_the_first_allocated_write_lands_on_the_first_slot():
    case, (items, mask) = small("dnc"), stream()
    params = with_gates(case.params, allocate=1e9, write=1e9)
    alone = np.zeros_like(mask)
    alone[:, 0, 0] = True  # one item in each stream
    memory = case.run(params, items, alone).memory
    close(memory.write_weights[:, 0], np.tile([1, 0, 0, 0], (3, 1)))
    sizes = np.abs(memory.slots[:, 0]).max(-1)  # of the slots [3, 4]
    assert (sizes[:, 0] > 1e-3).all() and (sizes[:, 1:] < 1e-4).all()


# What is each machine's own.


def test_links_lead_to_the_slot_that_was_written_next():
    memory = small("dnc").machine.init_memory(None, 1)
    one_hot = lambda k: jnp.eye(4)[jnp.array([[k]])]  # [1, 1, 4]
    content, modes = jnp.zeros((1, 1, 2, 4)), jnp.full((1, 1, 2, 3), -1e9)
    for k in (2, 0, 3):
        memory = dnc.look(memory.replace(write_weights=one_hot(k)), content, modes)
    # Nothing more is written; head 0 goes back from slot 0, and head 1 goes on from slot 0.
    memory = memory.replace(write_weights=jnp.zeros((1, 1, 4)), read_weights=one_hot([0, 0]))
    modes = modes.at[0, 0, 0, 0].set(1e9).at[0, 0, 1, 2].set(1e9)
    close(dnc.look(memory, content, modes).read_weights[0, 0], np.eye(4)[[2, 3]])


def test_one_program_is_a_dnc_without_links():
    machine = machines.make("nutm", ITEMS, **SIZES, programs=1)
    params, data = noise(machine.init), stream()
    memory, _, aux = jax.jit(functools.partial(machines.memorize, machine))(params, *data)
    assert not machine.has_loss and aux == (0, 0)
    both = [params["interface"][part] for part in ("read", "write")]
    layer = {name: jnp.concatenate([p[name][0] for p in both], -1) for name in ("kernel", "bias")}
    same(memory, plain()(params | {"interface": layer}, *data).memory)


def test_a_sure_choice_runs_one_program():
    params = noise(lambda key: nutm.init_programs(key, 6, 5, 3))
    h = jnp.asarray(RNG.normal(size=(1, 6)), jnp.float32)
    params["strength"] = 1e4 * h.T
    for p in range(3):
        # The query is the key of program p.
        params["query"] = h.T @ params["keys"][p][None] / (h @ h.T)
        close(nutm.mix(params, h), np.eye(3)[[p]])
        close(nutm.run(params, h), h @ params["kernel"][p] + params["bias"][p])


def test_one_block_is_a_dnc_without_links():
    machine = machines.make("dmsdnc", ITEMS, **SIZES, memory_blocks=1)
    params, data = noise(machine.init), stream()
    memory = jax.jit(functools.partial(machines.memorize, machine))(params, *data).memory
    width, reads = DIM + 3, 2 * (DIM + 3)  # a head's part, with the gate at its end
    place = np.arange(params["interface"]["bias"].size)
    keep = (place >= reads) | (place % width < width - 1)
    layer = jax.tree.map(lambda x: x[..., keep], params["interface"])
    same(memory, plain()(params | {"interface": layer}, *data).memory)


def test_gated_reads_of_all_blocks_sum_to_one():
    case = small("dmsdnc")
    weights = case.run(case.params, *stream()).memory.read_weights  # [B, G, R, J]
    assert weights.shape == (3, 2, 2, 2) and (weights > 0).all()
    close(weights.sum((1, 3)), np.ones((3, 2)))
    assert (np.abs(weights.sum(3) - 0.5) > 1e-3).any()


def test_without_draws_there_is_no_refreshing_loss():
    case = small("dmsdnc")
    assert case.run(case.params, *stream()).aux == (0, 0)  # without a key, as in evaluation
    machine = machines.make("dmsdnc", ITEMS, **SIZES, refresh_rate=0.0)
    assert not machine.has_loss and "refresh" not in jax.eval_shape(machine.init, jax.random.key(0))


def test_the_state_of_the_controller_as_one_more_slot():
    machine = machines.make("dnc", ITEMS, **SIZES, hidden_slot=True)
    memory = small("dnc").run(small("dnc").params, *stream()).memory
    slots, mask = machine.slots(small("dnc").params, memory)
    assert slots.shape == (3, 5, DIM) and mask.all()
    np.testing.assert_array_equal(slots[:, 4], memory.hidden)


def test_contradictions_are_named():
    with pytest.raises(ValueError, match="memory_blocks = 3 must divide slots = 4"):
        machines.make("dmsdnc", ITEMS, **SIZES, memory_blocks=3)
    with pytest.raises(ValueError, match="refresh_all = True: the items are features"):
        machines.make("dmsdnc", 0, **SIZES, width=5, refresh_all=True)
    with pytest.raises(ValueError, match="hidden_slot = True .* hidden = 5 must be dim = 8"):
        machines.make("nutm", ITEMS, **SIZES, hidden=5, hidden_slot=True)
