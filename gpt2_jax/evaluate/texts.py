"""The text columns: what is scored, and by how many units its loss is divided.

Units are counted in the file as it is, whatever de-tokenizer the text goes through, so
that a loss stays that of the data set (paper, section 3.1). A perplexity is
exp(loss in nats / units); bits are loss / ln 2 / units.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from gpt2_jax.config import ConfigError, check_name
from gpt2_jax.evaluate import detokenize
from gpt2_jax.evaluate.detokenize import Rules
from gpt2_jax.evaluate.files import read_utf8
from gpt2_jax.tokenizer import Ids, Tokenizer

Detok = Literal["none", "invertible", "megatron"]
Unit = Literal["word+eos", "word", "byte", "char", "token"]
UNITS = ["word+eos", "word", "byte", "char", "token"]

TEST_SIZE = 5_000_000  # bytes, characters; enwik8 and text8 are cut 90M/5M/5M


class Document(NamedTuple):
    """A text that is scored by itself, and its units."""

    text: str  # for `encode`: bytes that are no UTF-8 are lone surrogates
    units: int  # 0 if the unit is the token: whoever scores counts them


class Texts(NamedTuple):
    """What a column scores, all its units, and what to print beside its number."""

    documents: list[Document]
    units: int
    notes: list[str]


def wikitext2(
    path: Path, detok: Detok = "invertible", unit: Unit = "word+eos"
) -> Texts:
    """Return WikiText-2's wiki.test.tokens as one stream: 245,569 words and ends.

    Lines keep their ends. `megatron` is Megatron-LM v2.5's de-tokenizer.

    Raises
    ------
    ConfigError
        If the file is empty or ends within a line (it says which), or an option is
        unknown. So do the other columns.
    """
    megatron = detokenize.megatron_wikitext
    return _stream(path, detok, unit, detokenize.WIKITEXT, megatron=megatron)


def wikitext103(path: Path, detok: Detok = "none", unit: Unit = "word+eos") -> Texts:
    """Return WikiText-103's wiki.test.tokens as one stream.

    The paper's 37.50 is, second hand, of the text as it is.
    """
    return wikitext2(path, detok, unit)


def ptb(path: Path, detok: Detok = "invertible", unit: Unit = "word+eos") -> Texts:
    """Return Mikolov's Penn Treebank file as one stream: 82,430 words and ends."""
    megatron = detokenize.megatron_ptb
    return _stream(path, detok, unit, detokenize.PTB, megatron=megatron)


def enwik8(path: Path, detok: Detok = "none", unit: Unit = "byte") -> Texts:
    """Return the last 5,000,000 bytes of enwik8.

    `invertible` writes XML entities as the marks they stand for. A character that the
    cut halves, at either end, stays as bytes, none lost.
    """
    data, notes = _read_tail(path)
    text = data.decode("utf-8", errors="surrogateescape")
    lines, more = _detokenize(text.split("\n"), detok, detokenize.ENWIK8)
    return _one("\n".join(lines), _count(text, unit), notes + more)


def text8(path: Path, unit: Unit = "char") -> Texts:
    """Return the last 5,000,000 characters of text8, as they are.

    Raises
    ------
    ConfigError
        If there is another character than a to z and blank; word-level files called
        text8.test.txt, with <UNK>, are another thing.
    """
    data, notes = _read_tail(path)
    if bad := re.search(rb"[^a-z ]", data):
        line = 1 + data.count(b"\n", 0, bad.start())
        found = f"{path} holds {bad[0]!r} in line {line} of its test part"
        raise ConfigError(f"{found}; allowed: a to z and blank; get text8 again")
    text = data.decode("ascii")
    return _one(text, _count(text, unit), notes)


def lm1b(
    path: Path,
    detok: Detok = "invertible",
    unit: Unit = "word+eos",
    stream: bool = False,
) -> Texts:
    """Return a heldout shard of 1BW: a document for each sentence, or one stream.

    Sentences are shuffled; by themselves they have neither context nor end of line.
    """
    lines = _read_lines(path)
    texts, notes = _detokenize(lines, detok, detokenize.LM1B)
    if stream:
        units = _count(_join(lines), unit)
        return _one(_join(texts), units, notes)
    units = [_count(f"{line}\n", unit) for line in lines]
    documents = [Document(t, n) for t, n in zip(texts, units, strict=True)]
    return Texts(documents, sum(units), notes)


