"""The Python standard library as raw bytes: on every machine, no download.

Machine: 2 CPU cores, under 4 minutes. `gpt2-jax train`
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
    run_dir="runs/quickstart",
    data=DataConfig(source=("stdlib",), tokenizer="bytes", val_fraction=0.05),
    model=ModelConfig(
        n_vocab=257, vocab_multiple=8, n_ctx=256, n_embd=192, n_layer=4, n_head=3
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
    train=TrainConfig(steps=600, batch_tokens=16 * 256),
    evaluate=EvaluateConfig(interval=100, batches=4),
    checkpoint=CheckpointConfig(interval=100),
)
