"""A trained model with its tokenizer: `load(MODEL)` -> `GPT2`, which generates."""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from gpt2_jax import model
from gpt2_jax.checkpoint import read_meta, restore_params
from gpt2_jax.config import ConfigError, ModelConfig, check, from_dict
from gpt2_jax.decode import Sampling, generate
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class GPT2:
    """A model's config, its parameters and its tokenizer."""

    config: ModelConfig
    params: model.Params
    tokenizer: Tokenizer

    def generate(
        self,
        prompts: str | list[str],
        *,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[dict[str, str]]:
        """Return one `{"generated_text": prompt + new text}` per sequence.

        `temperature` 0 is greedy. An empty prompt starts a new document; a sequence
        ends at `<|endoftext|>` or after `max_new_tokens`: by default 128, or as many
        as the context has room for.

        Raises
        ------
        ConfigError
            If an argument is outside its range, or prompt and new tokens exceed the
            context.
        """
        check(num_return_sequences >= 1, "num_return_sequences", num_return_sequences,
              ">= 1")  # fmt: skip
        texts = [prompts] if isinstance(prompts, str) else prompts
        rows = [text for text in texts for _ in range(num_return_sequences)]
        start = np.array([self.tokenizer.eot])
        ids = [self.tokenizer.encode(text) if text else start for text in rows]
        room = self.config.n_ctx - max(map(len, ids), default=0)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(128, room))
        new = generate(
            self.config,
            self._unstacked,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            eot=self.tokenizer.eot,
        )
        return [
            {"generated_text": text + self.tokenizer.decode(tokens)}
            for text, tokens in zip(rows, new, strict=True)
        ]

    @functools.cached_property
    def _unstacked(self) -> model.Params:
        return model.unstack(self.config, self.params)


def load(name: str) -> GPT2:
    """Return the model of a run directory, from its newest good checkpoint.

    Raises
    ------
    ConfigError
        If `name` is no run directory, or holds no checkpoint yet.
    """
    directory = Path(name) / "checkpoints"
    if not directory.is_dir():
        raise ConfigError(
            f"MODEL {name!r} is no run directory (it has no checkpoints/); allowed: a "
            "directory that `gpt2-jax train --run-dir` wrote, such as runs/quickstart"
        )
    meta = read_meta(directory)
    if meta is None:
        raise ConfigError(f"MODEL {name!r} holds no checkpoint yet; train it first")
    run = from_dict(meta["config"])
    config = model.resolve(run.model)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
    )
    params = restore_params(directory, target)
    return GPT2(config, params, load_tokenizer(run.data.tokenizer))
