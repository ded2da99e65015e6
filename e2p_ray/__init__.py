"""Distributed generation of personalised text from user embeddings."""
