"""A checkpoint is complete or ignored: killed, cut and changed ones are never restored."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.io import checkpoint
from rmjax.io.checkpoint import Checkpoints
from tests import ROOT


@flax.struct.dataclass
class State:
    params: dict
    step: int
    empty: tuple = ()


def make_state(seed=0):
    key = jax.random.key(seed)
    encoder = {
        "kernel": jax.random.normal(key, (3, 5)),
        "half": jnp.full((4,), seed, jnp.bfloat16),
    }
    numbers = jnp.arange(3, dtype=jnp.int32) + seed
    params = {"encoder": encoder, "list": [numbers, jnp.zeros((0, 7)), jnp.array(seed % 2 == 0)]}
    return State(params, seed)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(a) == np.shape(b)
        assert getattr(a, "dtype", type(a)) == getattr(b, "dtype", type(b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def open_(keep_last=2, keep_best=0):
        opened.append(Checkpoints(tmp_path / "run", keep_last=keep_last, keep_best=keep_best))
        return opened[-1]

    yield open_
    for checkpoints in opened:
        checkpoints.close()


@pytest.fixture
def log(caplog):
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def saved(checkpoints, *steps, scores=None):
    for step in steps:
        checkpoints.save(step, make_state(step), None if scores is None else scores[step])
    checkpoints.wait()
    return checkpoints


def test_restored_equals_saved_bit_for_bit(open_checkpoints):
    saved(open_checkpoints(), 3, 4)
    step, state = open_checkpoints().restore(make_state())
    assert step == 4
    assert_same(state, make_state(4))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state.params))
    assert_same(open_checkpoints().restore(make_state(), step=3)[1], make_state(3))


def test_like_may_have_shapes_only(open_checkpoints):
    step, state = saved(open_checkpoints(), 5).restore(jax.eval_shape(lambda: make_state(5)))
    assert step == 5 and state.step == 5
    assert_same(state.params, make_state(5).params)


def test_restore_returns_none_if_nothing_was_saved(open_checkpoints):
    checkpoints = open_checkpoints()
    assert checkpoints.restore(make_state()) is None
    assert checkpoints.steps() == [] and checkpoints.best_step() is None


def test_the_next_step_may_donate_the_saved_tree(open_checkpoints):
    checkpoints = open_checkpoints()
    state, host = {"x": jnp.ones((1000, 1000))}, np.ones(3)
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    checkpoints.save(1, {**state, "host": host})
    host += 1
    for _ in range(3):
        state = bump(state)
    restored = checkpoints.restore({**state, "host": host})[1]
    assert (restored["x"] == 1).all() and (restored["host"] == 1).all()


def test_keeps_the_last_and_the_best(open_checkpoints):
    scores = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.7, 5: None, 6: 0.1, 7: 0.9}
    checkpoints = saved(open_checkpoints(keep_last=2, keep_best=2), *scores, scores=scores)
    assert checkpoints.steps() == [2, 6, 7]
    assert checkpoints.best_step() == 2
    assert saved(checkpoints, 8, scores={8: float("nan")}).score(8) is None
    again = open_checkpoints(keep_last=1, keep_best=1)  # scores outlive the process
    assert again.best_step() == 2 and again.score(2) == 0.9 and again.score(7) == 0.9
    assert again.score(5) is None and again.score(99) is None
    assert saved(again, 9, scores={9: 0.8}).steps() == [2, 9]


def test_a_score_of_zero_or_below_counts(open_checkpoints):
    scores = {1: -2.0, 2: 0.0, 3: -1.0, 4: None}
    checkpoints = saved(open_checkpoints(keep_last=1, keep_best=1), *scores, scores=scores)
    assert checkpoints.best_step() == 2 and checkpoints.steps() == [2, 4]


def test_the_newest_write_stays_even_if_its_step_is_not_the_latest(open_checkpoints):
    checkpoints = saved(open_checkpoints(keep_last=1), 10, 4)
    assert 4 in checkpoints.steps()


def test_same_step_is_replaced(open_checkpoints):
    checkpoints = saved(open_checkpoints(keep_best=1), 1, scores={1: 0.1})
    checkpoints.save(1, make_state(9), 0.2)
    assert_same(checkpoints.restore(make_state())[1], make_state(9))
    assert checkpoints.steps() == [1]
    assert [path.name for path in checkpoints._directory.iterdir()] == ["000000001"]


def test_old_checkpoints_stay_until_the_new_one_is_complete(open_checkpoints, monkeypatch):
    checkpoints = saved(open_checkpoints(keep_last=1), 1)

    def fail(path):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "_sums", fail)
    checkpoints.save(2, make_state(2))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(3, make_state(3))
    monkeypatch.undo()
    assert checkpoints.steps() == [1]
    assert_same(checkpoints.restore(make_state())[1], make_state(1))
    assert saved(checkpoints, 2).steps() == [2]


def test_every_changed_byte_and_every_cut_is_noticed(open_checkpoints, tmp_path, log):
    saved(open_checkpoints(), 1, 2)
    newest, intact = tmp_path / "run" / "000000002", tmp_path / "intact"
    shutil.copytree(newest, intact)
    rng = np.random.default_rng(0)
    files = [f.relative_to(intact) for f in sorted(intact.rglob("*")) if f.is_file()]
    assert len(files) > 5
    for file in files:
        content = (intact / file).read_bytes()
        damages = [content[:-1], content[: len(content) // 2], None] if content else [b"x", None]
        size = len(content)
        places = {0, size - 1, *rng.integers(0, max(size, 1), 4)} if content else ()
        for place in places:
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.integers(8)
            damages.append(bytes(flipped))
        for damaged in damages:
            (newest / file).unlink() if damaged is None else (newest / file).write_bytes(damaged)
            before = len(log())
            step, state = open_checkpoints().restore(make_state())
            assert step == 1, (file, damaged)
            assert_same(state, make_state(1))
            (line,) = log()[before:]
            assert str(newest) in line and "\n" not in line
            assert file.as_posix() in line or file.name == "SHA256SUMS"
            (newest / file).write_bytes(content)
    assert open_checkpoints().restore(make_state())[0] == 2


def test_damaged_checkpoints_are_skipped_and_removed_by_the_next_save(
    open_checkpoints, tmp_path, log
):
    saved(open_checkpoints(), 10, 20)
    (tmp_path / "run" / "000000020" / "manifest.json").write_text("{}")
    checkpoints = open_checkpoints()
    assert checkpoints.restore(make_state())[0] == 10 and checkpoints.steps() == [10]
    assert saved(checkpoints, 15).steps() == [10, 15]
    assert open_checkpoints().restore(make_state())[0] == 15
    (tmp_path / "run" / "000000010" / "manifest.json").unlink()
    (tmp_path / "run" / "000000015" / "manifest.json").unlink()
    assert open_checkpoints().restore(make_state()) is None and len(log()) == 3


@pytest.mark.parametrize("line", ["x" * 5000, "\0", "a" * 66 + "\0"])
def test_the_error_of_a_damaged_list_of_digests_names_the_file(tmp_path, line):
    checkpoint.save_tree(tmp_path / "tree", {"w": jnp.ones(2)}, {})
    sums = tmp_path / "tree" / "SHA256SUMS"
    sums.write_text(f"{sums.read_text()}{line}\n")
    with pytest.raises(ValueError, match="tree is damaged: .*SHA256SUMS") as error:
        checkpoint.load_tree(tmp_path / "tree", lambda manifest: {"w": jnp.ones(2)})
    assert len(str(error.value)) < 300


def test_an_extra_file_is_damage(open_checkpoints, tmp_path, log):
    saved(open_checkpoints(), 1, 2)
    (tmp_path / "run" / "000000002" / "arrays" / "extra").write_text("")
    assert open_checkpoints().restore(make_state())[0] == 1 and "SHA256SUMS" in log()[0]


def test_the_error_of_a_mismatch_names_the_leaves(open_checkpoints):
    checkpoints = saved(open_checkpoints(), 1)
    like = make_state()
    like.params["encoder"]["kernel"] = jnp.zeros((3, 6))
    mismatch = r"params/encoder/kernel: found float32\[3, 5\], expected float32\[3, 6\]"
    with pytest.raises(ValueError, match=mismatch):
        checkpoints.restore(like)
    like.params["encoder"] = {"half": jnp.zeros((4,), jnp.float32), "new": jnp.zeros(2)}
    with pytest.raises(ValueError) as error:
        checkpoints.restore(like)
    for words in (
        "half: found bfloat16[4], expected float32[4]",
        "new: found nothing",
        "[3, 5], expected nothing",
    ):
        assert words in str(error.value)
    assert checkpoints.steps() == [1]  # a mismatch is no damage


def _save_until_killed(directory):
    checkpoints = Checkpoints(directory, keep_last=2, keep_best=0)
    step = max(checkpoints.steps(), default=0)
    while True:
        step += 1
        checkpoints.save(step, make_state(step))


def test_killed_writes_never_count(tmp_path):
    context = multiprocessing.get_context("spawn")
    step, leftovers = 0, 0
    for delay in (0.0, 0.013, 0.031):
        process = context.Process(target=_save_until_killed, args=(tmp_path,), daemon=True)
        process.start()
        deadline = time.time() + 60
        while len(list(tmp_path.glob("*[0-9]"))) < 2 or _newest(tmp_path) <= step:
            assert time.time() < deadline and process.is_alive()
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        leftovers += len(list(tmp_path.glob("*.tmp")))
        complete = _newest(tmp_path)
        checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=0)
        assert not [p for p in tmp_path.iterdir() if p.suffix]
        step, state = checkpoints.restore(make_state())
        assert step == complete
        assert_same(state, make_state(step))
        checkpoints.close()
    assert leftovers  # at least one kill hit a write


def _newest(directory):
    return max((int(p.name) for p in directory.glob("*[0-9]") if p.name.isdigit()), default=0)


TWO_PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from rmjax.io.checkpoint import Checkpoints

address, directory, process = *sys.argv[1:3], int(sys.argv[3])
jax.distributed.initialize(address, 2, process)
mesh = jax.make_mesh((2,), ("data",))

def place(x, spec):
    return jax.jit(lambda: x, out_shardings=NamedSharding(mesh, spec))()

host = {"everywhere": np.arange(6.0, dtype="f4"), "split": np.arange(8, dtype="i4"), "step": 3}
state = {"everywhere": place(host["everywhere"], P()), "split": place(host["split"], P("data"))}
state["step"] = 3

def check(step):
    restored, tree = checkpoints.restore(state)
    assert restored == step == checkpoints.steps()[-1], (restored, step)
    jax.tree.map(np.testing.assert_array_equal, tree, host)

checkpoints = Checkpoints(directory, keep_last=2, keep_best=0)
for step in (1, 2):
    checkpoints.save(step, state)
check(2)
if process == 0:
    open(f"{directory}/000000002/manifest.json", "a").write(" ")
multihost_utils.sync_global_devices("damaged")
check(1)
checkpoints.save(2, state)
check(2)
checkpoints.close()
"""


