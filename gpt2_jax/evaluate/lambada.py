r"""LAMBADA: the last word of a passage, given all before it.

OpenAI's file holds one JSON object with the key `text` a line. Context and target are
tokenized apart: the context ends in no blank and the target begins with one, where
GPT-2's pattern cuts anyhow, so that both together have the same tokens.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from gpt2_jax.config import ConfigError, check_name
from gpt2_jax.evaluate.files import read_utf8
from gpt2_jax.tokenizer import Tokenizer

Preprocessing = Literal["paper", "none", "lm-eval"]


class Item(NamedTuple):
    """A passage without its last word, and the blank and the word."""

    context: str
    target: str


def read_items(path: Path, preprocessing: Preprocessing = "paper") -> list[Item]:
    r"""Return the items of a JSONL file.

    paper    curly double quotes to ", blanks stripped, a newline in front, as
             openai/gpt-2#131 guesses; the last word is what follows any whitespace
    none     the text as it is; the last word is what follows any whitespace
    lm-eval  the text as it is; the last word is what follows the last ' '; blanks at
             the context's end go to the target (lambada_openai, model.py _encode_pair)

    Raises
    ------
    ConfigError
        If the file is empty, or a line is no item; the message says which line.
    """
    check_name(preprocessing, ["paper", "none", "lm-eval"], "lambada preprocessing")
    lines = read_utf8(path).split("\n")
    if lines[-1] == "":  # after the last end of line
        lines.pop()
    return [_read(path, n, line, preprocessing) for n, line in enumerate(lines, 1)]


def _read(path: Path, number: int, line: str, preprocessing: Preprocessing) -> Item:
    wanted = 'allowed: {"text": "two words or more"}; get the file again'
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        wrong = f"{path}, line {number}: no JSON ({error.msg} at {error.pos})"
        raise ConfigError(f"{wrong}; {wanted}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or len(text.split()) < 2:
        raise ConfigError(f"{path}, line {number} is {line[:60]!r}; {wanted}")
    if preprocessing == "lm-eval":
        return _split_at_blank(text)
    if preprocessing == "paper":
        text = "\n" + re.sub("[“”]", '"', text).strip()
    word = text.split()[-1]
    return Item(text[: text.rindex(word)].rstrip(), f" {word}")


def _split_at_blank(text: str) -> Item:
    before, word = text.rsplit(" ", 1)
    context = before.rstrip()
    return Item(context, f"{before[len(context) :]} {word}")


# NLTK's English list of 127 words, which cybertronai/bflm filters with.
STOP_TEXT = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his
himself she her hers herself it its itself they them their theirs themselves what which
who whom this that these those am is are was were be been being have has had having do
does did doing a an the and but if or because as until while of at by for with about
against between into through during before after above below to from up down in out on
off over under again further then once here there when where why how all any both each
few more most other some such no nor not only own same so than too very s t can will
just don should now
"""
STOP_WORDS = frozenset(STOP_TEXT.split())
# sha256 of the words in alphabetical order, each with an end of line.
STOP_WORDS_SHA256 = "dee23a53237648b1c03582c3b814b4051280cf356de772edb620d5ed8c446699"


def allowed_first_pieces(tokenizer: Tokenizer) -> Bool[np.ndarray, " V"]:
    """Return which tokens may begin the last word under the stop-word filter.

    Not allowed is a token whose text is a whole stop word, blanks and case aside, or
    has no letter or digit, or is special. The paper (section 3.3) says no more than
    that there is a filter; this is the reading of applying it at the first piece only.
    A word that merely begins with such a piece (were + wolves) is lost with it: 5,001
    of the 5,153 targets can be reached, where whole words would leave 5,106.
    """
    allowed = np.zeros(tokenizer.n_vocab, bool)
    for token, i in tokenizer.vocabulary.ordinary.items():
        text = token.decode("utf-8", errors="replace").strip().casefold()
        allowed[i] = text not in STOP_WORDS and any(map(str.isalnum, text))
    return allowed
