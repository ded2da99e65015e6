"""Injected faults: whatever happens to a run, nothing is lost, nothing is there twice, nothing is half-visible.

All of it is seeded. Short by default; `E2P_TEST_LONG=1` runs the full counts, whose figures are in tests/bench/LOG.md.
"""
