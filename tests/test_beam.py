"""Beam search: its words kept, by exhaustive search. Parity: parity/test_generation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.beam import beam_search
from gpt2_jax.config import ConfigError
from gpt2_jax.decode import Decoder, Row, Sampling

PROMPT = [5, 9, 2]


@pytest.fixture(scope="module")
def trained():
    from gpt2_jax.config import ModelConfig

    config = ModelConfig(
        n_vocab=7, n_ctx=16, n_embd=16, n_layer=2, n_head=2, vocab_multiple=8,
        dtype="float32",
    )  # fmt: skip
    params = model.init(config, jax.random.key(1))
    return config, jax.tree.map(lambda x: 6.0 * x, params)


def search(trained, prompt, limit, beams, **how):
    config, params = trained
    row = Row(np.asarray(prompt), limit)
    how = dict(eot=None) | how
    return beam_search(config, model.unstack(config, params), row, beams=beams, **how)


def log_prob(trained, prompt, tokens) -> np.ndarray:
    config, params = trained
    text = jnp.array([[*prompt, *tokens]])
    found = jax.nn.log_softmax(model.apply(config, params, text)[0])
    places = np.arange(len(prompt) - 1, text.shape[1] - 1)
    return np.asarray(found)[places, np.asarray(tokens)]


def test_with_enough_beams_the_search_is_exhaustive(trained):
    texts = list(itertools.product(range(7), repeat=3))
    sums = {t: float(log_prob(trained, [1, 2], t).sum()) for t in texts}
    ordered = sorted(texts, key=sums.__getitem__, reverse=True)
    best = search(trained, [1, 2], 3, 49)
    assert [tuple(beam.tokens.tolist()) for beam in best[:5]] == ordered[:5]
    for beam in best[:5]:
        total = sums[tuple(beam.tokens.tolist())]
        assert beam.score == pytest.approx(total / 3, abs=1e-4)


def test_one_beam_is_greedy(trained):
    config, params = trained
    row = Row(np.array([1, 2]), 8)
    decoder = Decoder(
        config, model.unstack(config, params), [row], sampling=Sampling(0.0), eot=None
    )
    (beam,) = search(trained, [1, 2], 8, 1)
    np.testing.assert_array_equal(beam.tokens, decoder.advance()[0][0])


def test_scores_and_log_probs_are_those_of_the_tokens(trained):
    for beam in search(trained, [1, 2], 8, 3, eot=4, length_penalty=0.5):
        wanted = log_prob(trained, [1, 2], beam.tokens)
        np.testing.assert_allclose(beam.log_probs, wanted, atol=1e-4)
        score = wanted.sum() / len(beam.tokens) ** 0.5
        assert beam.score == pytest.approx(score, abs=1e-4)


def test_a_beam_ends_at_the_end_of_text(trained):
    eot = int(search(trained, [1, 2], 8, 3)[0].tokens[3])
    found = search(trained, [1, 2], 8, 3, eot=eot, length_penalty=0.0)
    assert any(len(beam.tokens) < 8 for beam in found)
    for beam in found:
        assert eot not in beam.tokens[:-1]
        assert len(beam.tokens) == 8 or beam.tokens[-1] == eot
    assert [b.score for b in found] == sorted((b.score for b in found), reverse=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(beams=0), "num_beams is 0"),
        (dict(length_penalty=float("nan")), "length_penalty is nan"),
        (dict(prompt=[7]), "token id is 7"),
        (dict(limit=15), "exceed the context of 16 by 1"),
    ],
)
def test_bad_requests_are_refused(trained, how, message):
    with pytest.raises(ConfigError, match=message):
        search(trained, **dict(prompt=[1, 2], limit=3, beams=2) | how)


def test_logits_that_are_not_finite_are_an_error(trained):
    config, params = trained
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(FloatingPointError, match="not finite"):
        search((config, broken), [1], 3, 2)
