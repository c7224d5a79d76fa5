"""The model card: figures that were measured, metadata the Hub reads, no paths."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from gpt2_jax.card import Facts, make_card, read_facts
from gpt2_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from gpt2_jax.pretrained import load
from gpt2_jax.train import train

SHAPE = ModelConfig(n_vocab=257, n_ctx=16, n_embd=16, n_layer=1, n_head=2)
HOW = dict(title="org/name", layout="hf", dtype="float32", tokenizer="bytes")
WIKI = {"value": 29.4123, "unit": "ppl/word", "card": 29.41, "nll": 1.0}
WIKI |= {"tokens": 283_287, "protocol": "stride 32 | detokenized"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret_home")
    (folder / "my text.txt").write_text("ab" * 500)
    config = Config(
        run_dir=str(folder / "run"),
        model=SHAPE,
        data=DataConfig(source=(str(folder / "my text.txt"),), tokenizer="bytes"),
        train=TrainConfig(steps=3, batch_tokens=8 * 16),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="wsd"),
        evaluate=EvaluateConfig(samples=0),
    )
    train(config, say=lambda line: None)
    return Path(config.run_dir)


@pytest.fixture
def copied(run_dir, tmp_path):
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def facts_of(directory: Path) -> Facts:
    return read_facts(directory, load(directory).params, source=directory.name)


def done_of(directory: Path) -> dict:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def test_a_run_tells_how_it_was_trained(run_dir):
    card = make_card(SHAPE, facts_of(run_dir), **HOW)
    for row in (
        "| data | my text.txt |",
        "| tokenizer | bytes |",
        "| steps | 3 of 3 |",
        "| tokens per step | 128 |",
        "| tokens in all | 384 |",
        "| learning rate | 0.002 |",
        "| schedule | wsd, 0 warm-up steps, down to 0.1 |",
    ):
        assert row in card
    assert "optimizer | adamw, betas 0.9 and 0.95, weight decay 0.1" in card
    assert f"GPT-2 with {SHAPE.n_params:,} parameters in float32: 1 layers" in card
    assert "Trained with `gpt2_jax`" in card
    assert "versions | gpt2_jax " in card
    assert "secret_home" not in card and str(run_dir.parent) not in card


def test_results_are_those_of_the_last_evaluation(run_dir):
    card, done = make_card(SHAPE, facts_of(run_dir), **HOW), done_of(run_dir)
    assert done["event"] == "done"
    assert "0.1 of my text.txt, held out" in card
    assert f"cross-entropy, nats per token | {done['val_loss']:.4f} |" in card
    assert f"perplexity per token | {math.exp(done['val_loss']):.4f} |" in card
    assert f"| bits per byte | {done['val_bits_per_byte']:.4f} |" in card
    assert f"xz -9, for comparison | {done['xz_bits_per_byte']:.4f} |" in card


def test_the_hub_reads_metadata_and_results(copied):
    (copied / "eval.json").write_text(json.dumps({"results": {"wikitext2": WIKI}}))
    facts = facts_of(copied)
    card = huggingface_hub.ModelCard(make_card(SHAPE, facts, **HOW, license="mit"))
    assert card.data.license == "mit"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["gpt2", "jax", "gpt2_jax"]
    assert card.data.model_name == "org/name"
    found = {r.metric_type: r for r in card.data.eval_results}
    loss = done_of(copied)["val_loss"]
    assert found["loss"].metric_value == pytest.approx(loss, abs=1e-4)
    assert found["perplexity"].dataset_type == "held-out"
    assert found["bits_per_byte"].task_type == "text-generation"
    assert found["ppl"].metric_value == WIKI["value"]
    assert found["ppl"].dataset_name == "wikitext2"


def test_a_benchmark_that_was_not_run_has_no_row(copied):
    rows = {"wikitext2": WIKI, "ptb": {"value": None, "note": "not run"}}
    (copied / "eval.json").write_text(json.dumps({"results": rows}))
    assert set(facts_of(copied).results) == {"wikitext2"}


def test_a_benchmark_stands_beside_the_published_figure():
    card = make_card(SHAPE, Facts(results={"wikitext2": WIKI}), **HOW)
    assert "| wikitext2 | 29.4123 | 29.41 | ppl/word | 283,287 | stride" in card
    assert "stride 32 \\| detokenized |" in card


def test_without_results_there_is_no_figure_and_no_index():
    text = make_card(SHAPE, Facts(converted_from="org/old@v1"), **HOW)
    assert "## Evaluation" not in text and "## Training" not in text
    assert "Converted from `org/old@v1`" in text
    card = huggingface_hub.ModelCard(text)
    assert card.data.eval_results is None and card.data.license is None
    assert "radford2019language" in text


def test_a_run_without_an_end_has_no_results(copied):
    path = copied / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    facts = facts_of(copied)
    assert facts.step == 3 and not facts.done
    assert "## Evaluation" not in make_card(SHAPE, facts, **HOW)


def test_results_of_another_step_are_left_out(copied):
    path = copied / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    assert '"step": 4' in path.read_text()
    assert not facts_of(copied).done


def test_facts_of_a_checkpoint_that_was_not_loaded_are_left_out(copied):
    params = load(copied).params
    params["wte"]["embedding"] = params["wte"]["embedding"] + 1
    facts = read_facts(copied, params, source="run")
    assert facts.run is None and not facts.done


def test_an_end_that_was_not_finite_gives_no_figure():
    done = {"val_loss": None, "val_bits_per_byte": None, "nonfinite": ["val_loss"]}
    assert "## Evaluation" not in make_card(SHAPE, Facts(done=done), **HOW)
    text = make_card(SHAPE, Facts(run=Config(), done={"val_loss": 1e4}), **HOW)
    assert "perplexity" not in text and "| 10000.0000 |" in text


@pytest.mark.parametrize(
    "source, told",
    [
        ("/home/me/a.txt", "a.txt"),
        ("data/b/", "b"),
        ("stdlib", "stdlib"),
        ("hf:org/name:train", "hf:org/name:train"),
        ("tfds:tiny_shakespeare", "tfds:tiny_shakespeare"),
        ("hf:/home/me/set", "hf:set"),
    ],
)
def test_sources_are_told_without_their_place(source, told):
    run = Config(data=DataConfig(source=(source,)))
    card = make_card(SHAPE, Facts(run=run, step=1), **HOW)
    assert f"| data | {told} |" in card and "/home" not in card


def test_fine_tuning_names_what_it_began_from():
    run = Config(train=TrainConfig(init_from="/home/me/old"))
    card = make_card(SHAPE, Facts(run=run, step=1), **HOW)
    assert "| began from | old |" in card


@pytest.mark.parametrize(
    "title", ["a: b", '"q" \\ #x', "émoji 😀", "\x7f\x1b", "- [x]"]
)
def test_any_title_is_metadata(title):
    facts = Facts(results={"wikitext2": WIKI})
    card = huggingface_hub.ModelCard(make_card(SHAPE, facts, **HOW | {"title": title}))
    assert card.data.model_name == title


def test_options_of_its_own_are_told():
    own = dataclasses.replace(SHAPE, tie_word_embeddings=False, n_inner=99)
    card = make_card(own, Facts(), **HOW)
    assert "Unlike GPT-2: `n_inner` 99, `tie_word_embeddings` False." in card
    assert "Unlike GPT-2" not in make_card(SHAPE, Facts(), **HOW)


def test_each_layout_is_used_by_what_opens_it():
    assert "transformers import pipeline" in make_card(SHAPE, Facts(), **HOW)
    ours = make_card(SHAPE, Facts(), **HOW | {"layout": "gpt2_jax"})
    assert "transformers" not in ours
    assert 'gpt2_jax.load("org/name")' in ours


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"results": {"wikitext2": 3}}',
        '{"results": {"wikitext2": {"value": NaN}}}',
        '{"results": {"wikitext2": {"value": "3"}}}',
    ],
)
def test_malformed_results_are_refused(tmp_path, text):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ConfigError, match=r"eval\.json.*delete it"):
        read_facts(tmp_path, {}, source="x")
