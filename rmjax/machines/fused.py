"""The scan of the rehearsal machine as one kernel, forward and backward.

`write_segments` does what `lax.scan` over `write` does. The scan starts dozens of small kernels for
each segment, this starts one for all segments. On a CUDA device it is Pallas, lowered by Triton.
JAX 0.11 and 0.12 still have that lowering, but they warn that it will go. Mosaic GPU, its successor
in Pallas, has no float32 products. Elsewhere Pallas interprets the kernel, which is for tests.

Some products leave the sequential part, and run for all segments at once:

    before  W2 f + b of Eq. 1, and the GRU's input kernel times f: (p f) W = p (f W), p = weights.
    inside  a = m W1 and the three recurrent products; scores; p; the GRU.
    after   gradients of the kernels: one product of the memories with the gradients of a and of
            the recurrent products, which the backward kernel writes.

The last choice writes 20 B T K d bytes in one launch. At T 50, K 20, d 64 and 1,024 streams that is
1.3 GB, less than a millisecond on an H100. Sums inside the kernel would need d x 4d numbers for
each stream, which fit on no chip from d = 128 on. The forward kernel writes memories, p and e^2a of
each segment; the backward kernel computes the gates again.

One program of 256 threads writes one stream, so any number of streams will do. A tile has 2^i rows
and columns, at least 16. Masked loads and stores cut it to K slots, N items and d features; d has
blocks of 64. Loops over blocks are not unrolled, so registers do not depend on d. The memory has 4
K d bytes. It passes from segment to segment through the cache of its multiprocessor, and it is
written for the backward pass in any case.

Triton 3.9 compiles it for sm_90a with 255 registers a thread at K = N = 20. So one program is on a
multiprocessor at a time. It takes 16 KB of shared memory at d = 64 and 24 KB at d = 256, for one
tile of a kernel. The forward kernel spills nothing at d = 64, the backward one 304 bytes a thread.
With unrolled blocks it was 2 KB, and at d = 128 50 KB. In bfloat16 it is 8 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rmjax.layers.attention import masked_softmax
from rmjax.machines.slots import SlotMemory
from rmjax.types import Array, Params

# Set it once tests/machines/test_fused.py has passed on a GPU: 'auto' then uses the kernel there.
TESTED_ON_GPU = False
WIDTH = 64  # features of a block
# Float32 products: three in TF32, exact to about 1e-7; or one, if that is what the caller asks for
# by `jax.default_matmul_precision`.
EXACT = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
FASTER = jax.lax.DotAlgorithmPreset.TF32_TF32_F32
_C = TypeVar("_C")
Ref = Any  # of an array in the memory of the device


def wanted(fused: str) -> bool:
    """Whether the setting `fused` asks for the kernel on this machine."""
    return fused == "on" or (fused == "auto" and TESTED_ON_GPU and jax.default_backend() == "gpu")


def faster() -> bool:
    """Whether float32 products may be in TF32 where this is traced."""
    precision: object = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return precision == "tensorfloat32"


def write_segments(
    params: Params,
    memory: SlotMemory,
    features: tuple[Array, Array],
    mask: Array,
    cut: Array | None = None,
    *,
    normalize: str = "slots",
    slot_identity: bool = False,
    dtype: jnp.dtype = jnp.float32,
) -> SlotMemory:
    """Writes t segments, see `MemoryMachine.write_segments`.

    Args:
      params: of the rehearsal machine.
      memory: of B streams.
      features: f and W2 f + b of `encode`, f32 [t, B, N, d] each.
      mask: bool [t, B, N].
      cut: bool [t, B], true where no gradient may pass to earlier segments; None: nowhere.
      normalize: axis of the softmax in Eq. 1.
      slot_identity: see `slots.Settings`.
      dtype: of the operands of products. Sums and the memory are f32.

    Returns:
      The memory after each segment, leading axes [t, B].
    """
    attention, gru = params["attention"], params["update"]
    f, projected = (jnp.where(mask[..., None], x, 0.0) for x in features)
    dim = f.shape[-1]
    gates = (f.astype(dtype) @ gru["input"].astype(dtype)).reshape(*f.shape[:-1], 3, dim)
    recurrent_kernels = gru["hidden"].reshape(dim, 3, dim).swapaxes(0, 1)
    kernels = jnp.concatenate([attention["slot"][None], recurrent_kernels])
    first = params["slots"] if slot_identity else jnp.zeros_like(params["slots"])
    inputs = _Inputs(
        memory.slots,
        projected.astype(dtype),
        gates,
        kernels.astype(dtype),
        jnp.concatenate([gru["bias"], gru["hidden_bias"]]).reshape(4, dim),
        attention["score"],
        first @ attention["slot"],
    )
    alive = mask.any(-1)
    flags = _Flags(mask, alive, jnp.zeros_like(alive) if cut is None else cut)
    flags = jax.tree.map(lambda x: x.astype(jnp.int32), flags)
    slots = _write(0 if normalize == "slots" else 1, inputs, flags)[1:]
    return SlotMemory(slots, memory.segments + jnp.cumsum(alive, 0, jnp.int32))


class _Inputs(NamedTuple):
    """What the kernel reads, and what has a gradient."""

    memory: Any  # f32 [B, K, d] before the first segment
    projected: Any  # [T, B, N, d] W2 f + b of Eq. 1
    gates: Any  # [T, B, N, 3, d] the GRU's input kernel times f, for r, z and n
    kernels: Any  # [4, d, d] W1 of Eq. 1; the recurrent kernels of r, z and n
    bias: Any  # f32 [4, d] of r, z and n; the hidden bias of n
    score: Any  # f32 [d] w of Eq. 1
    identity: Any  # f32 [K, d] is added to m W1


class _Flags(NamedTuple):
    """What has no gradient."""

    mask: Any  # i32 [T, B, N]
    alive: Any  # i32 [T, B], 1 where the segment has an item
    cut: Any  # i32 [T, B], 1 where no gradient passes to earlier segments


class _Saved(NamedTuple):
    """What the forward kernel writes."""

    memories: Any  # f32 [T + 1, B, K, d] before the first segment, and after each
    weights: Any  # f32 [T, B, K, N] p of Eq. 1
    parts: Any  # f32 [T, B, K, d] e^2a


class _Gradients(NamedTuple):
    """What the backward kernel writes."""

    memory: Any  # f32 [B, K, d]
    projected: Any  # [T, B, N, d]
    gates: Any  # [T, B, N, 3, d]
    before: Any  # [T, B, K, 5, d] of a, the recurrent products of r, z and n, and the gate n
    score: Any  # f32 [T, B, d]
    scores: Any  # f32 [T, B, K, N] scratch


# Axes: T, t = T + 1, B, K, N, d, or a number.
_INPUTS = _Inputs("BKd", "TBNd", "TBN3d", "4dd", "4d", "d", "Kd")
_FLAGS = _Flags("TBN", "TB", "TB")
_SAVED = _Saved("tBKd", "TBKN", "TBKd")
_GRADIENTS = _Gradients("BKd", "TBNd", "TBN3d", "TBK5d", "TBd", "TBKN")


class _Sizes(NamedTuple):
    """The sizes of an array's axes, and of the tiles that cover them."""

    segments: int
    batch: int
    slots: int
    items: int
    dim: int

    @property
    def width(self) -> int:
        return min(_power(self.dim), WIDTH)

    @property
    def blocks(self) -> int:
        return -(-self.dim // self.width)

    def shape(self, axes: str) -> tuple[int, ...]:
        t, b, k, n, d = self
        known = {"T": t, "t": t + 1, "B": b, "K": k, "N": n, "d": d}
        return tuple(known.get(axis) or int(axis) for axis in axes)

    def spec(self, axes: str) -> pl.BlockSpec:
        """The part of an array that one program sees: its stream, padded to full tiles."""
        padded = {
            "K": _power(self.slots),
            "N": _power(self.items),
            "d": self.width * self.blocks,
        }
        block = [
            None if axis == "B" else padded.get(axis, size)
            for axis, size in zip(axes, self.shape(axes), strict=True)
        ]
        return pl.BlockSpec(block, lambda stream: [stream * (axis == "B") for axis in axes])

    @property
    def slot_rows(self) -> _Span:
        return _Span(0, _power(self.slots), self.slots)

    @property
    def item_rows(self) -> _Span:
        return _Span(0, _power(self.items), self.items)

    def block(self, index: int | Array) -> _Span:
        return _Span(index * self.width, self.width, self.dim)


class _Span(NamedTuple):
    """A part of an axis: `size` entries from `start` on; those from `end` on do not exist."""

    start: int | Array  # a multiple of `size`
    size: int
    end: int


def _power(size: int) -> int:
    """The size of a tile's axis. Triton needs a power of two, and products need 16."""
    return max(16, 1 << (size - 1).bit_length())


def _at(ref: Ref, index: Sequence[int | Array | _Span]) -> tuple[Ref, Array | None]:
    """A tile of an array, and its mask: true where the array has an entry."""
    spans = [i for i in index if isinstance(i, _Span)]
    inside, mask = [], None
    for axis, (start, size, end) in enumerate(spans):
        if end % size:
            shape = [span.size for span in spans]
            inside.append(jax.lax.broadcasted_iota(jnp.int32, shape, axis) < end - start)
    if inside:
        mask = functools.reduce(jnp.logical_and, inside)
    # The interpreter of masked stores takes no int.
    part = lambda i: pl.ds(i.start, i.size) if isinstance(i, _Span) else jnp.asarray(i, jnp.int32)
    return ref.at[tuple(map(part, index))], mask


def _load(ref: Ref, *index: int | Array | _Span) -> Array:
    """Reads a tile; entries that do not exist are 0."""
    view, mask = _at(ref, index)
    other = None if mask is None else jnp.zeros((), ref.dtype)
    loaded: Array = triton.load(view, mask=mask, other=other)
    return loaded


def _store(ref: Ref, tile: Array, *index: int | Array | _Span) -> None:
    """Writes a tile; entries that do not exist are left out."""
    view, mask = _at(ref, index)
    triton.store(view, tile.astype(ref.dtype), mask=mask)


class _Program(NamedTuple):
    """What both kernels compute for one segment."""

    sizes: _Sizes
    axis: int  # of the softmax over tiles [K, N]
    on_gpu: bool
    inputs: _Inputs  # of references, as all arrays here
    flags: _Flags
    t: int | Array  # the segment

    def dot(self, x: Array, y: Array, contract: tuple[int, int] = (1, 0)) -> Array:
        """A product of two tiles over one axis of each, with sums in f32."""
        dtype, precision = self.inputs.kernels.dtype, None
        if self.on_gpu and dtype == jnp.float32:
            precision = FASTER if faster() else EXACT
        axes = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(x.astype(dtype), y.astype(dtype), axes, precision, jnp.float32)

    def barrier(self) -> None:
        """Lets all threads of the program see what each has stored."""
        if self.on_gpu:
            triton.debug_barrier()

    def kernel(self, which: int, row: Array, column: Array) -> Array:
        return _load(self.inputs.kernels, which, *map(self.sizes.block, (row, column)))

    def products(self, memories: Ref, which: Sequence[int], column: Array) -> list[Array]:
        """A block of m W for some of the kernels, see `_Inputs.kernels`."""
        s = self.sizes

        def add(row: Array, sums: list[Array]) -> list[Array]:
            m = _load(memories, self.t, s.slot_rows, s.block(row))
            kernels = [self.kernel(i, row, column) for i in which]
            return [x + self.dot(m, kernel) for x, kernel in zip(sums, kernels, strict=True)]

        zeros = jnp.zeros((s.slot_rows.size, s.width), jnp.float32)
        return _loop(s.blocks, add, [zeros for _ in which])

    def slot_part(self, memories: Ref, column: Array) -> Array:
        """e^2a, a block [K, width] of Eq. 1; see `attention.additive_scores`."""
        s = self.sizes
        (a,) = self.products(memories, (0,), column)
        a = a + _load(self.inputs.identity, s.slot_rows, s.block(column))
        return jnp.exp(2.0 * jnp.clip(a, -40.0, 40.0))

    def sigmoids(self, n: Array, slot_part: Array, column: Array) -> Array:
        """1 / (1 + e^2a e^2b) for item n, [K, width]."""
        b = _load(self.inputs.projected, self.t, n, self.sizes.block(column)).astype(jnp.float32)
        return 1.0 / (1.0 + slot_part * jnp.exp(2.0 * jnp.clip(b, -40.0, 40.0)))

    def weights(self, parts: Ref) -> Array:
        """Weights p of Eq. 1, [K, N]. Scores leave out a number that all slots share."""
        s = self.sizes
        shape = s.slot_rows.size, s.item_rows.size
        slot, item = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))

        def block(column: Array, scores: Array) -> Array:
            part = _load(parts, self.t, s.slot_rows, s.block(column))
            w = -2.0 * _load(self.inputs.score, s.block(column))

            def add(n: Array, scores: Array) -> Array:
                score = (w * self.sigmoids(n, part, column)).sum(1)
                return jnp.where(item == n, scores + score[:, None], scores)

            return _loop(s.items, add, scores)

        scores = _loop(s.blocks, block, jnp.zeros(shape, jnp.float32))
        exists = _load(self.flags.mask, self.t, s.item_rows)[None] > 0
        return masked_softmax(scores, exists & (slot < s.slots), self.axis)

    def gru(self, memories: Ref, p: Array, column: Array) -> tuple[Array, ...]:
        """A block of r, z, n and of the past that r scales; see `recurrent.gru`."""
        s, block = self.sizes, self.sizes.block(column)
        bias = [_load(self.inputs.bias, i, block) for i in range(4)]
        features = [_load(self.inputs.gates, self.t, s.item_rows, i, block) for i in range(3)]
        gates = [self.dot(p, x) + bias[i] for i, x in enumerate(features)]
        before = self.products(memories, (1, 2, 3), column)
        r, z = (jax.nn.sigmoid(gates[i] + before[i]) for i in range(2))
        past = before[2] + bias[3]
        return r, z, jnp.tanh(gates[2] + r * past), past


