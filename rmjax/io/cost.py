"""What a function costs, counted from its jaxpr: XLA's own analysis counts the body of a loop once."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# fmt: off
_MOVES_DATA = frozenset({
    "all_gather", "all_gather_invariant", "all_to_all", "axis_index", "bitcast_convert_type", "broadcast_in_dim",
    "concatenate", "convert_element_type", "copy", "copy_p", "device_put", "dynamic_slice", "dynamic_update_slice",
    "empty", "expand_dims", "gather", "iota", "name", "optimization_barrier", "pad", "pbroadcast", "pcast", "ppermute",
    "pvary", "random_clone", "random_seed", "random_unwrap", "random_wrap", "reshape", "reshard", "rev", "scatter",
    "select_n", "sharding_constraint", "slice", "split", "squeeze", "stop_gradient", "transpose",
})
# fmt: on
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}  # else 4
_READS_ALL = (
    "reduce",
    "arg",
    "cum",
    "scatter",
    "select_and_scatter",
)  # prefixes: one operation per element read


def flops(fn: Callable, *args: Any) -> int:
    """Floating-point operations of one call of `fn`, over all devices; arguments may be ShapeDtypeStructs."""
    return sum(breakdown(fn, *args).values())


def breakdown(fn: Callable, *args: Any) -> dict[str, int]:
    """{"matmul": operations of products and convolutions (2 per multiply-add), "other": of everything else}.

    Elementwise functions, exp and tanh too, are 1 per output, reductions 1 per input, moving data is 0.
    A scan is its length times its body, a branch the dearest one, a `while_loop` one turn, as its length is not known.
    """
    counts = _count(jax.make_jaxpr(fn)(*args).jaxpr)
    return {"matmul": counts["matmul"], "other": counts["other"]}


def peak_bytes(compiled: Any) -> int:
    """Bytes one device needs to run `jax.jit(fn).lower(...).compile()`: arguments, outputs and temporaries."""
    memory = compiled.memory_analysis()
    inputs_and_outputs = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
    return inputs_and_outputs + memory.temp_size_in_bytes


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """(operation between devices, bytes of its result on one of them), as often as each is in the compiled program: one
    in a loop once. Several arrays that travel together are one.
    """
    return [
        (
            name,
            sum(
                math.prod(map(int, filter(None, shape.split(",")))) * _BYTES.get(dtype, 4)
                for dtype, shape in found
            ),
        )
        for result, name in _COLLECTIVE.findall(compiled.as_text())
        if (found := _ARRAY.findall(result))
    ]


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or ShapeDtypeStructs) of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parameter_count(tree: Any) -> int:
    """Numbers in all arrays (or ShapeDtypeStructs) of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _count(jaxpr: Any) -> Counter:
    return sum((_count_equation(equation) for equation in jaxpr.eqns), Counter())


def _count_equation(equation: Any) -> Counter:
    name, params = equation.primitive.name, equation.params
    written = sum(_size(v) for v in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return Counter(
            matmul=2 * written * math.prod(equation.invars[0].aval.shape[d] for d in contracted)
        )
    if name == "conv_general_dilated":
        kernel, out_features = (
            equation.invars[1].aval.shape,
            params["dimension_numbers"].rhs_spec[0],
        )
        return Counter(matmul=2 * written * math.prod(kernel) // kernel[out_features])
    if name in _MOVES_DATA:
        return Counter()
    if name.startswith(_READS_ALL):
        return Counter(
            other=max(_size(v) for v in equation.invars[-1 if name.startswith("scatter") else 0 :])
        )
    bodies = [_count(body) for body in _bodies(params)]
    if not bodies:
        return Counter(other=written)
    if name == "cond":
        return max(bodies, key=lambda counts: counts.total())
    times = _times(name, params)
    return Counter({kind: times * number for kind, number in sum(bodies, Counter()).items()})


def _size(variable: Any) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))


def _bodies(params: dict) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _times(name: str, params: dict) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # jax.pmap too
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1
