"""Kill a run anywhere, start it again: the same bits, log and samples."""

import random
import re
import signal

import pytest
import runs

# How often each phase is called before the kill: from, to.
PHASES = {
    "set_up": (1, 1),
    "compile": (1, 1),
    "step": (2, 30),
    "data": (20, 300),
    "save": (1, 3),
    "wait": (1, 6),
    "delete": (1, 2),
    "eval": (1, 1),
    "sample": (1, 1),
    "restore": (1, 1),
}
SEED = 20_261_126
LONG = dict(train__steps=300, checkpoint__interval=10, evaluate__interval=25)


def kills(count: int, phases: list[str], *, soon: bool = False) -> list[str]:
    """Return seeded faults, every phase among them, at random moments within it.

    A fifth of the way, if they are to come `soon`: a short run has no more calls.
    """
    draw = random.Random(SEED)
    order = [phases[i % len(phases)] for i in range(count)]
    draw.shuffle(order)
    found = []
    for phase in order:
        first, last = PHASES[phase]
        call = draw.randint(first, max(first, last // 5) if soon else last)
        found.append(f"SIGKILL@{phase}:{call}:{draw.randint(1, 50) / 1000}")
    return found


def reached(text: str) -> int:
    """Return the last step that a session told of."""
    steps = re.findall(r"^step +(\d+)/", text, flags=re.MULTILINE)
    return int(steps[-1]) if steps else 0


def resumed(text: str) -> int:
    found = re.search(r"resumed run at step (\d+)", text)
    return int(found[1]) if found else 0


def check_sessions(texts: list[str], interval: int) -> None:
    """Check that no session lost more than two intervals of the work before it."""
    done = 0
    for text in texts:
        if reached(text):  # else it was killed before its first step
            assert resumed(text) >= done - 2 * interval, "".join(texts)
        done = max(done, reached(text))


@pytest.mark.faults
def test_twenty_kills_change_nothing(tmp_path):
    left_alone = tmp_path / "alone"
    left_alone.mkdir()
    [(code, text)] = runs.end(runs.start(left_alone, log__interval=1, **LONG))
    assert code == 0, text
    texts = []
    for fault in kills(20, list(PHASES)):
        [(code, text)] = runs.end(
            runs.start(tmp_path, fault=fault, log__interval=1, **LONG)
        )
        texts.append(text)
        assert code == -signal.SIGKILL, f"{fault}: {code}\n{text}"
    [(code, text)] = runs.end(runs.start(tmp_path, log__interval=1, **LONG))
    assert code == 0, text
    check_sessions([*texts, text], interval=10)
    assert runs.left_behind(tmp_path / "run") == runs.left_behind(left_alone / "run")


def test_a_kill_changes_nothing(tmp_path):
    left_alone = tmp_path / "alone"
    short = dict(train__steps=20, checkpoint__interval=10, evaluate__sample_interval=5)
    left_alone.mkdir()
    [(code, text)] = runs.end(runs.start(left_alone, **short))
    assert code == 0, text
    [(code, text)] = runs.end(runs.start(tmp_path, fault="SIGKILL@step:17", **short))
    assert code == -signal.SIGKILL, text
    [(code, text)] = runs.end(runs.start(tmp_path, **short))
    assert code == 0 and "resumed run at step 10" in text, text
    assert runs.left_behind(tmp_path / "run") == runs.left_behind(left_alone / "run")


@pytest.mark.faults
def test_six_kills_of_two_processes_change_nothing(tmp_path):
    left_alone = tmp_path / "alone"
    left_alone.mkdir()
    how = dict(devices=2, train__micro_batch=2, train__steps=40)
    found = runs.end(*runs.start_two(left_alone, {}, **how))
    assert [code for code, _ in found] == [0, 0], found
    phases = ["step", "eval", "save", "compile", "delete", "data"]
    texts = []
    for turn, fault in enumerate(kills(6, phases, soon=True)):
        victim = 0 if "delete" in fault else turn % 2  # process 0 deletes
        processes = runs.start_two(
            tmp_path, {victim: fault}, train__heartbeat=10, **how
        )
        code, text = runs.end(processes[victim])[0]
        assert code == -signal.SIGKILL, f"{fault}: {code}\n{text}"
        # Its heartbeat and five seconds, and some for a machine that does much else.
        [(code, other)] = runs.end(processes[1 - victim], seconds=10 + 5 + 45)
        assert code not in (0, -signal.SIGKILL), f"{fault}: {code}\n{other}"
        texts.append(text if victim == 0 else other)
    found = runs.end(*runs.start_two(tmp_path, {}, **how))
    assert [code for code, _ in found] == [0, 0], found
    check_sessions([*texts, found[0][1]], interval=5)
    assert runs.left_behind(tmp_path / "run") == runs.left_behind(left_alone / "run")
