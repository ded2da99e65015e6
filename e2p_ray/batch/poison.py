"""The search for the requests that end every worker which meets them: halving, until each stands alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from e2p_ray.batch.pieces import Piece, commit_pieces, give_up, read_piece, remove_pieces, whole
from e2p_ray.batch.tally import ShardOutcome, Tally
from e2p_ray.commit import Run, pending_shards
from e2p_ray.commit.shard import ShardData
from e2p_ray.schema import ErrorCode
from e2p_ray.storage import Storage

# Alone, too, a request may be where a node goes away by chance: it is tried again before it is given up.
_TRIES_ALONE = 2


class PoisonSearch:
    """Halves the shards that ended their workers in every attempt; in vain where more than `max_poison` do so.

    A shard of n requests with one that is poison costs log2(n) + 2 workers, each at most a reload of the model.
    """

    def __init__(
        self,
        storage: Storage,
        run: Run,
        max_poison: int,
        tally: Tally,
        one_pass: Callable[[Sequence[Mapping[str, Any]]], None],
    ) -> None:
        self._storage, self._run, self._max_poison, self._tally = storage, run, max_poison, tally
        self._one_pass = one_pass
        self._tries = Counter[Piece]()

    def among(self, shard_ids: Sequence[str]) -> None:
        """Commit what can be committed of these shards. Those whose failure was one of storage or data are left."""
        said = {outcome.shard_id: outcome for outcome in self._tally.failures}
        suspects = [shard for shard in shard_ids if shard not in said or not said[shard].is_ours]
        if not suspects or not self._max_poison:
            return
        pieces = [half for shard in suspects for half in _cut(whole(self._storage, self._run, shard))]
        done, poison = list[Piece](), list[Piece]()
        while pieces:
            missing = [piece for piece in pieces if self._read(piece) is None]
            if missing and not self._try(missing):
                return
            lost = [piece for piece in missing if self._read(piece) is None]
            if len(lost) > 2 * self._max_poison:
                return
            done += [piece for piece in pieces if piece not in lost]
            pieces = self._smaller(lost, poison)
        # By a call that was killed before it committed.
        num_given_up_before = sum(self._num_poison(piece) for piece in done if piece.num_requests == 1)
        if num_given_up_before + len(poison) > self._max_poison:
            return
        for piece in poison:
            give_up(self._storage, self._run, piece, datetime.now(UTC))
        self._commit(suspects, done + poison)

    def _try(self, missing: Sequence[Piece]) -> bool:
        """One pass over these; whether it says of a piece that it is lost because of what is in it.

        A pass that was given up says nothing of what it did not come to, and a piece that failed for its storage is
        as good as any: what is written stays for the next call.
        """
        num_before = len(self._tally.failures)
        self._one_pass([asdict(piece) for piece in missing])
        failed = self._tally.failures[num_before:]
        return not (self._tally.late or self._tally.pass_failure or any(outcome.is_ours for outcome in failed))

    def _smaller(self, lost: Sequence[Piece], poison: list[Piece]) -> list[Piece]:
        """What to try next. A request that is lost alone, again and again, is poison."""
        following: list[Piece] = []
        for piece in lost:
            self._tries[piece] += 1
            if piece.num_requests > 1:
                following += piece.halves()
            elif self._tries[piece] < _TRIES_ALONE:
                following.append(piece)
            else:
                poison.append(piece)
        return following

    def _read(self, piece: Piece) -> ShardData | None:
        return read_piece(self._storage, self._run, piece)

    def _num_poison(self, piece: Piece) -> int:
        found = self._read(piece)
        return sum(letter.error_code == ErrorCode.POISON for letter in found.dead_letters) if found else 0

    def _commit(self, shard_ids: Sequence[str], done: Sequence[Piece]) -> None:
        for shard_id in shard_ids:
            pieces = sorted(piece for piece in done if piece.shard_id == shard_id)
            found = [self._read(piece) for piece in pieces]
            data = [one for one in found if one is not None]
            if len(data) < len(pieces):
                assert shard_id not in pending_shards(self._storage, self._run), "a piece that is done has been written"
                # Another driver has committed the shard, and removed those that there were.
                remove_pieces(self._storage, self._run, shard_id)
                continue
            stats = commit_pieces(self._storage, self._run, shard_id, data)
            self._tally.add(
                ShardOutcome(
                    shard_id=shard_id,
                    num_requests=stats.num_requests,
                    num_dead_letters=sum(len(one.dead_letters) for one in data),
                    num_prompt_tokens=stats.num_prompt_tokens,
                    num_computed_tokens=stats.num_computed_tokens,
                    num_output_tokens=stats.num_output_tokens,
                    started_at_s=stats.started_at.timestamp(),
                    finished_at_s=stats.finished_at.timestamp(),
                )
            )


def _cut(piece: Piece) -> list[Piece]:
    return list(piece.halves()) if piece.num_requests > 1 else [piece]
