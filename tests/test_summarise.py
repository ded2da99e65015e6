"""An evaluation as a whole: its words follow its intervals, it survives JSON, and it names nobody."""

from __future__ import annotations

import polars as pl
import pytest

from e2p_ray.downstream.evaluation import Evaluation, MethodCost, summarise
from e2p_ray.downstream.measures.likelihood import score_methods, user_totals
from e2p_ray.downstream.measures.verdict import Finding, conclude
from e2p_ray.downstream.pages.columns import width
from tests.evaluation_world import (
    METHODS,
    NUM_CONTENTS,
    NUM_USERS,
    costs,
    matrices,
    ranking_frame,
    scores_frame,
    texts_frame,
    whole_evaluation,
)


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return whole_evaluation()


def test_a_clear_gain_is_called_personalisation(whole: Evaluation) -> None:
    first, *others = whole.conclusion.sentences
    shuffled = whole.score("shuffled")
    assert whole.conclusion.finding is Finding.PERSONALISES
    assert shuffled is not None
    assert shuffled.gain is not None
    assert first == (
        f"The right user's soft token beats a shuffled user's by {shuffled.gain.value:.4f} nats a token "
        f"(95 % interval {shuffled.gain.low:.4f} to {shuffled.gain.high:.4f}): it personalises."
    )
    assert sum(sentence.endswith("it personalises.") for sentence in others) == 2, "each language"


@pytest.mark.parametrize(
    ("gain", "num_users", "finding", "words"),
    [
        (-0.05, NUM_USERS, Finding.HARMS, "loses to a shuffled user's"),
        (0.05, 3, Finding.NOT_MEASURED, "Only 3 user(s)"),
    ],
)
def test_the_words_follow_the_interval(gain: float, num_users: int, finding: Finding, words: str) -> None:
    found = summarise(scores_frame(gain=gain, num_users=num_users), [], about={}, seed=0).conclusion
    assert found.finding is finding
    assert words in found.sentences[0]
    assert ": it personalises" not in " ".join(found.sentences)


def test_what_any_user_gains_over_a_constant_token_is_not_called_personal() -> None:
    dearer = pl.when(pl.col("method") == "constant").then(0.3 * pl.col("num_tokens")).otherwise(0.0)
    same = scores_frame(gain=0.0).filter(pl.col("method") != "shuffled")
    shuffled = same.filter(method="right").with_columns(method=pl.lit("shuffled"))
    found = summarise(pl.concat([same, shuffled]).with_columns(nll=pl.col("nll") + dearer), [], about={}, seed=0)
    said = next(sentence for sentence in found.conclusion.sentences if "constant learned token" in sentence)
    assert "so does another user's" in said
    own = summarise(scores_frame().with_columns(nll=pl.col("nll") + dearer), [], about={}, seed=0)
    assert any("more than adaptation" in sentence for sentence in own.conclusion.sentences), "the control"


def test_what_another_user_gains_over_a_constant_token_is_said_only_where_it_does() -> None:
    """The right user beats the constant token, and nobody else does; but a shuffled one has much luck, good and bad."""
    rows = scores_frame().filter(method="right")
    luck = pl.when(pl.col("user_id").hash(seed=1) % 2 == 0).then(-0.3).otherwise(0.3)
    losses = {"right": pl.lit(2.98), "constant": pl.lit(3.0), "shuffled": 3.0 + luck}
    frame = pl.concat(
        rows.with_columns(method=pl.lit(name), nll=loss * pl.col("num_tokens")) for name, loss in losses.items()
    )
    found = summarise(frame, [], about={}, seed=0).conclusion
    assert found.finding is Finding.NOT_SHOWN
    (said,) = [sentence for sentence in found.sentences if "It beats one constant learned token" in sentence]
    assert "so does another user's" not in said
    assert "may be adaptation to the task alone" in said


def test_the_fewest_users_allowed_seldom_show_a_gain_that_is_not_there() -> None:
    """In worlds where nobody gains: 2.5 of 100 by the interval's name."""
    methods = pl.col("method").is_in(["right", "shuffled"])

    def finding(num_users: int, seed: int) -> Finding:
        rows = scores_frame(gain=0.0, seed=seed, num_users=num_users).filter(methods)
        return conclude(score_methods("all", user_totals(rows), seed=0), ["en"]).finding

    fewest = next(number for number in range(1, NUM_USERS) if finding(number, 0) is not Finding.NOT_MEASURED)
    findings = [finding(fewest, seed) for seed in range(300)]
    assert findings.count(Finding.PERSONALISES) < 0.06 * len(findings)


