import dataclasses

import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.serve.options import ServeOptions


def test_only_this_machine_may_call_unless_told():
    how = ServeOptions()
    assert how.host == "127.0.0.1" and not how.allowed_host and not how.cors_origin
    assert how.api_key is None and how.queue > 0


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServeOptions().port = 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_no_key_is_needed_on_this_machine(host):
    assert ServeOptions(host=host).api_key is None
    assert ServeOptions(host="0.0.0.0", api_key="k").host == "0.0.0.0"


@pytest.mark.parametrize(
    "how",
    [
        dict(port=-1),
        dict(port=65_536),
        dict(lanes=3),
        dict(lanes=0),
        dict(queue=-1),
        dict(drain_seconds=-1.0),
        dict(drain_seconds=float("nan")),
        dict(api_key=""),
        dict(host="0.0.0.0"),
        dict(host="192.168.1.2"),
        dict(host="::"),
    ],
)
def test_refuses_what_cannot_be(how):
    with pytest.raises(ConfigError, match=next(iter(how)).replace("_", "-")):
        ServeOptions(**how)