def hf_wikitext2(path: Path) -> Texts:
    r"""Return wiki.test.raw as Hugging Face's perplexity page joins it.

    Rows are lines with their ends, blank ones empty, "\n\n" between them: 287,644
    tokens. The page averages over windows, per token.
    """
    rows = [f"{line}\n" if line.strip() else "" for line in _read_lines(path)]
    return _one("\n\n".join(rows), 0, [])


def lm_eval_wikitext(path: Path, unit: Literal["word", "byte"] = "word") -> Texts:
    r"""Return wiki.test.raw in articles, as lm-eval's task `wikitext` scores it.

    Units are of the article before it is de-tokenized: pieces between whitespace, an
    empty one at either end included, or bytes (process_results).
    """
    check_name(unit, ["word", "byte"], "lm-eval wikitext unit")
    pages = _split_articles("\n".join([*_read_lines(path), ""]))
    documents = [
        Document(
            detokenize.lm_eval_wikitext(page),
            len(re.split(r"\s+", page)) if unit == "word" else len(page.encode()),
        )
        for page in pages
    ]
    return Texts(documents, sum(document.units for document in documents), [])


def encode(tokenizer: Tokenizer, text: str) -> Ids:
    """Return the tokens of a document; a byte that is no UTF-8 is a token by itself."""
    parts = re.split("([\udc80-\udcff])", text)  # the odd ones are stray bytes
    ordinary = tokenizer.vocabulary.ordinary
    ids = [
        np.array([ordinary[part.encode("utf-8", "surrogateescape")]])
        if n % 2
        else tokenizer.encode(part)
        for n, part in enumerate(parts)
    ]
    return np.concatenate(ids).astype(ids[0].dtype)


def _stream(
    path: Path,
    detok: Detok,
    unit: Unit,
    rules: Rules,
    *,
    megatron: Callable[[str], str],
) -> Texts:
    check_name(detok, ["none", "invertible", "megatron"], "this column's detok")
    lines = _read_lines(path)
    units = _count(_join(lines), unit)
    if detok == "megatron":
        return _one(megatron(_join(lines)), units, [])
    texts, notes = _detokenize(lines, detok, rules)
    return _one(_join(texts), units, notes)


def _one(text: str, units: int, notes: list[str]) -> Texts:
    return Texts([Document(text, units)], units, notes)


def _join(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _detokenize(
    lines: list[str], detok: Detok, rules: Rules
) -> tuple[list[str], list[str]]:
    """Return the lines, and a note on those that stay as they are."""
    check_name(detok, ["none", "invertible"], "this column's detok")
    if detok == "none":
        return lines, []
    texts, raw = detokenize.detokenize_lines(lines, rules)
    return texts, [f"{raw:,} of {len(lines):,} lines stay raw"] if raw else []


def _count(text: str, unit: Unit) -> int:
    check_name(unit, UNITS, "unit")
    if unit == "byte":
        return len(text.encode("utf-8", errors="surrogateescape"))
    if unit == "char":
        return len(text)
    ends = text.count("\n") if unit == "word+eos" else 0
    return 0 if unit == "token" else len(text.split()) + ends


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file without their ends; refuse a truncated one."""
    lines = read_utf8(path).split("\n")
    if lines.pop():
        found = f"{path} ends within line {len(lines) + 1:,}"
        raise ConfigError(f"{found}; allowed: an end of line; get the file again")
    return lines


def _read_tail(path: Path) -> tuple[bytes, list[str]]:
    """Return the last `TEST_SIZE` bytes, and a note if the file has no more."""
    size = path.stat().st_size
    if not size:
        raise ConfigError(f"{path} is empty: it has no line 1; get the file again")
    with path.open("rb") as opened:
        opened.seek(max(0, size - TEST_SIZE))
        data = opened.read()
    small = f"all {size:,} bytes of a file no longer than its test part"
    return data, [small] if size <= TEST_SIZE else []


def _split_articles(text: str) -> list[str]:
    """Cut before each title, as lm-eval's builder datasets/wikitext/wikitext.py."""
    pages, page = [], []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append("\n".join(page))
            page = []
        page.append(line)
    pages = [text for text in pages if text.strip()]
    return [*pages, "\n".join(page)]
