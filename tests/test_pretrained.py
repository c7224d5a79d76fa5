"""Loading a model from anywhere, and what it then does."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_server import Hub

import gpt2_jax
from gpt2_jax import model
from gpt2_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    TrainConfig,
)
from gpt2_jax.hf import params_to_hf
from gpt2_jax.pretrained import GPT2, load
from gpt2_jax.tokenizer import load_tokenizer
from gpt2_jax.train import train
from gpt2_jax.weights import write_tensors

SHAPE = ModelConfig(n_vocab=257, n_ctx=16, n_embd=16, n_layer=2, n_head=2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "text.txt").write_text("ab" * 500)
    config = Config(
        run_dir=str(folder / "run"),
        model=dataclasses.replace(SHAPE, n_layer=1),
        data=DataConfig(source=(str(folder / "text.txt"),), tokenizer="bytes"),
        train=TrainConfig(steps=30, batch_tokens=8 * 16),
        evaluate=EvaluateConfig(samples=0),
    )
    train(config)
    return config.run_dir


@pytest.fixture(scope="module")
def lm() -> GPT2:
    params = model.init(SHAPE, jax.random.key(0))
    return GPT2(SHAPE, jax.tree.map(lambda x: 4 * x, params), load_tokenizer("bytes"))


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    lm.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """Return a copy that a test may break."""
    return shutil.copytree(saved, tmp_path / "model")


def same_bits(one: GPT2, other: GPT2) -> bool:
    pairs = jax.tree.map(np.array_equal, one.params, other.params)
    return jax.tree.all(pairs)


def test_a_loaded_run_writes_on_in_the_manner_of_its_text(run_dir):
    lm = load(run_dir)
    (text,) = lm.generate("abab", max_new_tokens=8, temperature=0.0)
    assert text["generated_text"].startswith("abab")
    assert set(text["generated_text"]) <= set("ab")


def test_loading_leaves_a_save_in_flight_alone(run_dir):
    partial = Path(run_dir, "checkpoints", "99.orbax-checkpoint-tmp")
    partial.mkdir()
    load(run_dir)
    assert partial.is_dir()
    partial.rmdir()


def test_what_was_saved_is_loaded_bit_for_bit(lm, saved):
    found = load(saved)
    assert same_bits(found, lm)
    assert found.config == model.resolve(SHAPE)
    assert found.tokenizer.fingerprint == lm.tokenizer.fingerprint


def test_parameters_take_over_the_memory_they_were_read_into(saved):
    """A copy would hold twice the parameters while a model is loaded."""
    from gpt2_jax.hf import _aligned

    host = _aligned((64, 64))
    assert jax.device_put(host).unsafe_buffer_pointer() == host.ctypes.data


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_as_float32(lm, dtype, tmp_path):
    lm.save(tmp_path / "half", dtype=dtype)
    found = load(tmp_path / "half")

    def rounded(x):
        return x.astype(dtype).astype(jnp.float32)

    assert same_bits(found, GPT2(SHAPE, jax.tree.map(rounded, lm.params), None))


def rewrite(folder: Path, lm: GPT2, change, shard_bytes: int = 10**9) -> None:
    """Write the weights anew after `change` had its way with them."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    tensors = params_to_hf(lm.config, lm.params)
    change(tensors)
    write_tensors(folder, tensors, dtype=None, shard_bytes=shard_bytes)


def test_shards_a_missing_prefix_saved_masks_and_an_equal_head_are_read(lm, folder):
    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 16, 16), bool)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    rewrite(folder, lm, change, shard_bytes=10_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert same_bits(load(folder), lm)


def test_a_tied_head_saved_alone_is_the_embedding(lm, folder):
    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")

    rewrite(folder, lm, change)
    assert same_bits(load(folder), lm)


def test_an_untied_head_is_read(lm, tmp_path):
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=False)
    untied = GPT2(shape, model.init(shape, jax.random.key(1)), lm.tokenizer)
    untied.save(tmp_path / "untied")
    assert same_bits(load(tmp_path / "untied"), untied)


