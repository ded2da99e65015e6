"""What an evaluation shows, in plain sentences. Words follow the intervals and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from e2p_ray.downstream.measures.bootstrap import Interval
from e2p_ray.downstream.measures.likelihood import ALL, MethodScore, part_label
from e2p_ray.downstream.measures.methods import CONSTANT, MEAN, NO_SOFT_TOKEN, SHUFFLED, label_of
from e2p_ray.downstream.pages.figures import gain_text

# A percentile bootstrap over few users is too narrow: where nobody gains, "it personalises" is said in about 10 worlds
# of 100 with 5 users, 7 with 10, 4 with 20 (tests/test_summarise.py), and its name promises 2.5.
_MIN_USERS = 20
_MANY_USERS = 30


class Finding(StrEnum):
    """Right against shuffled user, on all pairs."""

    PERSONALISES = "personalises"
    NOT_SHOWN = "not_shown"
    HARMS = "harms"
    NOT_MEASURED = "not_measured"


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The finding on all pairs, and sentences: on all, against the other controls, what does better, by language."""

    finding: Finding
    sentences: tuple[str, ...]


def conclude(
    scores: Sequence[MethodScore], languages: Sequence[str], shuffled_over_constant: Interval | None = None
) -> Conclusion:
    """The main finding is whether the right user's soft token beats another user's.

    shuffled_over_constant: nats a token that a shuffled user's soft token gains over the constant one, on all pairs.
    """
    by_key = {(score.part, score.method): score for score in scores}
    shuffled = by_key.get((ALL, SHUFFLED))
    finding = _finding(shuffled)
    sentences = [_main_sentence(shuffled, finding)]
    if shuffled is not None and finding is not Finding.NOT_MEASURED:
        constant = _against_constant(finding, shuffled_over_constant)
        for method, words in ((CONSTANT, constant), (MEAN, _AGAINST_MEAN), (NO_SOFT_TOKEN, _AGAINST_NONE)):
            score = by_key.get((ALL, method))
            if score is not None and score.gain is not None:
                sentences.append(_against(score.gain, *words))
        sentences += _better(scores)
        if len(languages) > 1:
            of_languages = [(name, by_key[name, SHUFFLED]) for name in languages if (name, SHUFFLED) in by_key]
            sentences += [
                f"{part_label(name)}: {_main_sentence(score, _finding(score))}" for name, score in of_languages
            ]
    return Conclusion(finding, tuple(sentences))


def _better(scores: Sequence[MethodScore]) -> list[str]:
    """The methods beside the controls that do better than the right user's soft token, if any, the best first."""
    controls = (SHUFFLED, CONSTANT, MEAN, NO_SOFT_TOKEN)
    found = [
        (score.gain.value, f"{label_of(score.method)} by {_amount(score.gain)}")
        for score in scores
        if score.part == ALL and score.method not in controls and score.gain is not None and score.gain.is_below_zero
    ]
    return (
        [f"Better than the right user's soft token: {'; '.join(said for _, said in sorted(found))}."] if found else []
    )


def _finding(score: MethodScore | None) -> Finding:
    if score is None or score.gain is None or score.num_users < _MIN_USERS:
        return Finding.NOT_MEASURED
    if score.gain.is_above_zero:
        return Finding.PERSONALISES
    return Finding.HARMS if score.gain.is_below_zero else Finding.NOT_SHOWN


def _main_sentence(score: MethodScore | None, finding: Finding) -> str:
    sentence = _said(score, finding)
    if score is None or finding is Finding.NOT_MEASURED or score.num_users >= _MANY_USERS:
        return sentence
    return f"{sentence} With {score.num_users} users the intervals are narrower than 95 % ones should be."


def _said(score: MethodScore | None, finding: Finding) -> str:
    if score is None or score.gain is None:
        return "Right and shuffled users were not both measured, so nothing is said about personalisation."
    if finding is Finding.NOT_MEASURED:
        return f"Only {score.num_users} user(s) have scored targets: too few to say whether it personalises."
    amount = _amount(score.gain)
    if finding is Finding.PERSONALISES:
        return f"The right user's soft token beats a shuffled user's by {amount}: it personalises."
    if finding is Finding.HARMS:
        return f"The right user's soft token loses to a shuffled user's by {amount}: it does not personalise."
    return f"Between the right user's soft token and a shuffled user's no difference is shown ({_signed(score.gain)})."


_AGAINST_CONSTANT = (
    "one constant learned token",
    "the gain is more than adaptation to the task",
    "adaptation to the task alone does better",
    "what is gained over no soft token may be adaptation to the task alone",
)
_UNSURE_AGAINST_CONSTANT = (
    "one constant learned token",
    "what is gained may be adaptation to the task alone, as a shuffled user's soft token is not beaten",
    *_AGAINST_CONSTANT[2:],
)
# Seen on dialogues (tests/bench/LOG.md): 0.14 nats a token over a constant token, and nothing over a shuffled user.
_ALIKE_AGAINST_CONSTANT = (
    "one constant learned token",
    "so does another user's, as a projector adapts to the task faster than one token does",
    *_AGAINST_CONSTANT[2:],
)
_AGAINST_MEAN = ("the mean user's soft token", "", "", "")
_AGAINST_NONE = ("no soft token at all", "", "the soft token harms", "")


def _against_constant(finding: Finding, shuffled_over_constant: Interval | None) -> tuple[str, str, str, str]:
    """What a difference from the constant token means: that another user's beats it, too, is said where it does."""
    if finding is Finding.PERSONALISES:
        return _AGAINST_CONSTANT
    if shuffled_over_constant is not None and shuffled_over_constant.is_above_zero:
        return _ALIKE_AGAINST_CONSTANT
    return _UNSURE_AGAINST_CONSTANT


def _against(gain: Interval, rival: str, if_better: str, if_worse: str, if_equal: str) -> str:
    if gain.is_above_zero:
        sentence, reason = f"It beats {rival} by {_amount(gain)}", if_better
    elif gain.is_below_zero:
        sentence, reason = f"It loses to {rival} by {_amount(gain)}", if_worse
    else:
        sentence, reason = f"Against {rival} no difference is shown ({_signed(gain)})", if_equal
    return f"{sentence}: {reason}." if reason else f"{sentence}."


def _amount(gain: Interval) -> str:
    """The size of a difference whose sign the sentence names."""
    low, high = sorted((abs(gain.low), abs(gain.high)))
    return f"{abs(gain.value):.4f} nats a token (95 % interval {low:.4f} to {high:.4f})"


def _signed(gain: Interval) -> str:
    value, bounds = gain_text(gain)
    return f"{value} nats a token, 95 % interval {bounds}"
