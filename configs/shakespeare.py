"""Tiny Shakespeare as raw bytes, against nanoGPT's CPU recipe.

Machine: 2 CPU cores, about 85 s, 1.684 nats per character on the whole validation
split. `gpt2-jax train shakespeare --data.source input.txt`; benchmarks/shakespeare.py
runs the peer beside it.
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
        n_vocab=257,
        vocab_multiple=8,
        n_ctx=64,  # as the peer's, and so are depth and width
        n_layer=4,
        n_embd=128,
        n_head=2,
        unroll=4,
    ),
    # Tuned on this data, one knob at a time; each is worth about 0.01 nats.
    optimizer=OptimizerConfig(
        name="muon",
        learning_rate=3e-3,
        muon_learning_rate=1e-2,
        beta1=0.8,
        momentum=0.9,
        schedule="wsd",
        warmup_steps=10,
        decay_fraction=0.9,
        final_fraction=0.0,
    ),
    train=TrainConfig(steps=480, batch_tokens=32 * 64),
    evaluate=EvaluateConfig(
        interval=160, batches=4, batch_sequences=64, sample_tokens=63, prompt="\n"
    ),
    checkpoint=CheckpointConfig(interval=160),
)
