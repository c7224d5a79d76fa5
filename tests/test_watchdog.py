"""Alone nothing is watched; what two processes do is in tests/faults."""

import os
import time

import jax
import pytest

from gpt2_jax import hosts, watchdog
from gpt2_jax.watchdog import Watchdog


@pytest.fixture
def board() -> dict[str, str]:
    """What the processes tell each other."""
    return {"gpt2_jax/progress/1": "7 waits for the batch of step 3"}


@pytest.fixture
def ended(monkeypatch, board) -> list[int]:
    """Return the statuses that the process would have ended with; there are two."""
    statuses: list[int] = []

    def published(folder: str) -> dict[str, str]:
        return {k: v for k, v in board.copy().items() if k.startswith(folder)}

    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "publish", board.__setitem__)
    monkeypatch.setattr(hosts, "published", published)
    monkeypatch.setattr(watchdog, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(watchdog, "MEET_SECONDS", 0.0)
    monkeypatch.setattr(
        watchdog.faulthandler, "dump_traceback_later", lambda *a, **k: 0
    )
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **how: None)
    return statuses


def test_who_goes_on_is_left_alone(ended):
    with Watchdog(1) as dog:
        for step in range(15):
            dog.beat(f"has dispatched step {step}")
            time.sleep(0.1)
    assert ended == []


def test_who_does_not_go_on_is_ended_and_all_are_told_of(ended, capsys):
    with Watchdog(1) as dog:
        dog.beat("has dispatched step 4")
        time.sleep(2.5)
    assert ended == [75]
    told = capsys.readouterr().err
    assert told.startswith("error: no process has gone on for 1 s\n")
    assert "  process 0: has dispatched step 4 (1)\n" in told
    assert "  process 1: waits for the batch of step 3 (7)\n" in told


def test_nobody_leaves_before_all_have_told_their_stacks(ended, board, monkeypatch):
    monkeypatch.setattr(watchdog, "MEET_SECONDS", 60.0)
    with Watchdog(1):
        time.sleep(2.5)
        assert board["gpt2_jax/written/0"] and ended == []
        board["gpt2_jax/written/1"] = "told"
        time.sleep(0.5)
        assert ended == [75]


def test_a_line_said_is_progress(ended):
    lines = []
    with Watchdog(1) as dog:
        say = dog.hears(lines.append)
        for _ in range(15):
            say("prepared 1 file")
            time.sleep(0.1)
    assert ended == [] and len(lines) == 15


def test_alone_or_asked_not_to_nothing_is_watched(ended, monkeypatch):
    with Watchdog(0) as dog:
        assert not dog._thread.is_alive()
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with Watchdog(1) as dog:
        assert not dog._thread.is_alive()
