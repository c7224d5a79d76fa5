"""lm-evaluation-harness on a model of ours, and its own HFLM on what we export."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import lm_eval.tasks
import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import gpt2_jax
from gpt2_jax import model
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.evaluate import harness
from gpt2_jax.evaluate.columns import evaluate
from gpt2_jax.evaluate.harness import HarnessLM
from gpt2_jax.evaluate.options import EvaluateOptions
from gpt2_jax.evaluate.scoring import score
from gpt2_jax.tokenizer import load_tokenizer

ATOL = 1e-4  # the promise; both sides compute in float32
CTX = 128
TASKS = Path(lm_eval.tasks.__file__).parent
LIKELY = ["\n", ".", " the", " cat", " Q", "Q", " ends", " who", "é", " said", " 日"]
LONG = "The owl, who had read a great deal, said nothing at all. " * 12


def make_model() -> gpt2_jax.GPT2:
    """Return a random model that likes a few tokens, so that texts meet their stops."""
    tokenizer = load_tokenizer("gpt2")
    shape = dict(n_layer=2, n_head=4, n_embd=64, n_ctx=CTX)
    config = model.resolve(ModelConfig(**shape, n_vocab=50_257, dtype="float32"))
    random = np.random.default_rng(0)
    likely = [token for text in LIKELY for token in tokenizer.encode(text)]

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        std = 0.05 if "wte" in name else 0.5 if "wpe" in name else 0.2
        values = random.normal(float(name.endswith("scale")), std, leaf.shape)
        if "wte" in name:
            values[likely] *= 4
            values[tokenizer.eot] *= 3.3
        return jnp.asarray(values, jnp.float32)

    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    return gpt2_jax.GPT2(config, jax.tree.map_with_path(draw, shapes), tokenizer)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the harness's model and ours, of the same files."""
    folder = tmp_path_factory.mktemp("harness") / "model"
    make_model().save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        # Full batches on eight devices are 512 rows: most of them padding here.
        patch.setattr(harness, "score", partial(score, tokens_at_once=8 * CTX))
        # Sums of a thousand nats in float32, as by default, are off by 1e-4.
        how = dict(device="cpu", batch_size=4, softmax_dtype="float64")
        yield HFLM(str(folder), **how), HarnessLM(gpt2_jax.load(folder))


def asked(kind: str, *args) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(args)]


def text_of(lm: HarnessLM, count: int) -> str:
    """Return a text of so many tokens."""
    tokenizer = lm.lm.tokenizer
    text = tokenizer.decode(tokenizer.encode(LONG * 4)[:count])
    assert len(tokenizer.encode(text)) == count
    return text


def greedy_pairs(lm: HarnessLM) -> list[tuple[str, str]]:
    """Return contexts and what the model writes after them, cut after some tokens."""
    pairs = []
    for context in ("The cat", "A dog sat", "Q:", "naïve", LONG):
        for new in (1, 2, 3):
            how = dict(temperature=0.0, max_new_tokens=new, truncate="left")
            [text] = lm.lm.generate(context, return_full_text=False, **how)
            pairs += [(context, text["generated_text"])]
    return [(context, text) for context, text in pairs if text]


def test_log_likelihoods_are_the_same(pair):
    theirs, ours = pair
    pairs = [
        ("The cat sat on the", " mat"),
        ("The cat sat on the", " red mat, and then it slept."),
        ("trailing blanks   ", "word"),
        ("a line\n\n", "and the next"),
        ("blanks \n ", " on both sides"),
        ("", "No context."),
        ("", "<|endoftext|>The text says where it begins."),
        ("One document.<|endoftext|>", "Another<|endoftext|>"),
        ("hel", "lo world, across a token"),
        ("naïve Zür", "ich, 日本語 😀"),
        ("日本", "語"),
        ("🙂", "🙃"),
        *(("Is it so? Answer:", choice) for choice in (" yes", " no", " maybe")),
        *((text_of(ours, n), " end") for n in (CTX - 1, CTX, CTX + 1, CTX + 2)),
        (LONG, " and that was the end of it"),
        ("Then:", text_of(ours, CTX)),  # the longest that can be asked
        (LONG, text_of(ours, CTX)),
        *greedy_pairs(ours),
    ]
    requests = asked("loglikelihood", *pairs)
    wanted, found = theirs.loglikelihood(requests), ours.loglikelihood(requests)
    gaps = [abs(a - b) for (a, _), (b, _) in zip(wanted, found, strict=True)]
    assert max(gaps) <= ATOL
    greedy = [hit for _, hit in found]
    assert greedy == [hit for _, hit in wanted]
    assert sum(greedy) >= 5 and not all(greedy)


