"""A workdir has one holder at a time, however a process ends; signals only set a flag."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import stat
import threading
import time

import pytest

from rmjax.run.workdir import EXIT_PREEMPTED, Preemption, lock


def _hold(workdir, ready, fork):
    with lock(workdir):
        if not fork or os.fork() == 0:
            ready.set()
        time.sleep(10)


@pytest.mark.parametrize("fork", [False, True])
def test_the_error_names_the_holder_and_sigkill_releases_the_lock(tmp_path, fork):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "run", ready, fork), daemon=True)
    process.start()
    assert ready.wait(60)
    words = rf"held by pid {process.pid} on .*: wait for it to end, stop it"
    with pytest.raises(RuntimeError, match=words), lock(tmp_path / "run"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").read_text().startswith(f"pid {os.getpid()} on ")


def test_the_lock_is_released_at_the_end(tmp_path):
    for _ in range(2):
        with (
            lock(tmp_path),
            pytest.raises(RuntimeError, match=f"pid {os.getpid()}"),
            lock(tmp_path),
        ):
            pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_a_second_interrupt_raises_keyboard_interrupt():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_a_preemption_does_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM), preemption.requested))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_the_exit_code_means_try_again():
    assert EXIT_PREEMPTED == os.EX_TEMPFAIL


def test_readers_share_a_workdir_but_not_with_a_writer(tmp_path):
    run, words = tmp_path / "run", f"pid {os.getpid()} on "
    with lock(run), pytest.raises(RuntimeError, match=words), lock(run, reading=True):
        pass
    with lock(tmp_path / "run", reading=True), lock(tmp_path / "run", reading=True):
        dead = f"pid {2**22 + 1} on {socket.gethostname()}\n"
        (tmp_path / "run" / "lock").write_text(dead)
        words = "another process, such as an evaluation: wait for it"
        with pytest.raises(RuntimeError, match=words), lock(tmp_path / "run"):
            pass


def test_a_lock_that_this_process_gave_back_does_not_name_it(tmp_path):
    own = "that is this process: close"
    with lock(tmp_path), pytest.raises(RuntimeError, match=own), lock(tmp_path):
        pass
    with (
        lock(tmp_path, reading=True),
        pytest.raises(RuntimeError, match="another process, such as an evaluation: wait"),
        lock(tmp_path),
    ):
        pass


def test_reading_makes_nothing(tmp_path):
    with lock(tmp_path / "none", reading=True):
        assert not (tmp_path / "none").exists()
    with lock(tmp_path, reading=True):
        assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("reading", [False, True])
def test_deleting_the_lock_file_releases_nothing(tmp_path, reading):
    with lock(tmp_path):
        (tmp_path / "lock").unlink()
        with (
            pytest.raises(RuntimeError, match="is held by another process"),
            lock(tmp_path, reading=reading),
        ):
            pass
    with lock(tmp_path, reading=reading):
        pass


@pytest.mark.parametrize("files", [False, True], ids=["nothing is locked", "files are locked"])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, files):
    flock = fcntl.flock

    def refuse(opened, how):
        if not files or stat.S_ISDIR(os.fstat(opened.fileno()).st_mode):
            raise OSError(errno.ENOLCK, "No locks available")
        flock(opened, how)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path):
        assert ("this file system has no locks" in caplog.text) == (not files)
        assert ("another --workdir" in caplog.text) == (not files)
        if files:
            with pytest.raises(RuntimeError, match=f"pid {os.getpid()}"), lock(tmp_path):
                pass


def read_only(monkeypatch):
    """Makes opening a file for writing fail, as on a read-only file system."""
    opened = os.open

    def refuse(path, flags, *rest, **more):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)


def test_a_read_only_workdir_can_be_read(tmp_path, monkeypatch):
    with lock(tmp_path):
        pass
    read_only(monkeypatch)
    with lock(tmp_path, reading=True), lock(tmp_path, reading=True):
        pass
    words = r"cannot be written to \(Read-only file system\): name another directory"
    with pytest.raises(OSError, match=words), lock(tmp_path):
        pass


def test_a_full_disk_is_named_and_the_lock_is_released(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        words = r"lock: \d+ bytes could not be written \(no space is left\)"
        with pytest.raises(OSError, match=words), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass
