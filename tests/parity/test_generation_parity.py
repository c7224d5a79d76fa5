"""Generation, hidden states and attention against transformers, on random weights."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2_jax

ATOL = 1e-4  # the promise; both sides compute in float32
PROMPTS = [[464, 3290], [15496, 11, 314, 1101, 257, 3303, 2746, 11], list(range(40))]


def make_network(n_layer: int, n_head: int, n_embd: int, **values):
    """Return a GPT-2 of random weights, wide enough that its choices are decided."""
    torch.manual_seed(0)
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    config = GPT2Config(**shape, **values, attn_implementation="eager")
    network = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            std = 0.05 if "wte" in name else 0.5 if "wpe" in name else 0.2
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(float(is_scale), std)
    return network


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return transformers' model and ours, loaded from what it saved."""
    network = make_network(4, 4, 64)
    folder = tmp_path_factory.mktemp("generation")
    network.save_pretrained(folder)
    return network, gpt2_jax.load(folder, dtype="float32")


def theirs(network, prompt, **how):
    with torch.no_grad():
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)  # or a token equal to pad_token_id is not seen
        ids = network.generate(
            ids, attention_mask=mask, do_sample=False, pad_token_id=0, **how
        )
    return [row[len(prompt) :].tolist() for row in ids]


def ours(lm, prompts, **how):
    found = lm.generate(prompts, temperature=0.0, eos=False, details=True, **how)
    return [[text["token_ids"].tolist() for text in texts] for texts in found]


def test_greedy_text_is_the_same_over_200_tokens(pair):
    network, lm = pair
    found = ours(lm, PROMPTS, max_new_tokens=200)
    for prompt, texts in zip(PROMPTS, found, strict=True):
        wanted = theirs(network, prompt, max_new_tokens=200, eos_token_id=None)
        assert texts == wanted
        assert len(set(wanted[0])) > 50  # no endless repetition


def test_greedy_text_with_repetition_penalty_is_the_same(pair):
    network, lm = pair
    how = dict(max_new_tokens=60, repetition_penalty=1.3)
    for prompt, texts in zip(PROMPTS, ours(lm, PROMPTS, **how), strict=True):
        assert texts == theirs(network, prompt, eos_token_id=None, **how)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("beams", [2, 5])
def test_beam_search_is_the_same(pair, beams, length_penalty):
    network, lm = pair
    how = dict(num_beams=beams, num_return_sequences=2, length_penalty=length_penalty)
    how |= dict(max_new_tokens=24)
    early = 0
    for prompt in PROMPTS:
        # A token that the best beam draws midway ends beams early.
        eot = theirs(network, prompt, eos_token_id=None, **how)[0][7]
        wanted = theirs(network, prompt, eos_token_id=eot, **how)
        wanted = [cut(row, eot) for row in wanted]
        ending = gpt2_jax.GPT2(
            lm.config, lm.params, dataclasses.replace(lm.tokenizer, eot=eot)
        )
        found = ending.generate(prompt, details=True, **how)
        assert [text["token_ids"].tolist() for text in found] == wanted
        early += sum(len(row) < 24 for row in wanted)
    assert early or length_penalty > 0  # a penalty of 0 prefers short texts


def cut(row, eot):
    return row[: row.index(eot)] if eot in row else row


def test_hidden_states_and_attentions_are_the_same(pair):
    network, lm = pair
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            found = network(ids, output_hidden_states=True, output_attentions=True)
            states = np.stack([x.numpy() for x in found.hidden_states])
            maps = np.stack([x.numpy() for x in found.attentions])
            assert np.abs(lm.hidden_states(prompt) - states).max() <= ATOL
            assert np.abs(lm.attentions(prompt) - maps).max() <= ATOL
            for layer in (-1, 0, 2, 4):
                ours = lm.features(prompt, layer=layer)
                assert np.abs(ours - states[layer]).max() <= ATOL


def test_padded_rows_have_the_features_of_each_alone(pair):
    network, lm = pair
    states, maps = lm.hidden_states(PROMPTS), lm.attentions(PROMPTS)
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            n = len(prompt)
            found = network(
                torch.tensor([prompt]),
                output_hidden_states=True,
                output_attentions=True,
            )
            wanted = np.stack([x.numpy()[0] for x in found.hidden_states])
            assert np.abs(states[:, i, :n] - wanted).max() <= ATOL
            assert not states[:, i, n:].any()
            wanted = np.stack([x.numpy()[0] for x in found.attentions])
            assert np.abs(maps[:, i, :, :n, :n] - wanted).max() <= ATOL
            assert not maps[:, i, :, n:].any()


def test_scores_are_the_loss(pair):
    network, lm = pair
    for prompt, score in zip(PROMPTS, lm.score(PROMPTS), strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            loss = network(ids, labels=ids).loss.item()
        assert abs(-score.total / len(score.log_probs) - loss) <= ATOL
        assert score.perplexity == pytest.approx(np.exp(loss), rel=1e-4)
