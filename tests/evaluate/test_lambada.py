import hashlib
import json
import os
from pathlib import Path

import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.evaluate.lambada import (
    STOP_WORDS,
    STOP_WORDS_SHA256,
    Item,
    Preprocessing,
    allowed_first_pieces,
    read_items,
)
from gpt2_jax.tokenizer import load_tokenizer

DATA = Path(os.environ.get("GPT2_JAX_DATA", Path(__file__).parents[3] / "shared/data"))
REAL = DATA / "lambada" / "lambada_test.jsonl"
HERE = pytest.mark.skipif(not REAL.is_file(), reason="the file is not there")


def write(path: Path, *texts: str) -> Path:
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("preprocessing", "items"),
    [
        ("paper", [('\n"Oh," he said. His', " cat"), ("\nA dog", " ran")]),
        ("none", [("“Oh,” he said. His", " cat"), ("A dog", " ran")]),
        ("lm-eval", [("“Oh,” he said.", " His\ncat"), ("A dog", "  ran")]),
    ],
)
def test_a_passage_is_cut_before_its_last_word(
    tmp_path: Path, preprocessing: Preprocessing, items: list[tuple[str, str]]
):
    path = write(tmp_path / "a.jsonl", "“Oh,” he said. His\ncat", "A dog  ran")
    assert read_items(path, preprocessing) == [Item(*item) for item in items]


def test_a_word_that_stands_twice_is_cut_at_its_end(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", " the cat is a cat\n")
    assert read_items(path, "none") == [Item(" the cat is a", " cat")]
    assert read_items(path, "paper") == [Item("\nthe cat is a", " cat")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "empty: it has no line 1"),
        ('{"text": "a b"}\n{"text": "a', "line 2: no JSON"),
        ('{"text": "a b"}\n\n{"text": "a b"}\n', "line 2: no JSON"),
        ('{"txt": "a b"}\n', "line 1 is"),
        ('["a b"]\n', "line 1 is"),
        ('{"text": "alone"}\n', "line 1 is"),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(
    tmp_path: Path, text: str, found: str
):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=found):
        read_items(path)


def test_the_stop_words_are_the_127_of_the_list():
    text = "".join(f"{word}\n" for word in sorted(STOP_WORDS))
    assert len(STOP_WORDS) == 127
    assert hashlib.sha256(text.encode()).hexdigest() == STOP_WORDS_SHA256


def test_the_filter_takes_whole_stop_words_and_marks_away():
    tokenizer = load_tokenizer("gpt2")
    allowed = allowed_first_pieces(tokenizer)
    assert allowed.shape == (50_257,)
    first = {t: allowed[tokenizer.encode(t)[0]] for t in (" cat", " 7", " isn", "ly")}
    assert all(first.values())
    for text in (" the", "The", " THE", " ,", ' "', " ", "\n"):
        assert not allowed[tokenizer.encode(text)[0]]
    assert not allowed[tokenizer.eot]


@HERE
@pytest.mark.parametrize(
    ("preprocessing", "n_tokens", "longest", "n_long"),
    [
        ("paper", 423_577, 225, 1140),
        ("none", 430_217, 224, 1140),
        ("lm-eval", 430_230, 224, 1143),
    ],
)
def test_the_real_items_have_the_counts_published(
    preprocessing: Preprocessing, n_tokens: int, longest: int, n_long: int
):
    encode = load_tokenizer("gpt2").encode
    items = read_items(REAL, preprocessing)
    targets = [encode(item.target).tolist() for item in items]
    wholes = [encode(f"{context}{target}").tolist() for context, target in items]
    assert len(items) == 5153
    assert sum(map(len, wholes)) == n_tokens
    assert max(map(len, wholes)) == longest
    for whole, target in zip(wholes, targets, strict=True):
        assert whole[-len(target) :] == target  # the cut is between tokens
    assert sum(len(target) > 1 for target in targets) == n_long


@HERE
def test_the_readings_of_the_real_file_differ_where_they_are_known_to():
    items = read_items(REAL, "none")
    other = read_items(REAL, "lm-eval")
    assert sum(a.target != b.target for a, b in zip(items, other, strict=True)) == 7
    assert sum(item.target.strip().casefold() in STOP_WORDS for item in items) == 47
    tokenizer = load_tokenizer("gpt2")
    for context, target in items[:500]:
        apart = [*tokenizer.encode(context), *tokenizer.encode(target)]
        assert apart == tokenizer.encode(context + target).tolist()
    allowed = allowed_first_pieces(tokenizer)
    reached = [allowed[tokenizer.encode(item.target)[0]] for item in items]
    assert sum(map(bool, reached)) == 5001
