import math
import os
from pathlib import Path

import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.evaluate import texts
from gpt2_jax.evaluate.texts import Document, Texts, Unit
from gpt2_jax.tokenizer import load_tokenizer

DATA = Path(os.environ.get("GPT2_JAX_DATA", Path(__file__).parents[3] / "shared/data"))
WIKI = " \n = One = \n \n It 's 1 @,@ 000 é , he said . \n"
RAW = " \n = One = \n \n = = Part = = \n a b . \n = Two = \n c d . \n"


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def real(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip("the file is not there")
    return DATA / name


def n_tokens(column: Texts) -> int:
    tokenizer = load_tokenizer("gpt2")
    return sum(texts.encode(tokenizer, d.text).size for d in column.documents)


@pytest.mark.parametrize(
    ("unit", "units"),
    [("word+eos", 17), ("word", 13), ("byte", 47), ("char", 46), ("token", 0)],
)
def test_units_are_those_of_the_file_with_any_detokenizer(
    tmp_path: Path, unit: Unit, units: int
):
    path = write(tmp_path, WIKI)
    for detok in ("none", "invertible", "megatron"):
        column = texts.wikitext2(path, detok, unit)
        assert column.units == units
        assert [document.units for document in column.documents] == [units]


def test_wikitext_is_one_stream_in_three_forms(tmp_path: Path):
    path = write(tmp_path, WIKI)
    plain = "\n= One =\n\nIt's 1,000 é, he said.\n"
    assert texts.wikitext2(path).documents[0].text == plain
    assert texts.wikitext103(path).documents[0].text == WIKI
    assert texts.wikitext103(path, "megatron").documents[0].text == plain


def test_ptb_is_one_stream(tmp_path: Path):
    path = write(tmp_path, " it did n't \n <unk> 's N \n")
    (document,), units, notes = texts.ptb(path)
    assert (document.text, units, notes) == ("it didn't\n<unk>'s N\n", 8, [])
    text = texts.ptb(path, "megatron").documents[0].text
    assert text == " it didn't\n<unk>'s N\n"


def test_lines_that_stay_raw_are_noted(tmp_path: Path):
    path = write(tmp_path, " a , b \nnot framed , no \n c \n")
    column = texts.wikitext2(path)
    assert column.documents[0].text == "a, b\nnot framed , no \nc\n"
    assert column.notes == ["1 of 3 lines stay raw"]


def test_enwik8_is_cut_in_bytes_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = "é<&amp;lt;é".encode()
    monkeypatch.setattr(texts, "TEST_SIZE", len(data) - 2)
    column = texts.enwik8(write(tmp_path, data[:-1]))  # half an é at either end
    assert column.units == len(data) - 2
    assert column.notes == []
    ids = texts.encode(load_tokenizer("gpt2"), column.documents[0].text)
    assert load_tokenizer("gpt2").decode_bytes(ids) == data[1:-1]


def test_enwik8_has_its_entities_written_as_marks(tmp_path: Path):
    path = write(tmp_path, "<title>A&amp;B</title>\n&lt;b&gt;")
    column = texts.enwik8(path, "invertible")
    assert column.documents == [Document("<title>A&B</title>\n<b>", 32)]
    assert column.notes == ["all 32 bytes of a file no longer than its test part"]
    with pytest.raises(ConfigError, match="known: none, invertible"):
        texts.enwik8(path, "megatron")


def test_text8_is_the_last_characters_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(texts, "TEST_SIZE", 5)
    column = texts.text8(write(tmp_path, " one two"))
    assert column == ([("e two", 5)], 5, [])
    for text, found in (
        ("a <UNK>", "b'<' in line 1"),
        ("a\nb\nA", "b'\\\\n' in line 1"),
    ):
        with pytest.raises(ConfigError, match=found):
            texts.text8(write(tmp_path, text))


def test_sentences_of_lm1b_stand_alone_or_in_one_stream(tmp_path: Path):
    path = write(tmp_path, 'I don \'t .\n" No , " he said .\n')
    plain = ["I don't.", '"No," he said.']
    column = texts.lm1b(path)
    assert column == ([(plain[0], 5), (plain[1], 8)], 13, [])
    assert texts.lm1b(path, stream=True) == ([("\n".join([*plain, ""]), 13)], 13, [])
    assert texts.lm1b(path, "none", "word").units == 11


def test_hugging_faces_rows_are_joined_by_two_newlines(tmp_path: Path):
    column = texts.hf_wikitext2(write(tmp_path, " \n = One = \n \n a \n"))
    assert column.documents[0].text == "\n\n = One = \n\n\n\n\n a \n"


def test_lm_eval_scores_articles_and_counts_what_stands_between_blanks(tmp_path: Path):
    path = write(tmp_path, RAW)
    documents, units, _ = texts.lm_eval_wikitext(path)
    assert [document.text for document in documents] == [
        " = One =\n\n== Part ==\na b. ",
        " = Two =\nc d.\n",
    ]
    assert [document.units for document in documents] == [1 + 11 + 1, 1 + 6 + 1]
    assert units == 21
    assert texts.lm_eval_wikitext(path, "byte").units == len(RAW) - 3


@pytest.mark.parametrize("read", [texts.wikitext2, texts.ptb, texts.lm1b])
def test_empty_and_truncated_files_are_refused(tmp_path: Path, read):
    with pytest.raises(ConfigError, match="empty: it has no line 1"):
        read(write(tmp_path, ""))
    with pytest.raises(ConfigError, match="ends within line 3"):
        read(write(tmp_path, " a \n b \n c"))
    with pytest.raises(ConfigError, match="line 2 is not UTF-8"):
        read(write(tmp_path, b" a \n \xff \n"))
    with pytest.raises(ConfigError, match="empty"):
        texts.enwik8(write(tmp_path, ""))


@pytest.mark.parametrize(
    ("name", "units", "n"),
    [
        ("wikitext2_tokens/wiki.test.tokens", 245_569, 295_877),
        ("wikitext103_tokens/wiki.test.tokens", 245_569, 285_234),
        ("ptb/ptb.test.txt", 82_430, 105_243),
    ],
)
def test_real_words_and_ends_are_those_published(name: str, units: int, n: int):
    read = texts.ptb if name.startswith("ptb") else texts.wikitext2
    column = read(real(name), "none")
    assert (column.units, n_tokens(column)) == (units, n)


def test_the_perplexity_page_scores_287644_tokens():
    assert n_tokens(texts.hf_wikitext2(real("wikitext2_raw/wiki.test.raw"))) == 287_644


def test_lm_evals_words_and_bytes_agree_with_its_published_results():
    path = real("wikitext2_raw/wiki.test.raw")
    words = texts.lm_eval_wikitext(path)
    n_bytes = texts.lm_eval_wikitext(path, "byte").units
    assert (len(words.documents), words.units, n_bytes) == (62, 241_335, 1_290_527)
    # 37.3698 per word and 1.9682 per byte are of the same loss.
    per_byte = math.log(37.3698) * words.units / n_bytes
    assert math.exp(per_byte) == pytest.approx(1.9682, abs=5e-5)  # digits published
    assert per_byte / math.log(2) == pytest.approx(0.9769, abs=5e-5)


def test_the_first_million_bytes_of_enwik8_have_their_tokens():
    column = texts.enwik8(real("enwik8_prefix/enwik6"))
    assert (column.units, n_tokens(column)) == (1_000_000, 286_273)
