"""A model of ours in lm-evaluation-harness: `HarnessLM(load(MODEL))`.

Its log-likelihoods and texts come from `scoring` and from `GPT2.write`; the harness
brings tasks, prompts and metrics. `pip install "gpt2_jax[lm-eval]"`, then:

    from lm_eval import simple_evaluate
    simple_evaluate(model=HarnessLM(load("gpt2")), tasks=["lambada_openai"])

What is tokenized, cut and stopped where follows the harness's own `HFLM`.
"""

import math
from collections import defaultdict
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Integer
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from gpt2_jax.config import ConfigError, GenerateConfig, check
from gpt2_jax.evaluate.scoring import Request, score, window_requests
from gpt2_jax.pretrained import GPT2, print_to_stderr

MAX_NEW_TOKENS = 256  # lm_eval/models/huggingface.py, max_gen_toks
Ids = Integer[np.ndarray, " _"]


class HarnessLM(LM):
    """What the harness asks of a model, answered by a `GPT2`.

    `<|endoftext|>` in a task's text is the token.

    Raises
    ------
    ConfigError
        If the model has no tokenizer.
    """

    def __init__(self, lm: GPT2):
        super().__init__()
        if lm.tokenizer is None:
            raise ConfigError(
                "this model has no tokenizer: add its files and load again"
            )
        self.lm, self._tokenizer = lm, lm.tokenizer

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, greedy) of each continuation.

        Blanks at the end of the context belong to the continuation. Both are tokenized
        together and cut after as many tokens as the context has alone. What is too long
        for the model loses its start.

        Raises
        ------
        ConfigError
            If a continuation has no token, or more than the model's context.
        """
        asked = []
        for one in requests:
            before, after = self._pair(*one.args)
            row = np.concatenate([before, after])[-self.lm.config.n_ctx - 1 :]
            asked.append(Request(row, len(row) - len(after)))
        answers = score(self.lm, asked, say=print_to_stderr)
        return [(-answer.nll, answer.greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-probability in nats of each whole text, given end of text.

        Long texts are cut into windows of the context whose targets do not overlap; the
        last one is filled up with what stands before it.
        """
        eot, size = self._tokenizer.eot, self.lm.config.n_ctx
        rows = [np.append(eot, self._encode(one.args[0])) for one in requests]
        parts = [window_requests(row, size, size) for row in rows]
        asked = [window for part in parts for window in part]
        answers = iter(score(self.lm, asked, say=print_to_stderr))
        return [-math.fsum(a.nll for a in islice(answers, len(part))) for part in parts]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text after each context, up to a stop string or end of text.

        It is greedy unless `do_sample` or a temperature is asked for; then a request
        draws with its number as the seed. A context that leaves no room for the new
        tokens loses its start, an empty one is the start of a document.

        Raises
        ------
        ConfigError
            If a generation option is unknown or out of range.
        """
        asked: list[Any] = [one.args for one in requests]
        alike: dict[str, list[int]] = defaultdict(list)
        for number, (_, options) in enumerate(asked):
            alike[repr(options)].append(number)
        hows = [self._how(asked[n[0]][1], tuple(n)) for n in alike.values()]
        found = [""] * len(asked)
        for numbers, how in zip(alike.values(), hows, strict=True):
            prompts = [self._prompt(asked[i][0]) for i in numbers]
            for i, [text] in zip(numbers, self.lm.write(prompts, how), strict=True):
                found[i] = text.text
        return found

    def _encode(self, text: str) -> Ids:
        return self._tokenizer.encode(text, special=True)

    def _prompt(self, text: str) -> Ids:
        ids = self._encode(text)
        return ids if len(ids) else np.array([self._tokenizer.eot])

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        if not context:
            row = np.append(self._tokenizer.eot, self._encode(continuation))
            begun = len(row) > 1 and row[0] == row[1]  # the text says so itself
            return row[:1], row[2:] if begun else row[1:]
        known = self._encode(context.rstrip())
        return known, self._encode(context + continuation)[len(known) :]

    def _how(self, asked: dict[str, Any], numbers: tuple[int, ...]) -> GenerateConfig:
        left: dict[str, Any] = {**normalize_gen_kwargs(asked, MAX_NEW_TOKENS)}
        new, until = left.pop("max_gen_toks"), left.pop("until")
        temperature = float(left.pop("temperature", 1.0))
        top_k, top_p = left.pop("top_k", None), float(left.pop("top_p", 1.0))
        if not left.pop("do_sample"):
            temperature = 0.0
        known = "until, max_gen_toks, do_sample, temperature, top_k, top_p"
        check(not left, "generation_kwargs", ", ".join(left), known)
        n_ctx = self.lm.config.n_ctx
        check(new < n_ctx, "max_gen_toks", new, f"< the context of {n_ctx}")
        return GenerateConfig(
            max_new_tokens=new,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=_without_longer(until),
            truncate="left",
            seed=numbers,
        )


def _without_longer(until: list[str]) -> tuple[str, ...]:
    """Leave out what holds an earlier stop string: HFLM cuts at that one first."""
    return tuple(
        stop
        for i, stop in enumerate(until)
        if not any(other in stop for other in until[:i])
    )
