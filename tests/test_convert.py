"""Conversion: exact, verified, all or nothing."""

import dataclasses
import json
import re
from pathlib import Path

import hub_server
import jax
import numpy as np
import pytest

from gpt2_jax import convert as program
from gpt2_jax import export, model
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.convert import KNOWN, Answer, Known, VerifyError, convert
from gpt2_jax.pretrained import GPT2, load
from gpt2_jax.tokenizer import load_tokenizer
from gpt2_jax.weights import open_tensors

SHAPE = ModelConfig(n_vocab=257, n_ctx=16, n_embd=32, n_layer=2, n_head=4)
DTYPES = ["float32", "bfloat16", "float16"]


def make_model(**options) -> GPT2:
    config = dataclasses.replace(SHAPE, dtype="float32", **options)
    params = model.init(config, jax.random.key(1))
    return GPT2(model.resolve(config), params, load_tokenizer("bytes"))


@pytest.fixture
def source(tmp_path) -> Path:
    make_model().save(tmp_path / "home" / "source")
    return tmp_path / "home" / "source"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.Hub() as hub:
        hub.use(monkeypatch, tmp_path / "hf_home")
        yield hub


@pytest.fixture
def online(hub, source) -> str:
    """Return the name of the model `source` on the Hub."""
    hub.add("org/tiny", {path.name: path.read_bytes() for path in source.iterdir()})
    return "org/tiny"


def quiet(line: str) -> None:
    pass


def assert_same_files(first: Path, second: Path) -> None:
    ours, theirs = open_tensors(first), open_tensors(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        a, b = np.asarray(tensor), np.asarray(theirs[name])
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name
    for name in ("config.json", "tokenizer.json", "vocab.json", "merges.txt"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("tie", [True, False])
def test_there_and_back_is_bitwise(tmp_path, tie):
    make_model(tie_word_embeddings=tie, n_inner=40).save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "run", to="gpt2_jax", verify=True, say=quiet)
    convert(tmp_path / "run", tmp_path / "b", verify=True, say=quiet)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "run" / "checkpoints").is_dir()
    assert "Converted from `a`" in (tmp_path / "b" / "README.md").read_text()


def test_a_run_of_another_padding_is_verified_in_hugging_faces_layout(tmp_path):
    """configs/quickstart.py pads to 8, and so no file says it."""
    lm = make_model(vocab_multiple=8)
    folder = tmp_path / "run"
    folder.mkdir()
    how = dict(name="run", source="x")
    export.write_run(lm.config, lm.params, lm.tokenizer, folder, **how)
    said: list[str] = []
    convert(folder, tmp_path / "out", verify=True, say=said.append)
    assert any("tensors equal to the bit" in line for line in said)


def test_another_padding_changes_nothing(tmp_path):
    lm = make_model(vocab_multiple=8)
    for folder, config in ("a", lm.config), ("b", make_model().config):
        (tmp_path / folder).mkdir()
        params = model.init(config, jax.random.key(1))
        rows = lm.params["wte"]["embedding"][:257]
        padded = params["wte"]["embedding"].at[:257].set(rows).at[257:].set(7)
        params = {**lm.params, "wte": {"embedding": padded}}
        export.write_hf(config, params, lm.tokenizer, tmp_path / folder)
    assert_same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("dtype", DTYPES)
def test_verified_weights_are_the_rounded_ones(tmp_path, source, dtype):
    said = []
    convert(source, tmp_path / "out", dtype=dtype, verify=True, say=said.append)
    found, wanted = load(tmp_path / "out").params, load(source).params
    kind = export.DTYPES[dtype]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(kind)),
        found,
        wanted,
    )
    told = "logits of up to 16 tokens equal too" if dtype == "float32" else "(allowed"
    assert told in "\n".join(said)
    assert f"parameters in {dtype}" in (tmp_path / "out" / "README.md").read_text()


def test_rounding_moves_logits_less_than_is_allowed(tmp_path):
    lm = make_model()
    lm.save(tmp_path / "half", dtype="bfloat16")
    line = program.compare(
        lm, load(tmp_path / "half", dtype="float32"), dtype="bfloat16"
    )
    gap, allowed = map(float, re.findall(r"\d+\.\d+", line))
    assert allowed / 30 < gap < allowed  # a bound that is of the size of what it bounds


def spoil_after_writing(monkeypatch, change) -> None:
    """Let the files be of other weights than the model's."""
    write = export.write_hf

    def spoiled(config, params, *rest, **how):
        params = jax.tree.map(lambda leaf: leaf, params)
        write(config, change(params), *rest, **how)

    monkeypatch.setattr(export, "write_hf", spoiled)


