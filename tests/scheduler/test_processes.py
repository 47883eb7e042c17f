"""Child hygiene on real processes, and the control pipe."""

import multiprocessing
import os
import signal
import subprocess
import sys

import psutil
import pytest
from child_mains import echo, ignored_signals, sleeper, wait_control

from ropeway.scheduler.messages import Heartbeat, Stop, WorkerGone, WorkerStarted
from ropeway.scheduler.processes import (
    Child,
    SignalPipe,
    receive_control,
    send_control,
    socket_address,
)


def test_a_child_hears_and_ends() -> None:
    """Guards the control pipe: messages arrive whole in both directions, and the end says how it came."""
    child = Child("echo", echo, lambda control: control)
    assert wait_control(child.control) == WorkerStarted(child.pid)
    assert child.alive
    beat = Heartbeat(3, "compiling", stage="größer", progress=0.25, steps=7)
    assert send_control(child.control, beat)
    assert wait_control(child.control) == beat
    assert send_control(child.control, Stop())
    assert child.wait(60)
    with pytest.raises(EOFError):
        receive_control(child.control)
    assert child.close() == "exited with code 0"


def test_no_signal_ends_a_child_at_birth() -> None:
    """Guards Ctrl-C during the seconds of importing: signals stay blocked until the child ignores them."""
    child = Child("young", ignored_signals, lambda control: control)
    os.kill(child.pid, signal.SIGINT)
    os.kill(child.pid, signal.SIGTERM)
    os.kill(child.pid, signal.SIGHUP)
    assert wait_control(child.control) == WorkerGone(3)
    assert child.wait(60)
    assert child.close() == "exited with code 0"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} == set()


def test_a_killed_child_shows_where_it_hung(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards the stack dump: without it nobody learns why an engine hung."""
    child = Child("hung", sleeper, lambda control: control)
    wait_control(child.control)
    child.kill(dump_seconds=0.5)
    assert not psutil.pid_exists(child.pid)
    assert child.close() == "was killed by SIGKILL"
    assert "in sleeper" in capfd.readouterr().err


def test_an_orphan_exits() -> None:
    """Guards the race at birth: a parent that died before the death signal was set sends none."""
    code = f"from ropeway.scheduler.processes import become_child; become_child({os.getpid()}); print('lives')"
    nested = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {code!r}]).returncode)"
    orphan = subprocess.run([sys.executable, "-c", nested], capture_output=True, text=True, check=False)
    assert (orphan.returncode, orphan.stdout) == (1, "")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout == "lives\n"


def test_sending_never_blocks() -> None:
    """Guards the supervisor against a child that reads nothing: a full pipe is an answer, not a wait."""
    ours, theirs = multiprocessing.Pipe()
    sent = 0
    while send_control(ours, Heartbeat(1, "stepping", stage="x" * 200)):
        sent += 1
        assert sent < 100_000
    assert sent > 10
    for _ in range(sent):
        assert receive_control(theirs) == Heartbeat(1, "stepping", stage="x" * 200)
    assert receive_control(theirs) is None
    theirs.close()
    assert send_control(ours, Stop())  # gone is not stuck
    ours.close()


def test_signals_become_bytes() -> None:
    """Guards the one blocking wait: a signal that came before or during it is seen, in order, once."""
    pipe = SignalPipe(signal.SIGUSR1, signal.SIGUSR2)
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert multiprocessing.connection.wait([pipe.fileno()], 10)
        assert set(pipe.received()) == {signal.SIGUSR1, signal.SIGUSR2}
        assert pipe.received() == []
    finally:
        pipe.close()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a test play PID 1")
def test_orphans_are_reaped_and_children_are_not() -> None:
    """Guards PID 1: zombies of strangers go, the exit status of our own child stays for its `Child`."""
    code = """
import ctypes, os, subprocess, sys, time
from ropeway.scheduler.processes import reap_orphans
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to us, as they come to PID 1
middle = subprocess.Popen(["sh", "-c", "sleep 0.1 & echo $!"], stdout=subprocess.PIPE, text=True)
orphan = int(middle.stdout.readline())
middle.wait()
while os.path.exists(f"/proc/{orphan}"):
    reap_orphans([])
ours = subprocess.Popen(["sh", "-c", "exit 7"])
while open(f"/proc/{ours.pid}/stat").read().split()[2] != "Z":
    pass
reap_orphans([ours.pid])
assert ours.wait() == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_addresses_tell_generations_and_workers_apart() -> None:
    """Guards queues: what a dead engine left must never be read by the next one."""
    addresses = {
        socket_address("/x", generation, worker, direction)
        for generation in (1, 11)
        for worker in (1, 11)
        for direction in ("in", "out")
    }
    assert len(addresses) == 8
    assert all(address.startswith("ipc:///x/") for address in addresses)


def test_a_calm_collector_leaves_what_was_loaded_alone() -> None:
    """Guards a step against pauses of 100 ms: once loaded, a full collection must walk over new objects only, and the
    objects of a thousand rows' steps must not start one."""
    code = """
import gc
from ropeway.scheduler.processes import calm_gc
ballast = [[i] for i in range(100_000)]
calm_gc()
assert gc.get_freeze_count() > 100_000 and len(gc.get_objects()) < 1_000
full = gc.get_stats()[2]["collections"]
for step in range(200):
    last = [[row] for row in range(10_000)]
assert gc.get_stats()[2]["collections"] == full and gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_calm_process_ends_without_complaints() -> None:
    """Guards the last lines of a terminal: frozen objects are leaks to nanobind, which names sixty of Triton's."""
    pytest.importorskip("triton")
    code = "import triton; from ropeway.scheduler.processes import calm_gc; calm_gc()"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
