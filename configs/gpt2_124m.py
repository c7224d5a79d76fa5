"""GPT-2 124M from scratch: the paper's shape, GPT-3's hyper-parameters.

Tokens: `gpt2-jax prepare SOURCE --out data/webtext` first. nanoGPT's reproduction on
OpenWebText ends near 2.85 nats per token after 600,000 steps of 491,520 tokens.
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
    run_dir="runs/gpt2_124m",
    data=DataConfig(source=("data/webtext",)),
    model=ModelConfig(n_layer=12, n_head=12, n_embd=768),  # paper, table 2
    optimizer=OptimizerConfig(
        learning_rate=6e-4,  # GPT-3 (Brown et al. 2020), table 2.1, 125M
        weight_decay=0.1,  # GPT-3, appendix B, as are the betas and the clip
        warmup_steps=715,  # 375M tokens: GPT-3, appendix B
        final_fraction=0.1,  # GPT-3, appendix B
    ),
    train=TrainConfig(
        steps=572_204,  # 300e9 tokens: GPT-3, table 2.1
        batch_tokens=512 * 1024,  # GPT-2 paper, section 2.3: 512 sequences of 1024
        micro_batch=8,
    ),
    evaluate=EvaluateConfig(interval=1000, batches=64, batch_sequences=8),
    checkpoint=CheckpointConfig(interval=1000, keep_every=50_000),
)