@pytest.mark.parametrize("continuation", ["", "x " * CTX])
def test_what_cannot_be_scored_is_refused(pair, continuation):
    theirs, ours = pair
    requests = asked("loglikelihood", ("A context", continuation))
    with pytest.raises(AssertionError):
        theirs.loglikelihood(requests)
    with pytest.raises(ConfigError, match="request 0 predicts from token"):
        ours.loglikelihood(requests)


def test_rolling_log_likelihoods_are_the_same(pair):
    theirs, ours = pair
    sizes = (1, 2, CTX - 1, CTX, CTX + 1, 2 * CTX, 2 * CTX + 1, 400)
    texts = [text_of(ours, size) for size in sizes]
    texts += ["", "naïve 日本語 😀" * 30, "\n\n", "<|endoftext|>After one<|endoftext|>"]
    requests = asked("loglikelihood_rolling", *((text,) for text in texts))
    wanted = theirs.loglikelihood_rolling(requests)
    found = ours.loglikelihood_rolling(requests)
    assert np.abs(np.subtract(found, wanted)).max() <= ATOL


CONTEXTS = ["The cat", "Q: why?\nA:", "naïve 日本語", "One.<|endoftext|>Two", LONG]


def write(lm, how: dict) -> list[str]:
    return lm.generate_until(asked("generate_until", *((t, how) for t in CONTEXTS)))


@pytest.fixture(scope="module")
def free(pair) -> list[str]:
    """Return the texts that nothing stops."""
    return write(pair[1], dict(max_gen_toks=40))


@pytest.mark.parametrize(
    "until",
    [
        ["\n\n", ".", " cat"],
        " who",
        ["ai"],  # inside a word
        ["dQ"],  # over two tokens
        ["id", "said"],  # cut at id, though said begins first
        ["said", "id"],
    ],
    ids=str,
)
def test_texts_stop_at_the_same_place(pair, free, until):
    how = dict(until=until, max_gen_toks=40)
    wanted, found = (write(lm, how) for lm in pair)
    assert found == wanted != free


@pytest.mark.parametrize(
    "how",
    [
        dict(until=[], temperature=0.0),
        dict(until=["<|endoftext|>"]),
        dict(do_sample=False, temperature=0.7),
    ],
    ids=str,
)
def test_texts_that_nothing_stops_are_the_same(pair, free, how):
    wanted, found = (write(lm, how | dict(max_gen_toks=40)) for lm in pair)
    assert found == wanted == free


def test_lengths_are_the_same(pair, free):
    for how in (dict(max_gen_toks=1), dict(max_new_tokens=CTX - 1)):
        wanted, found = (write(lm, how) for lm in pair)
        assert found == wanted != free
    assert len({len(text) for text in found}) > 1  # end of text, for some


def test_a_text_must_fit_the_context(pair):
    theirs, ours = pair
    with pytest.raises(AssertionError, match="256"):
        write(theirs, dict(until=["."]))  # of the usual length
    with pytest.raises(
        ConfigError, match="max_gen_toks is 256; allowed: < the context"
    ):
        write(ours, dict(until=["."]))


def test_unknown_options_are_refused(pair):
    how = dict(max_gen_toks=8, num_beams=10)
    with pytest.raises(ConfigError, match="^generation_kwargs is 'num_beams'; allowed"):
        write(pair[1], how)


def test_each_request_draws_for_itself(pair):
    _, ours = pair
    drawn = dict(do_sample=True, temperature=1.0, top_k=50, max_gen_toks=20)
    requests = asked("generate_until", *[("The cat", drawn)] * 4)
    found = ours.generate_until(requests)
    assert len(set(found)) > 1
    assert ours.generate_until(requests) == found
    greedy = drawn | dict(top_p=1e-6)
    [text] = ours.generate_until(asked("generate_until", ("The cat", greedy)))
    wanted = asked("generate_until", ("The cat", dict(max_gen_toks=20)))
    assert ours.generate_until(wanted) == [text]


