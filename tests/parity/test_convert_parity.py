"""What is converted opens in transformers: no warning, same logits, ids and texts."""

import dataclasses
import json
import logging
import warnings

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from gpt2_jax import export, model
from gpt2_jax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    TrainConfig,
)
from gpt2_jax.convert import convert
from gpt2_jax.pretrained import GPT2, load
from gpt2_jax.tokenizer import load_tokenizer
from gpt2_jax.train import train

ATOL = 1e-4  # the promise; both sides compute in float32
SHAPE = dict(n_ctx=64, n_embd=32, n_layer=2, n_head=4, dtype="float32")
VARIANTS = {
    "plain": {},
    "untied": dict(tie_word_embeddings=False),
    "n_inner": dict(n_inner=50),
    "relu": dict(activation_function="relu"),
    "mistral": dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
}
TEXTS = [
    "Hello, world! It's 2019.\n\n  def f(x):\n\treturn x",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f600 don't",
    " ",
    "x" * 64,
]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def make_model(tokenizer: str, **options) -> GPT2:
    """Return a model of random weights, wide enough that its choices are decided."""
    known = load_tokenizer(tokenizer)
    config = model.resolve(ModelConfig(**SHAPE, n_vocab=known.n_vocab, **options))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        std = 0.05 if "wte" in name or "head" in name else 0.5 if "wpe" in name else 0.2
        values = random.normal(float(name.endswith("scale")), std, leaf.shape)
        return jax.numpy.asarray(values, np.float32)

    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    return GPT2(config, jax.tree.map_with_path(draw, shapes), known)


@pytest.fixture
def silent():
    """Fail on whatever transformers logs, or anybody warns of."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    root = transformers.utils.logging.get_logger("transformers")
    root.addHandler(handler)
    with warnings.catch_warnings(record=True, action="always") as warned:
        yield
    root.removeHandler(handler)
    assert not records
    assert not [str(warning.message) for warning in warned]


def opened(directory, **how):
    """Return transformers' model, which found every key and no other."""
    network, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **how
    )
    assert not any(info.values()), info
    return network.eval()


def logits_of(network, ids) -> np.ndarray:
    with torch.no_grad():
        return network(torch.tensor([ids])).logits[0].float().numpy()


def quiet(line: str) -> None:
    pass


def test_the_fixture_hears_a_warning(silent, request):
    """Prove that silence below is no deafness."""
    heard = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    root = transformers.utils.logging.get_logger("transformers")
    [theirs] = [h for h in root.handlers if "silent" in h.emit.__qualname__]
    emit, theirs.emit = theirs.emit, handler.emit
    transformers.utils.logging.get_logger("transformers.modeling_utils").warning("x")
    theirs.emit = emit
    assert heard == ["x"]


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_opens_it_and_computes_the_same(
    tmp_path, silent, variant, tokenizer
):
    lm = make_model(tokenizer, **VARIANTS[variant])
    lm.save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "run", to="gpt2_jax", say=quiet)
    convert(tmp_path / "run", tmp_path / "hf", verify=True, say=quiet)
    network = opened(tmp_path / "hf")
    ids = np.random.default_rng(1).integers(lm.config.n_vocab, size=64)
    gap = np.abs(logits_of(network, ids.tolist()) - np.asarray(lm.logits(ids))).max()
    assert gap <= ATOL
    assert network.dtype == torch.float32
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == lm.tokenizer.encode(text).tolist()
    assert theirs.model_max_length == 64
    assert theirs.eos_token_id == lm.tokenizer.eot


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_the_pipeline_writes_the_same_text(tmp_path, silent, tokenizer):
    lm = make_model(tokenizer)
    lm.save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "hf", say=quiet)
    write = pipeline("text-generation", model=str(tmp_path / "hf"))
    for prompt in ("Hello, I'm", "def f("):
        [theirs] = write(prompt, do_sample=False, max_new_tokens=20)
        [ours] = lm.generate(prompt, temperature=0.0, max_new_tokens=20)
        assert theirs == ours
        assert len(ours["generated_text"]) > len(prompt)
    inputs = write.tokenizer(prompt, return_tensors="pt")
    network = opened(tmp_path / "hf")
    [ids] = network.generate(**inputs, do_sample=False, max_new_tokens=20)
    assert write.tokenizer.decode(ids) == ours["generated_text"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_transformers_saved_comes_back_to_the_bit(tmp_path, silent, dtype):
    config = transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, n_positions=64, vocab_size=50_257
    )
    network = transformers.GPT2LMHeadModel(config)
    network.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "run", to="gpt2_jax", verify=True, say=quiet)
    convert(tmp_path / "run", tmp_path / "b", dtype=dtype, verify=True, say=quiet)
    again = opened(tmp_path / "b")
    assert again.dtype == DTYPES[dtype]
    ours, theirs = again.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.to(DTYPES[dtype])), name
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "initializer_range"):
        assert getattr(again.config, name) == getattr(config, name)


def test_shards_and_their_index_are_read(tmp_path, silent):
    lm = make_model("bytes", tie_word_embeddings=False)
    how = dict(dtype="float32", shard_bytes=20_000)
    export.write_hf(lm.config, lm.params, lm.tokenizer, tmp_path, **how)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    ids = list(range(50))
    gap = logits_of(opened(tmp_path), ids) - np.asarray(lm.logits(ids))
    assert np.abs(gap).max() <= ATOL


def test_a_run_of_ours_writes_on_in_the_pipeline(tmp_path, silent):
    (tmp_path / "text.txt").write_text("ab" * 500)
    shape = ModelConfig(n_vocab=257, n_ctx=32, n_embd=16, n_layer=1, n_head=2)
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=shape,
        data=DataConfig(source=(str(tmp_path / "text.txt"),), tokenizer="bytes"),
        train=TrainConfig(steps=30, batch_tokens=8 * 32),
        evaluate=EvaluateConfig(samples=0),
    )
    train(config, say=quiet)
    convert(tmp_path / "run", tmp_path / "hf", verify=True, say=quiet)
    write = pipeline("text-generation", model=str(tmp_path / "hf"))
    [theirs] = write("abab", do_sample=False, max_new_tokens=10)
    [ours] = load(tmp_path / "run").generate("abab", temperature=0.0, max_new_tokens=10)
    assert theirs == ours and set(ours["generated_text"]) <= set("ab")


def test_padding_kept_by_the_trainer_survives(tmp_path, silent):
    lm = make_model("gpt2")
    wide = dataclasses.replace(lm.config, n_vocab=50_304)
    wte = np.zeros((wide.n_vocab_padded, 32), np.float32)
    wte[:50_304] = np.random.default_rng(0).normal(0, 0.05, (50_304, 32))
    padded = dataclasses.replace(
        lm,
        config=wide,
        params={**lm.params, "wte": {"embedding": jax.numpy.asarray(wte)}},
    )
    padded.save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "hf", verify=True, say=quiet)
    network = opened(tmp_path / "hf")
    assert network.get_input_embeddings().weight.shape == (50_304, 32)
    assert network.generation_config.eos_token_id == 50_256
