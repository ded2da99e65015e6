"""From events to user embeddings to candidates."""
