"""One small, exact, fast GPT-2 for JAX."""
