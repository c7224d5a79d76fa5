"""Text from tokens: never half a character, never a part of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.config import ConfigError
from gpt2_jax.stopping import TextStream
from gpt2_jax.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
GPT2 = load_tokenizer("gpt2")


def pieces(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    out = []
    for token in ids:
        out.append(stream.push(int(token)))
        if stream.stopped:
            return out, stream
    return [*out, stream.close()], stream


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_pieces_join_to_the_text_without_a_broken_character(text):
    for tokenizer in (BYTES, GPT2):
        found, _ = pieces(tokenizer, tokenizer.encode(text))
        assert "".join(found) == text
        assert all("\ufffd" not in piece or "\ufffd" in text for piece in found)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_join_to_what_decode_says(ids):
    found, _ = pieces(BYTES, ids)
    assert "".join(found) == BYTES.decode(ids)


def test_a_character_waits_for_its_last_byte():
    found, _ = pieces(BYTES, "é🙂".encode())
    assert found == ["", "é", "", "", "", "🙂", ""]


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab\n", max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_stop_string_that_is_complete_first(text, stops):
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    wanted = text
    if ends:
        first = min(ends)
        begun = [text[:first].find(s) for s in stops if s in text[:first]]
        wanted = text[: min(begun)]
    found, stream = pieces(BYTES, text.encode(), stops)
    assert "".join(found) == wanted
    assert stream.stopped == bool(ends)
    sent = ""
    for piece in found:  # nothing is taken back
        sent += piece
        assert wanted.startswith(sent)


def test_a_stop_string_may_cross_tokens_and_begin_inside_one():
    ids = GPT2.encode("The end.\n\nNext")
    for stop, wanted in (("d.\n", "The en"), (".\n\nN", "The end"), ("e e", "Th")):
        found, stream = pieces(GPT2, ids, [stop])
        assert stream.stopped and "".join(found) == wanted
    _, stream = pieces(GPT2, ids, ["d.\n"])
    assert GPT2.decode(ids[: stream.kept_tokens]).startswith("The en")


def test_text_that_may_become_a_stop_string_is_held_back():
    found, _ = pieces(BYTES, b"abXabab", ["abab"])
    assert found == ["", "", "abX", "", "", "", ""]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="stop is ''"):
        TextStream(BYTES, [""])


@settings(max_examples=100, deadline=None)
@given(st.text("ab\n", max_size=12), st.text("ab", min_size=1, max_size=3))
def test_tokens_are_sent_with_the_text_that_they_begin(text, stop):
    stream, sent = TextStream(BYTES, [stop]), ""
    for token in text.encode():
        sent += stream.push(token)
        assert stream.sent_tokens == len(sent)  # a byte is a token
        if stream.stopped:
            break
    sent += "" if stream.stopped else stream.close()
    assert stream.sent_tokens == stream.kept_tokens == len(sent)
