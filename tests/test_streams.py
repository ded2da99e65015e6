"""The random streams of requests, against known answers."""

from __future__ import annotations

import numpy as np
import pytest

from e2p_ray.engine.streams import philox, stream_key, uniforms
from e2p_ray.schema import RequestKey

# Known-answer vectors of the Random123 library (kat_vectors, philox4x32 10).
KNOWN = [
    ([0] * 4, [0] * 2, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], expected: list[str]) -> None:
    words = philox([np.array([c], np.uint64) for c in counter], [np.array([k], np.uint64) for k in key])
    assert [f"{int(word[0]):08x}" for word in words] == expected


def test_uniforms_are_uniform_and_independent_of_each_other() -> None:
    streams = np.array([stream_key(RequestKey(f"u{n}", "c", "t"), 0, 0) for n in range(2000)], np.uint64)
    numbers = np.stack([uniforms(streams, np.full(2000, step)) for step in range(20)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 45  # chi-square, 19 degrees of freedom: p < 0.001
    assert abs(np.corrcoef(numbers[0], numbers[1])[0, 1]) < 0.1
    assert len(np.unique(numbers)) == numbers.size
