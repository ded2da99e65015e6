"""Does it personalise, and what does that cost? The projector against honest controls, on held-out pairs."""

from e2p_ray.evaluate.evaluate import evaluate

__all__ = ["evaluate"]
