"""Every odd request to a model: a defined result, or one line that says what is odd.

GN1 .. GN12 are rows of the fault table in the reliability reference.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import cli, model
from gpt2_jax.beam import beam_search
from gpt2_jax.config import ConfigError, GenerateConfig, ModelConfig
from gpt2_jax.decode import Decoder, Row, Sampling, generate
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import load_tokenizer

HERE = Path(__file__).parent
LONG = pytest.mark.faults
NAN, INF = float("nan"), float("inf")
CONFIG = ModelConfig(
    n_vocab=257, n_ctx=32, n_embd=16, n_layer=2, n_head=2, dtype="float32"
)
BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def lm() -> GPT2:
    params = model.init(CONFIG, jax.random.key(0))
    return GPT2(CONFIG, jax.tree.map(lambda x: 4 * x, params), BYTES)


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("edges") / "model"
    lm.save(folder)
    return str(folder)


def new_ids(lm, prompt="ab", *, stream=None, **options) -> list[int]:
    how = GenerateConfig(**(dict(max_new_tokens=6, eos=False) | options))
    return lm.write(prompt, how, stream=stream)[0][0].token_ids.tolist()


def with_leaf(lm: GPT2, name: str, change) -> GPT2:
    """Return the model with one leaf changed."""

    def alter(path, leaf):
        here = jax.tree_util.keystr(path, simple=True, separator="/")
        return change(leaf) if here == name else leaf

    return GPT2(lm.config, jax.tree.map_with_path(alter, lm.params), lm.tokenizer)


def refused(ask, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ask()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# GN1


def test_an_empty_prompt_is_the_start_of_a_document(lm):
    wanted = new_ids(lm, [BYTES.eot])
    for empty in ("", [""], np.array([], int), [np.array([], int)], [[]]):
        assert new_ids(lm, empty) == wanted
        assert lm.features(empty).shape == (1, 1, 16)
    assert lm.generate([]) == [] == lm.score([])
    assert np.isnan(lm.score("").perplexity)
    assert len(lm.score("", start=True).log_probs) == 1
    with pytest.raises(ConfigError, match="no tokenizer"):
        GPT2(lm.config, lm.params, None).score(np.array([], int))


# GN2


@pytest.mark.parametrize("length", [30, 31, 32, 33, 160])
def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(lm, length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    for new in (1, 2, 3):
        if length + new <= 32:
            assert len(new_ids(lm, text, max_new_tokens=new)) == new
            continue
        excess = length + new - 32
        words = f"of {length} tokens .* = {new} exceed the context of 32 by {excess};"
        refused(lambda new=new: new_ids(lm, text, max_new_tokens=new), words)
    cut = dict(truncate="left", temperature=0.0)
    assert new_ids(lm, text, **cut) == new_ids(lm, text[-26:], temperature=0.0)
    if length <= 32:
        assert lm.features(text).shape == (1, length, 16)
    else:
        words = f"of {length} tokens exceeds the context of 32 by {length - 32}"
        refused(lambda: lm.features(text), words)
        refused(lambda: lm.score(text), words)
    if length == 32:
        refused(lambda: lm.score(text, start=True), "of 33 tokens exceeds")


# GN3


def test_no_temperature_is_too_small_for_the_argmax(lm):
    greedy = new_ids(lm, temperature=0.0)
    logits = lm.logits(np.array([*b"ab", *greedy]))[1:-1]
    assert greedy == np.argmax(logits, axis=-1).tolist()
    for heat in (-0.0, 1e-6, 1e-30, 1e-45, 5e-324):
        assert new_ids(lm, temperature=heat) == greedy


@pytest.mark.parametrize("heat", [-1.0, -1e-9, NAN, INF, -INF])
def test_no_other_number_is_a_temperature(lm, heat):
    for beams in (1, 2):  # which beams do not use
        refused(lambda b=beams: new_ids(lm, temperature=heat, num_beams=b), "tempera")
    refused(lambda: lm.generate([], temperature=heat), "temperature is")


def test_any_heat_draws_from_the_vocabulary_alone(lm):
    """GN12 too: padded rows made loud, in float32 an infinite temperature."""
    padded = with_leaf(lm, "wte/embedding", lambda x: x.at[CONFIG.n_vocab :].set(99.0))
    unstacked = model.unstack(CONFIG, padded.params)
    rows = [Row(np.array([1]), 8, 0, i) for i in range(40)]
    for heat in (1e9, 1e37, 1e38, 3e38, 1e39, 1e308):
        how = Sampling(heat)
        new = np.array(generate(CONFIG, unstacked, rows, sampling=how, eot=None))
        assert new.max() < CONFIG.n_vocab
        assert len(np.unique(new)) > 100  # of 257, in 320 draws


# GN4


def test_a_filter_wider_than_the_vocabulary_filters_nothing(lm):
    plain = new_ids(lm, seed=(3,))
    for wide in (dict(top_k=257), dict(top_k=258), dict(top_k=2**31 - 1)):
        assert new_ids(lm, seed=(3,), **wide) == plain
    for wide in (dict(top_p=1.0), dict(min_p=0.0), dict(min_p=1e-300)):
        assert new_ids(lm, seed=(3,), **wide) == plain


def test_the_narrowest_filter_leaves_the_likeliest(lm):
    greedy = new_ids(lm, temperature=0.0)
    for tight in (
        dict(top_k=1),
        dict(top_p=1e-300),
        dict(top_p=5e-324),
        dict(min_p=1.0),
    ):
        assert new_ids(lm, seed=(3,), **tight) == greedy
    all_three = dict(top_k=1, top_p=1e-9, min_p=1.0, temperature=1e9)
    assert new_ids(lm, seed=(3,), **all_three) == greedy


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("top_k", [0, -1, 2**31, 2**70]),
        ("top_p", [0.0, -0.1, 1.5, NAN, INF]),
        ("min_p", [-0.1, 1.5, NAN]),
        ("repetition_penalty", [0.0, -1.0, NAN, INF, 1e-38, 1e39]),
        ("length_penalty", [NAN, INF, 0.5]),
        ("max_new_tokens", [0, -1, 2**31, 10**30]),
        ("num_return_sequences", [0, -1, 1025, 10**9, 10**30]),
        ("num_beams", [0, -1, 1025, 10**9, 10**30]),
        ("seed", [(), (-1,), (2**32,), (2**70,)]),
        ("stop", [("",), ("a", ""), ("\ud800",)]),
    ],
)
def test_a_value_outside_its_range_is_refused(lm, name, values):
    for value in values:
        ask = functools.partial(GenerateConfig, **{name: value})
        refused(lambda ask=ask: lm.write("ab", ask()), f"^{name} is ")


def test_a_length_penalty_that_is_no_number_is_refused_before_a_model_is_read():
    with pytest.raises(ConfigError, match="length_penalty is nan"):
        GenerateConfig(num_beams=2, length_penalty=NAN)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(max_new_tokens=3, max_length=5), "max_new_tokens = 3 beside max_length"),
        (dict(num_beams=2, top_k=4), "top_k is 4; allowed: None when num_beams > 1"),
        (dict(num_beams=2, slide=True), "slide is True; allowed: False when"),
        (dict(num_beams=2, repetition_penalty=1.5), "repetition_penalty is 1.5"),
        (dict(num_beams=2, num_return_sequences=3), "num_return_sequences is 3"),
        (dict(num_beams=2, length_penalty=11.0), "length_penalty is 11.0"),
        (dict(num_beams=2, length_penalty=-40.0), "length_penalty is -40.0"),
        (dict(length_penalty=2.0), "length_penalty is 2.0; allowed: 1.0 unless"),
        (dict(truncate="left", max_new_tokens=32), "max_new_tokens is 32; allowed: <"),
        (dict(max_length=2), "of 2 tokens leaves no room in max_length = 2"),
        (dict(seed=(1, 2)), "one for each prompt"),
    ],
)
def test_options_that_contradict_each_other_are_refused(lm, options, words):
    refused(lambda: lm.write("ab", GenerateConfig(**options)), words)


@pytest.mark.parametrize("penalty", [1e-30, 1e-3, 1e30])
def test_the_strongest_penalties_leave_numbers(lm, penalty):
    found = new_ids(lm, repetition_penalty=penalty, max_new_tokens=20)
    assert max(found) < CONFIG.n_vocab
    if penalty > 1:
        assert len({*found, *b"ab"}) == 22


# GN5


@pytest.mark.parametrize(
    "poison", [NAN, *(pytest.param(x, marks=LONG) for x in (INF, -INF))], ids=str
)
@pytest.mark.parametrize(
    "leaf", ["wte/embedding", "ln_f/scale", "blocks/attn/qkv/kernel"]
)
def test_numbers_that_are_not_finite_give_an_error_and_no_text(lm, leaf, poison):
    broken = with_leaf(lm, leaf, lambda x: x.at[(0,) * x.ndim].set(poison))
    pieces: list[str] = []
    asks = [
        lambda: broken.generate("\0b", max_new_tokens=4),
        lambda: broken.generate("\0b", max_new_tokens=4, stream=pieces.append),
        lambda: broken.generate("\0b", max_new_tokens=4, num_beams=2),
        lambda: broken.score("\0b"),
        lambda: broken.features("\0b"),
        lambda: broken.features("\0b", pool="mean"),
        lambda: broken.hidden_states("\0b"),
    ]
    for ask in asks:
        with pytest.raises(FloatingPointError, match="not finite; check its weights"):
            ask()
    assert pieces == []


def test_a_row_that_is_not_finite_takes_no_token_from_the_others(lm):
    broken = with_leaf(lm, "wte/embedding", lambda x: x.at[0, 0].set(NAN))
    unstacked = model.unstack(CONFIG, broken.params)
    rows = [Row(np.array([5, 6]), 3), Row(np.array([0]), 3)]
    decoder = Decoder(CONFIG, unstacked, rows, eot=None)
    for _ in range(2):  # and it stays an error
        with pytest.raises(FloatingPointError, match="not finite"):
            decoder.advance()


# GN6


@LONG
def test_the_most_that_may_be_asked_is_given(lm):
    assert len(new_ids(lm, "a", max_new_tokens=31)) == 31
    refused(lambda: new_ids(lm, "a", max_new_tokens=10**9), "exceed the context of 32")
    refused(lambda: lm.write("a", GenerateConfig(max_length=10**9)), "exceed")
    with pytest.raises(ConfigError, match="num_return_sequences is 1025; allowed: <="):
        GenerateConfig(num_return_sequences=1025)
    how = GenerateConfig(num_return_sequences=1024, max_new_tokens=1)
    assert len(lm.write("a", how)[0]) == 1024
    many = tuple(f"zz{i}" for i in range(1000))
    assert new_ids(lm, stop=many) == new_ids(lm)


def test_beams_beyond_all_texts_are_refused_not_filled_up(lm):
    """Fillers had no tokens, or numbers of -1e9 in place of log-probabilities."""
    small = dataclasses.replace(CONFIG, n_vocab=3, vocab_multiple=8)
    params = model.init(small, jax.random.key(1))
    unstacked, row = model.unstack(small, params), Row(np.array([1]), 2)
    found = beam_search(small, unstacked, row, beams=20, eot=None)
    texts = {tuple(beam.tokens.tolist()) for beam in found}
    assert len(found) == len(texts) == 9  # 3 ** 2
    assert all(-20 < beam.log_probs.sum() < 0 for beam in found)
    how = dict(num_beams=300, num_return_sequences=300, max_new_tokens=1)
    refused(lambda: lm.write("a", GenerateConfig(**how)), "is 300; allowed: <= 257")


# GN7


def test_no_door_takes_what_is_no_token():
    """And every kind of whole number is one. A process without type checks asks."""
    command = [sys.executable, str(HERE / "doors.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    taken = {n: got for n, got in answers.items() if n.startswith("tokens /")}
    assert taken["tokens / list"][0] == "result"
    assert all(got == taken["tokens / list"] for got in taken.values()), taken
    asked = {name: got for name, got in answers.items() if name not in taken}
    assert len(asked) > 300
    wrong = {name: got for name, got in asked.items() if got[0] != "line"}
    assert not wrong
    for name, (_, text) in asked.items():
        assert "\n" not in text and len(text) < 200, name
        assert "allowed" in text, name
    for what in ("-1", "257", str(2**40)):
        assert f"token id is {what}; allowed: 0 <= id < 257" in str(asked)


# GN8, GN10


def crowd(lm, seed: int, **how) -> None:
    """Check that rows of one batch are what each is alone, in any place."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 9))
    prompts = [rng.integers(0, 257, rng.integers(1, 20)) for _ in range(count)]
    seeds = rng.integers(0, 2**32, count).tolist()
    how = dict(max_new_tokens=10, eos=False, details=True) | how
    found = lm.generate(prompts, seed=seeds, **how)
    order = rng.permutation(count)
    moved = lm.generate(
        [prompts[i] for i in order], seed=[seeds[i] for i in order], **how
    )
    for i, prompt in enumerate(prompts):
        alone = lm.generate(prompt, seed=seeds[i], **how)[0]
        there = moved[list(order).index(i)][0]
        for other in (found[i][0], there):
            assert other["token_ids"].tolist() == alone["token_ids"].tolist()
            np.testing.assert_allclose(  # sums in another order
                other["log_probs"], alone["log_probs"], atol=1e-4
            )


