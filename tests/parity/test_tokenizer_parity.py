"""Tokenizer files go both ways: the ids of Hugging Face are ours, and the reverse."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer, GPT2Tokenizer
from transformers.utils import logging as hf_logging

from gpt2_jax.config import ConfigError
from gpt2_jax.tokenizer import (
    ENDOFTEXT,
    load_tokenizer,
    read_tokenizer,
    tokenizer_files,
)

SPECIAL = ["<s>", "<pad>", "</s>"]
CORPUS = [
    "It's the cat's tail, they've said; we'll see 1234 and 12.",
    "naïve café — „Größe“ 数字と文字 Привет 🙂‍↔️🙂🙂 e\u0301",
    "def f(x):\n    return x  # aaaaaaaaaa --------\n\n\n\t\t",
    " ".join(f"word{i} wording{i % 7}" for i in range(300)),
]
TEXTS = [
    "",
    *CORPUS,
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪",
    "漢字かな交じり文。한국어",
    " " * 5000 + "x" + "\n" * 3000,
    "\x1c \x85 \u2028\u3000\ufeff\0",
    "a\r\nb",
    "'s 'S 's's ''re",
]
ANY = st.text() | st.lists(st.sampled_from([*CORPUS, *TEXTS[5:], " ", "  "])).map(
    lambda parts: "".join(part[:40] for part in parts)
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files of `tokenizers` itself: special tokens first, then bytes, then merges."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        CORPUS, 500, min_frequency=1, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.save_model(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}
    config = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["trained", "gpt2", "bytes"])
def ours(request, trained):
    name = request.param
    return read_tokenizer(trained) if name == "trained" else load_tokenizer(name)


@pytest.fixture(scope="module")
def written(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for name, contents in tokenizer_files(ours, model_max_length=77).items():
        (folder / name).write_text(contents, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def theirs(written):
    return AutoTokenizer.from_pretrained(written)


@pytest.fixture(scope="module")
def fast(written):
    return HFTokenizer.from_file(str(written / "tokenizer.json"))


def check_same(ours, theirs, fast, text):
    ids = ours.encode(text).tolist()
    assert theirs(text, truncation=False).input_ids == ids
    assert fast.encode(text).ids == ids
    kept = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert theirs.decode(ids, **kept) == ours.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.filterwarnings("ignore:Token indices sequence length")
def test_written_files_give_our_ids(ours, theirs, fast, text):
    check_same(ours, theirs, fast, text)


@given(text=ANY)
@settings(max_examples=200, deadline=None)
def test_written_files_give_our_ids_of_any_text(ours, theirs, fast, text):
    check_same(ours, theirs, fast, text)


def test_written_files_say_what_the_model_is(ours, fast, written, caplog):
    hf_logging.enable_propagation()
    again = AutoTokenizer.from_pretrained(written)
    hf_logging.disable_propagation()
    assert not caplog.records  # a warning is an error already
    assert isinstance(again, GPT2Tokenizer)
    assert (again.model_max_length, len(again)) == (77, ours.n_vocab)
    assert again.eos_token_id == ours.eot
    first = 0 if "<s>" in ours.vocabulary.added else ours.eot
    assert again.bos_token_id == first
    assert again.decode([ours.eot]) == ours.decode([ours.eot])
    assert again.decode([ours.eot], skip_special_tokens=True) == ""
    assert fast.get_vocab_size() == ours.n_vocab


def test_older_files_alone_give_our_ids(ours, written, tmp_path):
    """vocab.json and merges.txt, without tokenizer.json."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.n_vocab
    for text in TEXTS[:8]:
        assert theirs(text).input_ids == ours.encode(text).tolist()


@pytest.mark.parametrize("kept", [["vocab.json", "merges.txt"], ["tokenizer.json"]])
def test_trained_files_are_read(trained, tmp_path, kept):
    """As tokenizers wrote them; GPT2Tokenizer would not put a space before."""
    for name in [*kept, "tokenizer_config.json"]:
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    ours = read_tokenizer(tmp_path)
    theirs = ByteLevelBPETokenizer(
        str(trained / "vocab.json"), str(trained / "merges.txt")
    )
    assert ours.decode([0, 1, 2]) == "".join(SPECIAL)
    assert ours.eot == 2 == theirs.token_to_id("</s>")
    assert ours.fingerprint == read_tokenizer(trained).fingerprint
    for text in TEXTS:
        assert theirs.encode(text).ids == ours.encode(text).tolist()


@pytest.mark.parametrize("used", [False, True])
def test_saved_by_transformers_is_read(ours, theirs, tmp_path, used):
    theirs = AutoTokenizer.from_pretrained(theirs.name_or_path)
    if used:  # leaves padding and truncation in tokenizer.json
        theirs.add_special_tokens({"pad_token": "<more>"})
        theirs("a b", truncation=True, max_length=1, padding="max_length")
    theirs.save_pretrained(tmp_path)
    found = read_tokenizer(tmp_path, eos_token_id=theirs.eos_token_id)
    assert (found == ours) is not used
    assert (found.n_vocab, found.eot) == (len(theirs), ours.eot)
    for text in TEXTS[:8]:
        np.testing.assert_array_equal(found.encode(text), ours.encode(text))
    assert used is (found.decode([len(theirs) - 1]) == "<more>")


