"""Draws docs/images/engrams.webp, in which Memoria's graph grows, and some of its frames as PNG.

    python docs/figures/engrams.py

The stream is a story of twelve scenes that is told twice, as in notebooks/memoria.ipynb. The
memory is untrained: a step brings eight engrams near the vector of its scene.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import IMAGES, save, use_style
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from rmjax import memoria

SCENES, LENGTH, TELLINGS = 12, 6, 2
STORY = SCENES * LENGTH  # steps of one telling
WEIGHT = 0.7  # the least weight of an edge that is drawn
EVERY, PAUSE, HOLD = 2, 110, 4000  # steps a frame; milliseconds of a frame, and of the last one
KINDS = {
    memoria.SHORT_TERM: ("short-term engrams", "#d9730d"),
    memoria.LONG_TERM: ("long-term engrams", "#0550ae"),
}
CONFIG = memoria.MemoriaConfig(
    working=8,
    short_term_capacity=64,
    remind_short_term=8,
    remind_long_term=8,
    search_depth=5,
    dim=32,
    search_seeds="all_short_term",
)


class Graph(NamedTuple):
    """What one frame shows: the living engrams, and the edges between them."""

    serial: np.ndarray  # i64 [n]
    kind: np.ndarray  # i8 [n]
    edges: np.ndarray  # i64 [e, 2], serials


def stream() -> jax.Array:
    """The story, told twice: f32 [T, working, D]."""
    rng = np.random.default_rng(0)
    scenes = np.repeat(rng.normal(size=(SCENES, CONFIG.dim)), LENGTH, 0)[:, None]
    first = scenes + 0.5 * rng.normal(size=(STORY, CONFIG.working, CONFIG.dim))
    second = first + 0.1 * rng.normal(size=first.shape)
    return jnp.asarray(0.3 * np.concatenate([first, second]), jnp.float32)


@jax.jit
def listen(story: jax.Array) -> memoria.State:
    """The state after each step of the stream, leading axis T."""

    def step(state: memoria.State, x: tuple) -> tuple:
        working, key = x
        exploit = lambda reminded: memoria.exploit(working, reminded)
        state, _, _ = memoria.step(CONFIG, state, working, exploit, key)
        return state, state

    keys = jax.random.split(jax.random.key(0), len(story))
    return jax.lax.scan(step, memoria.init(CONFIG), (story, keys))[1]


def graphs() -> list[Graph]:
    """The graph after every `EVERY` steps."""
    states = jax.device_get(listen(stream()))
    made = []
    for t in range(EVERY - 1, TELLINGS * STORY, EVERY):
        state = jax.tree.map(lambda x, t=t: x[t], states)
        sources, targets, _ = memoria.edges_above(state, WEIGHT)
        alive = state.kind != memoria.EMPTY
        edges = np.stack([sources, targets], 1)
        made.append(Graph(state.serial[alive], state.kind[alive], edges))
    return made


def places(serial: np.ndarray) -> np.ndarray:
    """Where engrams stand: the angle is the place in the story, the ring is the telling."""
    step, order = np.divmod(serial, CONFIG.working)
    telling, place = np.divmod(step, STORY)
    angle = np.pi / 2 - 2 * np.pi * (place + order / CONFIG.working) / STORY
    radius = 1 + 0.5 * telling + 0.14 * (order % 4) / 3
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def draw_graph(axes: Axes, graph: Graph, step: int) -> None:
    """Draws one frame."""
    lines = list(np.stack([places(graph.edges[:, 0]), places(graph.edges[:, 1])], 1))
    faint = min(0.25, 60 / max(1, len(lines)))  # so that dense parts stay legible
    edges = LineCollection(lines, colors="#57606a", alpha=max(0.08, faint), linewidths=0.7)
    axes.add_collection(edges)
    for kind, (name, colour) in KINDS.items():
        points = places(graph.serial[graph.kind == kind])
        axes.scatter(*points.T, s=18, color=colour, label=name, linewidths=0, zorder=2)
    for scene in range(SCENES):
        angle = np.pi / 2 - 2 * np.pi * (scene + 0.5) / SCENES
        x, y = 1.86 * np.cos(angle), 1.86 * np.sin(angle)
        axes.text(x, y, str(scene + 1), ha="center", va="center", color="#57606a")
    axes.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    axes.axis("off")
    telling = "first" if step <= STORY else "second"
    axes.set_title(f"Step {step}, the {telling} telling", loc="center")


def frame(graph: Graph, step: int) -> Figure:
    """The figure of one frame."""
    figure = Figure(figsize=(5, 5.5))
    axes = figure.subplots()
    draw_graph(axes, graph, step)
    add_legend(figure, axes)
    return figure


def add_legend(figure: Figure, axes: Axes) -> None:
    """Adds one legend below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, markerscale=1.5)


def draw(steps: tuple[int, ...] = (24, 72, 144)) -> Figure:
    """Draws some frames side by side, for print."""
    drawn = graphs()
    figure = Figure(figsize=(3.6 * len(steps), 4.2))
    for axes, step in zip(figure.subplots(1, len(steps)), steps, strict=True):
        draw_graph(axes, drawn[step // EVERY - 1], step)
    add_legend(figure, figure.axes[0])
    return figure


def animate() -> None:
    """Writes docs/images/engrams.webp."""
    images = []
    for number, graph in enumerate(graphs(), 1):
        buffer = io.BytesIO()
        frame(graph, number * EVERY).savefig(buffer, format="png", dpi=96)
        images.append(Image.open(buffer).convert("RGB"))
    durations = [PAUSE] * (len(images) - 1) + [HOLD]
    path = IMAGES / "engrams.webp"
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=durations, loop=0, quality=60,
        method=6,
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    use_style()
    print(save(draw(), "engrams", "png"))
    animate()