@LONG
def test_a_text_is_the_same_alone_in_another_place_and_under_load(lm):
    crowd(lm, 0, temperature=0.0)
    crowd(lm, 1, temperature=1.0)


@LONG
@pytest.mark.parametrize("seed", range(2, 5))
def test_many_texts_are_the_same_alone_and_under_load(lm, seed):
    crowd(lm, seed, temperature=0.0)
    crowd(lm, seed, temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.1)


# GN9


@pytest.mark.parametrize("n_ctx", [pytest.param(n, marks=LONG) for n in (96, 1024)])
def test_a_cache_of_every_length_gives_what_no_cache_gives(n_ctx):
    config = dataclasses.replace(CONFIG, n_ctx=n_ctx)
    params = model.init(config, jax.random.key(2))
    params = jax.tree.map(lambda x: 4 * x, params)
    unstacked = model.unstack(config, params)
    row = Row(np.array([7]), n_ctx - 1)
    decoder = Decoder(config, unstacked, [row], sampling=Sampling(0.0), eot=None)
    tokens, log_probs = decoder.advance()
    text = np.array([7, *tokens[0]])
    assert len(text) == n_ctx and decoder.done
    logits = np.asarray(model.apply(config, params, jnp.asarray(text[None]))[0, :-1])
    chosen = logits[np.arange(n_ctx - 1), text[1:]]
    assert (logits.max(axis=-1) - chosen < 1e-4).all()  # the same, or a tie
    wanted = jax.nn.log_softmax(logits)[np.arange(n_ctx - 1), text[1:]]
    np.testing.assert_allclose(log_probs[0], wanted, atol=1e-4)
    with pytest.raises(ConfigError, match=f"exceed the context of {n_ctx} by 1"):
        Decoder(config, unstacked, [row._replace(limit=n_ctx)], eot=None)


