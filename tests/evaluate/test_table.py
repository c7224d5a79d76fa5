"""The table: the paper's figures by size, rows that did not run, JSON."""

import json
import math

import pytest

from gpt2_jax.config import ModelConfig
from gpt2_jax.evaluate.table import (
    CARD,
    UNITS,
    Result,
    card_figure,
    lines,
    spell,
    to_json,
)

SIZES = {
    "124M": dict(n_embd=768, n_layer=12, n_head=12),
    "355M": dict(n_embd=1024, n_layer=24, n_head=16),
    "774M": dict(n_embd=1280, n_layer=36, n_head=20),
    "1558M": dict(n_embd=1600, n_layer=48, n_head=25),
}
RAN = Result("wikitext2", "stride 32", 29.4, "ppl/word", 8.0, 12_345, 99, 61.2, "")
MISSING = Result("ptb", "", note="not run: put ptb.test.txt from LDC into data")


@pytest.mark.parametrize(
    "size, wikitext103, lambada",
    [
        ("124M", 37.50, 35.13),
        ("355M", 26.37, 15.60),
        ("774M", 22.05, 10.87),
        ("1558M", 17.48, 8.63),
    ],
)
def test_the_papers_figures_go_by_size(size, wikitext103, lambada):
    config = ModelConfig(**SIZES[size])
    assert card_figure(config, "wikitext103") == wikitext103
    assert card_figure(config, "lambada_ppl") == lambada
    assert card_figure(config, "hf_wikitext2") is None


def test_every_size_has_a_figure_in_every_column():
    assert {len(row) for row in CARD.values()} == {len(UNITS)}
    assert {ModelConfig(**shape).n_params for shape in SIZES.values()} == set(CARD)


def test_another_size_has_none():
    assert card_figure(ModelConfig(n_layer=2), "wikitext2") is None


def test_rows_stand_beside_the_paper():
    text = lines(ModelConfig(), [RAN, MISSING])
    assert (
        text[2] == "| wikitext2 | 29.40 | 29.41 | ppl/word | stride 32 | 12,345 | 61 |"
    )
    assert text[3].startswith("| ptb |  | 65.85 |  | not run: put ptb.test.txt")
    assert {row.count("|") for row in text} == {8}


def test_json_has_what_was_promised():
    found = json.loads(json.dumps(to_json("gpt2", ModelConfig(), [RAN, MISSING])))
    record = found["results"]["wikitext2"]
    wanted = dict(value=29.4, unit="ppl/word", card=29.41, nll=8.0, tokens=12_345)
    assert found["model"] == "gpt2" and wanted.items() <= record.items()
    assert record["protocol"] == "stride 32"
    assert found["results"]["ptb"]["value"] is None


def test_an_infinite_perplexity_is_no_broken_json():
    found = to_json("m", ModelConfig(), [RAN._replace(value=math.inf)])
    record = found["results"]["wikitext2"]
    assert record["value"] is None and record["note"] == "inf"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "value, text",
    [(1.16, "1.1600"), (35.13, "35.13"), (2.5e7, "2.5e+07"), (math.inf, "inf")],
)
def test_numbers_are_spelt_with_four_digits(value, text):
    assert spell(value) == text
