"""Predicts train steps on many devices from programs that are compiled, but not run, on CPUs.

    python -m rmjax.bench --size=xlong --scale=1,2,4,8,16,32,64,128,256,512,1024

Up to 64 devices the step is compiled for as many simulated devices, see `explain.report`. Beyond
that, bytes are extrapolated along the line through the two largest compiled numbers, and the rows
say so. The time is a roofline: the longer of arithmetic and memory traffic, then communication,
which overlaps with nothing. Launches of kernels are not counted, so small steps take longer. A
collective operation in a loop counts once, so such communication takes longer, too.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from rmjax.tools import explain, made_up

MOST_COMPILED = 64  # devices
Fields = dict[str, Any]  # of a JSON object


class Accelerator(NamedTuple):
    """Peak rates of a device, from its maker's data sheet.

    Attributes:
      flops: operations a second of matrix products, dense; see `accelerators`.
      memory: bytes a second.
      near: bytes a second that a device sends to others of its group.
      far: bytes a second that a device sends to other groups.
      group: devices of a group.
      latency: seconds of one step of a collective operation; an assumption.
    """

    flops: float
    memory: float
    near: float
    far: float
    group: int
    latency: float


_H100 = {"float32": 67e12, "tensorfloat32": 495e12, "bfloat16": 989e12}


def accelerators(compute_dtype: str) -> dict[str, Accelerator]:
    """The devices to model.

    All products are assumed to run in the format of the key, although with bfloat16 a GPU computes
    some in TF32. A TPU multiplies in bfloat16 whatever the key says, see `stages.in_precision`.

    Args:
      compute_dtype: config.train.compute_dtype.

    Returns:
      {name: device}.
    """
    return {
        # H100 SXM: no sparsity, HBM3, NVLink 4 among 8, one 400 Gbit/s adapter each.
        "H100": Accelerator(_H100[compute_dtype], 3.35e12, 450e9, 50e9, 8, 5e-6),
        # TPU v5p: HBM, 4,800 Gbit/s of links in a torus of up to 8,960.
        "TPU v5p": Accelerator(459e12, 2.765e12, 600e9, 600e9, 8960, 1e-6),
    }


class Step(NamedTuple):
    """A train step on n devices; every number is that of one device.

    Attributes:
      flops: operations.
      held: bytes that stay on a device or are temporary in a step.
      peak: peak bytes.
      collectives: {operation: (calls, bytes that a device receives)}.
      compiled: whether the step was compiled; False: extrapolated.
    """

    flops: float
    held: float
    peak: float
    collectives: Mapping[str, tuple[float, float]]
    compiled: bool = True


def rows(config: ConfigDict, source: Any, devices: Sequence[int]) -> Iterator[Fields]:
    """Models the step on numbers of devices. Each device has config.train.batch_size streams.

    Args:
      config: of the run.
      source: the data; None: random data in the shapes of the config.
      devices: the numbers of devices.

    Yields:
      First a row for each accelerator's assumptions; then for each number of devices and each
      accelerator what `predict` returns; then for each accelerator where it stops scaling.

    Raises:
      ValueError: a number of devices is below 1.
    """
    if not devices or min(devices) < 1:
        raise ValueError(f"--scale={devices}: must be numbers of devices, at least 1")
    modelled = accelerators(config.train.compute_dtype)
    for name, accelerator in modelled.items():
        products = {"products in": config.train.compute_dtype}
        yield {"assumed of": name} | products | accelerator._asdict()
    source = made_up.source_for(config) if source is None else source
    compiled = {n: measure(config, source, n) for n in to_compile(devices)}
    for name, accelerator in modelled.items():
        alone = compiled[1]
        limits: dict[int, float] = {}
        for n in sorted({*devices}):
            step = compiled[n] if n in compiled else extrapolate(compiled, n)
            row = predict(step, n, accelerator, alone)
            limits[n] = row["efficiency"]
            yield {"accelerator": name} | row
        yield {"accelerator": name, "stops scaling": stop(limits)}


def to_compile(devices: Sequence[int]) -> list[int]:
    """The numbers of devices to compile for; with larger ones, those for their extrapolation."""
    beyond = [MOST_COMPILED // 2, MOST_COMPILED] if max(devices) > MOST_COMPILED else []
    return sorted({1, *beyond, *(n for n in devices if n <= MOST_COMPILED)})


def measure(config: ConfigDict, source: Any, devices: int) -> Step:
    """Compiles the step for simulated devices, in a process of its own.

    Args:
      config: of the run; train.batch_size is that of one device.
      source: the data.
      devices: their number.

    Returns:
      The step.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, config, source, devices).result()


