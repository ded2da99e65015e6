"""Trains a projector on texts that were right for their users; the base model stays as it is. Import what you need."""
