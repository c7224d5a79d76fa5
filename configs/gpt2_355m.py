"""GPT-2 355M from scratch: gpt2_124m with the paper's larger shape."""

from dataclasses import replace

from gpt2_jax.config import load_config

parent = load_config("gpt2_124m")

config = replace(
    parent,
    run_dir="runs/gpt2_355m",
    model=replace(parent.model, n_layer=24, n_head=16, n_embd=1024, remat="block"),
    # The peak of GPT-3's nearest size: Brown et al. 2020, table 2.1, 350M.
    optimizer=replace(parent.optimizer, learning_rate=3e-4),
    train=replace(parent.train, micro_batch=4),
)
