"""Tiny Shakespeare as raw bytes, against nanoGPT's CPU recipe.

Machine: 2 CPU cores, about 85 s, 1.684 nats per character on the whole validation
split. `gpt2-jax train shakespeare --data.source input.txt`; benchmarks/shakespeare.py
runs the peer beside it.
"""

from dataclasses import replace

from gpt2_jax.config import CheckpointConfig, EvaluateConfig, TrainConfig, load_config

parent = load_config("quickstart")

config = replace(
    parent,
    run_dir="runs/shakespeare",
    data=replace(parent.data, source=("input.txt",), val_fraction=0.1),
    model=replace(parent.model, n_ctx=64),  # depth, width and context are the peer's
    train=TrainConfig(steps=480, batch_tokens=32 * 64),
    evaluate=EvaluateConfig(
        interval=160, batches=4, batch_sequences=64, sample_tokens=63, prompt="\n"
    ),
    checkpoint=CheckpointConfig(interval=160),
)
