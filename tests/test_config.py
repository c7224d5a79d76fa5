"""Checks, derived numbers, files and dicts of the configuration."""

import dataclasses
import subprocess
import sys

import pytest

from gpt2_jax import config as configs
from gpt2_jax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    differences,
    from_dict,
    load_config,
    must_match,
    to_dict,
)

SHIPPED = [
    "finetune",
    "gpt2_124m_v3_8",
    "gpt2_124m_v4_8",
    "gpt2_124m_v5e_8",
    "gpt2_124m_v5p_8",
    "gpt2_124m_v6e_8",
    "gpt2_355m_v3_32",
    "gpt2_774m_v3_128",
    "gpt2_1558m_v3_256",
    "quickstart",
    "shakespeare",
    "gpt2_124m",
    "gpt2_355m",
    "gpt2_774m",
    "gpt2_1558m",
]
INF, NAN = float("inf"), float("nan")

REFUSED = [
    (ModelConfig, "model.n_vocab", 1, ">= 2"),
    (ModelConfig, "model.n_ctx", 0, ">= 1"),
    (ModelConfig, "model.n_embd", 0, ">= 1"),
    (ModelConfig, "model.n_layer", -1, ">= 1"),
    (ModelConfig, "model.n_head", 0, ">= 1"),
    (ModelConfig, "model.n_head", 5, "divisor of model.n_embd = 768"),
    (ModelConfig, "model.n_inner", 0, "None or >= 1"),
    (ModelConfig, "model.vocab_multiple", 0, ">= 1"),
    (ModelConfig, "model.unroll", 0, ">= 1"),
    (ModelConfig, "model.embd_pdrop", 1.0, "0 <= rate < 1"),
    (ModelConfig, "model.attn_pdrop", -0.1, "0 <= rate < 1"),
    (ModelConfig, "model.resid_pdrop", NAN, "0 <= rate < 1"),
    (ModelConfig, "model.layer_norm_epsilon", -1e-5, ">= 0"),
    (ModelConfig, "model.initializer_range", INF, "finite"),
    (DataConfig, "data.source", (), "at least one source"),
    (DataConfig, "data.val_fraction", 0.0, "0 < fraction < 1"),
    (DataConfig, "data.val_fraction", 1.0, "0 < fraction < 1"),
    (DataConfig, "data.seed", -1, ">= 0"),
    (DataConfig, "data.prefetch", 0, ">= 1"),
    (OptimizerConfig, "optimizer.learning_rate", -1.0, ">= 0"),
    (OptimizerConfig, "optimizer.learning_rate", NAN, "finite"),
    (OptimizerConfig, "optimizer.muon_learning_rate", -1.0, ">= 0"),
    (OptimizerConfig, "optimizer.epsilon", -1.0, ">= 0"),
    (OptimizerConfig, "optimizer.weight_decay", -0.1, ">= 0"),
    (OptimizerConfig, "optimizer.grad_clip", -1.0, ">= 0"),
    (OptimizerConfig, "optimizer.warmup_steps", -1, ">= 0"),
    (OptimizerConfig, "optimizer.muon_steps", 0, ">= 1"),
    (OptimizerConfig, "optimizer.beta1", 1.0, "0 <= rate < 1"),
    (OptimizerConfig, "optimizer.beta2", 1.5, "0 <= rate < 1"),
    (OptimizerConfig, "optimizer.momentum", -0.5, "0 <= rate < 1"),
    (OptimizerConfig, "optimizer.decay_fraction", 1.5, "0 <= fraction <= 1"),
    (OptimizerConfig, "optimizer.final_fraction", -0.1, "0 <= fraction <= 1"),
    (MeshConfig, "mesh.data", 0, "None, -1 or >= 1"),
    (MeshConfig, "mesh.fsdp", -2, "None, -1 or >= 1"),
    (MeshConfig, "mesh.tensor", 0, "None, -1 or >= 1"),
    (TrainConfig, "train.steps", 0, ">= 1"),
    (TrainConfig, "train.batch_tokens", 0, ">= 1"),
    (TrainConfig, "train.micro_batch", 0, "None or >= 1"),
    (TrainConfig, "train.loss_chunk", -1, ">= 0"),
    (TrainConfig, "train.seed", -1, ">= 0"),
    (TrainConfig, "train.max_bad_steps", 0, ">= 1"),
    (EvaluateConfig, "evaluate.interval", -1, ">= 0"),
    (EvaluateConfig, "evaluate.batches", -1, ">= 0"),
    (EvaluateConfig, "evaluate.batch_sequences", 0, ">= 1"),
    (EvaluateConfig, "evaluate.sample_interval", -1, ">= 0"),
    (EvaluateConfig, "evaluate.samples", -1, ">= 0"),
    (EvaluateConfig, "evaluate.sample_tokens", 0, ">= 1"),
    (EvaluateConfig, "evaluate.temperature", -0.5, ">= 0"),
    (EvaluateConfig, "evaluate.top_p", 0.0, "0 < top_p <= 1"),
    (EvaluateConfig, "evaluate.top_k", 0, "None or >= 1"),
    (CheckpointConfig, "checkpoint.interval", 0, ">= 1"),
    (CheckpointConfig, "checkpoint.keep", 0, ">= 1"),
    (CheckpointConfig, "checkpoint.keep_every", -1, ">= 0"),
    (LogConfig, "log.interval", 0, ">= 1"),
]