def set_field(folder: Path, name: str, value) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "llama", "model_type is 'llama'"),
        ("architectures", ["GPT2ForSequenceClassification"], "architectures is"),
        ("add_cross_attention", True, "add_cross_attention is True"),
        ("activation_function", "quick_gelu", "activation_function is 'quick_gelu'"),
        ("quantization_config", {"bits": 4}, "quantization_config is"),
        ("n_layer", 3, "transformer.h.2.ln_1.weight is missing; .*h.2.mlp"),
        ("n_layer", 1, "transformer.h.1.ln_1.weight is unknown; .*h.1.mlp"),
        ("n_layer", 3_000_000, "tensors are of 2 layers; config.json says n_layer 30"),
        ("architectures", 5, "architectures is 5; allowed: a list of"),
        ("activation_function", ["a"], r"activation_function is \['a'\]"),
        ("n_inner", 48, r"c_fc.weight has shape \(16, 64\); allowed: \(16, 48\)"),
        (
            "vocab_size",
            300,
            "tokenizer has 257 tokens, config.json says vocab_size 300",
        ),
        (
            "vocab_size",
            256,
            "tokenizer has 257 tokens, config.json says vocab_size 256",
        ),
        ("tie_word_embeddings", False, "lm_head.weight is missing"),
        ("eos_token_id", "no", "eos_token_id is 'no'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, field, value, message):
    set_field(folder, field, value)
    with pytest.raises(ConfigError, match=message) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_transposed_weights_are_named_as_such(lm, folder):
    def change(tensors):
        for name in list(tensors):
            if "c_" in name and name.endswith("weight"):
                tensors[name] = tensors[name].T.copy()

    rewrite(folder, lm, change)
    with pytest.raises(ConfigError, match=r"c_attn.weight .* it is transposed: GPT-2"):
        load(folder)


def test_numbers_that_are_not_finite_are_warned_of(lm, folder):
    def change(tensors):
        tensors["transformer.h.1.mlp.c_fc.bias"] = np.full(64, np.nan, np.float32)

    rewrite(folder, lm, change)
    lines: list[str] = []
    broken = load(folder, report=lines.append)
    assert len(lines) == 1 and "blocks/mlp/up/bias" in lines[0]
    with pytest.raises(FloatingPointError, match="not finite"):
        broken.generate("a", max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("config.json", b"{", "config.json cannot be read: it holds no JSON"),
        ("config.json", b"\xff", "config.json cannot be read: it holds no JSON"),
        ("config.json", b"[" * 10**5, "config.json cannot be read: it holds no JSON"),
        ("config.json", b"[]", "its JSON is .*; allowed: an object"),
        ("model.safetensors", b"", "model.safetensors"),
        ("model.safetensors", b"\xff" * 100, "model.safetensors"),
        ("vocab.json", b"{}", "vocab.json"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(folder, name, contents, message):
    (folder / name).write_bytes(contents)
    with pytest.raises(ConfigError, match=message) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


def test_a_truncated_download_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="model.safetensors"):
        load(folder)


def test_pickles_are_refused_unread(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ConfigError, match="allow_pickle"):
        load(folder)
    assert not Path("pwned").exists()


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'/no/such' is no directory.*gpt2-xl"):
        load("/no/such")
    with pytest.raises(ConfigError, match="neither checkpoints/ nor config.json"):
        load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        load(str(tmp_path))


def test_a_model_without_tokenizer_files_takes_ids(lm, folder):
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink()
    assert load(folder).tokenizer.name == "bytes"  # 257 tokens can be nothing else
    shape = dataclasses.replace(SHAPE, n_vocab=99)
    nameless = GPT2(shape, model.init(shape, jax.random.key(0)), None)
    nameless.save(folder, force=True)
    found = load(folder)
    assert found.tokenizer is None
    assert found.logits([1, 2]).shape == (2, 99)
    assert found.features([1, 2], pool="mean").shape == (1, 16)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        found.generate("a")


def test_a_model_is_loaded_from_the_hub(lm, saved, monkeypatch, tmp_path):
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        hub.add("org/small", files)
        hub.add("org/small", files, revision="v2")
        for name in ("org/small", "org/small@v2"):
            assert same_bits(load(name), lm)
        assert same_bits(load("org/small", revision="v2"), lm)
        hub.stop()
        assert same_bits(load("org/small"), lm)  # from the cache
        with pytest.raises(ConfigError, match="org/other.* is no directory here"):
            load("org/other")


def test_generate_answers_like_the_pipeline(lm):
    found = lm.generate("ab", max_new_tokens=4, num_return_sequences=3)
    assert [list(text) for text in found] == [["generated_text"]] * 3
    assert all(text["generated_text"].startswith("ab") for text in found)
    assert len({text["generated_text"] for text in found}) == 3
    lists = lm.generate(["ab", "c"], max_new_tokens=4, num_return_sequences=3)
    assert lists[0] == found and len(lists) == 2
    new = lm.generate("ab", max_new_tokens=4, return_full_text=False)
    assert "ab" + new[0]["generated_text"] == found[0]["generated_text"]
    assert lm.generate("ab", max_new_tokens=4, seed=1) != found[:1]
    assert lm.generate([], max_new_tokens=4) == []


def test_generate_gives_ids_and_log_probabilities_on_request(lm):
    (text,) = lm.generate("ab", max_new_tokens=4, details=True, eos=False)
    assert text["token_ids"].shape == text["log_probs"].shape == (4,)
    assert text["finish_reason"] == "length"
    assert text["generated_text"] == "ab" + text["text"]
    ids = np.concatenate([lm.tokenizer.encode("ab"), text["token_ids"]])
    scored = lm.score(ids)
    np.testing.assert_allclose(text["log_probs"], scored.log_probs[1:], atol=1e-4)


def test_ids_are_prompts_too(lm):
    ids = lm.tokenizer.encode("ab").tolist()
    how = dict(max_new_tokens=4)
    assert lm.generate(ids, **how) == lm.generate("ab", **how)
    assert lm.generate([ids, ids[:1]], **how) == lm.generate(["ab", "a"], **how)
    with pytest.raises(ConfigError, match="token id is 257"):
        lm.generate([257], **how)


def test_an_empty_prompt_begins_a_document(lm):
    (text,) = lm.generate("", max_new_tokens=4, details=True)
    (same,) = lm.generate([256], max_new_tokens=4, details=True)
    assert text["text"] == same["text"]
    assert text["generated_text"] == text["text"]


def test_logits_have_the_shape_of_ids_and_no_padding(lm):
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    found = lm.logits(ids)
    assert found.shape == (2, 3, 257) and found.dtype == jnp.float32
    wanted = model.apply(lm.config, lm.params, jnp.asarray(ids))
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # padded: other sums
    np.testing.assert_allclose(lm.logits(ids[1]), wanted[1], atol=1e-5)
    for bad in ([[[1]]], [0.5], [257], [-1], [1] * 17, []):
        with pytest.raises(ConfigError):
            lm.logits(bad)


def test_texts_are_encoded_with_a_mask(lm):
    ids, mask = lm.encode(["abc", "", "d"])
    assert ids.tolist() == [[97, 98, 99], [256, 0, 0], [100, 0, 0]]
    assert mask.sum(axis=1).tolist() == [3, 1, 1]


def test_scores_with_a_start_count_every_token(lm):
    plain, started = lm.score("abc"), lm.score("abc", start=True)
    assert (len(plain.log_probs), len(started.log_probs)) == (2, 3)
    assert started.token_ids.tolist() == [97, 98, 99]
    assert len(lm.score(["abc", "d"])) == 2
    with pytest.raises(ConfigError, match="17 tokens exceeds the context of 16 by 1"):
        lm.score("a" * 17)
    assert len(lm.score("a" * 17, truncate="left").log_probs) == 15


def test_saving_replaces_nothing_unasked(lm, folder):
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="exists.*--force"):
        lm.save(folder)
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        lm.save(folder, dtype="int8", force=True)
    assert (folder / "config.json").read_bytes() == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]
    lm.save(folder, dtype="bfloat16", force=True)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_force_replaces_models_only(lm, folder):
    (folder / "src").mkdir()
    (folder / "src" / "work.py").write_text("days of it")
    with pytest.raises(ConfigError, match="it holds src; choose another"):
        lm.save(folder, force=True)
    assert (folder / "src" / "work.py").is_file()


