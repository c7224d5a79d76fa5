"""Requests made from the schema that the server publishes: no answer of 5xx."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from serve.conftest import NAME


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
