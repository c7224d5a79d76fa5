"""Tiny Shakespeare as raw bytes, against nanoGPT's CPU recipe.

Machine: 2 CPU cores. `gpt2-jax train shakespeare --data.source input.txt`
"""

from gpt2_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

config = Config(
    run_dir="runs/shakespeare",
    data=DataConfig(source=("input.txt",), tokenizer="bytes", val_fraction=0.1),
    model=ModelConfig(
        n_vocab=257, vocab_multiple=8, n_ctx=64, n_embd=128, n_layer=4, n_head=4
    ),
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=3e-3,
        muon_learning_rate=1e-2,
        schedule="wsd",
        decay_fraction=0.5,
        final_fraction=0.0,
        warmup_steps=20,
    ),
    train=TrainConfig(steps=1000, batch_tokens=32 * 64),
    evaluate=EvaluateConfig(interval=250, batches=4),
    checkpoint=CheckpointConfig(interval=500),
)