@pytest.mark.parametrize(("num_users", "is_said"), [(24, True), (60, False)])
def test_few_users_are_called_few(num_users: int, is_said: bool) -> None:
    first = summarise(scores_frame(num_users=num_users), [], about={}, seed=0).conclusion.sentences[0]
    assert (f"With {num_users} users the intervals are narrower" in first) == is_said


def test_without_a_gain_none_is_shown() -> None:
    """Of 20 worlds in which the right user is no better, the interval leaves zero in about one."""
    methods = pl.col("method").is_in(["right", "shuffled"])
    frames = [scores_frame(gain=0.0, seed=seed, num_users=30).filter(methods) for seed in range(20)]
    found = [summarise(frame, [], about={}, seed=0).conclusion for frame in frames]
    same = [conclusion for conclusion in found if conclusion.finding is Finding.NOT_SHOWN]
    assert len(same) >= 16
    assert all("no difference is shown" in conclusion.sentences[0] for conclusion in same)
    assert not any(": it personalises" in conclusion.sentences[0] for conclusion in same)


def test_a_better_method_is_named() -> None:
    saved = pl.col("method").replace_strict({"lora": 0.1, "our_own_method": 0.2}, default=0.0)
    frame = scores_frame().with_columns(nll=pl.col("nll") - saved * pl.col("num_tokens"))
    said = summarise(frame, [], about={}, seed=0).conclusion.sentences
    (sentence,) = [sentence for sentence in said if sentence.startswith("Better than the right user's")]
    assert sentence.index("our_own_method by 0.1") < sentence.index("LoRA by 0.0")
    assert "profile" not in sentence
    assert not any("Better than" in sentence for sentence in whole_evaluation().conclusion.sentences)


def test_without_the_shuffled_user_nothing_is_said() -> None:
    frame = scores_frame().filter(pl.col("method") != "shuffled")
    found = summarise(frame, [MethodCost("right")], about={}, seed=0)
    assert found.conclusion.finding is Finding.NOT_MEASURED
    assert "not both measured" in found.conclusion.sentences[0]
    assert found.lines()


def test_an_evaluation_survives_json_and_names_nobody(whole: Evaluation) -> None:
    written = whole.to_json()
    assert Evaluation.from_json(written) == whole
    for text in (written, whole.lines()):
        assert "reader-" not in text
        assert "article-" not in text
        assert "impression-" not in text
    assert whole.num_contents == NUM_CONTENTS


def test_the_order_of_rows_does_not_matter(whole: Evaluation) -> None:
    mixed = [
        frame.sample(fraction=1, shuffle=True, seed=3) for frame in (scores_frame(), texts_frame(), ranking_frame())
    ]
    moved = summarise(mixed[0], costs(), retrieval=matrices(), texts=mixed[1], ranking=mixed[2], about={}, seed=0)
    for ours, theirs in zip(whole.scores, moved.scores, strict=True):
        assert theirs.nll_per_token.low == pytest.approx(ours.nll_per_token.low)
    assert [one.auc.value for one in moved.ranking] == pytest.approx([one.auc.value for one in whole.ranking])
    assert (moved.texts, moved.samples, moved.retrieval) == (whole.texts, whole.samples, whole.retrieval)


def test_the_terminal_table_is_aligned_and_narrow(whole: Evaluation) -> None:
    lines = whole.lines().splitlines()
    assert max(map(width, lines)) <= 115
    start = next(index for index, line in enumerate(lines) if line.startswith("method"))
    table = lines[start : start + 1 + len(METHODS)]
    edge = lines[start].index("nats/token") + len("nats/token")
    for line in table:
        assert line[edge - 1] != " "
        assert line[edge : edge + 2] == "  "
    for words_ in ("right user", "LoRA", "our_own_method", "which user?", "ranking clicks", "drift", "1.25M"):
        assert words_ in whole.lines()
