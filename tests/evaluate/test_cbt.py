import os
from pathlib import Path

import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.evaluate.cbt import read_items
from gpt2_jax.evaluate.detokenize import CBT

DATA = Path(os.environ.get("GPT2_JAX_DATA", Path(__file__).parents[3] / "shared/data"))
OPTIONS = "cat|dog|hen|cow|pig|ant|bee|fox|owl|elk"
SENTENCES = ["`` Go , '' said I .", *["It did n't ."] * 19]
QUERY = "`` The XXXXX 's here ! ''"


def lines(query: str = QUERY, answer: str = "hen", options: str = OPTIONS) -> list[str]:
    numbered = [f"{n} {sentence}" for n, sentence in enumerate(SENTENCES, 1)]
    return [*numbered, f"21 {query}\t{answer}\t\t{options}", ""]


def write(path: Path, *parts: list[str]) -> Path:
    text = "".join(f"{line}\n" for part in parts for line in part)
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_items_read_as_people_write(tmp_path: Path):
    items = read_items(write(tmp_path / "a.txt", lines(), lines(answer="elk")))
    assert len(items) == 2
    assert items[0].prefix == '"Go," said I. ' + "It didn't. " * 19 + '"The'
    assert items[0].endings[:2] == [" cat's here!\"", " dog's here!\""]
    assert [item.answer for item in items] == [2, 9]
    assert len(items[0].endings) == 10


def test_without_a_detokenizer_the_tokens_stay(tmp_path: Path):
    (item,) = read_items(write(tmp_path / "a.txt", lines()), detok="none")
    assert item.prefix == " ".join(SENTENCES) + " `` The"
    assert item.endings[2] == " hen 's here ! ''"


def test_a_passage_is_what_lm_eval_scores(tmp_path: Path):
    (item,) = read_items(write(tmp_path / "a.txt", lines()), "passage")
    passage = '"Go," said I. ' + "It didn't. " * 18 + "It didn't."
    assert item.prefix == f'Passage: {passage}\nQuestion: "The'
    assert item.endings[2] == " hen's here!\""


def test_a_blank_in_front_keeps_no_space_and_another_one_is_filled(tmp_path: Path):
    (item,) = read_items(write(tmp_path / "a.txt", lines("`` XXXXX or XXXXX .")))
    assert item.prefix.endswith("It didn't. \"")
    assert item.endings[0] == "cat or cat."


def test_prefix_and_ending_are_the_text_of_each_option(tmp_path: Path):
    (item,) = read_items(write(tmp_path / "a.txt", lines()))
    text = " ".join(CBT.detok(line) for line in [*SENTENCES, QUERY])
    for ending, option in zip(item.endings, OPTIONS.split("|"), strict=True):
        assert item.prefix + ending == text.replace("XXXXX", option)


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ([], "is empty: it has no line 1"),
        (lines()[1:], 'line 1 is "2 It did n\'t ."; allowed: 1 and a sentence'),
        (lines()[:7] + lines()[8:], "line 8 is .9 It"),
        (lines()[:20], "line 21 is ''; allowed: line 21 of an item"),
        (lines(query="no blank"), "line 21 is 'no blank.*a query with XXXXX"),
        ([*lines()[:20], "21 The XXXXX ."], "line 21 is 'The XXXXX .'"),
        (lines(answer="gnu"), "line 21 is 'cat.*the answer 'gnu' among"),
        ([*lines(), *lines(answer="gnu")], "line 43 is"),
    ],
)
def test_a_malformed_item_is_refused_by_its_line(
    tmp_path: Path, part: list[str], found: str
):
    with pytest.raises(ConfigError, match=found):
        read_items(write(tmp_path / "a.txt", part))


def test_a_truncated_last_line_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.txt", lines())
    path.write_text(path.read_text()[: -len("bee|fox|owl|elk\n\n")])
    with pytest.raises(ConfigError, match="line 21 is .*allowed: 10 options"):
        read_items(path)


def test_the_number_of_items_is_checked_where_it_is_known(tmp_path: Path):
    path = write(tmp_path / "a.txt", lines())
    assert len(read_items(path, n_items=1)) == 1
    with pytest.raises(ConfigError, match="1 items; allowed: 2,000.*--any-data"):
        read_items(path, n_items=2000)


@pytest.mark.parametrize(
    ("name", "n_items"),
    [(f"cbtest_{kind}_{split}.txt", n) for kind in ("CN", "NE")
     for split, n in (("valid_2000ex", 2000), ("test_2500ex", 2500))],
)  # fmt: skip
def test_the_real_files_have_their_items(name: str, n_items: int):
    path = DATA / "cbt" / name
    if not path.is_file():
        pytest.skip("the file is not there")
    read_items(path, n_items=n_items)
