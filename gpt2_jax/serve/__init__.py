"""A server of one model: OpenAI's completions, and a page to play with it."""
