"""Our numbers against transformers', from files that parity/make_golden.py wrote."""

from pathlib import Path

import agreement
import pytest

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


def test_golden_files_cover_every_option():
    values = [agreement.load(path).values for path in FILES]
    for option in (
        "n_inner", "activation_function", "layer_norm_epsilon", "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
        "tie_word_embeddings",
    ):  # fmt: skip
        assert len({v[option] for v in values}) > 1, option


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_loss_and_gradients_agree_with_transformers(path):
    gaps = agreement.largest_differences(agreement.load(path))
    assert max(gaps.values()) <= agreement.TOLERANCE, gaps
