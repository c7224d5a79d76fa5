"""The zero-shot table: what was measured, beside table 3 of the GPT-2 paper."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpt2_jax.config import ModelConfig

UNITS = {
    "lambada_ppl": "ppl/word",
    "lambada_acc": "%",
    "cbt_cn": "%",
    "cbt_ne": "%",
    "wikitext2": "ppl/word",
    "ptb": "ppl/word",
    "enwik8": "bits/byte",
    "text8": "bits/char",
    "wikitext103": "ppl/word",
    "lm1b": "ppl/word",
}
# Radford et al. 2019, table 3, by number of parameters.
CARD = {
    124_439_808: (35.13, 45.99, 87.65, 83.4, 29.41, 65.85, 1.16, 1.17, 37.50, 75.20),
    354_823_168: (15.60, 55.48, 92.35, 87.1, 22.76, 47.33, 1.01, 1.06, 26.37, 55.72),
    774_030_080: (10.87, 60.12, 93.45, 88.0, 19.93, 40.31, 0.97, 1.02, 22.05, 44.575),
    1_557_611_200: (8.63, 63.24, 93.30, 89.05, 18.34, 35.76, 0.93, 0.98, 17.48, 42.16),
}


class Result(NamedTuple):
    """One row: what came out and how, or why nothing did."""

    name: str
    protocol: str  # in words
    value: float | None = None  # None: not run
    unit: str = ""
    nll: float | None = None  # nats of all that was scored; None for a share
    tokens: int = 0  # that were scored
    units: int = 0  # words, bytes, characters or items that `value` is of
    seconds: float = 0.0
    note: str = ""  # "not run: ..", other data


def card_figure(config: ModelConfig, name: str) -> float | None:
    """Return the paper's figure for a model of this size, None where there is none."""
    figures = CARD.get(config.n_params)
    if figures is None or name not in UNITS:
        return None
    return figures[list(UNITS).index(name)]


def lines(config: ModelConfig, results: Sequence[Result]) -> list[str]:
    """Return the rows as a Markdown table."""
    head = ["task", "ours", "paper", "unit", "protocol", "tokens", "s"]
    rows = [f"| {' | '.join(head)} |", "|---|---:|---:|---|---|---:|---:|"]
    for row in results:
        card = card_figure(config, row.name)
        paper = "" if card is None else f"{card:g}"
        if row.value is None:
            cells = [row.name, "", paper, "", row.note, "", ""]
        else:
            words = f"{row.protocol}; {row.note}" if row.note else row.protocol
            cells = [row.name, spell(row.value), paper, row.unit, words]
            cells += [f"{row.tokens:,}", f"{row.seconds:.0f}"]
        rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return rows


def spell(value: float) -> str:
    """Return a number with four digits that count, or in powers of ten."""
    if not math.isfinite(value) or value >= 1e6:
        return f"{value:.4g}"
    return f"{value:.2f}" if value >= 10 else f"{value:.4f}"


def to_json(model: str, config: ModelConfig, results: Sequence[Result]) -> dict:
    """Return plain JSON values: the model, and a record for each row by its name."""
    found: dict[str, dict[str, Any]] = {}
    for row in results:
        record: dict[str, Any] = dict(row._asdict())
        record["card"] = card_figure(config, record.pop("name"))
        if row.value is not None and not math.isfinite(row.value):
            record["value"] = None  # JSON has no infinity
            record["note"] = f"{row.value}; {row.note}".removesuffix("; ")
        found[row.name] = record
    return {"model": model, "n_params": config.n_params, "results": found}
