"""Made-up scores, texts, rankings and likelihoods in two languages, with a known gain of the right user."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from e2p_ray.downstream.evaluation import DriftPoint, Evaluation, MethodCost, summarise
from e2p_ray.downstream.measures.bootstrap import Interval
from e2p_ray.downstream.measures.retrieval import LikelihoodMatrix

METHODS = {  # nats a token above the right user, in gains
    "right": 0.0,
    "shuffled": 1.0,
    "mean": 0.8,
    "no_soft_token": 6.0,
    "constant": 0.7,
    "profile_text_constant": 0.5,
    "lora": 0.2,
    "our_own_method": 0.6,
}
NUM_USERS, NUM_CONTENTS = 60, 8
EVIL = "<script>document.title='owned'</script>\"'&<img src=x onerror=document.title='owned'>"
_TITLES = {
    "en": ("Harbour bridge opens", "The city opened a bridge on Monday. It cost 40 million dollars."),
    "ja": ("港の新しい橋が開通", "月曜日に橋が開通した。費用は40億円。佐藤市長がテープを切った。"),
}
_TEXTS = {
    "en": ("A bridge for 40 million", "The city opened a bridge", "Who paid for the bridge?", "Monday: bridge opens!"),
    "ja": ("費用40億円の橋が開通", "橋が開通した", "橋の費用は誰が?", "佐藤市長「橋が開通」"),
}


def user_id(number: int) -> str:
    """Such ids must be found in no output."""
    return f"reader-{number:04d}"


def scores_frame(*, gain: float = 0.05, noise: float = 0.05, seed: int = 0, num_users: int = NUM_USERS) -> pl.DataFrame:
    """Every user has five targets in one language; a user's own luck is shared by all of the user's targets."""
    random = np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    for user in range(num_users):
        luck = random.normal(0, noise, len(METHODS))
        for content in random.choice(NUM_CONTENTS, 5, replace=False):
            num_tokens, level = int(random.integers(6, 20)), random.normal(3.0, 0.3)
            for (method, times), own in zip(METHODS.items(), luck, strict=True):
                loss = level + times * gain + (own if method != "right" else 0.0)
                language = ("en", "ja")[user % 2]
                key = (method, "headline", language, user_id(user), f"article-{content}")
                rows.append((*key, num_tokens, loss * num_tokens, 5 + user))
    names = ["method", "task", "language", "user_id", "content_id", "num_tokens", "nll", "history_size"]
    kinds: dict[str, Any] = dict.fromkeys(names, pl.String)
    kinds |= {"num_tokens": pl.Int64, "nll": pl.Float64, "history_size": pl.Int64}
    return pl.DataFrame(rows, schema=kinds, orient="row")


def texts_frame(
    *, title: str | None = None, methods: tuple[str, ...] = ("right", "shuffled", "no_soft_token")
) -> pl.DataFrame:
    """Three users a content; the right user's texts are the references, but for one letter."""
    rows = []
    for content in range(NUM_CONTENTS):
        language = ("en", "ja")[content % 2]
        own_title, body = _TITLES[language]
        for user in range(3):
            reference = _TEXTS[language][(user + content) % 4]
            texts = {"right": reference[:-1] + ".", "shuffled": _TEXTS[language][(user + content + 1) % 4]}
            for method in methods:
                key = (method, "headline", language, user_id(2 * user + content % 2), f"article-{content}")
                text = texts.get(method, own_title)
                rows.append((*key, text, reference, title or own_title, body))
    names = ["method", "task", "language", "user_id", "content_id", "text", "reference", "title", "body"]
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def ranking_frame(*, num_impressions: int = 40, seed: int = 0) -> pl.DataFrame:
    """Five candidates an impression, one or two clicked, which `right` half knows; the last two have one class only."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(num_impressions):
        num_clicked = {num_impressions - 1: 0, num_impressions - 2: 5}.get(number, 1 + number % 2)
        for place in range(5):
            clicked = place < num_clicked
            for method, worth in (("right", 1.0), ("shuffled", 0.0)):
                score = random.normal(worth * clicked, 1.0)
                key = (method, f"impression-{number}", user_id(number % 13), f"article-{place}")
                rows.append((*key, score, clicked))
    kinds: dict[str, Any] = dict.fromkeys(["method", "impression_id", "user_id", "content_id"], pl.String)
    return pl.DataFrame(rows, schema=kinds | {"score": pl.Float64, "clicked": pl.Boolean}, orient="row")


def matrices(*, seed: int = 0) -> list[LikelihoodMatrix]:
    """The right user's texts are 2 nats likelier; a constant method gives every user the same."""
    random = np.random.default_rng(seed)
    found = []
    for language in ("en", "ja"):
        right = random.integers(12, size=30)
        values = random.normal(-30, 3, (30, 1)) + random.normal(0, 1, (30, 12)) + random.normal(0, 3, 12)
        constant = np.repeat(values.mean(axis=1, keepdims=True), 12, axis=1)
        values[np.arange(30), right] += 2.0
        found += [
            LikelihoodMatrix("right", language, values, right),
            LikelihoodMatrix("constant", language, constant, right),
        ]
    return found


def drift_points() -> list[DriftPoint]:
    """Loss grows with noise; one point each of later and refit user embeddings."""
    amounts = (0.0, 0.25, 0.5, 1.0, 2.0)
    points = [
        DriftPoint("noise", a, 3.0 + a / 40, Interval(3.0 + a / 40, 2.96 + a / 40, 3.04 + a / 40)) for a in amounts
    ]
    single = {"later": Interval(3.004, 2.965, 3.045), "refit": Interval(3.072, 3.03, 3.115)}
    return points + [DriftPoint(kind, 1.0, interval.value, interval) for kind, interval in single.items()]


def costs() -> list[MethodCost]:
    return [
        MethodCost("right", 1_247_232, 131.4, 1.0, 412.0, 38.5),
        MethodCost("shuffled", 1_247_232, 131.4, 1.0, 412.0, 38.5),
        MethodCost("constant", 256, 131.4, 1.0, 410.0),
        MethodCost("profile_text_constant", 256, 223.9, 93.5, 31.7, 96.2),
        MethodCost("lora", 2_400_000, 130.4, 0.0),
    ]


def whole_evaluation(*, gain: float = 0.05, title: str | None = None, about: str = "pens, seed 0") -> Evaluation:
    """An evaluation with everything that it can hold."""
    return summarise(
        scores_frame(gain=gain),
        costs(),
        retrieval=matrices(),
        texts=texts_frame(title=title),
        ranking=ranking_frame(),
        drift=drift_points(),
        about={"projector": about, "base model": "news-lm-6m@1"},
        seed=0,
    )
