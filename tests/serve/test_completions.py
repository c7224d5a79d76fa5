import json

import httpx
import numpy as np
import pytest

from serve.conftest import LANES, NAME, QUEUE


@pytest.fixture
def ask(served):
    def post(**body):
        asked = {"model": NAME, "prompt": "Hello"} | body
        how = dict(headers={"Content-Type": "application/json"}, timeout=60)
        content = json.dumps(asked)  # lone surrogates too
        url = f"{served.url}/v1/completions"
        return httpx.post(url, content=content, **how).json()

    return post


def generate(lm, prompt, **how):
    return lm.generate(prompt, return_full_text=False, details=True, **how)


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize(
    "asked, how",
    [
        (dict(temperature=0), dict(temperature=0.0)),
        (dict(seed=5), {}),
        (dict(seed=5, temperature=0.5, top_p=0.9), dict(temperature=0.5, top_p=0.9)),
        (
            dict(seed=5, top_k=9, min_p=0.01, repetition_penalty=1.2),
            dict(top_k=9, min_p=0.01, repetition_penalty=1.2),
        ),
        (dict(seed=5, stop=["\x01", "é", "a"]), dict(stop=["\x01", "é", "a"])),
    ],
)
def test_the_text_is_that_of_generate(lm, ask, asked, how):
    answer = ask(**asked, max_tokens=40)
    found = generate(lm, "Hello", seed=5, max_new_tokens=40, **how)[0]
    assert texts(answer) == [found["text"]]
    reason = {"eos": "stop"}.get(found["finish_reason"], found["finish_reason"])
    assert answer["choices"][0]["finish_reason"] == reason
    count = len(found["token_ids"])
    assert answer["usage"] == dict(
        prompt_tokens=5, completion_tokens=count, total_tokens=5 + count
    )


@pytest.mark.parametrize(
    "prompt",
    ["Hé\x00", ["Hé\x00", "b"], [72, 9], [[72, 9], [1], [72, 9]]],
)
def test_every_kind_of_prompt_and_n(lm, ask, prompt):
    answer = ask(prompt=prompt, n=2, seed=3, max_tokens=8)
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    expected = [
        found["text"]
        for one in ([prompt] if single else prompt)
        for found in generate(lm, one, num_return_sequences=2, seed=3, max_new_tokens=8)
    ]
    assert texts(answer) == expected
    assert [c["index"] for c in answer["choices"]] == list(range(len(expected)))


def test_without_a_seed_texts_differ(ask):
    found = {texts(ask(max_tokens=12))[0] for _ in range(3)}
    assert len(found) > 1


def test_the_default_length_is_openais(ask):
    assert ask(temperature=0, logit_bias={"65": 100})["choices"][0]["text"] == "A" * 16


def test_logprobs_are_the_models(lm, ask):
    answer = ask(logprobs=3, temperature=0, max_tokens=6, echo=True)
    choice = answer["choices"][0]
    # Bytes that are no text alone became U+FFFD: take the drawn ids from generate.
    drawn = generate(lm, "Hello", temperature=0.0, max_new_tokens=6)[0]["token_ids"]
    ids = np.concatenate([lm.tokenizer.encode("Hello"), drawn])
    score, given = lm.score(ids), choice["logprobs"]
    assert given["token_logprobs"][0] is None and given["top_logprobs"][0] is None
    np.testing.assert_allclose(given["token_logprobs"][1:], score.log_probs, atol=1e-4)
    assert len(given["tokens"]) == len(given["text_offset"]) == len(ids)
    for value, tops in zip(
        given["token_logprobs"][1:], given["top_logprobs"][1:], strict=True
    ):
        best = sorted(tops.values(), reverse=True)
        assert 3 <= len(tops) <= 4 and max(best) >= value - 1e-4
    assert given["tokens"][:5] == list("Hello")
    assert given["text_offset"][:6] == [0, 1, 2, 3, 4, 5]


def test_echo_of_a_prompt_alone_is_scored(lm, ask):
    answer = ask(echo=True, max_tokens=0, logprobs=0)
    choice = answer["choices"][0]
    assert choice["text"] == "Hello" and choice["finish_reason"] == "length"
    expected = lm.score("Hello").log_probs
    given = choice["logprobs"]["token_logprobs"][1:]
    np.testing.assert_allclose(given, expected, atol=1e-4)
    assert answer["usage"]["completion_tokens"] == 0


def test_best_of_gives_the_likeliest_per_token(lm, ask):
    answer = ask(best_of=6, n=2, seed=1, max_tokens=10)
    found = generate(lm, "Hello", num_return_sequences=6, seed=1, max_new_tokens=10)
    order = sorted(found, key=lambda one: -np.mean(one["log_probs"]))
    assert texts(answer) == [one["text"] for one in order[:2]]


def test_penalties_and_bias_change_the_text(ask):
    usual = ask(temperature=0, max_tokens=30)
    for how in (
        dict(presence_penalty=2),
        dict(frequency_penalty=2.0),
        dict(logit_bias={"66": 100}),
    ):
        assert texts(ask(temperature=0, max_tokens=30, **how)) != texts(usual)


def test_the_start_of_a_long_prompt_is_forgotten_if_asked(lm, ask):
    answer = ask(
        prompt="x" * 500 + "Hello",
        truncate_prompt_tokens=5,
        temperature=0,
        max_tokens=9,
    )
    expected = generate(lm, "Hello", temperature=0.0, max_new_tokens=9)[0]["text"]
    assert texts(answer) == [expected]
    assert answer["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    "asked, said, field",
    [
        (dict(prompt="x" * 150), "exceed the context of 160 by 6", "max_tokens"),
        (dict(prompt="x" * 161), "exceed the context of 160 by 17", "prompt"),
        (dict(max_tokens=1000), "by 845", "max_tokens"),
        (dict(prompt=[1, 300]), "token id 300; allowed: ids below 257", "prompt"),
        (dict(prompt="\ud800"), "surrogate", "prompt"),
        (dict(max_tokens=0), "at least 1, or 0 with echo", "max_tokens"),
        (dict(n=3, best_of=2), "best_of: it is 2; allowed: at least n = 3", "best_of"),
        (dict(best_of=2, stream=True), "only without stream", "best_of"),
        (dict(stream_options={"include_usage": True}), "only with stream",
         "stream_options"),
        (dict(logit_bias={"257": 1}), "token ids below 257", "logit_bias"),
        (dict(prompt=["a"] * 13), f"13 texts at once; allowed: {LANES + QUEUE}",
         "prompt"),
        (dict(n=13), "13 texts at once", "n"),
        (dict(suffix="b"), "not supported", "suffix"),
        (dict(model="gpt3"), "served here: 'runs/tiny'", "model"),
        (dict(stop="\ud800"), "surrogate", "stop"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be_done(ask, asked, said, field):
    error = ask(**asked)["error"]
    assert said in error["message"] and error["param"] == field
    assert error["type"] == "invalid_request_error"
