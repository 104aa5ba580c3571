"""Signals that ask a run to end: what a second one does."""

from __future__ import annotations

import os
import signal
import time

import pytest

from fastdcgan.signals import signals_afterwards, stop_signals


def test_a_second_sigterm_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5) and stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_ends_the_run_at_once() -> None:
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.wait(5) and stop.number == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)


def test_a_signal_waits_until_what_it_would_spoil_is_over() -> None:
    done, found = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), signals_afterwards():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            done.append("all of it")
        assert done == ["all of it"]
    finally:
        signal.signal(signal.SIGINT, found)


def test_a_handler_that_is_not_pythons_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a program that Python is embedded in: `getsignal` gives None, which `signal` does not take."""
    getsignal = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else getsignal(number))
    before = getsignal(signal.SIGTERM)
    with stop_signals():
        assert getsignal(signal.SIGTERM) == before
