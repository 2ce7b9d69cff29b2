"""Ctrl-C once and twice."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from harness.search.interrupt import StopRequest


def test_once_asks_to_stop_and_twice_stops() -> None:
    stop, said = StopRequest(), []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop.listening(said.append):
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() and "Ctrl-C again" in said[0]
        with pytest.raises(KeyboardInterrupt):
            stop.raise_if_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and len(said) == 1


def test_another_thread_cannot_listen_and_goes_on() -> None:
    entered: list[bool] = []

    def work() -> None:
        with StopRequest().listening(lambda text: None) as stop:
            entered.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [False]


def test_what_heeds_it_is_not_begun_any_more() -> None:
    stop = StopRequest()
    double = stop.heeded(lambda number: 2 * number)
    with stop.listening(lambda text: None):
        assert double(21) == 42
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            double(21)
