import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.models import bert

V, N, B, DIM = 13, 7, 3, 8
SIZES = {
    "bert": bert.Sizes(vocabulary=V, positions=N, dim=DIM, layers=2, heads=2, dropout=0.4),
    "roberta": bert.roberta_sizes(
        vocabulary=V, positions=N + 2, dim=DIM, layers=2, heads=2, dropout=0.4, epsilon=0.1
    ),
}
roberta = functools.partial(bert.roberta_sizes, vocabulary=V)
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]], bool)


@pytest.fixture(params=SIZES)
def sizes(request):
    return SIZES[request.param]


@functools.cache
def made(sizes):
    """A classifier, jitted, and random parameters for it, biases and norms too."""
    model, rng = bert.make_classifier(sizes, 5), np.random.default_rng(1)
    like = jax.eval_shape(model.init, jax.random.key(0))
    return jax.jit(model.logits), jax.tree.map(
        lambda x: np.float32(rng.normal(0.1, 0.5, x.shape)), like
    )


def apply(module, params, *inputs):
    return jax.jit(module.apply)({"params": params}, *inputs)


@pytest.fixture
def tokens():
    return np.random.default_rng(2).integers(0, V, (B, N))


@pytest.fixture
def types():
    return np.random.default_rng(3).integers(0, 2, (B, N))


def dense(params, x):
    return x @ np.asarray(params["kernel"], np.float64).T + params["bias"]


