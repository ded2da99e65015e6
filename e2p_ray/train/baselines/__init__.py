"""What one would train instead of a projector; for evaluation only."""