def _loop(length: int, body: Callable[[Array, _C], _C], carry: _C) -> _C:
    """A loop in the kernel: an unrolled one would fill the registers with addresses."""
    last: _C = jax.lax.fori_loop(0, length, body, carry)
    return last


def _forward_kernel(
    sizes: _Sizes, axis: int, on_gpu: bool, inputs: _Inputs, flags: _Flags, *out: Ref
) -> None:
    """Writes one stream. Between barriers, no tile is read that another thread may write."""
    s, saved = sizes, _Saved(*out)
    slots, items = s.slot_rows, s.item_rows
    of_segment = functools.partial(_Program, sizes, axis, on_gpu, inputs, flags)

    def segment(t: Array, _: None) -> None:
        program = of_segment(t)

        def part(column: Array, _: None) -> None:
            _store(
                saved.parts, program.slot_part(saved.memories, column), t, slots, s.block(column)
            )

        _loop(s.blocks, part, None)
        program.barrier()
        p = program.weights(saved.parts)
        _store(saved.weights, p, t, slots, items)

        def update(column: Array, _: None) -> None:
            z, n = program.gru(saved.memories, p, column)[1:3]
            old = _load(saved.memories, t, slots, s.block(column))
            new = jnp.where(flags.alive[t] > 0, n + z * (old - n), old)
            _store(saved.memories, new, t + 1, slots, s.block(column))

        _loop(s.blocks, update, None)
        program.barrier()

    def copy(column: Array, _: None) -> None:
        first = _load(inputs.memory, slots, s.block(column))
        _store(saved.memories, first, 0, slots, s.block(column))

    _loop(s.blocks, copy, None)
    of_segment(0).barrier()
    _loop(s.segments, segment, None)


