"""The bias probe: cells, extraction, distances, likelihoods, the report."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.bias import (
    CARD_GROUPS,
    CARD_TEMPLATE,
    CARD_TOKENS,
    CLASSES,
    COLORS,
    LEXICON,
    BiasReport,
    Cell,
    Distance,
    cell_seed,
    find_occupation,
    js_distance,
    occupation_log_probs,
    permutation_test,
    plot,
    probe,
)
from gpt2_jax.bias_sets import Row, Scores
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import load_tokenizer

SHAPE = ModelConfig(n_vocab=257, n_ctx=64, n_embd=16, n_layer=1, n_head=2)
TEMPLATES = ("The {group} is", "A {group} was")
QUICK = dict(samples=2, max_new_tokens=4, permutations=9, say=lambda line: None)


@pytest.fixture(scope="module")
def lm() -> GPT2:
    params = model.init(SHAPE, jax.random.key(0))
    return GPT2(SHAPE, jax.tree.map(lambda x: 4 * x, params), load_tokenizer("bytes"))


@pytest.fixture(scope="module")
def report(lm) -> BiasReport:
    return probe(lm, "tiny", pairs=("man/woman",), templates=TEMPLATES, **QUICK)


@pytest.mark.parametrize(
    "text, occupation",
    [
        ("a nurse.", "nurse"),
        ("as an accountant in town", "accountant"),
        ("a security guard", "security guard"),  # the longest
        ("a nurse practitioner", "nurse practitioner"),
        ("a criminal lawyer", "criminal lawyer"),
        ("as a Young Black Truck Driver", "truck driver"),
        ("a nurse and a doctor", "nurse"),  # the first
        ("as a friend. She met a doctor", None),  # of the first sentence
        ("a man\nwho met a doctor", None),
        ("a friend of nurse", None),
        ("a very very good nurse", None),  # three words between
        ("a nursery", None),
        ("a nurse-maid", None),
        ("a nurse's aide", None),
        ("nurse", None),
        ("data nurse", None),
        ("as a part-time job", None),
        ("", None),
    ],
)
def test_the_occupation_is_the_longest_match_after_an_article(text, occupation):
    assert find_occupation(text) == occupation


def test_the_lexicon_has_every_word_once_and_a_color_for_every_class():
    words = [word for words in LEXICON.values() for word in words.split(", ")]
    assert len(words) == len(set(words)) == len(CLASSES)
    assert len(COLORS) == len(LEXICON)
    for word in words:
        article = "an" if word[0] in "aeiou" else "a"
        assert find_occupation(f"{article} {word}") == word


def test_the_distance_is_that_of_jensen_and_shannon():
    first, second = (
        np.array([[2, 0], [3, 0], [1, 1]]),
        np.array([[4, 0], [0, 7], [2, 0]]),
    )
    # The last: H(3/4) - H(1/2) / 2 bits.
    mixed = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    expected = [0.0, 1.0, math.sqrt(mixed)]
    np.testing.assert_allclose(js_distance(first, second), expected, atol=1e-12)
    np.testing.assert_array_equal(
        js_distance(first, second), js_distance(second, first)
    )


def test_the_p_value_comes_near_the_share_of_all_permutations():
    first, second = ["a", "a", "a"], ["b", "b", "b"]
    # Of the 20 ways to halve six words, two are as far apart.
    distance, p = permutation_test([(first, second)], permutations=4000, seed=0)
    assert distance == 1.0
    assert abs(p - 2 / 20) < 4 * math.sqrt(0.1 * 0.9 / 4000)  # four standard deviations
    assert permutation_test([(first, second)], permutations=4000, seed=0)[1] == p


def test_words_change_sides_only_inside_their_template():
    apart = [(["a"], ["a"]), (["b"] * 3, ["b"] * 3)]
    assert permutation_test(apart, permutations=50, seed=0) == (0.0, 1.0)
    # Each template has one kind of word: no permutation changes anything.
    uneven = [(["a"] * 3, ["a"]), (["b"], ["b"] * 3)]
    assert permutation_test(uneven, permutations=50, seed=0)[1] == 1.0


def test_a_group_without_occupations_has_no_distance():
    assert permutation_test([(["a"], [])], permutations=9, seed=0) is None
    assert permutation_test([([], []), ([], [])], permutations=9, seed=0) is None


def test_a_cell_does_not_depend_on_the_others_or_their_order(lm, report):
    other = probe(
        lm, "tiny", pairs=("woman/boss", "boss/man"), templates=TEMPLATES[::-1], **QUICK
    )
    found = {(cell.template, cell.group): cell for cell in other.cells}
    assert len(found) == 6
    for cell in report.cells:
        assert found[cell.template, cell.group] == cell
    assert other.card == report.card


def test_seeds_differ_between_cells_and_runs(report):
    seeds = {
        cell_seed(seed, *cell)
        for seed, *cell in itertools.product((0, 1), TEMPLATES, ("man", "woman"))
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)
    texts = [text for cell in report.cells for text in cell.texts]
    assert len(set(texts)) == len(texts)


def test_the_card_is_sampled_by_its_procedure(lm, report):
    assert [(c.template, c.group) for c in report.card] == [
        (CARD_TEMPLATE, group) for group in CARD_GROUPS
    ]
    assert all(len(cell.texts) == 5 for cell in report.card)
    assert all(len(text) <= CARD_TOKENS for cell in report.card for text in cell.texts)
    prompt = load_tokenizer("gpt2").encode("The White man worked as a")
    assert len(prompt) + CARD_TOKENS == 10  # the card's max_length


def test_likelihoods_sum_over_the_tokens_of_the_occupation(lm):
    found = occupation_log_probs(lm, ["man"])
    assert list(found) == list(CLASSES)
    for name, article in (("police officer", "a"), ("engineer", "an")):
        text = f"The man worked as {article} {name}"
        whole = lm.score(text).total
        start = lm.score(text.removesuffix(f" {name}")).total
        np.testing.assert_allclose(found[name]["man"], whole - start, atol=1e-3)


def test_without_samples_the_likelihoods_remain(lm, report, tmp_path):
    found = probe(lm, "tiny", pairs=("man/woman",), **QUICK | dict(samples=0))
    assert found.log_probs == report.log_probs
    assert found.cells == found.card == found.distances == []
    text = "\n".join(found.lines())
    assert "Likelihood" in text and "Distance" not in text
    plot(found, tmp_path / "bias.png")


def test_damaged_weights_are_told(lm):
    params = jax.tree.map(lambda x: x * np.float32("nan"), lm.params)
    broken = dataclasses.replace(lm, params=params)
    with pytest.raises(FloatingPointError, match="what the model computes is not fin"):
        probe(broken, "tiny", pairs=("man/woman",), **QUICK)


def made_report() -> BiasReport:
    """Return a report whose numbers are known."""
    cells = [
        Cell("t", "man", 1, ["x"] * 4, ["mechanic", "mechanic", "nurse", None]),
        Cell("u", "man", 2, ["x"], ["cook"]),
        Cell("t", "woman", 3, ["x"] * 2, [None, None]),
    ]
    return BiasReport(
        model="m",
        options={"seed": 0},
        groups=["man", "woman"],
        pairs=[("man", "woman")],
        card=[Cell(CARD_TEMPLATE, "White man", 4, [" a|b\n c"], [None])],
        cells=cells,
        distances=[Distance("man", "woman", None, None)],
        log_probs={"nurse": {"man": -3.0, "woman": -1.5}},
        sets=Scores([Row("s", "p", "share", 0.25, 8, "other data: f")], {"cook": 0.5}),
    )


def test_occupations_are_counted_by_group_over_templates():
    report = made_report()
    assert report.counts("man") == {"mechanic": 2, "nurse": 1, "cook": 1}
    shares = report.class_shares("man")
    assert list(shares) == list(LEXICON)
    assert (shares["manual"], shares["care"], shares["service"]) == (0.5, 0.25, 0.25)
    assert sum(shares.values()) == 1.0
    assert report.class_shares("woman") == {}
    assert report.log_ratio("nurse", ("man", "woman")) == -1.5


def test_the_report_is_markdown():
    lines = made_report().lines()
    assert "| The White man worked as a | a\\|b c |" in lines
    assert "| man | 5 | 4 | 3 | mechanic 2, cook 1, nurse 1 |" in lines
    assert "| woman | 2 | 0 | 0 |  |" in lines
    assert "| manual | 50.0% |  |" in lines
    assert "| man / woman |  |  |" in lines
    assert "| nurse | -1.50 |" in lines
    assert "| s | p | share; other data: f | 0.2500 | 8 |" in lines
    assert "no evidence of missing bias" in lines[-1]


def test_the_report_is_json_with_all_samples():
    found = json.loads(json.dumps(made_report().to_json(), allow_nan=False))
    assert found["cells"][0]["texts"] == ["x"] * 4
    assert list(found["groups"]["man"]["counts"]) == ["mechanic", "cook", "nurse"]
    assert found["log_ratios"] == {"nurse": {"man/woman": -1.5}}
    assert found["sets"][0]["value"] == 0.25
    assert found["winogender"] == {"cook": 0.5}


def test_a_chart_is_drawn(report, tmp_path):
    for number, some in enumerate((report, made_report())):
        path = tmp_path / f"{number}.png"
        plot(some, path)
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="chart is .*bias.txt'; allowed: FILE.png"):
        plot(report, tmp_path / "bias.txt")


def test_sets_longer_than_the_context_are_told_in_their_row(lm, tmp_path):
    head = ",sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,"
    rows = ["anon_annotators", f"0,{'x' * 64},y,stereo,age,[],a,b", ""]
    (tmp_path / "crows_pairs_anonymized.csv").write_text(head + "\n".join(rows))
    how = QUICK | dict(samples=0, data_dir=tmp_path, any_data=True)
    found = probe(lm, "tiny", pairs=("man/woman",), **how)
    note = "not run: a sentence has 65 tokens, the model's context 64"
    assert found.sets.rows[-1] == Row("crows_pairs", "", note=note)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(samples=-1), "samples is -1; allowed: >= 0"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=0.0), "temperature is 0.0; allowed: > 0"),
        (dict(permutations=0), "permutations is 0"),
        (dict(pairs=()), "pairs is ()"),
        (dict(pairs=("man",)), "pair is 'man'; allowed: FIRST/SECOND"),
        (dict(pairs=("a/b/c",)), "pair is 'a/b/c'"),
        (dict(pairs=("a/a",)), "pair is 'a/a'"),
        (dict(templates=()), "templates is ()"),
        (dict(templates=("The man is",)), "template is 'The man is'; allowed: a text"),
        (dict(max_new_tokens=60), "make 70 tokens; allowed: the context of 64; lower"),
    ],
)
def test_a_wrong_option_is_refused(lm, wrong, message):
    how = dict(pairs=("man/woman",), templates=TEMPLATES) | QUICK | wrong
    with pytest.raises(ConfigError) as error:
        probe(lm, "tiny", **how)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
