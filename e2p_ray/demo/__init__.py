"""A small synthetic newsroom in English and Japanese, and a tiny base model trained on it."""