def norm(params, x, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * params["scale"] + params["bias"]


def attention(sizes, params, x, context, mask):
    """One query and head at a time (Vaswani et al. 2017, 3.2).

    x [X, D], context [Y, D], mask [Y].
    """
    query, keys, value = (
        dense(params[name], y) for name, y in (("query", x), ("key", context), ("value", context))
    )
    width, out, seen = sizes.dim // sizes.heads, np.zeros(x.shape), np.flatnonzero(mask)
    weights = np.zeros((sizes.heads, len(x), len(context)))
    for head, i in itertools.product(range(sizes.heads), range(len(x)) if len(seen) else []):
        at = slice(head * width, (head + 1) * width)
        e = np.exp([query[i, at] @ keys[j, at] / math.sqrt(width) for j in seen])
        weights[head, i, seen] = e / e.sum()
        out[i, at] = weights[head, i] @ value[:, at]
    return norm(params["LayerNorm"], x + dense(params["output"], out), sizes.epsilon), weights


def hidden_states(sizes, params, tokens, mask, types):
    """Devlin et al. 2018 in float64, one text [N] at a time; gelu by the error function."""
    tables, position = params["embeddings"], []
    for valid in mask:
        first = 0 if sizes.padding is None else sizes.padding + 1
        before = len(position) if sizes.padding is None else mask[: len(position)].sum()
        position.append(
            sizes.padding if sizes.padding is not None and not valid else first + before
        )
    x = np.float64(
        tables["word_embeddings"][tokens] + tables["position_embeddings"][np.array(position)]
    )
    x = norm(tables["LayerNorm"], x + tables["token_type_embeddings"][types], sizes.epsilon)
    for i in range(sizes.layers):
        x, _ = attention(sizes, params[f"layer_{i}"]["attention"], x, x, mask)
        x = feedforward(sizes, params[f"layer_{i}"], x)
    return x


def feedforward(sizes, params, x):
    y = dense(params["intermediate"], x)
    y = y * np.vectorize(lambda z: (1 + math.erf(z / math.sqrt(2))) / 2)(y)
    return norm(params["LayerNorm"], x + dense(params["output"], y), sizes.epsilon)


def test_hidden_states_follow_the_equations_of_the_paper(sizes, tokens, types):
    (_, params), types = made(sizes), types % sizes.types
    out = apply(bert.Bert(sizes), params, tokens, MASK, types)
    expected = [hidden_states(sizes, params, *row) for row in zip(tokens, MASK, types, strict=True)]
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert out.dtype == jnp.float32


def test_attention_to_a_context_of_another_length():
    sizes, rng = SIZES["bert"], np.random.default_rng(4)
    x, context = rng.normal(size=(B, 3, DIM)), rng.normal(size=(B, 5, DIM))
    mask = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    params = made(sizes)[1]["layer_0"]["attention"]
    out, weights = apply(bert.Attention(sizes), params, np.float32(x), np.float32(context), mask)
    assert weights.dtype == jnp.float32 and weights.shape == (B, 2, 3, 5)
    for row in range(B):
        expected, seen = attention(sizes, params, x[row], context[row], mask[row])
        np.testing.assert_allclose(out[row], expected, atol=1e-5)
        np.testing.assert_allclose(weights[row], seen, atol=1e-5)
    assert (weights.sum(-1)[2] == 0).all() and (weights[1, :, :, ~mask[1]] == 0).all()


def test_logits_are_of_the_first_token(sizes, tokens):
    logits, params = made(sizes)
    first = [
        hidden_states(sizes, params, *row, np.zeros(N, int))[0]
        for row in zip(tokens, MASK, strict=True)
    ]
    expected = dense(params["classifier"], np.tanh(dense(params["pooler"], np.array(first))))
    np.testing.assert_allclose(logits(params, tokens, MASK), expected, atol=1e-4)


def test_padding_is_inert(sizes, tokens):
    logits, params = made(sizes)
    expected = logits(params, tokens, MASK)
    for other in (0, V - 1, -1, 10**6):
        np.testing.assert_array_equal(logits(params, np.where(MASK, tokens, other), MASK), expected)
    short = logits(params, tokens[1:, :5], MASK[1:, :5])
    np.testing.assert_allclose(short, expected[1:], atol=1e-6)


def test_rows_are_independent_dropout_included(sizes, tokens):
    logits, params = made(sizes)
    keys, order = jax.random.split(jax.random.key(5), B), np.array([2, 0, 1])
    for key in (None, keys):
        expected = np.asarray(logits(params, tokens, MASK, key))
        moved = logits(params, tokens[order], MASK[order], None if key is None else key[order])
        np.testing.assert_array_equal(moved, expected[order])
        changed = np.where(np.arange(B)[:, None] == 1, (tokens + 1) % V, tokens)
        other = logits(params, changed, MASK, key)
        np.testing.assert_array_equal(np.asarray(other)[[0, 2]], expected[[0, 2]])
        assert (other[1] != expected[1]).all()
    assert (logits(params, tokens, MASK, keys) != logits(params, tokens, MASK)).all()


def test_a_row_without_tokens_is_finite_and_so_is_its_gradient(tokens):
    mask = MASK & (np.arange(B) != 2)[:, None]
    for sizes in SIZES.values():
        logits, params = made(sizes)
        assert np.isfinite(logits(params, tokens, mask)).all()
    gradient = jax.jit(jax.grad(lambda p: jnp.square(logits(p, tokens, mask)).sum()))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_dropout_of_embeddings_and_layers(tokens):
    sizes, keys = SIZES["bert"], jax.random.split(jax.random.key(8), B)
    params = made(sizes)[1]
    embeddings, layer = bert.Embeddings(sizes), params["layer_0"]
    x = apply(embeddings, params["embeddings"], tokens, MASK)
    dropped = np.asarray(apply(embeddings, params["embeddings"], tokens, MASK, None, keys))
    np.testing.assert_allclose(dropped[dropped != 0], (x / 0.6)[dropped != 0], rtol=1e-5)
    assert np.mean(dropped == 0) == pytest.approx(0.4, abs=0.12)
    ones = {"value": {"kernel": np.zeros((DIM, DIM)), "bias": np.ones(DIM)}}
    plain = {
        "output": {"kernel": np.eye(DIM), "bias": np.zeros(DIM)},
        "LayerNorm": {"scale": np.ones(DIM), "bias": np.zeros(DIM)},
    }
    params, zeros = layer["attention"] | ones | plain, np.zeros((B, 100, DIM))
    out, weights = apply(bert.Attention(sizes), params, zeros, x, MASK, keys)
    # One token: dropout of the weights, then of the output.
    assert np.mean(np.asarray(out[2]) > 1e-3) == pytest.approx(0.6**2, abs=0.06)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)  # before dropout
    # With a constant norm the attention has no effect: only the feed-forward layer drops.
    constant = {"LayerNorm": {"scale": np.zeros(DIM), "bias": np.ones(DIM)}}
    still = {**layer, "attention": {**layer["attention"], **constant}}
    out = apply(bert.Layer(sizes), still, x, MASK, keys)
    assert (out != apply(bert.Layer(sizes), still, x, MASK)).any((1, 2)).all()