def _backward_kernel(
    sizes: _Sizes,
    axis: int,
    on_gpu: bool,
    inputs: _Inputs,
    flags: _Flags,
    saved: _Saved,
    d_memories: Ref,
    *gradients: Ref,
) -> None:
    """The gradients of one stream, from the last segment to the first.

    `out.memory` is the gradient of the memory between two segments.
    """
    s, out = sizes, _Gradients(*gradients)
    slots, items = s.slot_rows, s.item_rows
    of_segment = functools.partial(_Program, sizes, axis, on_gpu, inputs, flags)

    def segment(i: Array, _: None) -> None:
        t = s.segments - 1 - i
        program, p = of_segment(t), _load(saved.weights, t, slots, items)
        _loop(
            s.blocks, functools.partial(_backward_gates, program, saved, d_memories, out, p), None
        )
        program.barrier()
        d_p = _loop(
            s.blocks, functools.partial(_backward_products, program, out, p), jnp.zeros_like(p)
        )
        _store(out.scores, p * (d_p - (p * d_p).sum(axis, keepdims=True)), t, slots, items)
        program.barrier()
        _loop(s.blocks, functools.partial(_backward_scores, program, saved, out), None)
        program.barrier()
        _loop(s.blocks, functools.partial(_backward_memory, program, out), None)
        program.barrier()

    def begin(column: Array, _: None) -> None:
        zeros = jnp.zeros((slots.size, s.width), jnp.float32)
        _store(out.memory, zeros, slots, s.block(column))

    def end(column: Array, _: None) -> None:
        place = slots, s.block(column)
        _store(out.memory, _load(out.memory, *place) + _load(d_memories, 0, *place), *place)

    _loop(s.blocks, begin, None)
    of_segment(0).barrier()
    _loop(s.segments, segment, None)
    _loop(s.blocks, end, None)


