"""Loading a run and generating from it."""

from pathlib import Path

import pytest

from gpt2_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    TrainConfig,
)
from gpt2_jax.pretrained import load
from gpt2_jax.train import train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "text.txt").write_text("ab" * 500)
    shape = ModelConfig(n_vocab=257, n_ctx=16, n_embd=16, n_layer=1, n_head=2)
    config = Config(
        run_dir=str(folder / "run"),
        model=shape,
        data=DataConfig(source=(str(folder / "text.txt"),), tokenizer="bytes"),
        train=TrainConfig(steps=30, batch_tokens=8 * 16),
        evaluate=EvaluateConfig(samples=0),
    )
    train(config)
    return config.run_dir


def test_a_loaded_run_writes_on_in_the_manner_of_its_text(run_dir):
    lm = load(run_dir)
    (text,) = lm.generate("abab", max_new_tokens=8, temperature=0.0)
    assert text["generated_text"].startswith("abab")
    assert set(text["generated_text"]) <= set("ab")


def test_sequences_differ_and_a_seed_repeats_them(run_dir):
    lm = load(run_dir)
    how = dict(max_new_tokens=8, num_return_sequences=3, temperature=5.0)
    first, again = lm.generate("ab", **how), lm.generate("ab", **how)
    assert first == again
    assert len({text["generated_text"] for text in first}) == 3
    assert first != lm.generate("ab", seed=1, **how)


def test_an_empty_prompt_begins_a_document(run_dir):
    assert len(load(run_dir).generate("", max_new_tokens=4)) == 1


def test_loading_leaves_a_save_in_flight_alone(run_dir):
    partial = Path(run_dir, "checkpoints", "99.orbax-checkpoint-tmp")
    partial.mkdir()
    load(run_dir)
    assert partial.is_dir()
    partial.rmdir()


def test_by_default_new_tokens_fit_the_context(run_dir):
    assert load(run_dir).generate("ab")[0]["generated_text"].startswith("ab")


def test_what_is_no_run_directory_is_refused(run_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"no run directory.*gpt2-jax train"):
        load(str(tmp_path / "none"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        load(str(tmp_path))
    with pytest.raises(ConfigError, match="num_return_sequences is 0"):
        load(run_dir).generate("a", num_return_sequences=0)
