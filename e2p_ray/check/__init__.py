"""(text, content) -> Verdict: what a text must keep to be published."""

from e2p_ray.check.check import check

__all__ = ["check"]
