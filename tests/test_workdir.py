"""One holder at a time, whoever dies and however; signals only ask."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from rmjax.workdir import EXIT_PREEMPTED, Preemption, lock


def _hold(workdir, ready, fork):
    with lock(workdir):
        if not fork or os.fork() == 0:
            ready.set()
        time.sleep(10)


@pytest.mark.parametrize("fork", [False, True])
def test_second_process_is_told_who_holds_it_and_sigkill_frees_it(tmp_path, fork):
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


def test_released_at_the_end(tmp_path):
    for _ in range(2):
        with lock(tmp_path), pytest.raises(RuntimeError, match=f"pid {os.getpid()}"), lock(tmp_path):
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


def test_the_second_interrupt_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_it_does_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM), preemption.requested))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_exit_code_says_try_again():
    assert EXIT_PREEMPTED == os.EX_TEMPFAIL
