"""124M, all layers: saved by transformers, loaded, converted, loaded by transformers.

The other sizes take the memory and minutes of `benchmarks/parity_sizes.py`, which this
runs; its figures stand in docs/performance.md.
"""

import sys
from pathlib import Path

import agreement
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import parity_sizes


@pytest.fixture(scope="module")
def gaps(tmp_path_factory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("full_size")
    parity_sizes.reference(folder, "124M")
    gaps = parity_sizes.our_gradients(folder) | parity_sizes.ours(folder)
    return gaps | parity_sizes.theirs_again(folder)


@pytest.mark.parametrize("what", ["load, logits", "load, gradients", "convert, logits"])
def test_numbers_agree(gaps, what, record_property):
    record_property(what, gaps[what])
    assert gaps[what] <= agreement.TOLERANCE
    assert gaps["largest gradient"] > 100 * agreement.TOLERANCE  # there is something


def test_greedy_text_is_the_same(gaps):
    assert gaps["greedy tokens that differ"] == 0
