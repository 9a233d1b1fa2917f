"""Each equation against an independent NumPy float64 oracle, to 1e-5 in fp32."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmjax import machines
from rmjax.layers import recurrent
from rmjax.layers.attention import additive_scores, masked_softmax
from rmjax.layers.dense import Dense
from rmjax.layers.embeddings import embed
from rmjax.layers.transformer import Transformer
from rmjax.reason import encoders, heads, hops
from rmjax.rehearsal import objectives, sampler
from rmjax.rehearsal.decoder import Decoder
from rmjax.run.step import init_state, make_train_step
from rmjax.types import Context, Task
from tests.oracles import close, f64
from tests.oracles import rehearsal as oracle
from tests.small import ITEMS, MACHINES, batch, noise, small, stream

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("rehearsal", {"heads": 2}),
        ("rehearsal-bigru", {"heads": None, "normalize": "items", "identity": True}),
        ("continual", {"heads": 2}),
    ],
)
def test_equations_1_to_3_and_the_segment_encoders(name, how):
    case, (items, mask) = small(name), stream()
    memory = case.run(case.params, items, mask).memory
    for row in range(3):
        close(memory.slots[row], oracle.memorize(f64(case.params), items[row], mask[row], **how))


def test_a_bound_cuts_long_slots_only():
    machine, params = bounded_slots(2.0), jax.tree.map(lambda x: 1.5 * x, small("continual").params)
    items, mask = stream()
    memory = machines.memorize(machine, params, items, mask).memory
    length = np.sqrt(np.square(memory.slots).mean(-1))
    assert (length < 1.99).any() and (length > 1.999).any()
    for row in range(3):
        close(memory.slots[row], oracle.memorize(f64(params), items[row], mask[row], 2, bound=2.0))


def test_a_bound_holds_in_a_long_stream_where_slots_grow():
    params = bounded_slots().init(jax.random.key(0))
    params["update"]["merge"] *= 1.5
    items, mask = np.ones((1, 200, 4), np.int32), np.ones((1, 200, 4), bool)
    slots = lambda bound: machines.memorize(bounded_slots(bound), params, items, mask).memory.slots
    assert np.abs(slots(0.0)).max() > 1e9
    assert np.sqrt(np.square(slots(2.0)).mean(-1)).max() <= 2.0


def bounded_slots(bound=0.0):
    _, settings = MACHINES["continual"]
    return machines.make("continual", ITEMS, **settings, slot_bound=bound)


def test_directly_reason_is_a_gru_over_the_whole_stream():
    case, (items, mask) = small("directly_reason"), stream()
    params, memory = f64(case.params), case.run(case.params, items, mask).memory
    answers = case.machine.read(case.params, memory, normal(3, 2, 8) * 0, np.ones((3, 2), bool))
    for row in range(3):
        h = np.zeros(8)
        for x in oracle.embed(params, items[row][mask[row]]):
            h = oracle.gru(params["encoder"], h, x)
        state, reader = np.concatenate([h, np.zeros(8)]), params["reader"]
        close(answers[row, 1], state @ reader["kernel"] + reader["bias"])


def test_multihop_reason_attends_to_a_bidirectional_gru_over_kept_items():
    case, (items, mask) = small("multihop_reason"), stream()
    params, memory = f64(case.params), case.run(case.params, items, mask).memory
    query = normal(3, 2, 8)
    answers = case.machine.read(case.params, memory, query, np.ones((3, 2), bool))
    for row in range(3):
        kept = items[row][mask[row]][-12:]  # the buffer's length
        every = np.ones(len(kept), bool)
        states = oracle.bigru(params["encoder"], oracle.embed(params, kept), every)
        expected = oracle.multihop(params["reader"], f64(query[row, 0]), states, every)
        close(answers[row, 0], expected[0])


def test_parts_of_the_buffer_draw_from_different_keys():
    """`init` splits its key for the other parameters, and no kernel comes from such a key."""
    machine, key = small("buffer").machine, jax.random.key(0)
    kernels = machine.init(key)["before"]
    for other in jax.random.split(key):
        drawn = nn.initializers.orthogonal()(other, kernels.shape)
        assert np.abs(kernels - drawn).max() > 0.1


def test_slots_of_the_buffer_hold_the_items_before_their_own():
    case, (items, mask) = small("buffer"), stream()
    params, memory = f64(case.params), case.run(case.params, items, mask).memory
    slots, slot_mask = case.machine.slots(case.params, memory)
    for row in range(3):
        kept = oracle.embed(params, items[row][mask[row]][-12:])  # the buffer's length
        latest = kept[-5:].copy()
        latest[1:] += kept[-5:-1] @ params["before"][0]
        assert slot_mask[row].all()
        close(slots[row], np.concatenate([latest, kept.mean(0, keepdims=True)]))


def test_the_gru_machine_is_a_gru_and_a_mean():
    case, (items, mask) = small("gru"), stream()
    params, memory = f64(case.params), case.run(case.params, items, mask).memory
    query = case.machine.embed(case.params, np.array([[1, 2]] * 3))
    answers = case.machine.read(case.params, memory, query, np.ones((3, 2), bool))
    for row in range(3):
        h, x = np.zeros(8), oracle.embed(params, items[row][mask[row]])
        for item in x:
            h = oracle.gru(params["gru"], h, item)
        close(memory.hidden[row], h)
        close(memory.history[row], x.mean(0))
        state = np.concatenate([h, x.mean(0), oracle.embed(params, 2)])
        reader = params["reader"]
        close(answers[row, 1], state @ reader["kernel"] + reader["bias"])


def test_the_decoder():
    decoder = Decoder(Transformer(2, 2))
    params = noise(lambda key: decoder.init(key, 8, 6, 4))
    x, slots = normal(2, 3, 4, 8), normal(2, 5, 6)
    mask, hidden = RNG.random((2, 3, 4)) < 0.7, RNG.random((2, 3, 4)) < 0.5
    hidden &= mask
    run = jax.jit(lambda *x: decoder(*x))
    out = run(params, x, mask, hidden, slots, np.ones((2, 5), bool))
    for b, f in np.ndindex(2, 3):
        valid = np.array([True, *mask[b, f]])
        fragment = x[b, f], mask[b, f], hidden[b, f]
        expected = oracle.decode(f64(params), *fragment, f64(slots[b]), 2)
        close(out[b, f][valid], expected[valid])


@pytest.mark.parametrize("sampled", [[3, 5, 5, 9, 11], [3, 3, 3], None], ids=str)
def test_equation_3(sampled):
    """A sampled item equal to the truth leaves the denominator; None takes all items."""
    recalled, table = normal(2, 3, 4, 8), normal(20, 8)
    truth, mask = RNG.integers(0, 20, (2, 3, 4)), RNG.random((2, 3, 4)) < 0.5
    truth[0, 0], mask[0, 0], mask[1, 2] = [3, 5, 3, 7], True, False
    table[0] = 100.0  # exp overflows at this scale
    truth[~mask] = 2**31 - 1
    ids = jnp.arange(20) if sampled is None else jnp.array(sampled)
    same = None if sampled is None else ids == truth[..., None]
    target = jnp.asarray(table).at[truth].get(mode="clip")
    losses = objectives.recollection(recalled / 100, target, jnp.asarray(table)[ids], same, mask)
    total, count = objectives.over_fragments(*losses)
    expected, others = [], sampled or range(20)
    for b, f in np.argwhere(mask.any(-1)):
        r, y = f64(recalled[b, f] / 100)[mask[b, f]], truth[b, f][mask[b, f]]
        expected.append(oracle.recollection(r, y, f64(table), others))
    close(total, sum(expected))
    assert count == len(expected)


def test_equation_4():
    positive, negative, pair = normal(2, 3) * 3, normal(2, 3) * 3, RNG.random((2, 3)) < 0.7
    losses = objectives.familiarity(positive, negative, pair)
    total, count = objectives.over_fragments(*losses)
    pairs = zip(f64(positive[pair]), f64(negative[pair]), strict=True)
    close(total, sum(oracle.familiarity(*logits) for logits in pairs))
    assert count == pair.sum()
    summed, streams = objectives.over_streams(*losses)
    assert summed == total and streams == pair.any(1).sum()  # CM Eq. 5
    # The loss falls as s+ rises and as s- falls.
    loss = lambda *x: objectives.familiarity(*x, pair)[0].sum()
    slopes = jax.grad(loss, (0, 1))(positive, negative)
    assert (slopes[0][pair] < 0).all() and (slopes[1][pair] > 0).all()
    assert not slopes[0][~pair].any()


def test_equation_5():
    params, (items, mask) = noise(lambda key: sampler.init(key, ITEMS, 8)), stream()
    query, valid = RNG.integers(0, ITEMS, (3, 2)), RNG.random((3, 2, 4)) < 0.6
    valid[1, 0] = False
    features = sampler.fragment_features(params, items, mask)
    asked = embed(params, query)
    scores, e = sampler.attend(params, asked, features, valid)
    reason = np.concatenate([e, asked], -1)
    for b, q in np.ndindex(3, 2):
        expected = oracle.sample(f64(params), query[b, q], items[b], mask[b], valid[b, q])
        close(scores[b, q], expected[0])
        close(reason[b, q], expected[1])


@pytest.mark.parametrize("steps", [{}, {"norm_hops": True}, {"mix_slots": 2}])
def test_multihop_attention(steps):
    params = noise(lambda key: hops.init(key, 6, 8, Context(hops=2, **steps)))
    query, slots, mask = normal(3, 2, 8), normal(3, 5, 6), RNG.random((3, 5)) < 0.6
    mask[2] = False
    answers, weights = hops.multihop(params, query, slots, mask)
    for b, q in np.ndindex(3, 2):
        expected = oracle.multihop(f64(params), f64(query[b, q]), f64(slots[b]), mask[b])
        close(answers[b, q], expected[0])
        close(weights[b, q], expected[1])
    read = lambda *inputs: hops.multihop(*inputs, mask)[0].sum()
    slopes = jax.jit(jax.grad(read, (0, 1, 2)))(params, query, slots)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
    assert not slopes[2][~mask].any() and slopes[2][mask].any()  # masked slots stay out


def test_slots_that_may_mix_are_read_as_they_are_before_training():
    query, slots, mask = normal(3, 2, 8), normal(3, 5, 6), RNG.random((3, 5)) < 0.6
    made = lambda **steps: hops.init(jax.random.key(3), 6, 8, Context(**steps))
    reads = lambda **steps: hops.multihop(made(**steps), query, slots, mask)
    chex.assert_trees_all_equal(reads(hops=2), reads(hops=2, mix_slots=2))
    chex.assert_trees_all_equal(reads(), reads(norm_hops=True))  # it lies between two hops


@pytest.mark.parametrize("hidden", [0, 5])
def test_the_click_head_and_its_loss(hidden):
    params = noise(lambda key: heads.init_click(key, 8, 8, hidden))
    x, query = normal(3, 2, 8), normal(3, 2, 8)
    target, mask = RNG.integers(0, 2, (3, 2)), RNG.random((3, 2)) < 0.7
    logits = heads.click(params, x, query)
    expected = np.zeros((3, 2))
    for i, j in np.ndindex(3, 2):
        expected[i, j] = oracle.click(f64(params), f64(x[i, j]), f64(query[i, j]))
    close(logits, expected)
    total, count = heads.click_loss(logits, target, mask)
    pairs = zip(expected[mask], target[mask], strict=True)
    close(total, sum(oracle.click_loss(*pair) for pair in pairs))
    assert count == mask.sum()


@pytest.mark.parametrize("hidden", [0, 5])
def test_classes_and_their_loss(hidden):
    """A question with a target outside the classes does not count.

    The loss of every other question is -log of the target's probability.
    """
    params, x = noise(lambda key: heads.init_classes(key, 8, 6, hidden)), normal(3, 2, 8)
    logits = heads.classify(params, x)
    target, mask = np.array([[0, 5], [3, 6], [2, 2]]), np.array([[1, 1], [0, 1], [1, 1]], bool)
    expected = 0.0
    for i, j in [(0, 0), (0, 1), (2, 0), (2, 1)]:
        probabilities = oracle.softmax(oracle.classes(f64(params), f64(x[i, j])))
        expected -= np.log(probabilities[target[i, j]])
    total, count = heads.cross_entropy(logits, target, mask)
    close(total, expected)
    assert count == 4


def test_the_scores_of_choices_depend_on_the_question():
    params = noise(lambda key: heads.init_click(key, 8, 8, 5))
    x, candidates, mask = normal(3, 2, 8), normal(3, 2, 4, 8), RNG.random((3, 2, 4)) < 0.7
    mask[0, 0], mask[1, 1], mask[..., 0] = False, False, mask[..., 0] | mask.any(-1)
    target = mask.argmax(-1)
    logits = heads.choose(params, x, candidates, mask)
    asked, losses = mask.any(-1), []
    for i, j in np.argwhere(asked):
        head, offered = f64(params), f64(candidates[i, j][mask[i, j]])
        expected = np.array([oracle.click(head, f64(x[i, j]), c) for c in offered])
        close(logits[i, j][mask[i, j]], expected)
        losses.append(-np.log(oracle.softmax(expected)[0]))
    total, count = heads.cross_entropy(logits, target, asked)
    close(total, sum(losses))
    assert count == asked.sum()
    loss = lambda p: heads.cross_entropy(heads.choose(p, x, candidates, mask), target, asked)[0]
    chex.assert_tree_all_finite(jax.grad(loss)(params))  # even with a question without choices


def test_a_question_of_words():
    params = noise(lambda key: encoders.init_words(key, 6, 8))
    words, mask = normal(3, 2, 5, 6), np.arange(5) < RNG.integers(0, 6, (3, 2, 1))
    q = encoders.encode_words(params, words, mask)
    for i, j in np.ndindex(3, 2):
        close(q[i, j], oracle.sentence(f64(params), f64(words[i, j]), mask[i, j]))


def test_the_gradient_of_a_gru():
    """The gradient equals finite differences of the same equation in float64."""
    params = noise(lambda key: recurrent.init_gru(key, 5, 5))
    h, gates, g = normal(3, 5), normal(3, 15), normal(3, 5)
    back = jax.vjp(recurrent.gru, params, h, gates)[1](g)
    inputs = params | {"h": h, "gates": gates}

    def loss(**changed):
        p = {name: f64(x) for name, x in (inputs | changed).items()}
        p |= {"input": np.eye(15), "bias": np.zeros(15)}
        return sum(f64(g[b]) @ oracle.gru(p, p["h"][b], p["gates"][b]) for b in range(3))

    actual = back[0] | {"h": back[1], "gates": back[2]}
    for name in ("hidden", "hidden_bias", "h", "gates"):
        x = f64(inputs[name])
        for index in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[index] = 1e-6
            change = loss(**{name: x + step}) - loss(**{name: x - step})
            close(actual[name][index], change / 2e-6)


@pytest.mark.parametrize("scale", [1, 10])
def test_additive_scores_and_their_gradient(scale):
    a, b, w, g = normal(2, 3, 8) * scale, normal(2, 5, 8) * scale, normal(8), normal(2, 3, 5)
    got, back = jax.vjp(additive_scores, a, b, w)
    t = np.tanh(f64(a)[:, :, None] + f64(b)[:, None])  # [2, 3, 5, 8]
    slope = f64(g)[..., None] * w * (1 - t**2)
    close(got, t @ f64(w))
    expected = slope.sum(2), slope.sum(1), np.einsum("bkn,bknm->m", f64(g), t)
    for actual, wanted in zip(back(g), expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize(
    ("a", "b"), [(30.0, -25.0), (-25.0, 40.0), (300.0, -300.0), (300.0, 300.0), (21.0, -22.0)]
)
def test_additive_scores_of_large_sums_and_differences(a, b):
    scores = additive_scores(jnp.full((1, 1), a), jnp.full((1, 1), b), jnp.ones(1))
    close(scores[0, 0], np.tanh(a + b))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_softmax_ignores_masked_values(garbage):
    x, mask = normal(3, 6), RNG.random((3, 6)) < 0.6
    mask[2] = False
    filled = np.where(mask, x, garbage).astype(np.float32)
    got, back = jax.vjp(lambda x: masked_softmax(x, mask), filled)
    expected = np.zeros((3, 6))
    for row in range(2):
        expected[row, mask[row]] = oracle.softmax(f64(x[row, mask[row]]))
    close(got, expected)
    g = normal(3, 6)
    close(back(g)[0], expected * (g - (expected * g).sum(-1, keepdims=True)))


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 3, 5), -1), ((5,), 2), ((2, 1, 5), 2), ((2, 3, 1), 1), (None, -1)]
)
def test_masked_softmax_over_any_axis_and_its_derivatives(shape, axis):
    x, mask = normal(2, 3, 5), None if shape is None else RNG.random(shape) < 0.7

    def plain(x):
        e = jnp.exp(x) if mask is None else jnp.exp(x) * mask
        return e / (e.sum(axis, keepdims=True) + 1e-30)

    softmax = lambda x: masked_softmax(x, mask, axis)
    close(softmax(x), plain(x))
    weights = normal(2, 3, 5)
    first = lambda f: jax.grad(lambda x: (weights * f(x)).sum())
    close(first(softmax)(x), first(plain)(x))
    second = lambda f: jax.grad(lambda x: (weights * first(f)(x)).sum())(x)
    close(second(softmax), second(plain))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_dense_layer_is_that_of_flax_with_a_transposed_kernel(dtype, use_bias):
    x, key = normal(2, 3, 5), jax.random.key(3)
    ours, flaxs = (layer(7, use_bias=use_bias, dtype=dtype) for layer in (Dense, nn.Dense))
    params, expected = ours.init(key, x)["params"], flaxs.init(key, x)["params"]
    turned = lambda p: p | {"kernel": p["kernel"].T}
    chex.assert_trees_all_equal(turned(params), expected)

    def run(layer, params):
        loss = lambda p, x: (layer.apply({"params": p}, x) ** 2).sum()
        y, (to_params, to_x) = jax.value_and_grad(loss, (0, 1))(params, x)
        return y, to_params, to_x

    y, to_params, to_x = run(ours, params)
    both = (y, turned(to_params), to_x), run(flaxs, expected)
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    chex.assert_trees_all_close(*both, rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_equal_dtypes(*both)


class Terms(Task):
    """A task with three terms; the last has a count of 0."""

    def init(self, key):
        return jnp.array([1.0, 2.0])

    def losses(self, params, frozen, carry, batch, key):
        x, y = params
        terms = {
            "a": (0.3, (6 * x, jnp.array(3.0))),
            "b": (0.7, (x * y, jnp.array(4.0))),
            "c": (9.0, (0 * y, jnp.array(0.0))),
        }
        return terms, carry


def test_equation_7_weighs_the_mean_of_each_term_and_follows_its_gradient():
    state = init_state(Terms(), optax.sgd(1.0), jax.random.key(0))
    after, _, metrics = make_train_step(Terms(), optax.sgd(1.0), seed=0)(state, (), None, batch())
    values = [metrics[name] for name in ("a", "b", "c", "loss")]
    close(values, [2.0, 0.5, 0.0, 0.3 * 2.0 + 0.7 * 0.5])
    close(state.params - after.params, [0.3 * 2 + 0.7 * 2 / 4, 0.7 * 1 / 4])
    assert after.step == 1