def swap_kernel(params):
    kernel = params["blocks"]["attn"]["out"]["kernel"]
    params["blocks"]["attn"]["out"]["kernel"] = kernel.swapaxes(1, 2)  # square
    return params


def nudge(params):
    bias = params["ln_f"]["bias"]
    params["ln_f"]["bias"] = bias.at[3].add(0.5)
    return params


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change, gap", [(swap_kernel, "c_proj.weight"), (nudge, "0.5")]
)
def test_a_wrong_copy_leaves_out_as_it_was(
    tmp_path, source, monkeypatch, dtype, change, gap
):
    make_model().save(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat()
    spoil_after_writing(monkeypatch, change)
    with pytest.raises(
        VerifyError, match="tensors differ.*the most.*by up to"
    ) as failed:
        convert(
            source, tmp_path / "out", dtype=dtype, verify=True, force=True, say=quiet
        )
    assert gap in str(failed.value)
    assert (tmp_path / "out" / "model.safetensors").stat() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out"]


def test_logits_that_differ_are_seen_where_weights_do_not():
    lm = make_model()
    other = dataclasses.replace(
        lm, config=dataclasses.replace(lm.config, attn_pdrop=0.1, dtype="bfloat16")
    )
    with pytest.raises(VerifyError, match=r"logits of 1 tokens differ by up to \d"):
        program.compare(lm, other, dtype="float32")


def test_another_config_or_tokenizer_is_seen():
    lm = make_model()
    other = dataclasses.replace(lm.config, layer_norm_epsilon=1e-6)
    with pytest.raises(VerifyError, match="layer_norm_epsilon 1e-05 -> 1e-06"):
        program.compare(lm, dataclasses.replace(lm, config=other), dtype="float32")
    with pytest.raises(VerifyError, match="tokenizer '9ede.*-> None"):
        program.compare(lm, dataclasses.replace(lm, tokenizer=None), dtype="float32")


def test_numbers_that_are_not_finite_pass_unless_they_change(tmp_path):
    lm = make_model()
    lm.params["ln_f"]["bias"] = lm.params["ln_f"]["bias"].at[0].set(np.nan)
    assert "tokens equal too" in program.compare(lm, lm, dtype="float32")
    with pytest.raises(VerifyError, match="up to inf"):
        program.compare(lm, make_model(), dtype="float32")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(to="onnx"), "to is 'onnx'; allowed: hf, gpt2_jax"),
        (dict(dtype="int8"), "dtype is 'int8'; allowed: float32, float16, bfloat16"),
        (dict(to="gpt2_jax", dtype="float16"), "allowed: float32, with --to gpt2_jax"),
        (dict(push="a/b/c"), "push is 'a/b/c'; allowed: ORG/NAME"),
        (dict(push="org/x@v1"), "without a revision"),
        (dict(push="org/x", to="gpt2_jax"), "push is 'org/x'; allowed: none"),
        (dict(), "exists; choose another"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(tmp_path, options, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").touch()
    with pytest.raises(ConfigError, match=message):
        convert("no/such/model", out, **options)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "out"]


def test_out_may_not_be_or_hold_the_model(source):
    for out in (source, source.parent):
        (out / "config.json").touch()
        with pytest.raises(ConfigError, match="is or holds MODEL"):
            convert(source, out, force=True)
    assert (source / "model.safetensors").is_file()


def test_force_replaces_a_model(tmp_path, source):
    make_model(n_inner=40).save(tmp_path / "out")
    (tmp_path / "out" / "eval.json").write_text("{}")
    convert(source, tmp_path / "out", force=True, say=quiet)
    assert_same_files(source, tmp_path / "out")
    assert not (tmp_path / "out" / "eval.json").exists()


def test_a_run_needs_a_tokenizer(tmp_path):
    lm = dataclasses.replace(make_model(n_vocab=99), tokenizer=None)
    lm.save(tmp_path / "a")
    with pytest.raises(ConfigError, match="has no tokenizer, which a run"):
        convert(tmp_path / "a", tmp_path / "run", to="gpt2_jax", say=quiet)
    assert not (tmp_path / "run").exists()


def test_the_card_names_no_place_and_not_the_source_s_card(tmp_path, source):
    (source / "README.md").write_text("a card of somebody else")
    (source / "eval.json").write_text('{"results": {"lambada": {"value": 0.5}}}')
    convert(source, tmp_path / "out", say=quiet)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "somebody else" not in card and str(tmp_path) not in card
    assert "Converted from `source`" in card and "| lambada | 0.5 |" in card
    convert(source, tmp_path / "run", to="gpt2_jax", say=quiet)
    for path in (tmp_path / "run").rglob("*"):
        ours = path.is_file() and path.name != "commit_success.txt"  # Orbax's
        assert not ours or str(tmp_path).encode() not in path.read_bytes()


def test_push_uploads_what_was_written(tmp_path, online, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    said = []
    out = convert(online, tmp_path / "out", push="me/copy", say=said.append)
    repo = hub.repos["me/copy"]
    files = repo.commits[repo.refs["main"]]
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert b"# me/copy" in files["README.md"]
    assert b"Converted from `org/tiny`" in files["README.md"]
    assert repo.messages == ["Add org/tiny in float32"]
    assert f"{hub.url}/me/copy" in said[-1]


def test_a_failed_verification_is_not_uploaded(
    tmp_path, online, hub, monkeypatch, source
):
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    spoil_after_writing(monkeypatch, nudge)
    with pytest.raises(VerifyError):
        convert(online, tmp_path / "out", verify=True, push="me/copy", say=quiet)
    assert "me/copy" not in hub.repos and not (tmp_path / "out").exists()


def answers_of(lm: GPT2) -> tuple[Answer, Answer]:
    [ids] = lm.generate([3, 4], max_new_tokens=6, temperature=0.0, details=True)
    [text] = lm.generate("ab", max_new_tokens=6, temperature=0.0)
    tokens = (3, 4, *ids["token_ids"].tolist())
    return (
        Answer((3, 4), 6, tokens, "somebody/repo a.py"),
        Answer("ab", 6, text["generated_text"], "somebody/repo b.py"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tiny", "openai-community/tiny", "tiny@main"])
def test_published_answers_are_checked_by_name(
    tmp_path, hub, source, monkeypatch, name, dtype
):
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub.add(name.partition("@")[0], files)
    lm = load(source)
    answers = answers_of(lm)
    monkeypatch.setitem(KNOWN, "tiny", Known(lm.config.n_params, answers))
    said = []
    convert(name, tmp_path / "out", dtype=dtype, verify=True, say=said.append)
    assert any(
        "2 published answers given, as in somebody/repo a.py, somebody/repo b.py" in s
        for s in said
    )
    assert 'license: "mit"' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_answer_names_what_was_found_and_expected(
    tmp_path, hub, source, monkeypatch, which
):
    hub.add("tiny", {path.name: path.read_bytes() for path in source.iterdir()})
    lm = load(source)
    answers = list(answers_of(lm))
    right = answers[which].text
    wrong = right[:-1] + ("!" if isinstance(right, str) else (1,))
    answers[which] = answers[which]._replace(text=wrong)
    monkeypatch.setitem(KNOWN, "tiny", Known(lm.config.n_params, tuple(answers)))
    with pytest.raises(VerifyError) as failed:
        convert("tiny", tmp_path / "out", verify=True, say=quiet)
    assert repr(right) in str(failed.value) and repr(wrong) in str(failed.value)
    assert "somebody/repo" in str(failed.value)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_size_is_not_the_official_one():
    with pytest.raises(VerifyError, match="gpt2 has 124,439,808 parameters, found"):
        program.check_answers(make_model(), "gpt2")


def test_where_no_answer_is_known_it_says_so(monkeypatch):
    lm = make_model()
    monkeypatch.setitem(KNOWN, "gpt2-xl", Known(lm.config.n_params, ()))
    line = program.check_answers(lm, "gpt2-xl")
    assert "no published answer is known for gpt2-xl" in line
    assert "not one of OpenAI's four" in program.check_answers(lm, None)


def test_a_directory_is_never_the_official_model(tmp_path, monkeypatch):
    make_model().save(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    said = []
    convert("gpt2", "out", verify=True, say=said.append)
    assert any("not one of OpenAI's four by name" in line for line in said)
    assert "license" not in Path("out", "README.md").read_text()


def test_the_four_are_known_by_their_shapes():
    shapes = {
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    }
    assert KNOWN.keys() == shapes.keys()
    for name, (n_layer, n_head, n_embd) in shapes.items():
        config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        assert config.n_params == KNOWN[name].n_params


def test_answers_are_their_prompts_continued_by_as_many_tokens():
    tokenizer = load_tokenizer("gpt2")
    for known in KNOWN.values():
        for answer in known.answers:
            assert answer.text[: len(answer.prompt)] == answer.prompt
            prompt, whole = (
                list(tokenizer.encode(t)) if isinstance(t, str) else list(t)
                for t in (answer.prompt, answer.text)
            )
            assert len(whole) - len(prompt) == answer.new_tokens
    dog = tokenizer.decode(KNOWN["gpt2"].answers[0].text)
    assert dog.startswith("The dog was found in a field near the intersection of")


def test_what_was_written_is_json_and_has_no_leftovers(tmp_path, source):
    out = convert(source, tmp_path / "out", say=quiet)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert not [path for path in tmp_path.rglob(".*")]
