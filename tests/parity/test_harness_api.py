"""lm-evaluation-harness's client of completions servers, on ours, and the adapter."""

import sys
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from gpt2_jax.evaluate.harness import HarnessLM
from gpt2_jax.serve.app import Doors

sys.path.insert(0, str(Path(__file__).parents[1]))

from parity.test_harness import ATOL, CTX, LONG, make_model
from serve.conftest import NAME, Served


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the harness's client and our adapter, of one model."""
    lm = make_model()
    folder = tmp_path_factory.mktemp("api") / "model"
    lm.save(folder)
    with Served(lm, doors=Doors(hosts=("127.0.0.1",))) as served:
        client = LocalCompletionsAPI(
            base_url=f"{served.url}/v1/completions",
            model=NAME,
            tokenizer=str(folder),
            max_length=CTX,
            batch_size=4,
            max_retries=1,
        )
        yield client, HarnessLM(lm)


def asked(kind: str, *args) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(args)]


def test_log_likelihoods_are_the_same(pair):
    theirs, ours = pair
    pairs = [
        ("The cat sat on the", " mat"),
        ("The cat sat on the", " red mat, and then it slept."),
        ("a line\n\n", "and the next"),
        ("naïve Zür", "ich, 日本語"),
        *(("Is it so? Answer:", choice) for choice in (" yes", " no", " maybe")),
        (LONG[:200], " and that was the end of it"),
        *greedy_pairs(ours),
    ]
    requests = asked("loglikelihood", *pairs)
    wanted, found = theirs.loglikelihood(requests), ours.loglikelihood(requests)
    gaps = [abs(a - b) for (a, _), (b, _) in zip(wanted, found, strict=True)]
    assert max(gaps) <= ATOL
    assert [hit for _, hit in wanted] == [hit for _, hit in found]
    assert any(hit for _, hit in found)


def greedy_pairs(lm: HarnessLM) -> list[tuple[str, str]]:
    contexts = ["The cat", "A dog sat", "Q:"]
    how = dict(temperature=0.0, max_new_tokens=2, return_full_text=False)
    texts = [lm.lm.generate(text, **how)[0]["generated_text"] for text in contexts]
    return [pair for pair in zip(contexts, texts, strict=True) if pair[1]]


def test_texts_are_the_same(pair):
    theirs, ours = pair
    how = dict(until=["."], max_gen_toks=16, do_sample=False)
    contexts = ["The cat", "Q: why?\nA:", "naïve 日本語"]
    requests = asked("generate_until", *((text, how) for text in contexts))
    assert theirs.generate_until(requests) == ours.generate_until(requests)


def test_rolling_log_likelihoods_are_the_same(pair):
    theirs, ours = pair
    requests = asked("loglikelihood_rolling", ("One sentence, and no more.",))
    wanted = theirs.loglikelihood_rolling(requests)
    found = ours.loglikelihood_rolling(requests)
    np.testing.assert_allclose(found, wanted, atol=ATOL)
