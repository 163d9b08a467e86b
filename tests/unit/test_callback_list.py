"""Callbacks that fail cost only what they would have written."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.callbacks.base import Callback, CallbackList

pytestmark = pytest.mark.unit


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_step(self, step: int) -> None:
        self.seen.append(step)

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.seen.append((step, path.name))

    def on_end(self) -> None:
        self.seen.append("end")


class FullDisk(Recorder):
    def on_step(self, step: int) -> None:
        super().on_step(step)
        if step < 3:
            raise OSError(28, "No space left on device")


def test_every_callback_hears_every_event_and_a_failure_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    failing, healthy = FullDisk(), Recorder()
    callbacks = CallbackList([failing, healthy])
    for step in (1, 2, 3):
        callbacks.on_step(step)
    callbacks.on_checkpoint(3, Path("step_000003"))
    callbacks.on_end()
    assert healthy.seen == failing.seen == [1, 2, 3, (3, "step_000003"), "end"]
    assert capsys.readouterr().err == (
        "warning: FullDisk failed: OSError: [Errno 28] No space left on device; training goes on without what it"
        " writes\n"
    )


def test_it_passes_on_every_event_that_a_callback_has() -> None:
    events = {name for name in vars(Callback) if name.startswith("on_")}
    assert events == {name for name in vars(CallbackList) if name.startswith("on_")}
    for name in events:
        heard: list[str] = []
        callback = Callback()
        setattr(callback, name, lambda *_args, heard=heard, name=name: heard.append(name))
        arguments = vars(Callback)[name].__code__.co_argcount - 1
        getattr(CallbackList([callback]), name)(*[None] * arguments)
        assert heard == [name]
