"""A trained model as files that need no rmjax: `write` and `answer` of live streams, compiled anywhere, and weights.

    python -m rmjax.export --workdir=runs/xlong --out=served

`served/live.py` is all that a server needs beside jax, numpy and flatbuffers, with which jax reads its exports:

    import live
    state = live.open_streams(2)
    state = live.write(state, items, mask)  # i32 [2, n], bool [2, n]; n is fixed by --items
    live.answer(state, query, mask)  # i32 [2, Q], bool [2, Q], any Q -> f32 [2, Q]
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax import export
from safetensors.numpy import save

from rmjax import config as configs
from rmjax.io import atomic, paths
from rmjax.machines.live import current_memory, feed, open_stream
from rmjax.run import environment
from rmjax.serve.model import open_model
from rmjax.serve.store import of_items
from rmjax.types import Params, Task

FILES = ("live.py", "write.bin", "answer.bin", "weights.safetensors", "empty.safetensors")
PLATFORMS = ("cpu", "cuda", "tpu")
LOADER = '''"""Live streams of an exported model; see `python -m rmjax.export`."""
import json
from pathlib import Path

import jax
import numpy as np
from jax import export

HERE, TYPES = Path(__file__).parent, {"F32": np.float32, "I32": np.int32, "BOOL": np.bool_}


def tensors(file):  # safetensors: length of a header, the header, the numbers
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header, data = json.loads(file.read_bytes()[8 : 8 + size]), file.read_bytes()[8 + size :]
    cut = lambda x: np.frombuffer(data[slice(*x["data_offsets"])], TYPES[x["dtype"]]).reshape(x["shape"])
    return {name: cut(x) for name, x in header.items() if name != "__metadata__"}


weights, empty = jax.device_put(tensors(HERE / "weights.safetensors")), tensors(HERE / "empty.safetensors")
called = lambda name: jax.jit(export.deserialize((HERE / name).read_bytes()).call)
write_, answer_ = called("write.bin"), called("answer.bin")
open_streams = lambda count: {name: np.repeat(x, count, 0) for name, x in empty.items()}
write = lambda state, items, mask: write_(weights, state, items, mask)
answer = lambda state, query, mask: answer_(weights, state, query, mask)
'''


def write_export(task: Task, params: Params, folder: str | Path, items: int = 0) -> None:
    """Makes `folder`, whole or not at all. Where it is a link, what it points to is replaced.

    Raises:
      ValueError: the model's streams are not of item ids, or the folder is an address.
      FileExistsError: something else is there.
      ImportError: flatbuffers is not installed.
      OSError: it could not be written; names the file and what to do.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "an export is written with flatbuffers, which is not installed: pip install 'rmjax[export]'"
        )
    task = of_items(task)
    machine, folder = task.machine, paths.resolve(folder, "--out").resolve()  # a link stays a link
    if folder.exists() and not all((folder / name).is_file() for name in FILES):
        raise FileExistsError(f"{folder} is there, and is no export: take another name or move it")
    blank = open_stream(machine, params["machine"], 1, task.segment_length)

    def write(weights: dict, state: dict, items: Any, mask: Any) -> dict:
        rows = as_tree(state, blank)
        return flat(feed(machine, as_tree(weights, params)["machine"], rows, items, mask))

    def answer(weights: dict, state: dict, query: Any, mask: Any) -> Any:
        tree = as_tree(weights, params)
        memory = current_memory(machine, tree["machine"], as_tree(state, blank))
        return task.answer(tree, memory, query, mask)

    rows, asked = export.symbolic_shape("b, q")
    shape = jax.ShapeDtypeStruct
    weights = {name: shape(x.shape, x.dtype) for name, x in flat(params).items()}
    state = {name: shape((rows, *x.shape[1:]), x.dtype) for name, x in flat(blank).items()}
    ids = lambda *size: (shape(size, jnp.int32), shape(size, jnp.bool_))
    made = {
        "write.bin": export.export(jax.jit(write), platforms=PLATFORMS)(
            weights, state, *ids(rows, items or task.segment_length)
        ),
        "answer.bin": export.export(jax.jit(answer), platforms=PLATFORMS)(
            weights, state, *ids(rows, asked)
        ),
    }
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, exported in made.items():
            atomic.write(temporary / name, bytes(exported.serialize()))
        for name, tree in (("weights", params), ("empty", blank)):
            tensors = save({path: np.asarray(x) for path, x in flat(tree).items()})
            atomic.write(temporary / f"{name}.safetensors", tensors)
        atomic.write(temporary / "live.py", LOADER)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    atomic.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flat(tree: Any) -> dict[str, Any]:
    """{path of a leaf: leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def as_tree(leaves: dict[str, Any], like: Any) -> Any:
    """The way back."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flat(like)])


def main(argv: Sequence[str]) -> int:
    del argv
    logging.set_verbosity(logging.INFO)
    asked = flags.FLAGS
    try:
        if not asked.workdir or not asked.out:
            raise ValueError(
                "--workdir of a trained model and --out, a folder to make, are both needed"
            )
        paths.resolve(asked.out, "--out")
        logging.info("%s", environment.prepare())
        environment.find_devices()
        model = open_model(asked.workdir)
        write_export(model.task, model.params, asked.out, asked.items)
        logging.info("%s: live.py, and what it reads.", asked.out)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def define_flags() -> None:
    flags.DEFINE_string("workdir", "", "Of a trained model.")
    flags.DEFINE_string("out", "", "Folder to make; what an export left there is replaced.")
    flags.DEFINE_integer("items", 0, "Items of a write, at most; 0: a segment's.", lower_bound=0)


def cli() -> None:
    """The command `python -m rmjax.export`."""
    define_flags()
    configs.import_modules(sys.argv)
    configs.answer_help(sys.argv)
    app.run(main, flags_parser=configs.parse_flags)