def test_many_texts_take_turns_and_give_the_same(lm):
    texts = [chr(97 + i % 26) * (1 + i % 7) for i in range(70)]
    how = dict(max_new_tokens=3, temperature=1.0)
    found = lm.generate(texts, **how)
    for i in (0, 33, 69):
        assert found[i] == lm.generate(texts[i], **how)
        np.testing.assert_allclose(
            lm.features(texts, pool="mean")[i],
            lm.features(texts[i], pool="mean")[0],
            atol=1e-5,  # sums in another order
        )
    assert len(lm.score(texts)) == 70
    seeds = list(range(70))
    each = lm.generate(texts, seed=seeds, **how)
    assert each[40] == lm.generate(texts[40], seed=40, **how)
    with pytest.raises(ConfigError, match="one for each prompt"):
        lm.generate(texts, seed=[1, 2], **how)


def test_compiled_programs_are_kept_between_processes(saved, tmp_path):
    code = (
        f"import sys, gpt2_jax; lm = gpt2_jax.load({str(saved)!r}); "
        "lm.generate('a', max_new_tokens=2); "
        "assert 'orbax' not in sys.modules"  # half a second, for nothing
    )
    environment = {
        k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"
    } | {"XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        kept = {p.name: p.stat().st_mtime for p in tmp_path.rglob("*advance*-cache")}
        assert len(kept) == 1  # the second run added none
    assert list((tmp_path / "gpt2_jax" / "compiled").iterdir())


def test_the_package_offers_what_a_notebook_needs():
    assert gpt2_jax.load is load and gpt2_jax.GPT2 is GPT2