@pytest.mark.parametrize(
    "kind, name, value, allowed", REFUSED, ids=[f"{r[1]}={r[2]}" for r in REFUSED]
)
def test_refusal_names_field_value_and_allowed(kind, name, value, allowed):
    with pytest.raises(ConfigError) as refused:
        kind(**{name.split(".")[1]: value})
    message = str(refused.value)
    assert name in message
    assert repr(value) in message
    assert allowed in message


def test_two_free_mesh_axes_are_refused():
    with pytest.raises(ConfigError, match="at most one axis of -1"):
        MeshConfig(data=-1, fsdp=-1)


@pytest.mark.parametrize(
    "groups, message",
    [
        (
            dict(run_dir="gs://bucket/run"),
            "run_dir is 'gs://bucket/run'; allowed: a path; mount a bucket",
        ),
        (
            dict(train=TrainConfig(batch_tokens=1000)),
            "train.batch_tokens is 1000; allowed: a multiple of model.n_ctx = 1024",
        ),
        (
            dict(train=TrainConfig(loss_chunk=1000)),
            "train.loss_chunk is 1000; allowed: 0 or a divisor of model.n_ctx = 1024",
        ),
        (
            dict(train=TrainConfig(steps=5), optimizer=OptimizerConfig(warmup_steps=6)),
            "optimizer.warmup_steps is 6; allowed: <= train.steps = 5",
        ),
    ],
)
def test_groups_that_contradict_each_other_are_refused(groups, message):
    with pytest.raises(ConfigError) as refused:
        Config(**groups)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "shape, n_params",
    [
        (dict(n_embd=768, n_layer=12, n_head=12), 124_439_808),
        (dict(n_embd=1024, n_layer=24, n_head=16), 354_823_168),
        (dict(n_embd=1280, n_layer=36, n_head=20), 774_030_080),
        (dict(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200),
    ],
)
def test_derived_numbers_are_those_of_gpt2(shape, n_params):
    config = ModelConfig(**shape)
    assert config.n_params == n_params
    assert config.n_vocab_padded == 50_304
    assert config.inner_width == 4 * config.n_embd
    assert config.head_width == 64


def test_derived_numbers_of_a_run():
    config = Config(train=TrainConfig(steps=10, batch_tokens=8 * 1024))
    assert config.batch_sequences == 8
    assert config.total_tokens == 10 * 8 * 1024


def test_dict_round_trip_keeps_everything():
    config = Config(
        run_dir="elsewhere",
        model=ModelConfig(n_inner=100, tie_word_embeddings=False),
        data=DataConfig(source=("a.txt", "b.txt")),
        train=TrainConfig(micro_batch=4),
        log=LogConfig(wandb="project"),
    )
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    "values, near",
    [
        ({"modle": {}}, "'model'"),
        ({"model": {"n_layers": 3}}, "'n_layer'"),
        ({"optimizer": {"learningrate": 0.1}}, "'learning_rate'"),
    ],
)
def test_unknown_field_suggests_the_nearest(values, near):
    with pytest.raises(ConfigError, match=f"did you mean {near}"):
        from_dict(values)


def test_unknown_field_like_no_other_lists_the_known():
    with pytest.raises(ConfigError, match="known: .*n_layer") as refused:
        from_dict({"model": {"zzz": 1}})
    assert "did you mean" not in str(refused.value)