def test_an_empty_context_is_the_start_of_a_document(pair):
    _, ours = pair  # theirs fails: it would read no token
    how = dict(max_gen_toks=20)
    empty, start = ours.generate_until(
        asked("generate_until", ("", how), ("<|endoftext|>", how))
    )
    assert empty == start != ""


def test_a_model_needs_a_tokenizer(pair):
    with pytest.raises(ConfigError, match="no tokenizer"):
        HarnessLM(replace(pair[1].lm, tokenizer=None))


PAGES = [
    """ = Owl = \n \n The owl ( Strigiformes ) sees at 10 @.@ 5 km , it 's said . \n
 = = Food = = \n \n " Mice " , mostly ; 1 @,@ 000 a year . <unk> ! \n """,
    " = Zürich = \n \n " + "In Zürich the owl 's well @-@ known : ' hoo ' . " * 30,
    ' = Quotes = \n \n He said : " It \'s late " ? \n Nobody [ sic ] \n heard . \n',
]


def passages(lm: HarnessLM) -> list[str]:
    """Return texts with a last word; some of them are those that the model expects."""
    texts = [
        "`` Who's there? '' said the owl.\nNobody answered the owl",
        "“Curly quotes,” she said, “are two bytes more than straight ones”",
        "two blanks before the last  word",
        "The last word ends in a newline\n",
        "a tab\tis no blank",
        LONG + "the end",
    ]
    for start in ("The cat", "One day", "Once upon a time there was", "Here", "Two"):
        [text] = lm.generate_until(
            asked("generate_until", (start, dict(max_gen_toks=20)))
        )
        texts.append((start + text).rstrip())
    return texts


@pytest.fixture(scope="module")
def tables(pair, tmp_path_factory):
    """Return the figures of each model by task, and of our own modes."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = dict(
        lambada=[dict(text=text) for text in passages(pair[1])],
        wikitext=[dict(page=page) for page in PAGES],
    )
    lines = {name: "\n".join(map(json.dumps, rows[name])) + "\n" for name in rows}
    # The package's own task files; only the data are ours.
    files = dict(
        lambada="lambada/lambada_openai.yaml", wikitext="wikitext/wikitext.yaml"
    )
    for name, file in files.items():
        (folder / f"{name}.jsonl").write_text(lines[name])
        task = dict(
            include=str(TASKS / file),
            task=f"local_{name}",
            dataset_path="json",
            dataset_name=None,
            dataset_kwargs=dict(
                data_files=dict(test=str(folder / f"{name}.jsonl")),
                cache_dir=str(folder / "cache"),
            ),
            training_split=None,
            validation_split=None,
        )
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = [f"local_{name}" for name in files]
    how = dict(tasks=names, task_manager=manager, bootstrap_iters=0)
    theirs, ours = (simple_evaluate(lm, **how)["results"] for lm in pair)
    (folder / "lambada_test.jsonl").write_text(lines["lambada"])
    (folder / "wiki.test.raw").write_text("\n".join(PAGES))
    options = EvaluateOptions(
        tasks="lm_eval_lambada,lm_eval_wikitext", data_dir=folder, any_data=True
    )
    return theirs, ours, evaluate(pair[1].lm, options)


FIGURES = {
    "local_lambada": ["perplexity", "acc"],
    "local_wikitext": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
}


def test_the_harness_has_the_same_figures(tables):
    theirs, ours, _ = tables
    for task, figures in FIGURES.items():
        for figure in figures:
            wanted, found = (side[task][f"{figure},none"] for side in (theirs, ours))
            assert found == pytest.approx(wanted, rel=ATOL), figure
    assert 0 < ours["local_lambada"]["acc,none"] < 1


def test_our_modes_have_the_same_figures(tables):
    theirs, _, (lambada, wikitext) = tables
    wanted = {
        name.removesuffix(",none"): value
        for task in FIGURES
        for name, value in theirs[task].items()
    }
    assert lambada.value == pytest.approx(wanted["perplexity"], rel=ATOL)
    assert lambada.note.startswith(f"acc {wanted['acc']:.4f}")
    assert wikitext.value == pytest.approx(wanted["word_perplexity"], rel=ATOL)
    noted = [float(number) for number in re.findall(r"\d+\.\d+", wikitext.note)][:2]
    rest = [wanted["byte_perplexity"], wanted["bits_per_byte"]]
    assert noted == pytest.approx(rest, abs=ATOL)  # noted to four places