def _measure(config: ConfigDict, source: Any, devices: int) -> Step:
    os.nice(10)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.batch_size *= devices
        config.train.eval_batch_size = config.train.batch_size
        config.train.devices = devices
    report = explain.report(config, source, cut=False)
    held, collectives = report["bytes_per_device"], report["collectives"]
    return Step(
        report["flops_per_step"] / devices,
        sum(held.values()),
        report["peak_bytes_per_device"],
        {name: (float(c["calls"]), float(c["bytes"])) for name, c in collectives.items()},
    )


def extrapolate(compiled: Mapping[int, Step], devices: int) -> Step:
    """A step on more devices than were compiled, along the line through the two largest ones.

    Args:
      compiled: {number of devices: step}; at least two.
      devices: their number.

    Returns:
      The step.
    """
    m, n = sorted(compiled)[-2:]
    first, last = compiled[m], compiled[n]
    at = lambda x, y: max(0.0, y + (y - x) / (n - m) * (devices - n))
    names = {*first.collectives, *last.collectives}
    of = lambda step, name: step.collectives.get(name, (0.0, 0.0))
    lines = {
        name: (at(of(first, name)[0], of(last, name)[0]), at(of(first, name)[1], of(last, name)[1]))
        for name in sorted(names)
    }
    return Step(
        at(first.flops, last.flops),
        at(first.held, last.held),
        at(first.peak, last.peak),
        lines,
        compiled=False,
    )


def seconds_of(step: Step, devices: int, accelerator: Accelerator) -> tuple[float, float, float]:
    """The roofline of a step.

    Args:
      step: on so many devices.
      devices: their number.
      accelerator: the device.

    Returns:
      Seconds of arithmetic; of memory traffic, in which every held byte is read and written once;
      and of communication. It is that of recursive halving and doubling (Thakur et al. 2005).
      There a device sends (n - 1) / n of an array over its slowest link, in log2(n) waits.
    """
    link = accelerator.near if devices <= accelerator.group else accelerator.far
    sent = delay = 0.0
    for name, (calls, size) in step.collectives.items():
        # An all-reduce reduces and gathers; the others do one of the two.
        times = 2 if name == "all-reduce" else 1
        sent += times * size * (devices - 1) / devices
        delay += times * calls * math.ceil(math.log2(devices)) * accelerator.latency
    arithmetic, memory = step.flops / accelerator.flops, 2 * step.held / accelerator.memory
    return arithmetic, memory, sent / link + delay


def predict(step: Step, devices: int, accelerator: Accelerator, alone: Step) -> Fields:
    """Predicts the time of a step.

    Args:
      step: on so many devices.
      devices: their number.
      accelerator: the device.
      alone: the step on one device.

    Returns:
      devices; basis: 'compiled' or 'extrapolated'; step_ms and its parts; peak_bytes and
      sent_bytes of a device; bound: the largest part; efficiency: streams a second and device over
      those of one device; speedup: of the streams of one device, divided among all.
    """
    arithmetic, memory, links = seconds_of(step, devices, accelerator)
    total = max(arithmetic, memory) + links
    alone_total = max(seconds_of(alone, 1, accelerator)[:2])
    parts = {"arithmetic": arithmetic, "memory": memory, "links": links}
    return {
        "devices": devices,
        "basis": "compiled" if step.compiled else "extrapolated",
        "step_ms": 1e3 * total,
        **{f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()},
        "peak_bytes": float(step.peak),
        "collective_bytes": float(sum(size for _, size in step.collectives.values())),
        "bound": max(parts, key=lambda name: parts[name]),
        "efficiency": alone_total / total,
        "speedup": alone_total / (alone_total / devices + links),
    }


def stop(efficiency: Mapping[int, float], least: float = 0.5) -> str:
    """Where more devices no longer pay.

    Args:
      efficiency: {number of devices: streams a second and device, over those of one device}.
      least: the efficiency that still pays.

    Returns:
      The first number of devices below it, in words.
    """
    for devices in sorted(efficiency):
        if efficiency[devices] < least:
            return f"at {devices} devices a step takes more than {1 / least:g} times as long"
    return f"not up to {max(efficiency)} devices: efficiency {efficiency[max(efficiency)]:.2f}"
