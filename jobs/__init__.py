"""Thin entry points: `python -m jobs.<verb> --config job.yaml`."""
