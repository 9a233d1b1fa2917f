"""Counts equal sums done by hand; a loop costs as much as the same loop unrolled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from rmjax.io.cost import bounded_loop, breakdown, flops, parameter_count, peak_bytes, tree_bytes


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("equation", "left", "right", "multiply_adds"),
    [
        ("mk,kn->mn", (3, 5), (5, 7), 3 * 5 * 7),
        ("bmk,bkn->bmn", (2, 3, 5), (2, 5, 7), 2 * 3 * 5 * 7),
        ("bhqd,bhkd->bhqk", (2, 4, 3, 8), (2, 4, 9, 8), 2 * 4 * 3 * 9 * 8),
        ("i,i->", (11,), (11,), 11),
        ("ijk,jkl->il", (2, 3, 5), (3, 5, 7), 2 * 3 * 5 * 7),
    ],
)
def test_products(equation, left, right, multiply_adds):
    counts = breakdown(lambda a, b: jnp.einsum(equation, a, b), zeros(*left), zeros(*right))
    assert counts == {"matmul": 2 * multiply_adds, "other": 0}


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (2, 1), (4, 1)])
def test_convolutions(groups, stride):
    image, kernel = zeros(2, 9, 9, 4), zeros(3, 3, 4 // groups, 8)

    def conv(x, k):
        options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
        return jax.lax.conv_general_dilated(x, k, (stride, stride), "VALID", **options)

    side = {1: 7, 2: 4}[stride]
    matmul = 2 * 2 * side * side * 8 * 9 * 4 // groups
    assert breakdown(conv, image, kernel) == {"matmul": matmul, "other": 0}


def test_the_gradient_of_a_product_is_three_products():
    def loss(a, b):
        return (a @ b).sum()

    one = breakdown(loss, zeros(3, 5), zeros(5, 7))["matmul"]
    squared = jax.value_and_grad(lambda ab: ((ab[0] @ ab[1]) ** 2).sum())
    both = breakdown(squared, (zeros(3, 5), zeros(5, 7)))["matmul"]
    assert one == 2 * 3 * 5 * 7 and both == 3 * one


def test_elementwise_reductions_and_moves():
    x = zeros(6, 4)
    assert flops(lambda x: jnp.exp(x) + x * 2, x) == 3 * 24
    for reduction in (lambda x: x.sum(), lambda x: x.max(0), lambda x: jnp.argmax(x)):
        assert flops(reduction, x) == 24
    assert flops(lambda x: x.T.reshape(-1)[None].astype(jnp.bfloat16), x) == 0
    assert flops(lambda x: jnp.concatenate([x, x])[2:5], x) == 0
    assert flops(lambda x, i: x[i], x, jnp.array([1, 2])) <= 4 * 2  # the signs of the indices
    assert flops(lambda x, y: x.at[0].add(y), x, zeros(4)) <= 4 + 4


def layer(x, w):
    return jnp.tanh(x @ w) + jax.nn.softmax(x)


def test_a_scan_costs_as_much_as_the_unrolled_loop():
    x, ws = zeros(3, 8), zeros(10, 8, 8)

    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]

    def unrolled(x, ws):
        for w in jnp.split(ws, 10):
            x = layer(x, w.reshape(8, 8))
        return x

    assert breakdown(scanned, x, ws) == breakdown(unrolled, x, ws)
    assert breakdown(scanned, x, ws)["matmul"] == 10 * 2 * 3 * 8 * 8
    four_times = lambda x, ws: jax.lax.scan(lambda x, _: (scanned(x, ws), None), x, None, length=4)
    nested = breakdown(lambda x, ws: four_times(x, ws)[0], x, ws)
    assert nested == {kind: 4 * n for kind, n in breakdown(scanned, x, ws).items()}


def wrapped(name):
    @jax.custom_vjp
    def custom_vjp(x, w):
        return layer(x, w)

    custom_vjp.defvjp(lambda x, w: (layer(x, w), None), lambda _, g: (g, None))

    @jax.custom_jvp
    def custom_jvp(x, w):
        return layer(x, w)

    custom_jvp.defjvp(lambda primals, _: (layer(*primals), layer(*primals)))
    other = {"jit": jax.jit(jax.jit(layer)), "remat": jax.checkpoint(layer)}
    return {"custom_vjp": custom_vjp, "custom_jvp": custom_jvp, **other}[name]


@pytest.mark.parametrize("name", ["jit", "remat", "custom_vjp", "custom_jvp"])
def test_a_wrapping_costs_nothing(name):
    arguments = zeros(3, 8), zeros(8, 8)
    assert breakdown(wrapped(name), *arguments) == breakdown(layer, *arguments)


def test_rematerialisation_is_counted():
    arguments = zeros(3, 8), zeros(8, 8)

    def loss(f):
        return lambda x, w: jnp.sin(f(jnp.sin(f(x, w)), w)).sum()

    plain = breakdown(jax.grad(loss(layer)), *arguments)["matmul"]
    assert breakdown(jax.grad(loss(jax.checkpoint(layer))), *arguments)["matmul"] > plain


def test_vmap_costs_as_much_as_single_calls():
    one = flops(layer, zeros(3, 8), zeros(8, 8))
    assert flops(jax.vmap(layer, (0, None)), zeros(6, 3, 8), zeros(8, 8)) == 6 * one


def test_a_branch_costs_its_maximum_and_a_while_loop_one_turn():
    x = zeros(8, 8)

    def branch(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ x, x)

    assert breakdown(branch, jax.ShapeDtypeStruct((), jnp.int32), x)["matmul"] == 2 * 2 * 8**3
    assert breakdown(loop, x) == {"matmul": 2 * 8**3, "other": 64 + 1}


def test_a_loop_with_a_bound_costs_its_largest_number_of_turns():
    loop = lambda x: bounded_loop(7, lambda x: x.sum() < 3, lambda x: x @ x, x)
    assert breakdown(loop, zeros(8, 8)) == {"matmul": 7 * 2 * 8**3, "other": 7 * (64 + 1)}
    once = bounded_loop(7, lambda x: x.sum() < 3, lambda x: x + 1, jnp.ones((2,)))
    assert once.tolist() == [2.0, 2.0]


def test_a_kernel_costs_its_number_of_programs():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    block = pl.BlockSpec((4, 8), lambda i, j: (i, 0))
    run = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((12, 8), jnp.float32),
        grid=(3, 2),
        in_specs=[block, pl.BlockSpec((8, 8), lambda i, j: (0, 0))],
        out_specs=block,
        interpret=True,
    )
    assert breakdown(run, zeros(12, 8), zeros(8, 8)) == {
        "matmul": 3 * 2 * 2 * 4 * 8 * 8,
        "other": 0,
    }


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_all_devices_count(how):
    count, spec = jax.device_count(), jax.sharding.PartitionSpec("data")
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = zeros(count, 3, 8), zeros(8, 8)
    mapped = {
        "pmap": jax.pmap(lambda x, w: x @ w, in_axes=(0, None)),
        "shard_map": jax.shard_map(
            lambda x, w: x @ w,
            mesh=mesh,
            in_specs=(spec, jax.sharding.PartitionSpec()),
            out_specs=spec,
        ),
    }[how]
    assert breakdown(mapped, x, w) == {"matmul": count * 2 * 3 * 8 * 8, "other": 0}


def test_agrees_with_xla_where_there_is_no_loop():
    arguments = zeros(64, 128), zeros(128, 128)
    gradient = jax.jit(jax.grad(lambda x, w: layer(x, w).sum()))
    analysis = gradient.lower(*arguments).compile().cost_analysis()
    counted = flops(jax.grad(lambda x, w: layer(x, w).sum()), *arguments)
    expected = analysis["flops"] + analysis.get("transcendentals", 0)
    assert counted == pytest.approx(expected, rel=0.05)


def test_sizes():
    tree = {"a": np.zeros((3, 5), np.float32), "b": [zeros(7), jnp.zeros((2,), jnp.bfloat16)]}
    assert parameter_count(tree) == 15 + 7 + 2
    assert tree_bytes(tree) == 4 * 22 + 2 * 2


def test_peak_bytes():
    def f(x):
        return (x @ x.T).sum()

    x = zeros(256, 512)
    assert peak_bytes(jax.jit(f).lower(x).compile()) >= tree_bytes(x) + 4
    step = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert tree_bytes(x) <= peak_bytes(step) < 2 * tree_bytes(x)
