"""Each column on small files: what is scored, what a missing or bad file becomes."""

import json
import math

import jax
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.evaluate import columns
from gpt2_jax.evaluate.columns import REFUSED, TASKS, evaluate
from gpt2_jax.evaluate.options import MODES, EvaluateOptions
from gpt2_jax.evaluate.table import UNITS
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import load_tokenizer

CONFIG = ModelConfig(
    n_vocab=257, n_ctx=64, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3,
    dtype="float32", attention="xla",
)  # fmt: skip
WIKI = "\n = Title = \n\n The cat , it is said , sat on the mat . \n\n"
SENTENCES = "He said so .\nShe did n't .\n"
LAMBADA = ["said “yes” and then “no”", "one two three two"]
STORY = [f"{n} This is line {n} .\n" for n in range(1, 21)]
OPTIONS = "cat|dog|fox|hen|owl|pig|rat|cow|bee|ant"
QUERY = f"21 The XXXXX sat .\tfox\t\t{OPTIONS}\n"


@pytest.fixture(scope="module")
def lm() -> GPT2:
    params = model.init(CONFIG, jax.random.key(0))
    return GPT2(CONFIG, params, load_tokenizer("bytes"))


@pytest.fixture
def data(tmp_path):
    """Return a folder with a small file for every column."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in LAMBADA)
    files = {
        "lambada_test.jsonl": rows,
        "wikitext2_tokens/wiki.test.tokens": WIKI,
        "wikitext2_raw/wiki.test.raw": WIKI,
        "wikitext103_tokens/wiki.test.tokens": WIKI,
        "ptb.test.txt": " he said so \n it is n't \n",
        "enwik8": "A &amp; B &lt;i&gt;\n",
        "text8": " anarchism originated as a term",
        "cbtest_CN_valid_2000ex.txt": "".join([*STORY, QUERY, "\n"]),
        "cbtest_NE_valid_2000ex.txt": "".join([*STORY, QUERY, "\n"]),
        "news.en.heldout-00000-of-00050": SENTENCES,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(lm, data, task, **how):
    stride = how.pop("stride", 64)
    options = EvaluateOptions(
        tasks=task, data_dir=data, any_data=True, stride=stride, **how
    )
    return evaluate(lm, options)[0]


def total(lm, text: str) -> float:
    """Return the nll of all bytes but the first, by the model's own score."""
    return -lm.score(text).total


