"""Ctrl-C and SIGTERM during training, with real signals to this process."""

from __future__ import annotations

import os
import signal

import pytest

from launch import interrupt
from launch.interrupt import Interrupt

pytestmark = pytest.mark.unit


def press(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)  # Python runs the handler before this returns: it is the main thread's own signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_first_signal_is_a_flag_and_a_line(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupt(announce=True) as caught, caught.deferred():
        assert not caught.requested
        press(number)
        assert caught.requested
    text = capfd.readouterr().err
    assert text == f"\n{number.name}: finishing this step, then saving (once more to stop at once)\n"


def test_other_ranks_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupt(announce=False) as caught, caught.deferred():
        press()
        assert caught.requested
    assert capfd.readouterr() == ("", "")


def test_one_press_that_arrives_twice_is_one_press(capfd: pytest.CaptureFixture[str]) -> None:
    """The terminal signals the whole group, and torchrun passes the signal on as well."""
    with Interrupt(announce=True) as caught, caught.deferred():
        press(signal.SIGINT)
        press(signal.SIGTERM)
        assert caught.requested
    assert capfd.readouterr().err.count("finishing this step") == 1


def test_a_second_press_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_ECHO_S", 0.0)
    with Interrupt(announce=False) as caught, caught.deferred():
        press()
        with pytest.raises(KeyboardInterrupt):
            press()
        assert caught.requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_outside_of_training_a_signal_stops_at_once(number: signal.Signals) -> None:
    """Preparing data or exporting has no step to finish; a rank whose peer has died must not go on for minutes."""
    with Interrupt(announce=False) as caught:
        with pytest.raises(KeyboardInterrupt):
            press(number)
        press()  # the same press, passed on by torchrun: the first one is on its way out already
        assert not caught.requested


def fail_while_caught(former: object) -> None:
    with Interrupt(announce=False):
        assert signal.getsignal(signal.SIGTERM) is not former
        raise RuntimeError("a step failed")


def test_former_handlers_come_back_even_after_an_error() -> None:
    seen: list[int] = []
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with pytest.raises(RuntimeError, match="a step failed"):
            fail_while_caught(mine)
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is former[signal.SIGINT]
        press(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, former[signal.SIGTERM])


def test_the_exit_code_is_the_shell_s_for_ctrl_c() -> None:
    assert interrupt.EXIT_CODE == 128 + signal.SIGINT
