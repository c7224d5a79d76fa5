"""Text from prompts: lengths, stops, seeds, batches; parity: parity/."""

import dataclasses

import jax
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.config import ConfigError, GenerateConfig, ModelConfig
from gpt2_jax.generation import write_texts
from gpt2_jax.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def writer():
    """Return a function from prompts and options to texts of one small model."""
    config = ModelConfig(
        n_vocab=257, n_ctx=48, n_embd=32, n_layer=2, n_head=4, dtype="float32"
    )
    params = model.init(config, jax.random.key(3))
    unstacked = model.unstack(config, jax.tree.map(lambda x: 5.0 * x, params))

    def write(*prompts, stream=None, tokenizer=BYTES, **options):
        how = GenerateConfig(**options)
        ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
        return write_texts(config, unstacked, tokenizer, ids, how, stream=stream)

    return write


def ids(texts):
    return [text.token_ids.tolist() for text in texts]


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.0),
        dict(temperature=1.0, seed=(7,)),
        dict(temperature=1.3, top_k=30, top_p=0.9, min_p=0.01, seed=(7,)),
        dict(temperature=0.7, repetition_penalty=1.2, num_return_sequences=2),
        dict(temperature=0.0, stop=("e", "\x07")),
    ],
)
def test_a_batch_equals_each_prompt_alone(writer, options):
    prompts = ["a", "the quick brown", "zz" * 9]
    together = writer(*prompts, max_new_tokens=20, **options)
    for prompt, texts in zip(prompts, together, strict=True):
        (alone,) = writer(prompt, max_new_tokens=20, **options)
        assert ids(alone) == ids(texts)
        assert [t.text for t in alone] == [t.text for t in texts]
        assert [t.finish_reason for t in alone] == [t.finish_reason for t in texts]
        for one, other in zip(alone, texts, strict=True):  # sums in another order
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_sequences_of_a_prompt_differ_and_more_of_them_change_none(writer):
    (three,) = writer("ab", max_new_tokens=12, num_return_sequences=3)
    (five,) = writer("ab", max_new_tokens=12, num_return_sequences=5)
    assert len({tuple(row) for row in ids(five)}) == 5
    assert ids(five)[:3] == ids(three)


def test_each_prompt_may_have_a_seed(writer):
    found = writer("ab", "ab", "ab", max_new_tokens=12, seed=(1, 2, 1))
    (first,), (second,), (third,) = (ids(texts) for texts in found)
    assert first == third != second
    (alone,) = writer("ab", max_new_tokens=12, seed=(2,))
    assert ids(alone) == [second]
    with pytest.raises(ConfigError, match="one for each of the 3 prompts"):
        writer("ab", "ab", "ab", seed=(1, 2))


def test_max_length_counts_the_prompt_of_each_row(writer):
    (short,), (long,) = writer("ab", "a" * 20, max_length=24, eos=False)
    assert (len(short.token_ids), len(long.token_ids)) == (22, 4)
    with pytest.raises(ConfigError, match="no room in max_length = 20; raise it to 21"):
        writer("a" * 20, max_length=20)
    with pytest.raises(ConfigError, match="allowed: one of them"):
        writer("a", max_length=20, max_new_tokens=3)


def test_without_a_length_new_tokens_fill_the_context(writer):
    ((text,),) = writer("ab", eos=False)
    assert len(text.token_ids) == 46


def test_too_long_a_prompt_says_by_how_much(writer):
    for length in (48, 49, 60):
        with pytest.raises(ConfigError, match=f"context of 48 by {length - 44}"):
            writer("a" * length, max_new_tokens=4)
    with pytest.raises(ConfigError, match="context of 48 by"):
        writer("a" * 48)


def test_truncation_keeps_the_end_of_the_prompt(writer):
    text = "".join(chr(97 + i % 26) for i in range(60))
    how = dict(max_new_tokens=8, temperature=0.0)
    cut = writer(text, truncate="left", **how)
    assert ids(cut[0]) == ids(writer(text[-40:], **how)[0])
    ((default,),) = writer(text, truncate="left", eos=False)
    assert len(default.token_ids) == 24
    with pytest.raises(ConfigError, match="max_new_tokens is 48"):
        writer(text, truncate="left", max_new_tokens=48)


