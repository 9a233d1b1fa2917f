"""Exports a trained model as files that need no rmjax: `write` and `answer` of live streams.

    python -m rmjax.export --workdir=runs/xlong --out=served

The two functions are stored with the weights and can be compiled on any platform. A server needs
the folder `served`, jax, numpy and flatbuffers, with which jax reads exported functions:

    import live  # served/live.py

    state = live.open_streams(2)
    state = live.write(state, items, mask)  # i32 [2, n], bool [2, n]; n is fixed by --items
    live.answer(state, query, mask)  # i32 [2, Q], bool [2, Q], any Q; returns f32 [2, Q]
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax import export
from safetensors.numpy import save

from rmjax import command_line
from rmjax.io import atomic, paths
from rmjax.machines.live import LiveStream, current_memory, feed, open_stream
from rmjax.run import environment
from rmjax.serve.checks import of_items
from rmjax.serve.model import open_model
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Array, Params, Task

FILES = ("live.py", "write.bin", "answer.bin", "weights.safetensors", "empty.safetensors")
PLATFORMS = ("cpu", "cuda", "tpu")
Leaves = dict[str, Array]  # {path of a leaf: leaf}
LOADER = '''"""Live streams of an exported model, written by `python -m rmjax.export`."""
import json
from pathlib import Path

import jax
import numpy as np
from jax import export

FOLDER, TYPES = Path(__file__).parent, {"F32": np.float32, "I32": np.int32, "BOOL": np.bool_}


def tensors(file):  # a safetensors file: the length of the header, the header, the numbers
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header, data = json.loads(file.read_bytes()[8 : 8 + size]), file.read_bytes()[8 + size :]
    part = lambda x: np.frombuffer(data[slice(*x["data_offsets"])], TYPES[x["dtype"]])
    return {k: part(x).reshape(x["shape"]) for k, x in header.items() if k != "__metadata__"}


weights = jax.device_put(tensors(FOLDER / "weights.safetensors"))
empty = tensors(FOLDER / "empty.safetensors")
called = lambda name: jax.jit(export.deserialize((FOLDER / name).read_bytes()).call)
write_, answer_ = called("write.bin"), called("answer.bin")
open_streams = lambda count: {name: np.repeat(x, count, 0) for name, x in empty.items()}
write = lambda state, items, mask: write_(weights, state, items, mask)
answer = lambda state, query, mask: answer_(weights, state, query, mask)
'''


def write_export(task: Task, params: Params, folder: str | Path, items: int = 0) -> None:
    """Writes an export to `folder`, completely or not at all.

    An earlier export in the folder is replaced. If the folder is a link, the target is replaced.

    Args:
      task: the task of a trained model whose streams hold item ids.
      params: the parameters of the same model.
      folder: the folder to make; `~` stands for the home directory.
      items: the fixed width n of a `write`, in items; callers pad shorter writes with a mask. 0
        stands for the segment length.

    Raises:
      ValueError: the model's streams do not hold item ids, or the folder is a URL.
      FileExistsError: the folder holds something that is not an export.
      ImportError: flatbuffers is not installed.
      OSError: a file could not be written; names the file and the cure.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "exports are written with flatbuffers, which is missing: pip install 'rmjax[export]'"
        )
    task = of_items(task)
    folder = paths.resolve(folder, "--out").resolve()  # follow links, so that a link stays a link
    if folder.exists() and not all((folder / name).is_file() for name in FILES):
        raise FileExistsError(
            f"{folder} exists and is not an export: choose another name or move it"
        )
    blank = open_stream(task.machine, params["machine"], 1, task.segment_length)
    files: dict[str, str | bytes] = {**_programs(task, params, blank, items)}
    for name, tree in (("weights", params), ("empty", blank)):
        tensors = {path: np.asarray(x) for path, x in flat(tree).items()}
        files[f"{name}.safetensors"] = save(tensors)
    _write_folder(folder, files | {"live.py": LOADER})


def _programs(task: Reasoning, params: Params, blank: LiveStream, items: int) -> dict[str, bytes]:
    """The serialized functions `write` and `answer`, {file name: content}."""
    machine = task.machine

    def write(weights: Leaves, state: Leaves, items: Array, mask: Array) -> Leaves:
        rows = as_tree(state, blank)
        return flat(feed(machine, as_tree(weights, params)["machine"], rows, items, mask))

    def answer(weights: Leaves, state: Leaves, query: Array, mask: Array) -> Array:
        tree, rows = as_tree(weights, params), as_tree(state, blank)
        memory = current_memory(machine, tree["machine"], rows)
        return task.answer(tree, memory, task.answers.asked_live(rows, query), mask)

    symbols: Callable[[str], Sequence[object]] = export.symbolic_shape
    shape: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct
    rows, queries = symbols("b, q")  # any number of streams, and of queries a stream
    weights = {name: shape(x.shape, x.dtype) for name, x in flat(params).items()}
    state = {name: shape((rows, *x.shape[1:]), x.dtype) for name, x in flat(blank).items()}
    programs: dict[str, bytes] = {}
    for name, function, width in (
        ("write.bin", write, items or task.segment_length),
        ("answer.bin", answer, queries),
    ):
        ids, mask = shape((rows, width), jnp.int32), shape((rows, width), jnp.bool_)
        exporter: Callable[..., export.Exported] = export.export(
            jax.jit(function), platforms=PLATFORMS
        )
        programs[name] = bytes(exporter(weights, state, ids, mask).serialize())
    return programs


def _write_folder(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes the files to a folder beside `folder`, then swaps the two."""
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            atomic.write(temporary / name, content)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    atomic.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flat(tree: Params) -> Leaves:
    """Returns the leaves of a tree as {path of a leaf, such as 'machine/embed': leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def as_tree(leaves: Leaves, like: Params) -> Params:
    """Inverts `flat`.

    Args:
      leaves: {path of a leaf: leaf}.
      like: a tree with the same paths.

    Returns:
      A tree with the structure of `like` and the given leaves.
    """
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flat(like)])


def main(argv: Sequence[str]) -> int:
    """Runs the command after the flags are parsed; returns the exit code."""
    del argv
    logging.set_verbosity(logging.INFO)
    asked = flags.FLAGS
    try:
        if not asked.workdir or not asked.out:
            raise ValueError("give both --workdir, of a trained model, and --out, a folder to make")
        paths.resolve(asked.out, "--out")
        logging.info("%s", environment.prepare())
        environment.find_devices()
        model = open_model(asked.workdir)
        write_export(model.task, model.params, asked.out, asked.items)
        logging.info("%s: wrote live.py and the files that live.py reads.", asked.out)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", "", "Workdir of a trained model.")
    flags.DEFINE_string("out", "", "Folder to make; an earlier export in it is replaced.")
    flags.DEFINE_integer(
        "items", 0, "Width of a write, in items; 0: the segment length.", lower_bound=0
    )


def cli() -> None:
    """Runs the command `python -m rmjax.export`."""
    command_line.run(main, define_flags)