def test_two_processes_write_once_and_restore_the_same(tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    command = [sys.executable, "-c", TWO_PROCESSES, address, str(tmp_path / "run")]
    start = lambda i: subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.PIPE)
    processes = [start(i) for i in range(2)]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def test_a_kill_between_two_renames_keeps_the_old_checkpoint(open_checkpoints, tmp_path):
    saved(open_checkpoints(), 1)
    (tmp_path / "run" / "000000001").rename(tmp_path / "run" / "000000001.old")
    assert_same(open_checkpoints().restore(make_state())[1], make_state(1))


def test_manifest_and_digests_can_be_checked_by_hand(open_checkpoints, tmp_path):
    saved(open_checkpoints(), 7, scores={7: 0.25})
    manifest = json.loads((tmp_path / "run" / "000000007" / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["score"] == 0.25
    assert manifest["leaves"]["params/encoder/kernel"] == ["float32", [3, 5]]
    check = f"cd {tmp_path}/run/000000007 && sha256sum --quiet --strict -c SHA256SUMS"
    assert os.system(check) == 0


def test_a_full_disk_is_an_error_and_keeps_old_checkpoints(open_checkpoints, monkeypatch):
    checkpoints = open_checkpoints()
    checkpoints.save(1, {"w": np.ones(3)})
    checkpoints.wait()

    def full(path, leaves, about):
        path.mkdir()
        raise ValueError(f"RESOURCE_EXHAUSTED: Failed writing: {path}: No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    checkpoints.save(2, {"w": np.ones(3)})
    kept = r"step 2 did not fit .*No space left.*kept is of step 1. Free space, and run the"
    with pytest.raises(OSError, match=kept):
        checkpoints.wait()
    assert checkpoints.steps() == [1] and checkpoints.restore({"w": np.ones(3)})[0] == 1


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep_last"):
        Checkpoints(tmp_path, keep_last=0, keep_best=0)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder_that_orbax_would_take_for_a_pattern_is_refused(tmp_path, read_only):
    with pytest.raises(ValueError, match="could not be read again"):
        Checkpoints(tmp_path / "lr[0.01]", read_only=read_only)
    assert not any(tmp_path.iterdir())


def test_the_log_has_no_traceback_of_an_error_that_orbax_also_raises():
    def passes(message: str, path: str = "/x/orbax/checkpoint/futures.py") -> bool:
        record = logging.LogRecord("absl", logging.ERROR, path, 1, message, (), None)
        return checkpoint._is_not_orbax_chatter(record)

    assert passes("lost") and not passes("run() raised an exception: full")
    assert passes("run() raised an exception: full", "/x/rmjax/train.py")
