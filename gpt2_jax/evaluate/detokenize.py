"""De-tokenizers: evaluation text as people write it, and back to the file's line.

GPT-2's paper (section 3.1) scores text without the artifacts of older tokenizers, by
*invertible* de-tokenizers, so that the probability is still that of the data set.
OpenAI's were not published; these are ours. A de-tokenizer says where two tokens
stand without a blank; `retok` is a small tokenizer that finds the tokens again, and
where it would not, the blank stays. The de-tokenizers of others stand beneath.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Rules(NamedTuple):
    """A de-tokenizer of one line and what undoes it."""

    detok: Callable[[str], str]
    retok: Callable[[str], str]


class Detokenized(NamedTuple):
    """Lines, and how many of them stayed as the file has them."""

    lines: list[str]
    raw: int


def invertible(line: str, rules: Rules) -> str:
    """Return `line` de-tokenized if `retok` gives it back exactly, else `line`."""
    text = rules.detok(line)
    return text if rules.retok(text) == line else line


def detokenize_lines(lines: Sequence[str], rules: Rules) -> Detokenized:
    """Return each line by `invertible`, and count those that do not come back."""
    texts = [invertible(line, rules) for line in lines]
    same = [line for text, line in zip(texts, lines, strict=True) if text == line]
    raw = sum(rules.retok(line) != line for line in same)
    return Detokenized(texts, raw)


def megatron_wikitext(text: str) -> str:
    """Return a whole file of WikiText as Megatron-LM v2.5 de-tokenizes it.

    Not invertible. Source: wikitext_detokenizer of tasks/zeroshot_gpt/detokenizer.py;
    its second expression looks for slashes that WikiText does not have.
    """
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    text = re.sub(r"\(\s*([^)]*?)\s*\)", r"(\1)", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", text)
    text = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", text)
    text = re.sub(r'"\s*([^"]*?)\s*"', r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    for n in (4, 3, 2):
        text = text.replace(" ".join("=" * n), "=" * n)
    text = text.replace(" ° ", "°")
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


def megatron_ptb(text: str) -> str:
    """Return a whole file of PTB as Megatron-LM v2.5 de-tokenizes it.

    Not invertible: N becomes 1, glued to the word before it. Source: ptb_detokenizer
    of tasks/zeroshot_gpt/detokenizer.py.
    """
    text = text.replace(" '", "'").replace(" \n", "\n").replace("\n ", "\n")
    text = text.replace(" n't", "n't").replace(" N ", "1 ")
    return text.replace("$ 1", "$1").replace("# 1", "#1")


# lm-evaluation-harness, lm_eval/tasks/wikitext/preprocess_wikitext.py, has the same
# replacements in the same order, and applies them to one article.
lm_eval_wikitext = megatron_wikitext


def lm_eval_cbt(text: str) -> str:
    """Return the text of one CBT item as lm-eval v0.3.0 (tasks/cbt.py) writes it."""
    text = text.replace(" '", "'").replace(" \n", "\n").replace("\n ", "\n")
    text = text.replace(" n't", "n't").replace("`` ", '"').replace("''", '"')
    for mark in ":;!?,.":
        text = text.replace(f" {mark}", mark)
    return text


@dataclass(frozen=True, eq=False, kw_only=True)  # a key of `_split`'s cache
class _Style:
    """Which tokens stand beside which without a blank, in one corpus."""

    framed: bool  # a line begins and ends with a blank
    spelled: dict[str, str]  # token -> what people write
    quotes: dict[str, tuple[str, str]]  # mark -> tokens that open and close
    openers: str  # marks that stand right before a word
    tail: re.Pattern[str]  # a stem, and a token that stands right behind it
    joints: dict[str, re.Pattern[str]]  # token between two words -> where it is found
    splits_period: Callable[[str, bool], bool]  # of a stem, and if line or quote ends


def _rules(style: _Style) -> Rules:
    return Rules(lambda line: _detok(line, style), lambda text: _retok(text, style))


def _detok(line: str, style: _Style) -> str:
    if style.framed:
        line = line[1:-1]
    groups = _group(line.split(" "), style)
    words = []
    for n, group in enumerate(groups):
        if len(group) > 1:
            word = "".join(style.spelled.get(token, token) for token in group)
            if _split(word, style, n == len(groups) - 1) == group:
                group = [word]
        words += group
    return " ".join(words)


def _retok(text: str, style: _Style) -> str:
    words = text.split(" ")
    parts = [_split(w, style, n == len(words) - 1) for n, w in enumerate(words)]
    line = " ".join(token for part in parts for token in part)
    if not style.framed:
        return line
    return f" {line} " if line else " "


def _group(tokens: list[str], style: _Style) -> list[list[str]]:
    """Cut the tokens into those that make one word."""
    groups, glued = [], False
    inside = {pair[0]: False for pair in style.quotes.values() if pair[0] == pair[1]}
    for n, token in enumerate(tokens):
        left = right = False
        if token in inside:  # the same token opens and closes
            before = tokens[n - 1] if n else ""
            possessive = token == "'" and before.endswith("s")
            left = inside[token] or possessive
            right = inside[token] = not left and token in tokens[n + 1 :]
        elif not token.isalnum():
            left, right = _sides(tokens, n, style)
        if groups and (glued or left):
            groups[-1].append(token)
        else:
            groups.append([token])
        glued = right
    return groups


def _sides(tokens: list[str], n: int, style: _Style) -> tuple[bool, bool]:
    """Say if token `n` stands right behind the one before, and before the next."""
    token = tokens[n]
    before, after = tokens[n - 1] if n else "", "".join(tokens[n + 1 : n + 2])
    if token == "=":  # of a heading
        return before == "=", False
    for open_quote, close_quote in style.quotes.values():
        if token in (open_quote, close_quote):
            return token == close_quote, token == open_quote
    written = style.spelled.get(token, token)
    if token in style.joints:
        near = before[-2:] + written + after[:1]
        if style.joints[token].search(near):
            return True, True
    if len(written) == 1 and written in style.openers:
        return False, True
    behind = style.tail.match("a" + written)
    return token == "." or bool(behind and behind[2] == written), False


@functools.lru_cache(1 << 16)
def _split(word: str, style: _Style, last: bool) -> list[str]:
    """Return the tokens of a word, not to be changed; `last`: it ends its line."""
    if word.isalnum() or word in style.spelled:
        return [word]
    if not word.strip("="):
        return list(word) or [""]
    for token, pattern in style.joints.items():
        if len(parts := pattern.split(word, maxsplit=1)) == 2:
            first = _split(parts[0], style, False)
            return [*first, token, *_split(parts[1], style, last)]
    return _peel(word, style, last)


def _peel(word: str, style: _Style, last: bool) -> list[str]:
    """Return the marks before a word, the word, and the tokens behind it."""
    spelled = {v: k for k, v in style.spelled.items() if k not in style.joints}
    opening = spelled | {mark: pair[0] for mark, pair in style.quotes.items()}
    closing = spelled | {mark: pair[1] for mark, pair in style.quotes.items()}
    openers = (*style.openers, *style.quotes)
    head, tail = [], []
    while len(word) > 1 and word[0] in openers and not CLIPPED.match(word):
        head.append(opening.get(word[0], word[0]))
        word = word[1:]
    while True:
        quoted = tail[-1:] in [[pair[1]] for pair in style.quotes.values()]
        if found := style.tail.match(word):
            word, token = found[1], found[2]
        elif word[-1:] == "." and style.splits_period(word[:-1], last or quoted):
            word, token = word[:-1], "."
        else:
            return [*head, word, *reversed(tail)]
        tail.append(closing.get(token, token))


# Tokens of one apostrophe and letters: there it opens no quotation.
CLIPPED = re.compile(r"'(s|t|re|ve|m|d|ll|em|tis|twas|til|cause|bout)$", re.IGNORECASE)

# Moses' English non-breaking prefixes, as far as WikiText's test and validation files
# have them: their period is part of the word.
ABBREVIATIONS = re.compile(
    r"(?:^|\W)(Bros|Capt|Co|Col|Corp|Dr|Gen|Gov|Hon|Inc|Jr|Lt|Ltd|Maj|Mr|Mrs|Ms|Mt|Nos?"
    r"|Prof|Rep|Rev|Sen|Sgt|Sr|St|al|etc|mm|pp|var|vs)$"
)


def _ends_a_sentence(stem: str, last: bool) -> bool:
    """Return False where Moses' tokenizer leaves the period with its word."""
    known = ABBREVIATIONS.search(stem)
    initial = re.fullmatch(r"[A-Za-z]", stem) or re.search(r"\.[^\W\d]*$", stem)
    return bool(stem) and not known and not initial