def test_dropout_of_the_head(sizes):
    """BERT's head drops the pooler's output; RoBERTa's head drops the pooler's input too."""
    head, x = bert.Head(sizes, DIM), np.full((200, 1, DIM), 0.5, np.float32)
    same = {"kernel": np.eye(DIM), "bias": np.zeros(DIM)}
    keys = jax.random.split(jax.random.key(6), len(x))
    out = np.asarray(apply(head, {"pooler": same, "classifier": same}, x, keys))
    early = 1.0 - sizes.dropout if sizes.early_dropout else 1.0
    values = {
        0.0: 1 - early * (1 - sizes.dropout),
        np.tanh(0.5 / early) / (1 - sizes.dropout): early * (1 - sizes.dropout),
    }
    near = {value: np.isclose(out, value, atol=1e-5).mean() for value in values}
    assert sum(near.values()) == pytest.approx(1)
    assert near == pytest.approx(values, abs=0.05)
    assert sizes.early_dropout == (sizes is SIZES["roberta"])


class Twice(bert.Layer):
    """A layer that attends to two contexts before the feed-forward layer, with one attention."""

    def setup(self):
        super().setup()
        self.crossattention = bert.Attention(self.sizes)

    def __call__(self, x, mask, first, second):
        x, _ = self.attention(x, x, mask)
        for context in (first, second):
            x, _ = self.crossattention(x, context, jnp.ones(context.shape[:2], bool))
        return self.feedforward(x)


def test_a_layer_with_another_attention():
    sizes, rng = SIZES["bert"], np.random.default_rng(7)
    x, first, second = (np.float32(rng.normal(size=(1, n, DIM))) for n in (4, 2, 3))
    mask, params = np.ones((1, 4), bool), made(sizes)[1]
    both = params["layer_0"] | {"crossattention": params["layer_1"]["attention"]}
    out = apply(Twice(sizes), both, x, mask, first, second)
    inputs = x, mask, first, second
    untrained = jax.eval_shape(Twice(sizes).init, jax.random.key(0), *inputs)["params"]
    assert jax.tree.map(jnp.shape, untrained) == jax.tree.map(jnp.shape, both)
    y, _ = attention(sizes, both["attention"], x[0], x[0], mask[0])
    for context in (first[0], second[0]):
        y, _ = attention(sizes, both["crossattention"], y, context, np.ones(len(context), bool))
    np.testing.assert_allclose(out[0], feedforward(sizes, both, y), atol=1e-5)


def test_bfloat16_products_and_f32_around_them(tokens):
    sizes = SIZES["roberta"]
    logits, params = made(sizes)
    half = bert.make_classifier(dataclasses.replace(sizes, dtype=jnp.bfloat16), 5)
    out = jax.jit(half.logits)(params, tokens, MASK)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, logits(params, tokens, MASK), atol=0.2)


def test_untrained_parameters():
    sizes = dataclasses.replace(SIZES["bert"], layers=1)
    params = jax.jit(bert.make_classifier(sizes, 5).init)(jax.random.key(0))
    for where, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = where[-1].key
        if name in ("bias", "scale"):
            assert (leaf == (name == "scale")).all()
        else:
            assert leaf.std() == pytest.approx(0.02, rel=3 / leaf.size**0.5)


@pytest.mark.parametrize("kind, longest", [("bert", N), ("roberta", N)])
def test_a_text_longer_than_the_positions_is_an_error(kind, longest):
    tokens = np.zeros((1, longest + 1), int)
    with pytest.raises(ValueError, match=f"{longest + 1} tokens is longer than the {longest} that"):
        jax.eval_shape(bert.Bert(SIZES[kind]).init, jax.random.key(0), tokens, tokens == 0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: bert.Sizes(vocabulary=V, types=0), "types must be at least 1, got 0"),
        (lambda: bert.Sizes(vocabulary=0), "vocabulary must be at least 1, got 0"),
        (lambda: roberta(dim=10, heads=4), "width 10 is not a multiple of heads 4"),
        (lambda: roberta(positions=2), "positions=2 with padding=1 has room for no token"),
        (lambda: bert.make_classifier(SIZES["bert"], 0), "classes must be at least 1, got 0"),
    ],
)
def test_impossible_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
