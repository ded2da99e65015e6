"""The store of prefixes keeps within its bytes, counted in the memory that is really held."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from e2p_ray.engine import prefixes
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import MAX_PADDING, PrefixStore
from e2p_ray.engine.shared_prefix import Prefix
from e2p_ray.engine.wave import Wave
from e2p_ray.schema import Content, Group
from tests import tiny_models
from tests.tiny_models import engine_of, group, task

LLAMA = LlamaConfig(**tiny_models.common())
LENGTH, NUM_KEPT = 10, 64


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel(tiny_models.random_model(LLAMA))


@pytest.fixture
def num_copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found, plain = list[int](), Prefix.alone

    def watched(self: Prefix) -> Prefix:
        found.append(self.length)
        return plain(self)

    monkeypatch.setattr(Prefix, "alone", watched)
    return found


def lefts_of(num: int) -> list[tuple[int, ...]]:
    return [tuple(row) for row in np.random.default_rng(num).integers(0, 256, (num, LENGTH)).tolist()]


def real_bytes(prefixes: Iterable[Prefix | None]) -> int:
    """All memory that these keep from being freed."""
    tensors = [tensor for prefix in prefixes if prefix is not None for tensor in (*prefix.keys, *prefix.values)]
    parts = [tensor.untyped_storage() for tensor in tensors]
    return sum({part.data_ptr(): part.nbytes() for part in parts}.values())


def arrivals(base: BaseModel, num_together: int) -> Iterator[tuple[PrefixStore, list[tuple[int, ...]]]]:
    """A store with room for NUM_KEPT left parts, as they come; the first of those that come together stays popular."""
    store = PrefixStore(base, NUM_KEPT * LENGTH * base.kv_bytes_per_token)
    lefts, popular = lefts_of(60 * num_together), list[tuple[int, ...]]()
    for start in range(0, len(lefts), num_together):
        store.get(lefts[start : start + num_together])
        popular = [*popular, lefts[start]][1 - NUM_KEPT :]
        store.get(popular)
        yield store, popular


@pytest.mark.parametrize("num_together", [2, 5, 16])
def test_neighbours_of_popular_contents_are_not_kept_with_them(
    base: BaseModel, num_together: int, num_copied: list[int]
) -> None:
    most = 0
    for store, popular in arrivals(base, num_together):
        kept = store._kept.values()
        assert store.num_bytes == real_bytes(kept) <= store.max_bytes
        most = max(most, len(kept))
        assert store._kept.keys() >= {*popular}
    assert most >= NUM_KEPT - 1, "its room is used"
    assert num_copied


def test_control_of_tokens_alone(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by tokens, a store keeps several times what it may."""
    monkeypatch.setattr(
        Prefix, "memory", property(lambda self: (id(self), self.length * base.kv_bytes_per_token)), raising=True
    )
    most = 0
    for store, _ in arrivals(base, 16):
        assert store.num_bytes <= store.max_bytes
        most = max(most, real_bytes(store._kept.values()) // store.max_bytes)
    assert most >= 5


def test_what_is_used_once_or_fits_is_never_copied(base: BaseModel, num_copied: list[int]) -> None:
    store = PrefixStore(base, NUM_KEPT * LENGTH * base.kv_bytes_per_token)
    lefts = lefts_of(400)
    for start in range(0, len(lefts), 7):
        store.get(lefts[start : start + 7])
        assert store.num_bytes == real_bytes(store._kept.values()) <= store.max_bytes
    assert len(store._kept) >= NUM_KEPT - 7
    store = PrefixStore(base, len(lefts) * LENGTH * base.kv_bytes_per_token)
    for _ in range(3):
        store.get(lefts)
    assert len(store._kept) == len(lefts)
    assert not num_copied


def test_to_drop_everything_takes_no_memory(base: BaseModel, num_copied: list[int]) -> None:
    """It is what is done when memory has run out."""
    store = PrefixStore(base, 100 * LENGTH * base.kv_bytes_per_token)
    store.get(lefts_of(8))
    store.trim(0)
    assert store.num_bytes == len(store._kept) == 0
    assert not num_copied
    store.get(lefts_of(8))
    store.trim(store.num_bytes // 2)
    assert num_copied, "the control"


def test_a_store_smaller_than_a_batch_keeps_some_of_it(base: BaseModel, num_copied: list[int]) -> None:
    store = PrefixStore(base, NUM_KEPT * LENGTH * base.kv_bytes_per_token)
    lefts = lefts_of(80)
    expected = store.get(lefts)
    assert store.num_bytes == real_bytes(store._kept.values()) <= store.max_bytes
    assert len(store._kept) == 40, "half of it, with memory of their own"
    computed = store.num_computed_tokens
    again = store.get(lefts[-40:])
    assert store.num_computed_tokens == computed
    assert len(num_copied) == 40
    for one, other in zip(again, expected[-40:], strict=True):
        assert one is not None
        assert other is not None
        for mine, theirs in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
            assert torch.equal(mine, theirs)
    store.trim(0)
    assert store.num_bytes == len(store._beside) == 0


def test_stems_of_other_left_parts_count_once(base: BaseModel) -> None:
    """A left part that is no more than another one's stem is a view of it."""
    store = PrefixStore(base, 1 << 30)
    lefts = lefts_of(8)
    store.get(lefts, [LENGTH // 2] * 8)
    before = store.num_bytes
    store.get([left[: LENGTH // 2] for left in lefts], [LENGTH // 2] * 8)
    assert len(store._kept) == 16
    assert store.num_bytes == before == real_bytes(store._kept.values())
    store.get([(*left[: LENGTH // 2], 7) for left in lefts], [LENGTH // 2] * 8)
    assert before < store.num_bytes == real_bytes(store._kept.values())


def test_a_stem_whose_left_part_was_dropped_is_computed_again(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as many that go on from one as there are, a few in a pass."""
    monkeypatch.setattr(prefixes, "_MAX_CONTINUED", 3)
    store = PrefixStore(base, 1 << 30)
    (first, other), stem = lefts_of(2), LENGTH // 2
    alike = [(*first[:stem], *(7, 8)[: at % 3], at) for at in range(8)]
    expected = PrefixStore(base, 1 << 30).get(alike)

    def num_computed(lefts: list[tuple[int, ...]]) -> int:
        before = store.num_computed_tokens
        for one, whole in zip(store.get(lefts, [stem] * len(lefts)), expected, strict=False):
            assert one is not None
            assert whole is not None
            for mine, theirs in zip((*one.keys, *one.values), (*whole.keys, *whole.values), strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        return store.num_computed_tokens - before

    assert num_computed(alike) == sum(len(left) - stem for left in alike) + stem
    assert num_computed(alike) == 0
    store.trim(0)
    assert num_computed(alike) == sum(len(left) - stem for left in alike) + stem
    store.get([other], [stem])
    assert not {first[:stem], other[:stem]} - store._with_stem.keys()
    store.trim(0)
    assert not store._with_stem
    assert not store._stem_of


def test_a_pass_of_prefills_is_bounded_in_tokens_and_padding_and_otherwise_full() -> None:
    lengths = sorted(np.random.default_rng(1).integers(1, 120, 300).tolist())
    batches = list(prefixes._batches([(0,) * length for length in lengths], 100))
    assert [len(left) for batch in batches for left in batch] == lengths

    def fits(batch: list[tuple[int, ...]]) -> bool:
        """All are as long as the longest there."""
        return len(batch) * len(batch[-1]) <= 100 and len(batch[-1]) <= MAX_PADDING * len(batch[0])

    assert all(fits(batch) or len(batch) == 1 for batch in batches)
    assert not any(fits([*one, other[0]]) for one, other in itertools.pairwise(batches))
    assert {len(batch[0]) > 100 for batch in batches} == {True, False}


def test_what_is_about_to_be_used_is_not_what_is_dropped_for_it(base: BaseModel) -> None:
    store = PrefixStore(base, 1 << 30)
    lefts = lefts_of(4)
    for left in lefts:
        store.get([left])
    assert store.use(lefts[0]) is not None
    assert store.use((1, 2, 3)) is None
    store.trim(store.num_bytes // 2)
    assert store._kept.keys() == {lefts[0], lefts[3]}


@pytest.mark.parametrize(("max_rows", "num_short"), [(32, 3), (64, 60)])
def test_a_wave_and_the_store_keep_within_the_engine_s_bytes(
    max_rows: int, num_short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row in eight writes long texts: what was computed beside its content is held all the while.

    A quarter more is for slots of rows that may come in later. By tokens alone it came to 3.2 times as much; and where
    slots are as large as prefixes, with slots for as many rows as there were bytes without these, to 1.6 times.
    """
    max_bytes = 2 << 20
    tasks = {"headline": task(max_new_tokens=num_short), "teaser": task(max_new_tokens=max(num_short, 30))}
    engine = engine_of(LLAMA, tasks=tasks, max_rows=max_rows, max_bytes=max_bytes)
    store, found, plain = engine._decoder.store, list[int](), Wave.readers

    def watched(self: Wave, *args: Any) -> Any:
        slots = [*self.slots.keys, *self.slots.values]
        num_slot_bytes = sum(tensor.untyped_storage().nbytes() for tensor in slots)
        found.append(num_slot_bytes + real_bytes([*self.prefixes, *store._kept.values()]))
        return plain(self, *args)

    monkeypatch.setattr(Wave, "readers", watched)
    bodies = ("".join(letters) for letters in itertools.permutations("bridges"))
    contents = [Content(f"c{at}", "Bridge", body * 8, "en") for at, body in enumerate(itertools.islice(bodies, 150))]
    groups = [group(one, [at], task_name=("headline", "teaser")[at % 8 == 3]) for at, one in enumerate(contents)]
    # The first wave has one content, and leaves its slots for rows that each have one of their own.
    first = Content("c", "Bridge", "b", "en")
    many = group(first, range(max_rows), task_name="teaser")
    assert not [one for each in ([many], groups) for one in engine.generate(each) if one.error_code]
    assert 0.5 * max_bytes < max(found) <= 1.25 * max_bytes


@pytest.mark.parametrize(("max_rows", "num_short", "num_long"), [(96, 90, 90), (64, 60, 140)])
def test_rows_that_come_into_a_wave_find_its_free_slots_counted(
    max_rows: int, num_short: int, num_long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most rows of a wave end early, and others come in with a content each: to 1.5 times the bytes before.

    Slots that nobody is in are given back where they leave no room, and nothing waits for the last of the long rows.
    """
    max_bytes = 2 << 20
    tasks = {name: task(max_new_tokens=num) for name, num in (("short", 4), ("middle", 30), ("long", num_long))}
    engine = engine_of(LLAMA, tasks=tasks, max_rows=max_rows, max_bytes=max_bytes, drafts=False)
    store, found, sizes, plain = engine._decoder.store, list[int](), list[int](), Wave.readers

    def watched(self: Wave, *args: Any) -> Any:
        slots = [*self.slots.keys, *self.slots.values]
        num_slot_bytes = sum(tensor.untyped_storage().nbytes() for tensor in slots)
        found.append(num_slot_bytes + real_bytes([*self.prefixes, *store._kept.values()]))
        sizes.append(self.slots.max_rows)
        return plain(self, *args)

    monkeypatch.setattr(Wave, "readers", watched)
    first = Content("c", "Bridge", "b", "en")
    groups = [
        group(first, range(num_short, max_rows), task_name="long"),
        group(first, range(num_short), task_name="short"),
    ]
    for at in range(60):
        one = Content(f"d{at}", "Bridge", (f"{at:03d} river " * 60)[:400], "en")
        groups.append(group(one, [1000 + at], task_name="middle"))
    completions = list(engine.generate(groups))
    assert len(completions) == max_rows + 60
    assert not [one for one in completions if one.error_code]
    assert 0.5 * max_bytes < max(found) <= 1.1 * max_bytes
    assert min(sizes) < max(sizes) / 2
    assert engine.stats.num_waves == 1


def test_as_many_rows_run_where_they_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wave's slots double as rows come in, and leave room for the prefixes that later rows bring.

    Slots that took all that was left kept a sixth of these rows out, under steady load for good.
    """
    sizes, plain = list[int](), Wave.readers

    def watched(self: Wave, *args: Any) -> Any:
        sizes.append(len(self))
        return plain(self, *args)

    monkeypatch.setattr(Wave, "readers", watched)
    contents = [Content(f"c{at}", "Bridge", f"{at:03d} river", "en") for at in range(300)]

    def most_running(num_at_a_time: int) -> int:
        tasks = {"headline": task(max_new_tokens=60)}
        engine = engine_of(LLAMA, tasks=tasks, max_rows=400, max_bytes=2 << 20, drafts=False)
        groups = [group(one, [at]) for at, one in enumerate(contents)]
        arriving: list[Group | None] = []
        for at, one in enumerate(groups, 1):
            arriving += [one] if at % num_at_a_time else [one, None]
        sizes.clear()
        assert not [one for one in engine.generate(arriving) if one.error_code]
        return max(sizes)

    together = most_running(400)
    assert 20 < together < 400, "bytes are what bounds it"
    assert most_running(1) >= 0.95 * together
