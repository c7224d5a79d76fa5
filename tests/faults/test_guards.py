"""The list of guards, which guards.py switches off one by one, is about this code."""

import ast
from pathlib import Path

from guard_list import GUARDS

TESTS = Path(__file__).parents[1]


def test_every_guard_stands_once_in_its_file():
    for guard in GUARDS:
        source = (TESTS.parent / "gpt2_jax" / guard.file).read_text()
        assert source.count(guard.line) == 1, guard
        ast.parse(source.replace(guard.line, guard.off))


def test_every_guard_has_a_test_that_exists():
    for guard in GUARDS:
        file, _, rest = guard.test.partition("::")
        name = rest.partition("[")[0]
        assert not name or f"def {name}(" in (TESTS / file).read_text(), guard
