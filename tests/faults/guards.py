"""Switch each guard off, one after another, and see its test fail.

    python tests/faults/guards.py            # all, about ten seconds each
    python tests/faults/guards.py hosts lock # those whose file's path has a word

Works on a copy of the tracked files. Ends with status 1 if a test still passes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from guard_list import GUARDS, Guard

ROOT = Path(__file__).parents[2]


def still_passes(guard: Guard, copies: list[Path]) -> str | None:
    """Return what is wrong: the test passes without the guard, or did not run."""
    copy = copies.pop()
    path = copy / "gpt2_jax" / guard.file
    source = path.read_text()
    try:
        if source.count(guard.line) != 1:
            return f"{source.count(guard.line)} times in the source"
        path.write_text(source.replace(guard.line, guard.off))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n0", "-qx", "-m", "", guard.test],
            cwd=copy / "tests",
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(source)
        copies.append(copy)
    # 1: tests failed, which is right; 2: could not be collected; 4: no such test.
    if done.returncode == 1:
        return None
    return "its test passes" if done.returncode == 0 else done.stdout[-2000:]


def main() -> int:
    """Return 0 if every guard is missed."""
    words = sys.argv[1:] or [""]
    guards = [g for g in GUARDS if any(word in g.file for word in words)]
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        copies = [Path(scratch, name) for name in ("a", "b")]
        for copy in copies:
            for name in listed.stdout.splitlines():
                target = copy / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        with ThreadPoolExecutor(len(copies)) as pool:
            found = pool.map(lambda guard: still_passes(guard, copies), guards)
            bad = 0
            for guard, problem in zip(guards, found, strict=True):
                bad += problem is not None
                print(
                    f"{problem or 'missed'}: {guard.file}: {guard.line!r}", flush=True
                )
    print(f"{len(guards) - bad} of {len(guards)} guards are missed by their tests")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
