"""Children's Book Test: which of ten words stands in the blank of a 21st sentence.

An item is 21 numbered lines and a blank one; the last numbered line has the query with
XXXXX, a tab, the answer, two tabs, and the options with | between them. Tokens are
those of the Penn Treebank. All endings of an item share its prefix, so the likeliest
ending is the likeliest whole text (paper, section 3.2).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from gpt2_jax.config import ConfigError, check_name
from gpt2_jax.evaluate.detokenize import CBT, invertible, lm_eval_cbt
from gpt2_jax.evaluate.files import read_utf8

Reading = Literal["plain", "passage"]
Detok = Literal["none", "invertible"]

BLANK = "XXXXX"
N_SENTENCES, N_OPTIONS = 20, 10  # Hill et al. 2016, section 2


class Item(NamedTuple):
    """What stands before the blank, and each option with the rest of the query."""

    prefix: str  # ends in no blank
    endings: list[str]
    answer: int  # which ending


class _Record(NamedTuple):
    sentences: list[str]
    query: str
    answer: str
    options: list[str]


def read_items(
    path: Path,
    reading: Reading = "plain",
    detok: Detok = "invertible",
    n_items: int | None = None,
) -> list[Item]:
    """Return the items of a cbtest_*.txt file.

    plain    20 sentences and the query, blanks between them, de-tokenized by `detok`
    passage  "Passage: ... Question: ..." as lm-eval v0.3.0, whatever `detok`

    Raises
    ------
    ConfigError
        If the file is empty, a line is malformed (it says which), an answer is not
        among its options, or there are not `n_items` items.
    """
    check_name(reading, ["plain", "passage"], "cbt reading")
    check_name(detok, ["none", "invertible"], "cbt detok")
    items = [_item(record, reading, detok) for record in _read(path)]
    if n_items not in (None, len(items)):
        found = f"{path} has {len(items):,} items; allowed: {n_items:,}"
        raise ConfigError(f"{found}; get the file again, or pass --any-data")
    return items


def _item(record: _Record, reading: Reading, detok: Detok) -> Item:
    if reading == "passage":
        passage = " ".join(record.sentences)
        text = lm_eval_cbt(f"Passage: {passage}\nQuestion: {record.query}")
    else:
        lines = [*record.sentences, record.query]
        if detok == "invertible":
            lines = [invertible(line, CBT) for line in lines]
        text = " ".join(lines)
    before, after = text.split(BLANK, 1)
    prefix = before.rstrip(" ")
    endings = [
        before[len(prefix) :] + option + after.replace(BLANK, option)
        for option in record.options
    ]
    return Item(prefix, endings, record.options.index(record.answer))


def _read(path: Path) -> Iterator[_Record]:
    lines = read_utf8(path).split("\n")
    sentences: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        wanted = len(sentences) + 1
        found, _, text = line.partition(" ")
        if found != str(wanted):
            _refuse(path, number, line, f"{wanted} and a sentence")
        if wanted <= N_SENTENCES:
            sentences.append(text.strip())
            continue
        yield _query(path, number, text, sentences, whole=number < len(lines))
        sentences = []
    if sentences or not any(map(str.strip, lines)):
        wanted = f"line {len(sentences) + 1} of an item"
        _refuse(path, len(lines), lines[-1], wanted)


def _query(
    path: Path, number: int, text: str, sentences: list[str], *, whole: bool
) -> _Record:
    """Read line 21; `whole` says that an end of line follows it."""
    query, *fields = [field.strip() for field in text.split("\t")]
    if len(fields) < 2 or BLANK not in query:
        wanted = f"21, a query with {BLANK}, tab, answer, two tabs, options with |"
        _refuse(path, number, text, wanted)
    answer, options = fields[0], fields[-1].split("|")
    if answer not in options or not (whole or len(options) == N_OPTIONS):
        wanted = f"{N_OPTIONS} options with the answer {answer!r} among them"
        _refuse(path, number, fields[-1], wanted)
    return _Record(sentences, query, answer, options)


def _refuse(path: Path, number: int, found: str, wanted: str) -> NoReturn:
    wrong = f"{path}, line {number:,} is {found[:60]!r}; allowed: {wanted}"
    raise ConfigError(f"{wrong}; get the file again")