# GN11


def test_a_text_is_cut_exactly_at_every_stop_streamed_or_not(lm):
    how = dict(max_new_tokens=16, eos=False, return_full_text=False)
    for seed in range(20):  # of the first text with two-byte characters
        whole = lm.generate("ab", seed=seed, **how)[0]["generated_text"]
        good = [c for c in whole if c != "\ufffd"]
        if any(ord(c) > 127 for c in good) and len(good) > 5:
            break
    assert any(ord(c) > 127 for c in good)
    stops = {whole[i:j] for i in range(16) for j in range(i + 1, i + 4)}
    for stop in sorted(s for s in stops if s and "\ufffd" not in s):
        pieces: list[str] = []
        how_here = how | dict(seed=seed, stop=("never", stop), details=True)
        plain = lm.generate("ab", **how_here)[0]
        lm.generate("ab", stream=pieces.append, **how_here)
        assert plain["finish_reason"] == "stop"
        assert plain["text"] == "".join(pieces) == whole.partition(stop)[0]


# The command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["ab", "--temperature", "nan"], "temperature is nan"),
        (["ab", "--temperature", "-1"], "temperature is -1"),
        (["ab", "--top-k", "0"], "top_k is 0"),
        (["ab", "--top-p", "1.5"], "top_p is 1.5"),
        (["ab", "--max-new-tokens", str(10**9)], "exceed the context of 32"),
        (["ab", "--max-new-tokens", str(10**12)], "max_new_tokens is 1000000000000"),
        (["ab", "--max-new-tokens", "3", "--max-length", "9"], "beside max_length"),
        (["ab", "--num-return-sequences", str(10**9)], "num_return_sequences is"),
        (["ab", "--num-beams", str(10**9)], "num_beams is 1000000000; allowed: <="),
        (["ab", "--num-beams", "2", "--temperature", "nan"], "temperature is nan"),
        (["ab", "--seed", "-1"], "seed is -1"),
        (["ab", "--seed", str(2**40)], "seed is"),
        (["ab", "--stop", ""], "stop is ''"),
        (["ab", "--length-penalty", "2"], "length_penalty is 2.0"),
        (["a" * 40], "of 40 tokens"),
        (["\udcff"], "lone surrogate"),  # what a shell gives that is no UTF-8
    ],
)
def test_the_shell_answers_in_one_line(saved, capsys, flags, words):
    assert cli.run(["generate", saved, *flags]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and words in error
    assert error.count("\n") == 1


def test_the_shell_takes_an_empty_prompt_and_a_wide_filter(saved, capsys):
    for flags in ([], [""], ["", "--top-k", "99999"], ["", "--temperature", "0"]):
        assert cli.run(["generate", saved, *flags, "--max-new-tokens", "3"]) == 0
        assert len(capsys.readouterr().out) > 1


def test_the_shell_tells_of_bad_weights_and_prints_no_text(lm, tmp_path, capsys):
    broken = with_leaf(lm, "ln_f/scale", lambda x: x.at[0].set(NAN))
    broken.save(tmp_path / "model")
    for more in ([], ["--no-stream"], ["--json"], ["--num-beams", "2"]):
        assert cli.run(["generate", str(tmp_path / "model"), "ab", *more]) == 2
        out, error = capsys.readouterr()
        assert out == "" and "error: the model's logits are not finite" in error
    out_file = str(tmp_path / "x.npz")
    assert cli.run(["features", str(tmp_path / "model"), "ab", "--out", out_file]) == 2
    assert "not finite; check its weights" in capsys.readouterr().err
    assert not Path(out_file).exists()