def _backward_gates(
    program: _Program,
    saved: _Saved,
    d_memories: Ref,
    out: _Gradients,
    p: Array,
    column: Array,
    _: None,
) -> None:
    """Backward through the elementwise part of Eq. 2; see `recurrent._gated`."""
    t, slots, block = program.t, program.sizes.slot_rows, program.sizes.block(column)
    r, z, n, past = program.gru(saved.memories, p, column)
    m = _load(saved.memories, t, slots, block)
    d_m = _load(out.memory, slots, block) + _load(d_memories, t + 1, slots, block)
    d = jnp.where(program.flags.alive[t] > 0, d_m, 0.0)
    d_n = d * (1.0 - z) * (1.0 - n * n)
    d_r, d_z = d_n * past * r * (1.0 - r), d * (m - n) * z * (1.0 - z)
    for i, x in enumerate((d_r, d_z, d_n * r, d_n)):
        _store(out.before, x, t, slots, i + 1, block)
    _store(out.memory, d_m + (z - 1.0) * d, slots, block)


def _backward_products(
    program: _Program, out: _Gradients, p: Array, column: Array, d_p: Array
) -> Array:
    """Adds to the gradient of p, and stores that of the gates' features."""
    s, t, block = program.sizes, program.t, program.sizes.block(column)
    for i, gate in enumerate((1, 2, 4)):
        d_gate = _load(out.before, t, s.slot_rows, gate, block)
        features = _load(program.inputs.gates, t, s.item_rows, i, block)
        d_p += program.dot(d_gate, features, (1, 1))
        _store(out.gates, program.dot(p, d_gate, (0, 0)), t, s.item_rows, i, block)
    return d_p


