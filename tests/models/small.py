"""A small instance of every sequence model, for tests of laws."""

import jax
import jax.numpy as jnp

from rmjax import memoria
from rmjax.models import compressive, gpt2, infinity, memoria_gpt2, transformer_xl

N, VOCABULARY = 8, 11
SIZES = gpt2.Sizes(vocabulary=VOCABULARY, positions=N, dim=16, layers=2, heads=2)
ENGRAMS = memoria.MemoriaConfig(
    working=2,
    short_term_capacity=4,
    remind_short_term=2,
    remind_long_term=3,
    initial_lifespan=4.0,
    dim=16,
    ties="hash",
)


def compiled(model):
    """The model with jitted functions; without jit JAX compiles every operation on its own."""
    state = jax.jit(model.init_state, static_argnums=1)
    return model._replace(init=jax.jit(model.init), step=jax.jit(model.step), init_state=state)


def noisy(init, *args, scale=0.3):
    """init(key, *args) plus noise; an untrained memory hardly changes the predictions."""

    @jax.jit
    def drawn(key):
        leaves, tree = jax.tree.flatten(init(key, *args))
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            [x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        )

    return drawn(jax.random.key(0))


def models(sizes):
    made = {
        "transformer": gpt2.make(sizes),
        "transformer-xl": transformer_xl.make(sizes, memory=N),
        "transformer-xl-long": transformer_xl.make(sizes, memory=12, same_length=False, clamp=9),
        "compressive": compressive.make(sizes, memory=4, compressed=3, rate=4),
        "infinity": infinity.make(sizes, infinity.Signal(segment_length=N, basis=8, samples=6)),
        "memoria": memoria_gpt2.make(sizes, ENGRAMS, segment_length=N),
        "memoria-layer": memoria_gpt2.make(
            sizes, ENGRAMS, segment_length=N, memory_layer=0, activation="none"
        ),
    }
    return {kind: compiled(model) for kind, model in made.items()}


MODELS = models(SIZES)


def streams(key, batch, segments, length=N):
    """Draws tokens i32 [batch, segments, length]; the mask is all true."""
    tokens = jax.random.randint(key, (batch, segments, length), 0, VOCABULARY)
    return tokens, jnp.ones(tokens.shape, bool)