def _ends_line_or_quote(stem: str, last: bool) -> bool:
    """Return True where the Penn Treebank's tokenizer cuts."""
    return last and bool(stem) and not stem.endswith(".")


def _never(stem: str, last: bool) -> bool:
    return False


def _between(mark: str, side: str) -> re.Pattern[str]:
    return re.compile(f"(?<={side}){mark}(?={side})")


# Behind a word, as Moses' tokenizer cuts: 's, 't and 'Brien begin with the apostrophe.
MOSES_TAIL = re.compile(r"""^(.+?)(\.\.\.|[,;:!?)\]%°"'”]|(?<=[\w>.)])'\w+)$""")

WIKITEXT = _rules(
    _Style(
        framed=True,
        spelled={"@-@": "-", "@,@": ",", "@.@": "."},
        quotes={'"': ('"', '"'), "'": ("'", "'"), "“": ("“", "”")},
        openers="([$£¥₱#",
        tail=MOSES_TAIL,
        joints={
            "@-@": _between("-", "[^-@]"),
            "@,@": _between(",", r"\d"),
            "@.@": re.compile(r"(?<![A-Za-z]\d)(?<=\d)\.(?=\d)"),  # not in T2.5
            ":": _between(":", r"\d"),
            "–": _between("–", r"\d"),
            "/": _between("/", "."),
        },
        splits_period=_ends_a_sentence,
    )
)

