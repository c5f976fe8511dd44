"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal

import pytest

from mot_megatron.train.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_signal_asks_only_inside_the_block(
    number: signal.Signals, before: signal.Handlers
) -> None:
    # A launcher that ignores a signal starts ranks that ignore it.
    original = signal.signal(number, before)
    try:
        with StopRequest() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, original)
