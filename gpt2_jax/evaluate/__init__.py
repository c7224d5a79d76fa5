"""Zero-shot evaluation: data, scoring and the table of the GPT-2 model card."""