def test_decoding_slides_only_when_asked(writer):
    how = dict(max_new_tokens=100, temperature=0.0, eos=False)
    with pytest.raises(ConfigError, match="exceed the context of 48 by 54"):
        writer("ab", **how)
    ((text,),) = writer("ab", slide=True, **how)
    assert len(text.token_ids) == 100
    ((long,),) = writer("a" * 60, slide=True, truncate="left", **how)
    assert len(long.token_ids) == 100


def test_the_first_stop_string_ends_the_text_and_is_left_out(writer):
    ((whole,),) = writer("ab", max_new_tokens=30, temperature=0.0, eos=False)
    stop = next(chr(t) for t in whole.token_ids[5:] if t < 128)
    first = whole.token_ids.tolist().index(ord(stop))
    how = dict(max_new_tokens=30, temperature=0.0, eos=False)
    ((text,),) = writer("ab", stop=("never", stop), **how)
    assert text.finish_reason == "stop"
    assert text.token_ids.tolist() == whole.token_ids[:first].tolist()
    assert len(text.log_probs) == first
    assert text.text == BYTES.decode(whole.token_ids[:first])


def test_eos_ends_a_text_and_may_be_switched_off(writer):
    ((whole,),) = writer("ab", max_new_tokens=30, temperature=0.0, eos=False)
    assert whole.finish_reason == "length" and len(whole.token_ids) == 30
    stop = int(whole.token_ids[5])
    first = whole.token_ids.tolist().index(stop)
    ending = dataclasses.replace(BYTES, eot=stop)
    ((text,),) = writer("ab", max_new_tokens=30, temperature=0.0, tokenizer=ending)
    assert text.finish_reason == "eos"
    assert text.token_ids.tolist() == whole.token_ids[:first].tolist()


def test_a_stream_joins_to_the_text(writer):
    for options in (dict(), dict(stop=("a", "b", "\n")), dict(temperature=0.0)):
        pieces: list[str] = []
        how = dict(max_new_tokens=40, **options)
        ((streamed,),) = writer("ab", stream=pieces.append, **how)
        ((plain,),) = writer("ab", **how)
        assert "".join(pieces) == streamed.text == plain.text
    with pytest.raises(ConfigError, match="number of texts to stream is 2"):
        writer("ab", num_return_sequences=2, stream=print)


def test_beams_are_cut_by_stop_strings_too(writer):
    how = dict(num_beams=3, num_return_sequences=2, max_new_tokens=10, eos=False)
    for prompt in "abcdefgh":
        (plain,) = writer(prompt, **how)
        sums = [text.log_probs.sum() for text in plain]
        assert len(plain) == 2 and sums[0] >= sums[1]
        ascii_tokens = [t for t in plain[0].token_ids if t < 128]
        if ascii_tokens:
            break
    stop = chr(ascii_tokens[0])
    (cut,) = writer(prompt, stop=(stop,), **how)
    assert cut[0].finish_reason == "stop"
    assert cut[0].text == plain[0].text.partition(stop)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_return_sequences=0), "num_return_sequences is 0"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(num_beams=2, num_return_sequences=3), "num_return_sequences is 3"),
        (dict(num_beams=2, top_k=4), "top_k is 4; allowed: None when num_beams > 1"),
        (dict(stop=("",)), "stop is ''"),
        (dict(seed=()), r"seed is \(\)"),
        (dict(seed=(-1,)), "seed is -1"),
    ],
)
def test_bad_options_are_refused(writer, options, message):
    with pytest.raises(ConfigError, match=message):
        writer("ab", **options)


def test_ids_without_text_are_never_drawn():
    config = ModelConfig(n_vocab=264, n_ctx=16, n_embd=16, n_layer=1, n_head=2)
    params = model.init(config, jax.random.key(0))
    params["wte"]["embedding"] = params["wte"]["embedding"].at[257:].mul(1e3)
    unstacked = model.unstack(config, params)
    how = GenerateConfig(num_return_sequences=20, temperature=50.0, eos=False)
    (texts,) = write_texts(config, unstacked, BYTES, [np.array([1])], how)
    assert max(max(row) for row in ids(texts)) < 257
