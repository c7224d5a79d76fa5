import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.evaluate.detokenize import (
    CBT,
    ENWIK8,
    LM1B,
    PTB,
    WIKITEXT,
    Rules,
    detokenize_lines,
    invertible,
    lm_eval_cbt,
    megatron_ptb,
    megatron_wikitext,
)
from gpt2_jax.tokenizer import load_tokenizer

DATA = Path(os.environ.get("GPT2_JAX_DATA", Path(__file__).parents[3] / "shared/data"))
RULES = {"wikitext": WIKITEXT, "ptb": PTB, "cbt": CBT, "lm1b": LM1B, "enwik8": ENWIK8}


@pytest.mark.parametrize(
    ("rules", "line", "text"),
    [
        (WIKITEXT, " = = Early life = = ", "== Early life =="),
        (WIKITEXT, " ", ""),
        (WIKITEXT, " well @-@ off 1 @,@ 000 ( 3 @.@ 5 % ) ", "well-off 1,000 (3.5%)"),
        (WIKITEXT, ' He said , " It \'s <unk> \'s . " ', 'He said, "It\'s <unk>\'s."'),
        (WIKITEXT, " Mr. J. Doe , U.S. and / or . ", "Mr. J. Doe, U.S. and/or."),
        (WIKITEXT, " boys ' $ 5 , 1990 – 95 , 3 : 30 ", "boys' $5, 1990–95, 3:30"),
        (PTB, " no it was n't black monday ", "no it wasn't black monday"),
        (PTB, " traders ' <unk> rose $ N to N \\/ N ", "traders' <unk> rose $N to N/N"),
        (PTB, " ", ""),
        (CBT, "`` A , '' said Mr. A -LRB- is n't -RRB- .", '"A," said Mr. A (isn\'t).'),
        (CBT, "`` ` A , ' she said . '' 'T is so .", '"\'A,\' she said." \'T is so.'),
        (CBT, "two  blanks .", "two  blanks."),
        (CBT, "'' No . '' he said -- `` so", "'' No.\" he said -- \"so"),
        (LM1B, '" It isn \'t $ 5 ( or 1,000 ) ! "', '"It isn\'t $5 (or 1,000)!"'),
        (LM1B, "Mr. A left St. Ives at 10 : 30 .", "Mr. A left St. Ives at 10:30."),
        (ENWIK8, "  <text>&lt;b&gt;R&amp;amp;D</text>", "  <text><b>R&amp;D</text>"),
        (ENWIK8, "|&lt;big&gt;'''A'''&lt;/big&gt;", "|<big>'''A'''</big>"),
    ],
)  # fmt: skip
def test_a_line_reads_as_people_write_and_comes_back(
    rules: Rules, line: str, text: str
):
    assert invertible(line, rules) == text
    assert rules.retok(text) == line


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        (WIKITEXT, " his 1,000th game "),  # as if from 1 @,@ 000th
        (WIKITEXT, "no blank at the ends"),
        (ENWIK8, '<ref name="a">'),
    ],
)
def test_a_line_that_does_not_come_back_stays_raw(rules: Rules, line: str):
    assert invertible(line, rules) == line
    assert detokenize_lines([line, line], rules).raw == 2


def test_a_blank_stays_where_the_mark_would_be_taken_for_part_of_the_word():
    line = " vitamin C . In approx. 5 Jr . "
    assert invertible(line, WIKITEXT) == line  # "approx." would lose its period
    line = " vitamin C . In Jr . "
    assert invertible(line, WIKITEXT) == "vitamin C . In Jr ."


TOKENS = (
    "a b's n't 's ' \" `` '' ` . , ( ) -LRB- -RRB- @-@ @,@ / = == 1 1.5 U.S. $ &lt;"
)
LINES = st.lists(st.sampled_from([*TOKENS.split(), "", "\\/", "…", "<text>"])).map(
    " ".join
)


@pytest.mark.parametrize("name", RULES)
@given(line=LINES | LINES.map(" {} ".format) | st.text(max_size=20))
def test_any_line_comes_back_or_stays(name: str, line: str):
    rules = RULES[name]
    text = invertible(line, rules)
    assert text == line or rules.retok(text) == line


def test_megatron_loses_what_its_rules_say():
    text = ' \n = = A = = \n \n the cat \'s " big " ( N ) 1 @.@ 5 ° C \n'
    assert megatron_wikitext(text) == '\n== A ==\n\nthe cat\'s "big" (N) 1.5°C\n'
    text = " it did n't cost $ N a <unk> 's \n or N \n"
    assert megatron_ptb(text) == " it didn't cost $1 a <unk>'s\nor N\n"


def test_lm_eval_writes_an_item_of_cbt_plainly():
    text = "Passage: `` Oh , '' he did n't say .\nQuestion: It 's XXXXX !"
    plain = "Passage: \"Oh,\" he didn't say.\nQuestion: It's XXXXX!"
    assert lm_eval_cbt(text) == plain


@pytest.mark.parametrize(
    ("name", "rules", "raw", "before", "after"),
    [
        ("wikitext2_tokens/wiki.test.tokens", WIKITEXT, 1, 295_877, 278_396),
        ("wikitext2_tokens/wiki.valid.tokens", WIKITEXT, 1, 258_659, 243_704),
        ("wikitext2_raw/wiki.test.raw", WIKITEXT, 14, 286_221, 272_066),
        ("wikitext103_tokens/wiki.test.tokens", WIKITEXT, 3, 285_234, 270_240),
        ("wikitext103_tokens/wiki.valid.tokens", WIKITEXT, 4, 249_735, 236_911),
        ("enwik8_prefix/enwik6", ENWIK8, 0, 286_273, 275_935),
        ("enwik8_prefix/enwik8.first4000000", ENWIK8, 0, None, None),
        ("ptb/ptb.test.txt", PTB, None, 105_243, None),
        ("ptb/ptb.valid.txt", PTB, None, None, None),
        ("lm1b/news.en.heldout-00000-of-00050", LM1B, None, None, None),
    ],
)
def test_whole_files_come_back(
    name: str, rules: Rules, raw: int | None, before: int | None, after: int | None
):
    if not (DATA / name).is_file():
        pytest.skip("the file is not there")
    lines = (DATA / name).read_bytes().decode().split("\n")
    ends = lines.pop()
    texts, stayed = detokenize_lines(lines, rules)
    back = [rules.retok(text) for text in texts]
    wrong = [n for n, line in enumerate(lines) if back[n] != line]
    assert all(texts[n] == lines[n] for n in wrong)
    assert len(wrong) == stayed <= 0.01 * len(lines)
    # No raw line reads as another line de-tokenized: the file can be had again.
    assert len(set(texts)) == len(set(lines))
    assert raw in (None, stayed)
    encode = load_tokenizer("gpt2").encode
    for n_tokens, kept in ((before, lines), (after, texts)):
        if n_tokens is not None:
            assert len(encode("\n".join([*kept, ends]))) == n_tokens


def test_tokens_of_megatrons_text_are_as_published():
    path = DATA / "wikitext103_tokens/wiki.test.tokens"
    if not path.is_file():
        pytest.skip("the file is not there")
    text = path.read_bytes().decode()
    # Megatron-LM's paper prints T - 1 = 270,329 and T_o = 245,566.
    assert len(load_tokenizer("gpt2").encode(megatron_wikitext(text))) == 270_330
    assert len(text.strip().split(" ")) == 245_566
