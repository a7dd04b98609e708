"""Signals that ask to stop: of a closed terminal, of a whole group, twice for one request."""

import multiprocessing
import os
import pty
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from understudy.stopping import left_to_parent, listen, restore
from understudy.training.arguments import StopOnSignal
from understudy.workers import carry_out


@pytest.fixture
def handlers():
    """Handlers as of a shell's foreground job, whatever started the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def _stopped_by(*numbers, clock=None, monkeypatch=None):
    """Whether the step that a stop was asked in is the last one and has a checkpoint."""
    stop, control = StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_train_begin(None, None, None)
    try:
        for i, number in enumerate(numbers):
            if clock is not None:
                monkeypatch.setattr("understudy.training.arguments.time.monotonic", lambda at=clock[i]: at)
            os.kill(os.getpid(), number)
        stop.on_step_end(SimpleNamespace(device="cpu"), SimpleNamespace(global_step=1, max_steps=9), control)
    finally:
        stop.restore()
    return control.should_save and control.should_training_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_writes_a_checkpoint(number, handlers):
    assert _stopped_by(number)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL  # put back


def test_one_request_may_come_as_two_signals_and_a_later_one_stops_at_once(handlers, monkeypatch):
    assert _stopped_by(signal.SIGTERM, signal.SIGTERM, clock=[10.0, 10.2], monkeypatch=monkeypatch)  # as `timeout` does
    with pytest.raises(KeyboardInterrupt):
        _stopped_by(signal.SIGINT, signal.SIGINT, clock=[10.0, 12.0], monkeypatch=monkeypatch)


def test_nohup_stays(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert not _stopped_by(signal.SIGHUP)


def _signalled(number):
    os.kill(os.getpid(), number)
    stop = StopOnSignal()
    stop.on_train_begin(None, None, None)
    os.kill(os.getpid(), number)
    return stop.asked, signal.getsignal(number) is left_to_parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_worker_leaves_the_signals_of_its_group_to_its_parent(number, handlers):
    """Ctrl-C reaches parent and workers; the parent's SIGTERM would be a worker's second one, which leaves no checkpoint."""
    assert carry_out(_signalled, [(number,)], 1, multiprocessing.get_context("fork")) == [(None, True)]


def test_output_is_turned_from_a_terminal_that_is_closed(handlers):
    came = []
    child, terminal = pty.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            before = listen(lambda number, frame: came.append(number))
            sys.stderr = os.fdopen(2, "w", closefd=False)
            sys.stderr.write("ready\n")
            sys.stderr.flush()
            while not came:
                time.sleep(0.01)
            sys.stderr.write("a bar's next state\n")
            sys.stderr.flush()
            restore(before)
            code = 0
        finally:
            os._exit(code)
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
