"""Knock at every door for token ids with what is none; print what each answers.

A program of its own: in the tests, type checks at every call would answer first.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import model
from gpt2_jax.beam import beam_search
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.decode import Row, Sampling, generate
from gpt2_jax.evaluate.scoring import Request, score
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import load_tokenizer

CONFIG = ModelConfig(
    n_vocab=257, n_ctx=16, n_embd=8, n_layer=1, n_head=2, dtype="float32"
)
PARAMS = model.init(CONFIG, jax.random.key(0))
UNSTACKED = model.unstack(CONFIG, PARAMS)
LM = GPT2(CONFIG, PARAMS, load_tokenizer("bytes"))

NO_TOKENS: dict[str, Any] = {
    "-1": [-1],
    "-2**40": [-(2**40)],
    "n_vocab": [257],
    "padding": [383],
    "2**40": [2**40],
    "2**63, unsigned": np.array([2**63], np.uint64),
    "2**70": [2**70],
    "float": [1.5],
    "whole float": [1.0],
    "NaN": [float("nan")],
    "numpy float": np.array([1.0, 2.0]),
    "bool": [True],
    "None": [None],
    "letter": [1, "a"],
    "bytes": b"ab",
    "nested": [[[1, 2]]],
    "ragged": [1, [2]],
    "3 axes": np.zeros((2, 3, 4), int),
}
NO_LISTS: dict[str, Any] = {
    "number": 5,
    "nothing": None,
    "dict": {"a": 1},
    "set": {1, 2},
    "iterator": iter([1, 2]),
    "no axis": np.array(3),
}
NO_ROWS: dict[str, dict[str, Any]] = {
    "limit 1.5": dict(limit=1.5),
    "limit 0": dict(limit=0),
    "limit 2**31": dict(limit=2**31),
    "seed 1.5": dict(seed=1.5),
    "seed -1": dict(seed=-1),
    "seed 2**40": dict(seed=2**40),
    "seed a": dict(seed="a"),
    "number -1": dict(number=-1),
    "number 2**40": dict(number=2**40),
}
NO_OPTIONS: dict[str, list[Any]] = {
    "temperature": ["a", None, True, 1j],
    "top_k": [1.5, float("nan"), True],
    "top_p": ["a", None],
    "max_new_tokens": [1.5, True],
    "max_length": [1.5, "a"],
    "num_return_sequences": [1.5, None],
    "num_beams": [1.5, None],
    "length_penalty": ["x", None],
    "seed": [0.5, None, "a", True, [[1]], [[1], [1, 2]], np.float32(1), {1: 2}],
    "stop": [5, [1], [["a"]], np.array([1])],
    "truncate": ["right", True],
    "slide": [1, None],
    "eos": [1, None],
}
NO_LAYERS = [1.5, None, "a", True, float("nan"), 2, -3]
TOKENS = {
    "unsigned": np.array([1, 2], np.uint64),
    "bytes": np.array([1, 2], np.uint8),
    "jax": jnp.array([1, 2]),
    "tuple": (1, 2),
    "numpy ints": [np.int64(1), np.int32(2)],
    "range": range(1, 3),
}


def decode(ids: Any, **how: Any) -> Any:
    row = Row(**(dict(prompt=ids, limit=3) | how))
    return generate(CONFIG, UNSTACKED, [row], sampling=Sampling(0.0), eot=None)


def option(name: str, value: Any) -> Any:
    return LM.generate("ab", **(dict(max_new_tokens=3) | {name: value}))


TEXTS: dict[str, Callable[[Any], Any]] = {
    "generate": lambda ids: LM.generate(ids, max_new_tokens=3, temperature=0.0),
    "generate beams": lambda ids: LM.generate(ids, max_new_tokens=3, num_beams=2),
    "features": LM.features,
    "hidden states": LM.hidden_states,
    "attentions": LM.attentions,
    "encode": LM.encode,
    "score": LM.score,
    "score after start": lambda ids: LM.score(ids, start=True),
}
DOORS = TEXTS | {
    "logits": LM.logits,
    "decode": decode,
    "beam search": lambda ids: beam_search(
        CONFIG, UNSTACKED, Row(ids, 3), beams=2, eot=None
    ),
    "evaluation": lambda ids: score(LM, [Request(ids, 1)]),
}


def answer(door: Callable[[Any], Any], asked: Any) -> list[str]:
    """Return ["result", ..], ["line", ..] or the name of what must not come."""
    try:
        return ["result", repr(door(asked))]
    except ConfigError as error:
        return ["line", str(error)]
    except BaseException as error:  # noqa: BLE001  what comes is the answer
        return [type(error).__name__, str(error)]


def main() -> None:
    found = {
        f"{name} / {what}": answer(door, asked)
        for name, door in DOORS.items()
        for what, asked in NO_TOKENS.items()
    }
    for name, door in TEXTS.items():
        found |= {f"{name} / {w}": answer(door, asked) for w, asked in NO_LISTS.items()}
    for what, how in NO_ROWS.items():
        found[f"row / {what}"] = answer(lambda how: decode([1], **how), how)
    for name, values in NO_OPTIONS.items():
        for asked in values:
            door = functools.partial(option, name)
            found[f"{name} / {asked!r}"] = answer(door, asked)
    for layer in NO_LAYERS:
        found[f"layer / {layer!r}"] = answer(lambda n: LM.features("ab", n), layer)
    for what, ids in TOKENS.items():
        found[f"tokens / {what}"] = answer(TEXTS["generate"], ids)
    found["tokens / list"] = answer(TEXTS["generate"], [1, 2])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