def log_prob(lm, text: str, last: int) -> float:
    """Return the log-probability of the last bytes of a text, by plain softmax."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(int)
    logits = np.asarray(lm.logits(ids[:-1]), np.float64)[-last:]
    found = logits[np.arange(last), ids[-last:]]
    return float(np.sum(found - np.log(np.sum(np.exp(logits), axis=-1))))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gives_a_number_with_its_protocol(lm, data, name):
    row = run(lm, data, name)
    assert row.name == name and row.value is not None and math.isfinite(row.value)
    assert row.unit and row.protocol and row.tokens > 0 and row.units > 0
    assert "other data" in row.note or "checksum not known" in row.note


def test_the_tasks_are_the_columns_and_the_modes():
    assert list(TASKS) == [*UNITS, *MODES]


def test_a_text_column_divides_by_words_and_ends(lm, data):
    row = run(lm, data, "ptb", detok="none")
    text = " he said so \n it is n't \n"
    assert row.units == 6 + 2 and row.tokens == len(text) - 1
    assert row.nll == pytest.approx(total(lm, text), rel=1e-5)
    assert row.value == pytest.approx(math.exp(row.nll / 8), rel=1e-6)


def test_a_de_tokenizer_changes_the_text_and_not_the_units(lm, data):
    row = run(lm, data, "ptb")
    assert row.units == 8
    assert row.nll == pytest.approx(total(lm, "he said so\nit isn't\n"), rel=1e-5)
    assert "de-tokenizer invertible" in row.protocol


@pytest.mark.parametrize(
    "unit, units, kind",
    [
        ("word", 6, "ppl/word"),
        ("char", 25, "ppl/char"),
        ("byte", 25, "ppl/byte"),
        ("token", 24, "ppl/token"),
    ],
)
def test_other_units(lm, data, unit, units, kind):
    row = run(lm, data, "ptb", detok="none", unit=unit)
    assert (row.units, row.unit) == (units, kind)
    assert row.value == pytest.approx(math.exp(row.nll / units), rel=1e-6)


def test_bits_are_of_original_bytes(lm, data):
    row = run(lm, data, "enwik8", detok="invertible")
    assert row.units == len("A &amp; B &lt;i&gt;\n")
    assert row.nll == pytest.approx(total(lm, "A & B <i>\n"), rel=1e-5)
    assert row.value == pytest.approx(row.nll / row.units / math.log(2), rel=1e-6)


def test_a_start_token_lets_the_first_token_count(lm, data):
    row = run(lm, data, "text8", start="eot")
    text = " anarchism originated as a term"
    assert row.tokens == len(text)
    assert row.nll == pytest.approx(-lm.score(text, start=True).total, rel=1e-5)


def test_a_smaller_stride_sees_more(lm, data):
    far = run(lm, data, "wikitext2", window=16, stride=16)
    near = run(lm, data, "wikitext2", window=16, stride=1)
    assert far.tokens == near.tokens and far.nll != near.nll


def test_lambada_takes_the_last_word(lm, data):
    row = run(lm, data, "lambada_ppl", lambada_text="none")
    nll = 0.0
    for text in LAMBADA:
        context, word = text.rsplit(" ", 1)
        nll += total(lm, text) - total(lm, context)
    assert row.nll == pytest.approx(nll, rel=1e-4) and row.units == 2
    assert row.value == pytest.approx(math.exp(nll / 2), rel=1e-4)


def test_perplexity_and_accuracy_of_lambada_are_one_pass(lm, data, monkeypatch):
    calls = []
    score = columns.score
    monkeypatch.setattr(
        columns, "score", lambda *a, **k: (calls.append(1), score(*a, **k))[1]
    )
    options = EvaluateOptions(
        tasks="lambada_ppl,lambada_acc", data_dir=data, any_data=True
    )
    assert [row.name for row in evaluate(lm, options)] == ["lambada_ppl", "lambada_acc"]
    assert len(calls) == 1


def test_cbt_takes_the_likeliest_of_ten(lm, data):
    row = run(lm, data, "cbt_cn")
    story = "".join(f"This is line {n}. " for n in range(1, 21)) + "The"
    rows = [f"{story} {option} sat."[-65:] for option in OPTIONS.split("|")]
    scores = [-log_prob(lm, row, len(" cat sat.")) for row in rows]
    assert row.value == 100.0 * (int(np.argmin(scores)) == 2) and row.units == 1


def test_hugging_faces_mean_is_over_windows(lm, data):
    row = run(lm, data, "hf_wikitext2", window=16, stride=16)
    text = "\n\n".join(["", " = Title = \n", "", WIKI.split("\n")[3] + "\n", ""])
    parts = [text[i : i + 16] for i in range(0, len(text), 16)]
    means = [total(lm, part) / (len(part) - 1) for part in parts if len(part) > 1]
    assert row.value == pytest.approx(math.exp(np.mean(means)), rel=1e-4)


def test_a_missing_file_is_a_row_that_says_where_to_get_it(lm, data):
    (data / "text8").unlink()
    options = EvaluateOptions(
        tasks="text8,ptb", data_dir=data, any_data=True, stride=64
    )
    missing, ran = evaluate(lm, options)
    assert missing.value is None and ran.value is not None
    assert missing.note.startswith("not run: put text8 from ")
    assert missing.note.endswith(f"into {data}")


def test_another_file_is_refused_and_the_rest_runs(lm, data):
    options = EvaluateOptions(tasks="enwik8,lm1b", data_dir=data)
    refused, ran = evaluate(lm, options)
    assert refused.note.startswith(REFUSED) and "--any-data" in refused.note
    assert ran.value is not None


def test_a_cbt_file_of_fewer_items_is_refused(lm, data):
    found = evaluate(lm, EvaluateOptions(tasks="cbt_cn", data_dir=data))[0]
    assert "has 1 items; allowed: 2,000" in found.note


def test_lm_evals_passage_begins_after_the_end_of_text(lm, data):
    row = run(lm, data, "cbt_cn", cbt_text="passage")
    assert "lm-eval v0.3.0" in row.protocol and row.units == 1


@pytest.mark.parametrize("name", ["lm1b", "text8"])
def test_a_file_without_a_token_to_predict_is_refused(lm, data, name):
    names = dict(lm1b="news.en.heldout-00000-of-00050", text8="text8")
    (data / names[name]).write_text("\n" if name == "lm1b" else "a")
    for unit in (None, "token"):
        assert "has nothing to predict" in run(lm, data, name, unit=unit).note


def test_text8_has_nothing_to_undo(lm, data):
    row, same = (run(lm, data, "text8", detok=d) for d in ("invertible", "none"))
    assert row.value == same.value and "de-tokenizer none" in row.protocol


@pytest.mark.parametrize("name", ["lambada_ppl", "cbt_cn"])
def test_a_line_that_is_not_utf8_is_refused(lm, data, name):
    names = dict(lambada_ppl="lambada_test.jsonl", cbt_cn="cbtest_CN_valid_2000ex.txt")
    path = data / names[name]
    path.write_bytes(path.read_bytes().replace(b" ", b" \xe9", 1))
    assert "line 1 is not UTF-8" in run(lm, data, name).note


@pytest.mark.parametrize("name", ["ptb", "cbt_cn"])
def test_weights_that_are_not_finite_give_no_number(lm, data, name):
    broken = GPT2(
        lm.config, jax.tree.map(lambda x: x * np.nan, lm.params), lm.tokenizer
    )
    with pytest.raises(FloatingPointError, match=f"{name}: .*not finite"):
        run(broken, data, name)


def test_a_truncated_file_names_its_line(lm, data):
    path = data / "news.en.heldout-00000-of-00050"
    path.write_text(path.read_text()[:-3])
    assert "ends within line 2" in run(lm, data, "lm1b").note


def test_a_last_word_beyond_the_context_is_refused(lm, data):
    text = json.dumps({"text": "a " + "b" * 70})
    (data / "lambada_test.jsonl").write_text(text + "\n")
    row = run(lm, data, "lambada_ppl")
    assert "line 1: a last word of 71 tokens; allowed: at most" in row.note


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(tasks="wikitxt2"), "no 'wikitxt2'; did you mean 'wikitext2'"),
        (dict(tasks=" , "), "--tasks is ' , '; allowed: lambada_ppl"),
        (dict(window=65), "--window is 65; allowed: 1 to the context of 64"),
        (dict(window=16, stride=17), "--stride is 17; allowed: 1 to the window of 16"),
    ],
)
def test_options_out_of_range_are_refused(lm, data, how, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(lm, EvaluateOptions(**{"data_dir": data, "stride": 64} | how))


def test_a_model_without_a_tokenizer_is_refused(lm, data):
    bare = GPT2(lm.config, lm.params, None)
    with pytest.raises(ConfigError, match="no tokenizer"):
        evaluate(bare, EvaluateOptions(data_dir=data))


def test_a_second_call_goes_on_from_the_journals(lm, data, tmp_path, monkeypatch):
    options = EvaluateOptions(
        tasks="ptb", data_dir=data, any_data=True, stride=8, window=8
    )
    how = dict(journals=tmp_path / "journals")
    first = evaluate(lm, options, **how)[0]
    monkeypatch.setattr("gpt2_jax.evaluate.scoring._answer", None)  # is not called
    assert evaluate(lm, options, **how)[0]._replace(seconds=first.seconds) == first
