"""The Neural Stored-program Memory (NUTM, Le et al. 2020) over a DNC without links.

Its own idea among the machines of `mann.py` is that the interface has P stored programs: layers
with a key each. In every step the controller's query mixes them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal, normal

from rmjax.layers import addressing
from rmjax.machines import mann
from rmjax.registry import at_least, setting
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum


@dataclasses.dataclass(frozen=True)
class Settings(mann.Settings):
    """Settings of the machine: those of `mann.Settings`, and two of its own."""

    programs: int = setting(4, at_least(1), "nutm: stored programs, P")
    key_similarity: float = setting(
        0.1, at_least(0), "nutm: weight of the similarity of the programs' keys in its loss"
    )

    @property
    def ignores(self) -> dict[str, str]:
        """Keys that such a run does not read, see `rmjax.registry.Registry.ignored_by`."""
        return {} if self.programs > 1 else {"machine.key_similarity": "programs"}


def init_programs(key: Key, inputs: int, width: int, programs: int) -> Params:
    """Draws P layers with their keys, and the query's layer. Equal layers would stay equal."""
    a, b, c, d = jax.random.split(key, 4)
    kernel = lecun_normal(batch_axis=0)(a, (programs, inputs, width))
    return {
        "kernel": kernel,  # f32 [P, inputs, width]
        "bias": jnp.zeros((programs, width)),
        "keys": normal(1.0)(b, (programs, programs)),  # f32 [P, P]: keys are P wide
        "query": lecun_normal()(c, (inputs, programs)),
        "strength": lecun_normal()(d, (inputs, 1)),
    }


def mix(params: Params, h: Array) -> Array:
    """The share of each program, alpha: f32 [B, h] -> f32 [B, P]."""
    query, strength = jnp.tanh(h @ params["query"]), jax.nn.softplus(h @ params["strength"])
    shares: Array = addressing.content(jnp.tanh(params["keys"]), query[:, None], strength)
    return shares[:, 0]


def run(params: Params, h: Array) -> Array:
    """The mixed program: sum_p alpha_p (V_p h + b_p), f32 [B, h] -> f32 [B, width]."""
    shares = mix(params, h)
    inputs = (shares[..., None] * h[:, None]).reshape(len(h), -1)  # one product for all programs
    mixed: Array = inputs @ params["kernel"].reshape(inputs.shape[1], -1) + shares @ params["bias"]
    return mixed


def similarity(keys: Array) -> Array:
    """The mean cosine of pairs of keys f32 [P, P]; 0 for one key."""
    pairs = len(keys) * (len(keys) - 1)
    apart = jnp.where(jnp.eye(len(keys), dtype=bool), 0.0, addressing.cosine(keys, keys))
    mean: Array = apart.sum() / max(pairs, 1)
    return mean


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    Its loss depends on the parameters alone, so each segment that is not empty counts once. The
    weight of the loss is constant; in the released code it falls as 0.1 * 0.9^t. The slots of an
    empty stream are zeros; in the released code they are 1 / (K d).
    """

    def init(key: Key, inputs: int, widths: tuple[int, int]) -> Params:
        a, b = jax.random.split(key)
        read, write = widths
        return {
            "read": init_programs(a, inputs, read, settings.programs),
            "write": init_programs(b, inputs, write, settings.programs),
        }

    def interface(params: Params, h: Array) -> Array:
        return jnp.concatenate([run(params["read"], h), run(params["write"], h)], -1)

    def loss(params: Params, outputs: mann.Outputs, x: Array, mask: Array, key: Key | None) -> Sum:
        both = [similarity(params["interface"][part]["keys"]) for part in ("read", "write")]
        rows = mask.any(-1).sum().astype(jnp.float32)
        return settings.key_similarity * sum(both) / 2 * rows, rows

    active = settings.key_similarity > 0 and settings.programs > 1
    access = mann.Access(init=init, interface=interface, loss=loss if active else None)
    return mann.make(num_items, settings, context, access)