def _backward_scores(
    program: _Program, saved: _Saved, out: _Gradients, column: Array, _: None
) -> None:
    """Backward through the scores of Eq. 1; see `attention.additive_scores`."""
    t, slots, block = program.t, program.sizes.slot_rows, program.sizes.block(column)
    part = _load(saved.parts, t, slots, block)
    w = 4.0 * _load(program.inputs.score, block)

    def add(n: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        sigmoids = program.sigmoids(n, part, column)
        d = _load(out.scores, t, slots, n)[:, None] * sigmoids
        slope = d - d * sigmoids
        _store(out.projected, w * slope.sum(0), t, n, block)
        return sums[0] + slope, sums[1] + d

    zeros = jnp.zeros_like(part)
    d_a, d_w = _loop(program.sizes.items, add, (zeros, zeros))
    _store(out.before, w * d_a, t, slots, 0, block)
    _store(out.score, -2.0 * d_w.sum(0), t, block)


def _backward_memory(program: _Program, out: _Gradients, row: Array, _: None) -> None:
    """Adds the gradients that come through the four products of m."""
    s, t = program.sizes, program.t

    def add(column: Array, d_m: Array) -> Array:
        for i in range(4):
            d = _load(out.before, t, s.slot_rows, i, s.block(column))
            d_m += program.dot(d, program.kernel(i, row, column), (1, 1))
        return d_m

    place = s.slot_rows, s.block(row)
    d_m = _loop(s.blocks, add, _load(out.memory, *place))
    _store(out.memory, jnp.where(program.flags.cut[t] > 0, 0.0, d_m), *place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _write(axis: int, inputs: _Inputs, flags: _Flags) -> Array:
    """The memories, see `_Saved`. `axis` is that of the softmax."""
    return _write_forward(axis, inputs, flags)[0]


def _write_forward(axis: int, inputs: _Inputs, flags: _Flags) -> tuple[Array, Any]:
    s = _sizes(inputs)
    kernel = functools.partial(_forward_kernel, s, axis)
    dtypes = _Saved(jnp.float32, jnp.float32, jnp.float32)
    saved = _launch(kernel, s, (_INPUTS, _FLAGS), _SAVED, dtypes, inputs, flags)
    return saved.memories, (inputs, flags, saved)


def _write_backward(axis: int, residuals: Any, d_memories: Array) -> tuple[_Inputs, None]:
    inputs, flags, saved = residuals
    s, dtype = _sizes(inputs), inputs.kernels.dtype
    dtypes = _Gradients(jnp.float32, dtype, dtype, dtype, jnp.float32, jnp.float32)
    kernel = functools.partial(_backward_kernel, s, axis)
    axes = (_INPUTS, _FLAGS, _SAVED, _SAVED.memories)
    out = _launch(kernel, s, axes, _GRADIENTS, dtypes, inputs, flags, saved, d_memories)
    memories = saved.memories[:-1].astype(dtype)
    f32 = dict(preferred_element_type=jnp.float32)
    kernels = jnp.einsum("tbki,tbkjo->jio", memories, out.before[..., :4, :], **f32)
    r, z, past, n = out.before[..., 1:, :].sum((0, 1, 2), jnp.float32)
    return _Inputs(
        memory=out.memory,
        projected=out.projected,
        gates=out.gates,
        kernels=kernels.astype(dtype),
        bias=jnp.stack([r, z, n, past]),
        score=out.score.sum((0, 1)),
        identity=out.before[..., 0, :].sum((0, 1), jnp.float32),
    ), None


_write.defvjp(_write_forward, _write_backward)


def _sizes(inputs: _Inputs) -> _Sizes:
    segments, batch, items, dim = inputs.projected.shape
    return _Sizes(segments, batch, inputs.memory.shape[1], items, dim)


def _launch(
    kernel: Any, sizes: _Sizes, in_axes: Any, out_axes: Any, dtypes: Any, *args: Any
) -> Any:
    """Runs a kernel, one program for each stream: by Triton on a CUDA device, else interpreted."""
    zeros = lambda axes, dtype: jnp.zeros(sizes.shape(axes), dtype)
    shapes = jax.eval_shape(lambda: jax.tree.map(zeros, out_axes, dtypes))

    def run(*args: Any, on_gpu: bool) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, on_gpu),
            out_shape=shapes,
            grid=(sizes.batch,),
            in_specs=jax.tree.map(sizes.spec, in_axes),
            out_specs=jax.tree.map(sizes.spec, out_axes),
            compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
            interpret=not on_gpu,
        )(*args)

    on = functools.partial(run, on_gpu=True)
    return jax.lax.platform_dependent(*args, cuda=on, default=functools.partial(run, on_gpu=False))