@pytest.mark.parametrize("option", ["add_bos_token", "add_prefix_space"])
def test_options_that_change_ids_are_refused(written, tmp_path, option):
    plain = AutoTokenizer.from_pretrained(written)
    changed = AutoTokenizer.from_pretrained(written, **{option: True})
    assert changed("a").input_ids != plain("a").input_ids
    changed.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{option}|post_processor is"):
        read_tokenizer(tmp_path)


def test_special_tokens_in_text_are_where_we_differ(ours, theirs):
    """Hugging Face obeys them unless told not to; here they are data."""
    text = f"a{ours.decode([ours.eot])}b"
    assert theirs(text).input_ids != ours.encode(text).tolist()
    assert ours.eot not in ours.encode(text)
    told = theirs(text, split_special_tokens=True).input_ids
    assert told == ours.encode(text).tolist()
    assert ENDOFTEXT in ours.decode(ours.encode(ENDOFTEXT))
    for known in (f"{text}{text}", f"{text}\n b", ENDOFTEXT[:5] + text):
        assert theirs(known).input_ids == ours.encode(known, special=True).tolist()


ADDED = [  # one within another, one over another's end, in both of HF's passes
    AddedToken("newword", normalized=True),
    AddedToken("newword2", normalized=True),
    AddedToken("neww", normalized=False),
    AddedToken("newws", normalized=False),
    AddedToken("zz  ", normalized=True),
    AddedToken("<sp>", special=True, normalized=False),
    AddedToken("<sp>+", special=True, normalized=False),
    AddedToken(">q", normalized=False),
    AddedToken("p>", normalized=True),
    AddedToken("é(.*)", normalized=False),
    AddedToken("<late>", special=True, normalized=True),
    AddedToken("e><", normalized=True),
]
PIECES = [token.content for token in ADDED] + [*"<>sq2+zé \n", "word", ENDOFTEXT]


@pytest.fixture(scope="module")
def extended(written, tmp_path_factory):
    """Ours of transformers' files, transformers' own, and transformers' of ours."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    theirs = AutoTokenizer.from_pretrained(written)
    theirs.add_tokens([token for token in ADDED if not token.special])
    special = [token for token in ADDED if token.special]
    theirs.add_tokens(special, special_tokens=True)
    theirs.add_special_tokens({"pad_token": "<pad!>"})
    theirs.save_pretrained(first)
    ours = read_tokenizer(first)
    for name, contents in tokenizer_files(ours).items():
        (second / name).write_text(contents, encoding="utf-8")
    return ours, theirs, AutoTokenizer.from_pretrained(second)


def check_added(extended, text):
    ours, *both = extended
    for theirs in both:
        assert theirs(text).input_ids == ours.encode(text, special=True).tolist()
        told = theirs(text, split_special_tokens=True).input_ids
        assert told == ours.encode(text).tolist()
    assert ours.decode(ours.encode(text)) == text


@given(text=ANY | st.lists(st.sampled_from(PIECES)).map("".join))
@settings(max_examples=500, deadline=None)
def test_added_tokens_are_those_of_transformers(extended, text):
    check_added(extended, text)


def test_added_tokens_by_long_blanks(extended):
    check_added(
        extended, "a newword" + " " * 20000 + "<sp>" + " " * 20000 + "newword b"
    )


def test_added_tokens_keep_flags_and_roles(extended, tmp_path):
    ours, theirs, again = extended
    flags = {i: str(token) for i, token in theirs.added_tokens_decoder.items()}
    assert flags == {i: str(token) for i, token in again.added_tokens_decoder.items()}
    assert repr(theirs.added_tokens_decoder) == repr(again.added_tokens_decoder)
    assert theirs.special_tokens_map == again.special_tokens_map
    again.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path) == ours


def test_an_added_word_of_gpt2(tmp_path):
    for name, contents in tokenizer_files(load_tokenizer("gpt2")).items():
        (tmp_path / name).write_text(contents, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["newword"])
    theirs.save_pretrained(tmp_path)
    ids = read_tokenizer(tmp_path).encode("a newword b").tolist()
    assert ids == theirs("a newword b").input_ids == [64, 220, 50257, 275]


def test_added_tokens_of_the_old_layout(written, ours, tmp_path):
    """No flags there: tokens are special when a file names them so."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    n = ours.n_vocab
    eot = ours.decode([ours.eot])
    named = {
        "pad_token": "<pad!>",
        "eos_token": eot,
        "bos_token": eot,
        "unk_token": eot,
    }
    files = {
        "added_tokens.json": {"newword": n, "<pad!>": n + 1, "neww": n + 2},
        "special_tokens_map.json": named,
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
    }
    for name, contents in files.items():
        (tmp_path / name).write_text(json.dumps(contents))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    extended = read_tokenizer(tmp_path), theirs, theirs
    for text in ("a newword b<pad!>neww c", f"newwneww word<pad!>{eot}", *TEXTS[:8]):
        check_added(extended, text)
