"""Small runs for tests, the files that they leave, and a hook to act in the middle of a run."""

from __future__ import annotations

import builtins
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from rmjax import config as configs
from rmjax.io.checkpoint import Checkpoints
from rmjax.run import loop, training
from rmjax.tasks.reasoning import Reasoning, Teacher


def tiny(**changes) -> ConfigDict:
    """A config of a small run: 6 steps of the teacher, 12 of the model, each of them logged.

    It has 15 test users, so that the last batch has a padded row.

    Args:
      changes: values of other keys, such as {"train.steps": 3}.
    """
    config = configs.base()
    values = {
        "data.segment_length": 10,
        "data.negatives": 8,
        "data.simulated": dict(
            clusters=9, styles=2, items_per_style=3, staples=4, clicks_min=40, clicks_max=40,
            visit=10, targets=2, train=64, valid=16, test=15,
        ),
        "machine": dict(dim=8, slots=4, layers=1, heads=2, recent=5),
        "rehearsal": dict(fragments=2, sampled_items=8, layers=1),
        "teacher": dict(steps=6, batch_size=8, dim=8),
        "train": dict(
            steps=12, batch_size=8, eval_batch_size=8, devices=1, log_every=1, eval_every=4,
            save_every=3,
        ),
        "train.schedule": "cosine",
    }  # fmt: skip
    for name, value in {**values, **changes}.items():
        for key, one in value.items() if isinstance(value, dict) else [(None, value)]:
            set_key(config, f"{name}.{key}" if key else name, one)
    configs.validate(config)
    return config


def set_key(config: ConfigDict, name: str, value) -> None:
    *sections, key = name.split(".")
    for section in sections:
        config = config[section]
    config[key] = value


# No rehearsal, and a machine that compiles fast.
PLAIN = {"machine.kind": "gru", "rehearsal.recollection": 0.0, "rehearsal.familiarity": 0.0}


@contextlib.contextmanager
def compilations_kept(directory: Path) -> Iterator[None]:
    """Keeps compiled programs in `directory`; a second run of the same shapes compiles nothing."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


def before(moment: str, act: Callable[[], None], setattr: Callable = builtins.setattr) -> None:
    """Makes every run call `act` at a moment.

    Args:
      moment: '<stage> compilation', '<stage> step <n>', '<stage> validation <step>' or 'test';
        the stage is 'teacher' or 'model'.
      act: the function to call.
      setattr: replaces an attribute; monkeypatch.setattr undoes it after a test.
    """
    stage = ""

    def entered(begun, start, *_) -> str:
        nonlocal stage
        stage = begun.stage.name
        return f"{stage} step {start}"

    def hook(owner, name: str, describe: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def hooked(*args, **kwargs):
            if describe(*args, **kwargs) == moment:
                act()
            return original(*args, **kwargs)

        setattr(owner, name, hooked)

    hook(training, "run_loop", entered)
    hook(loop, "validate", lambda begun, params, step: f"{stage} validation {step}")
    hook(training, "test", lambda *_: "test")
    hook(loop.Losses, "add", lambda self, step, *_: f"{stage} step {step}")
    hook(Reasoning, "losses", lambda *_: "model compilation")
    hook(Teacher, "losses", lambda *_: "teacher compilation")


def lines(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without values that depend on the clock."""
    entries = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if not k.endswith("_per_second")} for entry in entries]


def saved(
    workdir: Path, stage: str = "model", step: int | None = None
) -> tuple[int, dict[str, np.ndarray]] | None:
    """The step and the leaves by name of the newest intact checkpoint, at most of `step`."""
    folder = workdir / stage
    leaves = json.loads(min(folder.glob("*/manifest.json")).read_text())["leaves"]
    shape_of = lambda dtype, shape: jax.ShapeDtypeStruct(tuple(shape), dtype)
    like = {name: shape_of(*spec) for name, spec in leaves.items()}
    with contextlib.closing(Checkpoints(folder, keep_last=2, keep_best=1)) as checkpoints:
        return checkpoints.restore(like, step)
