"""Which tasks, which window: names and ranges."""

import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.evaluate.options import MODES, EvaluateOptions
from gpt2_jax.evaluate.table import UNITS


def test_the_default_is_the_papers_table():
    assert EvaluateOptions().task_names() == list(UNITS)


def test_blanks_do_not_count():
    asked = EvaluateOptions(tasks=" ptb, hf_wikitext2,")
    assert asked.task_names() == ["ptb", "hf_wikitext2"]


@pytest.mark.parametrize("name", [*UNITS, *MODES])
def test_every_name_is_known_and_a_misspelt_one_is_not(name):
    assert EvaluateOptions(tasks=name).task_names() == [name]
    with pytest.raises(ConfigError, match="--tasks has no .*did you mean"):
        EvaluateOptions(tasks=f"{name}x").task_names()


@pytest.mark.parametrize(
    "window, stride, sizes",
    [
        (None, None, (1024, 32)),
        (16, None, (16, 16)),
        (None, 32, (1024, 32)),
        (64, 64, (64, 64)),
        (1024, 1, (1024, 1)),
    ],
)
def test_the_window_is_at_most_the_context(window, stride, sizes):
    assert EvaluateOptions(window=window, stride=stride).sizes(1024) == sizes


@pytest.mark.parametrize(
    "window, stride, message",
    [
        (2048, 32, "--window is 2048; allowed: 1 to the context of 1024"),
        (0, 32, "--window is 0; allowed: 1 to the context of 1024"),
        (16, 32, "--stride is 32; allowed: 1 to the window of 16"),
        (None, 0, "--stride is 0; allowed: 1 to the window of 1024"),
    ],
)
def test_what_does_not_fit_is_refused(window, stride, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateOptions(window=window, stride=stride).sizes(1024)


def test_a_mode_may_have_a_stride_of_its_own():
    assert EvaluateOptions().sizes(1024, stride=1024) == (1024, 1024)
    assert EvaluateOptions(stride=512).sizes(1024, stride=1024) == (1024, 512)
