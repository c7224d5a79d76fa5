"""Text from prompts: how long, from which tokens, until which stop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from gpt2_jax import model
from gpt2_jax.beam import beam_search
from gpt2_jax.config import ConfigError, GenerateConfig, ModelConfig, check
from gpt2_jax.decode import ENDED, Decoder, Row, Sampling, check_tokens
from gpt2_jax.stopping import TextStream
from gpt2_jax.tokenizer import Tokenizer

USUAL_TOKENS = 128  # written where nothing is asked
STRIDE = 4  # tokens between looks at the text, when stop strings or a reader wait


class Generated(NamedTuple):
    """One text, without its prompt, the stop string or `<|endoftext|>`."""

    text: str
    token_ids: Integer[np.ndarray, " n"]  # those that begin inside the text
    log_probs: Float[np.ndarray, " n"]  # of each, by the model alone, in nats
    finish_reason: Literal["eos", "stop", "length"]


def write_texts(
    config: ModelConfig,
    unstacked: model.Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Integer[np.ndarray, " _"]],
    how: GenerateConfig,
    *,
    stream: Callable[[str], None] | None = None,
) -> list[list[Generated]]:
    """Return `how.num_return_sequences` texts for every prompt of token ids.

    Sequence j of a prompt draws with `fold_in(seed, j)`: neither the other prompts nor
    their number change it. `stream` is called with each piece of the text as soon as
    it is certain; that takes one prompt and one sequence.

    Raises
    ------
    ConfigError
        If an option is out of range, or a prompt and its new tokens exceed the context:
        the message says by how much.
    """
    config = restrict_vocabulary(config, tokenizer)
    rows = [
        row
        for prompt, seed in zip(prompts, _seeds(prompts, how), strict=True)
        for row in _rows(config, prompt, seed, how)
    ]
    alone = len(rows) == 1 and how.num_beams == 1
    name = "the number of texts to stream"
    check(stream is None or alone, name, len(rows), "1, and num_beams 1")
    sampling = Sampling(
        how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty
    )
    sampling.validate()  # where nothing is drawn too
    eot = tokenizer.eot if how.eos else None
    if how.num_beams > 1:
        firsts = rows[:: how.num_return_sequences]
        return [_search(config, unstacked, tokenizer, row, how, eot) for row in firsts]
    texts = [_Text(tokenizer, how.stop, eot, stream) for _ in rows]
    if rows:
        _write(config, unstacked, rows, texts, sampling, how, eot)
    done = [text.finish() for text in texts]
    size = how.num_return_sequences
    return [done[i : i + size] for i in range(0, len(done), size)]


def restrict_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return the config of a model that never draws ids without text."""
    n_vocab = min(config.n_vocab, tokenizer.n_vocab)
    return dataclasses.replace(config, n_vocab=n_vocab)


def _seeds(prompts, how):
    if len(how.seed) == 1:
        return how.seed * len(prompts)
    allowed = f"one seed, or one for each of the {len(prompts)} prompts"
    check(len(how.seed) == len(prompts), "seed", how.seed, allowed)
    return how.seed


def _rows(config, prompt, seed, how):
    check_tokens(config, prompt)
    limit = _limit(config, len(prompt), how)
    if how.truncate == "left":
        wanted = min(limit, config.n_ctx // 2) if how.slide else limit
        room = config.n_ctx - wanted
        allowed = f"< the context of {config.n_ctx}, or --slide"
        check(room > 0, "max_new_tokens", limit, allowed)
        prompt = prompt[-room:]
    rows = range(how.num_return_sequences)
    return [Row(np.asarray(prompt), limit, seed, number) for number in rows]


def _limit(config, length, how):
    if how.max_new_tokens is not None:
        return how.max_new_tokens
    if how.max_length is not None:
        if how.max_length <= length:
            raise ConfigError(
                f"prompt of {length} tokens leaves no room in max_length = "
                f"{how.max_length}; raise it to {length + 1} or more, or say "
                "--max-new-tokens instead"
            )
        return how.max_length - length
    room = config.n_ctx - length
    if room < 1:  # an error unless something gives way
        room = config.n_ctx // 2
    return max(1, min(USUAL_TOKENS, room))


def _write(config, unstacked, rows, texts, sampling, how, eot):
    decoder = Decoder(
        config, unstacked, rows, sampling=sampling, eot=eot, slide=how.slide
    )
    watched = bool(how.stop) or any(text.stream for text in texts)
    while not decoder.done:
        drawn = decoder.advance(STRIDE if watched else None)
        for i, (text, tokens, log_probs) in enumerate(zip(texts, *drawn, strict=True)):
            text.take(tokens, log_probs)
            if text.reason == "stop":
                decoder.stop(i)


def _search(config, unstacked, tokenizer, row, how, eot):
    found = beam_search(
        config,
        unstacked,
        row,
        beams=how.num_beams,
        length_penalty=how.length_penalty,
        eot=eot,
    )
    texts, count = [], how.num_return_sequences
    allowed = f"<= {len(found)}, all that beam search found of at most {row.limit}"
    check(count <= len(found), "num_return_sequences", count, f"{allowed} tokens")
    for beam in found[:count]:
        text = _Text(tokenizer, how.stop, eot, None)
        text.take(beam.tokens, beam.log_probs)
        texts.append(text.finish())
    return texts


class _Text:
    """What one row has become so far."""

    def __init__(self, tokenizer, stops, eot, stream):
        self._out = TextStream(tokenizer, stops)
        self._eot = eot
        self.stream = stream
        self.reason: Literal["eos", "stop", "length"] = "length"
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._log_probs: list[float] = []

    def take(self, tokens, log_probs) -> None:
        for token, log_prob in zip(tokens.tolist(), log_probs.tolist(), strict=True):
            if token == ENDED or self.reason != "length":
                return
            if token == self._eot:
                self.reason = "eos"
                return
            self._tokens.append(token)
            self._log_probs.append(log_prob)
            self._say(self._out.push(token))
            if self._out.stopped:
                self.reason = "stop"

    def finish(self) -> Generated:
        if not self._out.stopped:
            self._say(self._out.close())
        count = self._out.kept_tokens
        return Generated(
            "".join(self._pieces),
            np.array(self._tokens[:count], np.int64),
            np.array(self._log_probs[:count], np.float32),
            self.reason,
        )

    def _say(self, piece: str) -> None:
        self._pieces.append(piece)
        if self.stream is not None and piece:
            self.stream(piece)
