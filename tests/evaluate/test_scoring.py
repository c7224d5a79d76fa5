"""The scoring core: every target once, the same numbers in any batch, a journal."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.evaluate import scoring
from gpt2_jax.evaluate.scoring import Choice, Request, score, score_choices, windows
from gpt2_jax.pretrained import GPT2

CONFIG = ModelConfig(
    n_vocab=61, n_ctx=16, n_embd=32, n_layer=2, n_head=4, vocab_multiple=8,
    initializer_range=0.3, dtype="float32", attention="xla",
)  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> GPT2:
    return GPT2(CONFIG, model.init(CONFIG, jax.random.key(0)), None)


def random_requests(count: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, CONFIG.n_ctx + 2, count)
    rows = [rng.integers(0, CONFIG.n_vocab, n) for n in lengths]
    return [Request(row, int(rng.integers(1, len(row)))) for row in rows]


def log_probs(lm: GPT2, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probability of every token after the first, of every token."""
    logits = np.asarray(lm.logits(tokens[:-1]), np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.mark.parametrize("n", [1, 2, 9, 17, 40])
@pytest.mark.parametrize("window", [4, 16])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_windows_score_every_target_once(n, window, stride):
    seen = [t for b, e, f in windows(n, window, stride) for t in range(f + 1, e + 1)]
    assert seen == list(range(1, n))
    for begin, end, first in windows(n, window, stride):
        assert 0 <= begin <= first < end and end - begin <= window
        assert begin == 0 or end - first <= stride


def test_answers_are_those_of_the_logits(lm):
    for request, answer in zip(
        requests := random_requests(9), score(lm, requests), strict=True
    ):
        found = log_probs(lm, request.tokens)[request.first - 1 :]
        wanted = request.tokens[request.first :]
        nll = -found[np.arange(len(wanted)), wanted].sum()
        hits = found.argmax(axis=-1) == wanted
        assert answer.nll == pytest.approx(nll, rel=1e-5)
        assert (answer.greedy, answer.last) == (hits.all(), hits[-1])


def test_without_hits_the_rest_is_the_same(lm):
    requests = random_requests(5)
    for bare, whole in zip(
        score(lm, requests, hits=False), score(lm, requests), strict=True
    ):
        assert bare == (pytest.approx(whole.nll, rel=1e-6, abs=1e-5), False, False)


def greedy_requests(lm: GPT2, count: int) -> list[Request]:
    """Return requests whose last token is the likeliest one."""
    rows = [r.tokens[: CONFIG.n_ctx] for r in random_requests(count, seed=1)]
    best = [int(log_probs(lm, np.append(row, 0))[-1].argmax()) for row in rows]
    return [
        Request(np.append(row, b), len(row)) for row, b in zip(rows, best, strict=True)
    ]


def test_the_likeliest_token_is_a_hit_unless_it_is_banned(lm):
    requests = greedy_requests(lm, 5)
    assert all(answer == (answer.nll, True, True) for answer in score(lm, requests))
    banned = np.zeros(CONFIG.n_vocab, bool)
    banned[requests[0].tokens[-1]] = True
    found = score(lm, requests, banned=banned)
    assert not found[0].greedy and not found[0].last
    assert found[0].nll == pytest.approx(score(lm, requests)[0].nll)


@pytest.mark.parametrize(
    "devices, tokens", [(1, 16), (1, 64), (1, 10_000), (8, 16), (4, 64)]
)
def test_batches_and_devices_change_nothing(lm, devices, tokens):
    requests = random_requests(21)
    wanted = score(lm, requests, devices=jax.devices()[:1])
    how = dict(devices=jax.devices()[:devices], tokens_at_once=tokens)
    for ours, theirs in zip(score(lm, requests, **how), wanted, strict=True):
        assert ours.nll == pytest.approx(theirs.nll, rel=1e-6, abs=1e-5)  # of logits
        assert ours[1:] == theirs[1:]


def test_choices_are_scored_as_whole_rows(lm):
    rng = np.random.default_rng(3)
    choices = [
        Choice(rng.integers(0, 61, n), tuple(rng.integers(0, 61, m) for m in (1, 3, 5)))
        for n in (1, 4, 9, 30)
    ]
    for choice, found in zip(choices, score_choices(lm, choices), strict=True):
        prefix = choice.prefix[-(CONFIG.n_ctx - 5 + 1) :]
        rows = [
            Request(np.concatenate([prefix, e]), len(prefix)) for e in choice.endings
        ]
        assert found == pytest.approx([a.nll for a in score(lm, rows)], rel=1e-5)


def test_a_killed_evaluation_goes_on(lm, tmp_path, monkeypatch):
    requests, journal = random_requests(12), tmp_path / "deep" / "journal.jsonl"
    wanted, calls = score(lm, requests), []
    answer = scoring._answer

    def counted(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(scoring, "_answer", counted)
    how = dict(journal=journal, tokens_at_once=32, devices=jax.devices()[:1])
    with pytest.raises(KeyboardInterrupt):
        score(lm, requests, **how)
    with journal.open("a") as file:
        file.write('{"of": "cut sho')
    found = score(lm, requests, **how)
    whole = len(calls)
    assert [a.nll for a in found] == pytest.approx([a.nll for a in wanted], rel=1e-6)
    assert score(lm, requests, **how) == found and len(calls) == whole
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: 2 * x, lm.params))
    assert (
        score(other, requests, **how) != found
    )  # another model's answers are not taken


@pytest.mark.parametrize(
    "tokens, first, message",
    [
        ([1, 2], 0, "request 0 predicts from token 0 of 2; allowed: 1 to 1"),
        ([1, 2], 2, "request 0 predicts from token 2 of 2; allowed: 1 to 1"),
        ([1] * 18, 1, "request 0 reads 17 tokens; allowed: at most the context of 16"),
        ([1, 61], 1, "61"),
    ],
)
def test_a_request_that_cannot_be_is_refused(lm, tokens, first, message):
    with pytest.raises(ConfigError, match=message):
        score(lm, [Request(np.array(tokens), first)])


def test_an_ending_longer_than_the_context_is_refused(lm):
    choice = Choice(np.array([1]), (np.ones(16, int),))
    with pytest.raises(ConfigError, match="ending of choice 0 is '16 tokens'"):
        score_choices(lm, [choice])


def test_progress_says_how_long_it_takes(lm, monkeypatch):
    lines, clock = [], itertools.count(0, 11)
    monkeypatch.setattr(scoring.time, "monotonic", lambda: next(clock))
    score(
        lm,
        random_requests(6),
        say=lines.append,
        tokens_at_once=16,
        devices=jax.devices()[:1],
    )
    assert lines[0] == "1 of 6, " + lines[0].split(", ")[1] and lines[0].endswith(
        "s left"
    )