def test_differences_are_dotted_and_complete():
    old = Config()
    new = dataclasses.replace(
        old, run_dir="b", model=ModelConfig(n_layer=3), data=DataConfig(source=("b",))
    )
    assert differences(old, old) == {}
    assert differences(old, new) == {
        "run_dir": ("runs/gpt2", "b"),
        "model.n_layer": (12, 3),
        "data.source": (["stdlib"], ["b"]),
    }


@pytest.mark.parametrize(
    "name, expected",
    [
        ("run_dir", False),
        ("mesh.data", False),
        ("train.steps", False),
        ("model.remat", False),
        ("evaluate.interval", False),
        ("train.seed", True),
        ("train.batch_tokens", True),
        ("model.n_layer", True),
        ("model.attn_pdrop", True),
        ("data.source", True),
        ("optimizer.learning_rate", True),
    ],
)
def test_resume_may_change_only_how_it_is_computed(name, expected):
    assert must_match(name) == expected


def test_every_name_that_may_change_exists():
    known = {"run_dir"} | {
        f"{group}.{field}" if field else group
        for group, fields in to_dict(Config()).items()
        for field in [None, *(fields if isinstance(fields, dict) else ())]
    }
    assert set(configs.MAY_CHANGE) <= known


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_loads(name):
    assert isinstance(load_config(name), Config)


def test_every_config_file_is_listed_here():
    found = {path.stem for path in configs.config_directory().glob("*.py")}
    assert found == set(SHIPPED)


def test_config_of_a_path_is_loaded(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from gpt2_jax.config import Config, TrainConfig\n"
        "config = Config(train=TrainConfig(steps=7))\n"
    )
    assert load_config(str(path)).train.steps == 7


def test_missing_config_suggests_the_nearest_shipped_one():
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_config("quikstart")
    with pytest.raises(ConfigError, match="did you mean 'gpt2_124m'"):
        load_config("configs/gpt2_125m.py")


def test_file_without_a_config_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("configuration = 3\n")
    with pytest.raises(ConfigError, match="empty.py binds `config` to NoneType"):
        load_config(str(path))


def test_config_does_not_import_jax():
    """`gpt2-jax --help` stays fast only as long as this holds."""
    program = "import sys, gpt2_jax.config; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_group_that_is_no_object_is_refused():
    with pytest.raises(ConfigError, match=r"config.model is 3; allowed: an object"):
        from_dict({"model": 3})


# Under the tests' import hook jaxtyping refuses these first; users have no hook.
WRONG_TYPES = """
from gpt2_jax.config import *
from gpt2_jax.config import ConfigError
for kind, field, value in [
    (ModelConfig, "activation_function", "gelux"),
    (ModelConfig, "dtype", "float16"),
    (ModelConfig, "n_layer", "12"),
    (ModelConfig, "n_layer", True),
    (ModelConfig, "n_ctx", 16.5),
    (ModelConfig, "n_inner", "x"),
    (DataConfig, "source", "a.txt"),
    (DataConfig, "verify", 1),
    (OptimizerConfig, "name", "sgd"),
    (OptimizerConfig, "learning_rate", "1e400"),
    (Config, "model", 3),
]:
    try:
        kind(**{field: value})
        print("accepted", field)
    except ConfigError as error:
        print(error)
OptimizerConfig(weight_decay=0)  # an int is a float here
"""


def test_a_value_of_another_type_is_refused():
    command = [sys.executable, "-c", WRONG_TYPES]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "model.activation_function is 'gelux'; "
        "allowed: gelu_new, gelu, relu, silu, tanh",
        "model.dtype is 'float16'; allowed: auto, float32, bfloat16",
        "model.n_layer is '12'; allowed: int",
        "model.n_layer is True; allowed: int",
        "model.n_ctx is 16.5; allowed: int",
        "model.n_inner is 'x'; allowed: int or None",
        "data.source is 'a.txt'; allowed: a tuple of str",
        "data.verify is 1; allowed: bool",
        "optimizer.name is 'sgd'; allowed: adamw, muon",
        "optimizer.learning_rate is '1e400'; allowed: float",
        "model is 3; allowed: ModelConfig",
    ]


def test_flops_per_token_is_palm_appendix_b():
    by_hand = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert ModelConfig().flops_per_token == by_hand
