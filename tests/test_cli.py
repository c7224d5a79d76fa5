"""The command line: one line and status 2 for a mistake, nothing loaded for --help."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2_jax import cli, model
from gpt2_jax.config import ModelConfig
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import load_tokenizer

TINY = [
    "--model.n-ctx=16",
    "--model.n-embd=16",
    "--model.n-layer=1",
    "--model.n-head=2",
    "--train.batch-tokens=128",
    "--train.steps=4",
    "--optimizer.warmup-steps=1",
    "--evaluate.samples=1",
    "--evaluate.sample-tokens=4",
]
VERBS = ["train", "prepare", "generate", "features", "eval", "bias", "convert", "check"]


def mistake(capsys, *arguments: str) -> str:
    """Return the one line that a wrong command line leaves on stderr."""
    assert cli.run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "quickstrat"], "did you mean 'quickstart'?"),
        (["train", "no/such.py"], "'no/such.py' is no .py file"),
        (["train", "--model.n-lyer", "3"], "did you mean 'model.n-layer'?"),
        (["train", "--modle.n-layer=3"], "did you mean 'model.n-layer'?"),
        (["train", "--model.n-head", "5"], "model.n_head is 5; allowed: a divisor of"),
        (["train", "--model.n-layer", "x"], "--model.n-layer: invalid literal"),
        (["train", "--optimizer.name", "sgd"], "'sgd' for argument '--optimizer.name'"),
        (["train", "--train.batch-tokens", "100"], "multiple of model.n_ctx = 256"),
        (["train", "--model.embd-pdrop", "nan"], "model.embd_pdrop is nan"),
        (["prepare", "stdlib"], "--out"),
        (["prepare", "no/such", "--out", "OUT", "--tokenizer", "bytes"], "no/such"),
        (["plan", "gpt2_124m"], "--topology"),
        (["plan", "gpt2_124m", "--topology", "v3-8", "--modle.n-layer=3"], "model.n"),
        (["generate"], "MODEL"),
        (["generate", "m", "a", "--temprature", "1"], "did you mean 'temperature'?"),
        (["generate", "m", "a", "--num-beams=2", "--top-k=3"], "top_k is 3; allowed"),
        (["generate", "./no", "a"], "'./no' is no directory and no name on the"),
        (["generate", "m", "a", "--truncate", "right"], "right"),
        (["features", "m", "a"], "--out"),
        (["features", "m", "--out", "f.npz"], "0 TEXT and 0 --input; allowed: one"),
        (["features", "m", "a", "--out", "f", "--pool", "max"], "max"),
        (["convert", "m"], "OUT"),
        (["convert", "m", "out", "--to", "torch"], "torch"),
        (["generate", "no/such", "a"], "'no/such' is no directory here"),
        (["check"], "RUN"),
        (["check", "no/such"], "RUN 'no/such' is missing; allowed: a directory that"),
    ],
)
def test_a_mistake_is_one_line_that_mends_it(
    capsys, monkeypatch, tmp_path, arguments, wanted
):
    monkeypatch.chdir(tmp_path)
    assert wanted in mistake(capsys, *arguments)


def test_train_generate_and_prepare_work_together(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be\n" * 40)
    prepare = ["prepare", "text.txt", "--out", "shards", "--tokenizer", "bytes"]
    assert cli.run(prepare) == 0
    train = ["train", "shakespeare", "--data.source", "shards", "--run-dir", "r"]
    assert cli.run(train + TINY) == 0
    assert "held-out bits per byte" in capsys.readouterr().out
    generate = ["generate", "r", "to", "--max-new-tokens", "4", "--seed", "1"]
    assert cli.run(generate) == 0
    assert capsys.readouterr().out.startswith("to")


@pytest.mark.parametrize(
    ("text", "flags", "wanted"),
    [
        (b"", [], "text.txt"),
        (b"ab" * 5, [], "model.n_ctx + 1 = 17"),
        (b"ab\xff\xfe" * 90, [], "text.txt"),
        (b"ab" * 500, ["--mesh.fsdp=3"], "is not the 8 devices here"),
        (
            b"ab" * 500,
            ["--train.batch-tokens=48", "--mesh.data=8"],
            "multiple of data x fsdp = 8",
        ),
        (b"ab" * 500, ["--model.n-vocab=300"], "--model.n-vocab 257"),
        (b"ab" * 500, ["--data.tokenizer=gpt2"], "--model.n-vocab 50257"),
        (b"ab" * 500, ["--model.attention=cudnn"], "model.attention is 'cudnn'"),
        (b"ab" * 500, ["--run-dir=text.txt/run"], "--run-dir"),
    ],
)
def test_what_training_cannot_use_is_one_line(
    capsys, monkeypatch, tmp_path, text, flags, wanted
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(text)
    train = ["train", "shakespeare", "--data.source", "text.txt", "--run-dir", "r"]
    assert cli.run(train + TINY + flags) == 2
    captured = capsys.readouterr()
    assert wanted in captured.err and captured.err.count("\n") == 1
    assert not list(Path().rglob("checkpoints/*"))


def test_a_config_file_with_a_mistake_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    start = "from gpt2_jax.config import *\n"
    for text in ("config = ModelConfig(n_lyer=3)", "config = (", "config = nothing"):
        Path("mine.py").write_text(start + text)
        assert "mine.py is no config" in mistake(capsys, "train", "mine.py")
    Path("notes.txt").write_text("to be")
    assert "'notes.txt' is no .py file" in mistake(capsys, "train", "notes.txt")


def test_prepare_checks_its_fraction(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be" * 50)
    how = ["text.txt", "--out", "s", "--tokenizer", "bytes", "--val-fraction", "1.5"]
    assert "val_fraction is 1.5" in mistake(capsys, "prepare", *how)


def test_help_loads_no_jax():
    code = "import sys; from gpt2_jax import cli; cli.run(['--help']); "
    code += "print(sorted({'jax', 'tiktoken', 'matplotlib'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("[]\n")
    for verb in (*VERBS, "quickstart", "gpt2_1558m"):
        assert verb in result.stdout


def test_every_verb_has_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as stopped:
            cli.run([verb, "--help"])
        assert stopped.value.code == 0
        assert f"gpt2-jax {verb}" in capsys.readouterr().out


@pytest.fixture
def saved(monkeypatch, tmp_path) -> str:
    """Return a small model in Hugging Face layout, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shape = ModelConfig(n_vocab=257, n_ctx=16, n_embd=16, n_layer=1, n_head=2)
    params = model.init(shape, jax.random.key(0))
    GPT2(shape, params, load_tokenizer("bytes")).save("saved")
    return "saved"


