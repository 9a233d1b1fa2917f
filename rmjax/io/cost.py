"""The cost of a function, counted from its jaxpr.

XLA's own analysis counts the body of a loop only once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax.extend import core
from jax.stages import Compiled

# fmt: off
_MOVES_DATA = frozenset({
    "all_gather", "all_gather_invariant", "all_to_all", "axis_index", "bitcast_convert_type",
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "device_put",
    "dynamic_slice", "dynamic_update_slice", "empty", "expand_dims", "gather", "get", "iota",
    "masked_load", "masked_swap", "name", "optimization_barrier", "pad", "pbroadcast", "pcast",
    "ppermute", "pvary", "random_clone", "random_seed", "random_unwrap", "random_wrap", "reshape",
    "reshard", "rev", "scatter", "select_n", "sharding_constraint", "slice", "split", "squeeze",
    "stop_gradient", "swap", "transpose",
})
# Bytes of a number in XLA's names of types; all others have 4.
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8,
          "f64": 8}
# fmt: on
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|"
    r"reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_BOUNDED = re.compile(r"at_most_(\d+)_turns")  # see `bounded_loop`
_C = TypeVar("_C")
# Prefixes of primitives with one operation for each element that they read.
_READS_ALL = ("reduce", "arg", "cum", "scatter", "select_and_scatter")


def flops(fn: Callable, *args: Any) -> int:
    """Floating-point operations of one call, over all devices.

    Args:
      fn: the function.
      *args: arrays or ShapeDtypeStructs.

    Returns:
      Their number, as `breakdown` counts.
    """
    return sum(breakdown(fn, *args).values())


def breakdown(fn: Callable, *args: Any) -> dict[str, int]:
    """Floating-point operations of one call, over all devices, by type.

    A multiply-add counts as 2. Elementwise functions, exp and tanh too, count as 1 for each output,
    reductions as 1 for each input, moves of data as 0. A scan costs its length times its body, a
    Pallas kernel its number of programs, a branch as much as the most expensive one. A `while_loop`
    counts as one turn, since its length is unknown; use `bounded_loop` if it has a bound.

    Args:
      fn: the function.
      *args: arrays or ShapeDtypeStructs.

    Returns:
      {"matmul": operations in matrix products and convolutions, "other": all other operations}.
    """
    counts = _count(jax.make_jaxpr(fn)(*args).jaxpr)
    return {"matmul": counts["matmul"], "other": counts["other"]}


def bounded_loop(most: int, more: Callable[[_C], Any], body: Callable[[_C], _C], carry: _C) -> _C:
    """Runs `jax.lax.while_loop`; its cost counts as that of the largest number of turns.

    Args:
      most: this number. It is a note for `breakdown`, and does not end the loop.
      more: carry -> bool [], whether there is another turn.
      body: carry -> carry.
      carry: the first one.

    Returns:
      The last carry.
    """

    def loop(carry: _C) -> _C:
        return jax.lax.while_loop(more, body, carry)

    loop.__name__ = f"at_most_{most}_turns"  # the one thing of a jitted function that jaxprs keep
    return jax.jit(loop)(carry)


def peak_bytes(compiled: Compiled) -> int:
    """Bytes that one device needs: arguments, outputs and temporaries.

    Args:
      compiled: from `jax.jit(fn).lower(...).compile()`.

    Returns:
      The number of bytes.
    """
    memory = compiled.memory_analysis()
    assert memory is not None  # some backends have no analysis
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    shared = memory.alias_size_in_bytes
    return int(arguments + outputs - shared + memory.temp_size_in_bytes)


def collectives(compiled: Compiled) -> list[tuple[str, int]]:
    """The operations between devices in a compiled program.

    An operation in a loop counts once. Arrays that travel together are one operation.

    Args:
      compiled: from `jax.jit(fn).lower(...).compile()`.

    Returns:
      (name of the operation, bytes of its result on one device), in the order of the program.
    """
    size = lambda shape: math.prod(map(int, filter(None, shape.split(","))))
    operations, program = [], compiled.as_text()
    assert program is not None
    for result, name in _COLLECTIVE.findall(program):
        if arrays := _ARRAY.findall(result):
            total = sum(size(shape) * _BYTES.get(dtype, 4) for dtype, shape in arrays)
            operations.append((name, total))
    return operations


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays or ShapeDtypeStructs of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parameter_count(tree: Any) -> int:
    """Numbers in all arrays or ShapeDtypeStructs of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _count(jaxpr: core.Jaxpr) -> Counter[str]:
    return sum((_count_equation(equation) for equation in jaxpr.eqns), Counter())


def _count_equation(equation: core.JaxprEqn) -> Counter[str]:
    """The operations of one equation, those of inner jaxprs included."""
    name, params = equation.primitive.name, equation.params
    written = sum(_size(v) for v in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        return Counter(matmul=2 * written * math.prod(left[d] for d in contracted))
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        out_features = params["dimension_numbers"].rhs_spec[0]
        return Counter(matmul=2 * written * math.prod(kernel) // kernel[out_features])
    if name in _MOVES_DATA:
        return Counter()
    if name.startswith(_READS_ALL):
        read = equation.invars[-1 if name.startswith("scatter") else 0 :]
        return Counter(other=max(_size(v) for v in read))
    bodies = [_count(body) for body in _bodies(params)]
    if not bodies:
        return Counter(other=written)
    if name == "cond":
        return max(bodies, key=lambda counts: counts.total())
    times = _times(name, params)
    return Counter({kind: times * number for kind, number in sum(bodies, Counter()).items()})


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())


def _size(variable: core.Var | core.Literal) -> int:
    return math.prod(_shape(variable))


def _bodies(params: Mapping[str, object]) -> Iterator[core.Jaxpr]:
    """The inner jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _times(name: str, params: Mapping[str, Any]) -> int:
    """How often an equation runs its inner jaxpr."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name in ("jit", "pjit") and (bounded := _BOUNDED.fullmatch(params["name"])):
        return int(bounded[1])
    if name == "shard_map":  # jax.pmap too
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1
