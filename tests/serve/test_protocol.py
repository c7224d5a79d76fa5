import pytest
from pydantic import ValidationError

from gpt2_jax.serve.protocol import CompletionRequest, InspectRequest, Refused

GOOD = dict(model="m", prompt="ab")


@pytest.mark.parametrize("prompt", ["ab", ["a", "b"], [1, 2], [[1], [2, 3]], "\x00"])
def test_four_kinds_of_prompt(prompt):
    assert CompletionRequest(**GOOD | {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [["a"]], [1, "a"], ["a", [1]], 7, None, {}, [-1],
               [1.5], [True], [[[1]]], "\ud800"],
)  # fmt: skip
def test_no_other_prompt(prompt):
    with pytest.raises(ValidationError):
        CompletionRequest(**GOOD | {"prompt": prompt})


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "5"),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"),
        ("temperature", float("nan")), ("temperature", True),
        ("top_p", 0), ("top_p", 1.01), ("n", 0), ("n", 17), ("n", True),
        ("best_of", 17), ("logprobs", 6), ("logprobs", True), ("seed", -1),
        ("seed", 2**32), ("stop", ""), ("stop", ["a"] * 5), ("stop", [""]),
        ("stop", [1]), ("presence_penalty", 2.5), ("frequency_penalty", -2.5),
        ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}), ("logit_bias", [1]),
        ("logit_bias", {"1\n": 1}), ("suffix", "x"), ("echo", "yes"), ("stream", 1),
        ("user", 5), ("top_k", 0), ("min_p", 1.5), ("repetition_penalty", 0),
        ("truncate_prompt_tokens", 0), ("stream_options", {"other": 1}),
        ("topp", 1), ("messages", []),
    ],
)  # fmt: skip
def test_refuses_what_is_out_of_range_or_unknown(field, value):
    with pytest.raises(ValidationError) as refused:
        CompletionRequest(**GOOD | {field: value})
    assert refused.value.errors()[0]["loc"][0] == field


def test_null_is_the_default_as_clients_send_it():
    fields = CompletionRequest.model_fields
    nulls = {k: None for k in fields if k not in ("model", "prompt")}
    CompletionRequest(**GOOD, **nulls)


def test_inspect_takes_one_text():
    assert InspectRequest(model="m", prompt=[1, 2]).top == 10
    for wrong in (["a"], [[1]], "", [], 5):
        with pytest.raises(ValidationError):
            InspectRequest(model="m", prompt=wrong)


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_errors_have_openais_shape(status, kind):
    found = Refused("no", status=status, param="n", code="c").body
    error = dict(message="no", type=kind, param="n", code="c")
    assert found == {"error": error}