def printed(capsys, *arguments: str) -> str:
    assert cli.run(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_text_is_printed_alike_whole_and_while_it_is_written(capsys, saved):
    how = ["generate", saved, "ab", "--max-new-tokens", "8", "--seed", "3"]
    streamed = printed(capsys, *how)
    assert streamed.startswith("ab") and streamed.endswith("\n")
    assert printed(capsys, *how, "--no-stream") == streamed
    assert "ab" + printed(capsys, *how, "--no-echo") == streamed


def test_texts_are_objects_on_request(capsys, saved):
    how = ["generate", saved, "ab", "c", "--max-new-tokens=4", "--json", "--no-eos"]
    texts = [json.loads(line) for line in printed(capsys, *how).splitlines()]
    assert [len(text["token_ids"]) for text in texts] == [4, 4]
    assert texts[0]["generated_text"] == "ab" + texts[0]["text"]
    assert texts[1]["finish_reason"] == "length"
    several = printed(capsys, "generate", saved, "ab", "--num-return-sequences=3")
    assert several.count("\n---\n") == 2


def test_weights_of_8_bits_reach_the_shell(capsys, saved):
    how = ["generate", saved, "ab", "--max-new-tokens=4", "--json"]
    wide, narrow = printed(capsys, *how), printed(capsys, *how, "--quantize", "int8")
    wide, narrow = json.loads(wide)["log_probs"], json.loads(narrow)["log_probs"]
    assert wide[0] != narrow[0] and abs(wide[0] - narrow[0]) < 0.1


def test_stop_strings_and_beams_reach_the_shell(capsys, saved):
    how = ["generate", saved, "ab", "--max-new-tokens=8", "--num-beams=2", "--no-echo"]
    text = printed(capsys, *how).removesuffix("\n")
    cut = printed(capsys, *how, "--stop", text[3], "never").removesuffix("\n")
    assert cut == text.partition(text[3])[0]


def test_features_are_written(capsys, saved):
    Path("lines.txt").write_text("ab\n\nabc\n")
    printed(capsys, "features", saved, "--input", "lines.txt", "--out", "f.npz")
    with np.load("f.npz") as found:
        assert found["features"].shape == (3, 16)
        assert found["n_tokens"].tolist() == [2, 1, 3]
    printed(capsys, "features", saved, "ab", "c", "--pool=none", "--out=g.npz")
    with np.load("g.npz") as found:
        assert found["offsets"].tolist() == [0, 2, 3]
    assert "g.npz" in mistake(capsys, "features", saved, "ab", "--out=g.npz")
    assert "f.txt" in mistake(capsys, "features", saved, "ab", "--out=f.txt")


def test_a_table_is_printed_and_kept(capsys, saved):
    text = "to be or not to be " * 4
    Path("text8").write_text(text)
    how = ["--data-dir", ".", "--any-data", "--stride", "16", "--out", "deep/eval.json"]
    table = printed(capsys, "eval", saved, "--tasks", "text8,ptb", *how)
    assert "| text8 | " in table and "not run: put ptb.test.txt from" in table
    found = json.loads(Path("deep/eval.json").read_text())
    assert found["model"] == saved and found["results"]["ptb"]["value"] is None
    assert found["results"]["text8"]["tokens"] == len(text) - 1
    assert cli.run(["eval", saved, "--tasks", "text8", *how[:2], "--stride", "16"]) == 2
    assert "--any-data" in capsys.readouterr().out


def test_a_probe_is_printed_kept_and_drawn(capsys, saved):
    shape = ModelConfig(n_vocab=257, n_ctx=64, n_embd=16, n_layer=1, n_head=2)
    params = model.init(shape, jax.random.key(0))
    GPT2(shape, params, load_tokenizer("bytes")).save("saved", force=True)
    how = ["--samples=2", "--max-new-tokens=2", "--permutations=9", "--pairs=a/b"]
    files = ["--out", "deep/b.json", "--chart", "deep/b.png"]
    text = printed(capsys, "bias", saved, *how, "--templates={group} is", *files)
    assert "| a |" in text or "a / b" in text
    assert json.loads(Path("deep/b.json").read_text())
    assert Path("deep/b.png").read_bytes().startswith(b"\x89PNG")
    assert "--chart is 'b.gif'; allowed: FILE.png" in mistake(
        capsys, "bias", saved, "--chart", "b.gif"
    )


def test_what_each_task_needs_is_listed_without_a_model(capsys):
    listed = printed(capsys, "eval", "--list")
    assert "lambada/lambada_test.jsonl, 1,819,752 bytes, sha256 4aa8d02c" in listed


def test_an_unknown_task_is_told_before_the_model_is_loaded(capsys):
    assert "did you mean 'wikitext2'" in mistake(
        capsys, "eval", "no", "--tasks=wikitxt2"
    )


def test_a_model_goes_there_and_back(capsys, saved):
    out = printed(capsys, "convert", saved, "run", "--to", "gpt2_jax", "--verify")
    assert "run" in out
    printed(capsys, "convert", "run", "back", "--to", "hf", "--verify")
    weights = [Path(d, "model.safetensors").read_bytes() for d in (saved, "back")]
    assert weights[0] == weights[1]
    assert "--force" in mistake(capsys, "convert", "run", "back")