# Mikolov's file is in lower case, without punctuation; <unk> and N stay.
PTB = _rules(
    _Style(
        framed=True,
        spelled={"\\/": "/"},
        quotes={},
        openers="$#",
        tail=re.compile(r"^(.+?)(n't|'(?:s|m|d|ll|re|ve)?)$"),
        joints={"\\/": _between("/", ".")},
        splits_period=_never,
    )
)

CBT = _rules(
    _Style(
        framed=False,
        spelled={"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]"}
        | {"``": '"', "''": '"', "`": "'"},
        quotes={'"': ("``", "''"), "'": ("`", "'")},
        openers="([",
        tail=re.compile(
            r"""^(.+?)(\.\.\.|[,;:!?)\]"]|n't|'(?:s|m|d|ll|re|ve)|')$""", re.IGNORECASE
        ),
        joints={},
        splits_period=_ends_line_or_quote,
    )
)

# Tokenized by the scripts of WMT11, which are Moses' (Chelba et al. 2013, section 2).
LM1B = _rules(
    _Style(
        framed=False,
        spelled={},
        quotes={'"': ('"', '"'), "'": ("'", "'")},
        openers="([$£€#",
        tail=MOSES_TAIL,
        joints={":": _between(":", r"\d"), "/": _between("/", ".")},
        splits_period=_ends_a_sentence,
    )
)

# Tags of MediaWiki's export format; what they enclose has its entities.
TAG = (
    "</?(?:base|case|comment|contributor|generator|id|ip|mediawiki|minor|namespaces?|page"
    "|restrictions|revision|sitename|siteinfo|text|timestamp|title|username)"
    "(?: [^>]*)?/?>"
)
EXPORT = re.compile(f"(?s)( *{TAG})?(.*?)({TAG})?")
ENTITIES = {"&quot;": '"', "&lt;": "<", "&gt;": ">", "&amp;": "&"}
ESCAPES = str.maketrans({mark: entity for entity, mark in ENTITIES.items()})


def _part(line: str) -> tuple[str, str, str]:
    """Return the tag that a line begins with, its text, and the tag at its end."""
    found = EXPORT.fullmatch(line)
    return (found[1] or "", found[2], found[3] or "") if found else ("", line, "")


def _unescape(line: str) -> str:
    tag, text, end = _part(line)
    return tag + re.sub("&(quot|lt|gt|amp);", lambda m: ENTITIES[m[0]], text) + end


def _escape(text: str) -> str:
    tag, text, end = _part(text)
    return tag + text.translate(ESCAPES) + end


ENWIK8 = Rules(_unescape, _escape)  # XML entities of enwik8's Wikipedia export
