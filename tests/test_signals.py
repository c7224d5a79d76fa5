import os
import signal
import threading

import pytest

from gpt2_jax import hosts
from gpt2_jax.signals import ALONE, Interrupted, Stop


@pytest.fixture
def handlers():
    """Return those of before, each of which only takes a note, and restore pytest's."""
    noted: list[int] = []
    before = {n: signal.signal(n, lambda n, frame: noted.append(n)) for n in ALONE}
    yield noted
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ALONE)
def test_the_first_signal_is_noted_and_the_second_is_not_ours(handlers, number):
    with Stop() as stop:
        os.kill(os.getpid(), number)
        assert handlers == [number] and not stop.came()  # nothing to save yet
        stop.listen()
        stop.listen()
        os.kill(os.getpid(), number)
        assert stop.came() and stop.signal == number and handlers == [number]
        os.kill(os.getpid(), number)
        assert handlers == [number, number]
    os.kill(os.getpid(), number)
    assert len(handlers) == 3


def test_a_signal_breaks_what_may_be_left_and_nothing_else(handlers):
    with Stop() as stop:
        stop.listen()
        with pytest.raises(Interrupted), stop.breaks():
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not left at once")
        with pytest.raises(Interrupted), stop.breaks():
            raise AssertionError("entered after a signal")
        with pytest.raises(Interrupted):
            stop.leave_if_it_came()
    with Stop() as stop:
        stop.listen()
        with stop.breaks():
            pass
        os.kill(os.getpid(), signal.SIGINT)  # outside: only noted
        assert stop.came()


def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        stop.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.came()


def test_a_thread_of_a_notebook_may_train(handlers):
    with Stop() as stop:
        thread = threading.Thread(target=stop.listen)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGINT)
        assert handlers == [signal.SIGINT] and not stop.came()


def test_all_processes_are_asked_once_a_call(monkeypatch):
    asked = []

    def asked_to_stop(ask: int) -> bool:
        asked.append(ask)
        return ask == 3

    monkeypatch.setattr(hosts, "asked_to_stop", asked_to_stop)
    with Stop() as stop:
        assert [stop.came() for _ in range(5)] == [False, False, True, True, True]
    assert asked == [1, 2, 3] and stop.signal == signal.SIGTERM
