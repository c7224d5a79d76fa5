"""Requests made from the schema that the server publishes, and ten thousand more."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from serve.conftest import LANES, NAME, body, memory_bytes


def operations(url):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("examples", [30, pytest.param(2500, marks=pytest.mark.faults)])
def test_no_generated_request_is_the_servers_fault(served, mode, examples):
    statuses: dict[int, int] = {}
    for operation in operations(served.url):
        post = operation.method == "post"
        if not post and mode is GenerationMode.NEGATIVE:
            continue  # there is nothing to get wrong
        strategy = operation.as_strategy(generation_mode=mode)
        count = examples if post else examples // 10

        @given(case=strategy)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case):
            if isinstance(case.body, dict):  # or almost all would be 404
                case.body.setdefault("max_tokens", 3)
                if len(str(case.body.get("model", ""))) % 4:
                    case.body["model"] = NAME
            found = case.call(timeout=60)
            statuses[found.status_code] = statuses.get(found.status_code, 0) + 1
            assert found.status_code < 500, (case.body, found.text)
            if found.status_code >= 400:
                assert found.json()["error"]["message"]

        ask()
    served.wait_until_idle()
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert sum(statuses.values()) >= examples, statuses
    print(statuses)


@pytest.mark.faults
def test_ten_thousand_requests_leave_nothing(served):
    def ask(number: int) -> None:
        draw = np.random.default_rng(number)
        how = body(
            prompt="x" * int(draw.integers(1, 60)),
            max_tokens=int(draw.integers(1, 12)),
            n=int(draw.integers(1, 4)),
            seed=number,
            stream=bool(draw.integers(2)),
            temperature=float(draw.integers(3)),
        )
        found = client.post("/v1/completions", json=how)
        assert found.status_code == 200, found.text
        assert "finish_reason" in found.text

    with (
        httpx.Client(base_url=served.url, timeout=60) as client,
        ThreadPoolExecutor(LANES // 2) as pool,
    ):
        list(pool.map(ask, range(2000)))
        served.wait_until_idle()
        before = memory_bytes()
        list(pool.map(ask, range(2000, 10_000)))
    served.wait_until_idle()
    assert memory_bytes() < 1.05 * before
