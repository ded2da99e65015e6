"""User embeddings from what users wrote: how they write (style) and what they write about (words).

One fit gives one basis. Later texts of the same users are projected with that basis and stay in its embedding space.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from tests.real.style import style_features

FloatArray = npt.NDArray[np.float64]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_MAX_SIZE = 3.0  # standard deviations: one odd user must not stretch an axis
_TYPICAL = 2.5  # how many standard errors a share must lie above all users' to be called typical


class Written(NamedTuple):
    """A text of a user; `about` (its subject, not its style) counts for the words only."""

    text: str
    about: str = ""


History = Mapping[str, Sequence[Written]]  # by user id; every user has at least one text


@dataclass(frozen=True, slots=True)
class VectorSettings:
    """How many axes for style and for words, and which terms count."""

    num_style: int = 10
    num_words: int = 6
    min_users: int = 5  # a term that fewer users wrote is left out
    char_ngram: int = 3  # 0: words and word pairs only
    prior_texts: float = 10.0  # so many average texts are added to every user's: a few texts are no strong opinion

    @property
    def num_axes(self) -> int:
        return self.num_style + self.num_words


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """Raw features of users: means over their texts."""

    num_texts: FloatArray  # (n, 1)
    style: FloatArray  # (n, num_features)
    words: FloatArray  # (n, num_terms)


@dataclass(frozen=True, slots=True, eq=False)
class Axes:
    """Raw features, averaged over a user's texts -> axes of mean 0; of variance 1 over the users of the fit, shrunk."""

    average: FloatArray  # (num_features,) over the texts of the fit
    matrix: FloatArray  # (num_features, num_axes)

    def project(self, means: FloatArray) -> FloatArray:
        return np.asarray((means - self.average) @ self.matrix, np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A basis; its embedding space is named by all that it is made of."""

    settings: VectorSettings
    terms: Mapping[str, int]  # term -> column
    style: Axes
    words: Axes
    rotation: FloatArray  # (d, d)

    @property
    def embedding_space(self) -> str:
        digest = hashlib.sha256(json.dumps([asdict(self.settings), list(self.terms)]).encode())
        for array in (self.style.average, self.style.matrix, self.words.average, self.words.matrix, self.rotation):
            digest.update(np.ascontiguousarray(array).tobytes())
        return f"texts{self.settings.num_axes}-{digest.hexdigest()[:12]}"

    def rotated(self, seed: int) -> Fit:
        """The same axes turned at random: what another fit of most models gives, a space of its own."""
        dim = len(self.rotation)
        rotation, _ = np.linalg.qr(np.random.default_rng([seed, dim]).standard_normal((dim, dim)))
        return replace(self, rotation=np.asarray(rotation, np.float64))

    def measure(self, history: History) -> Measures:
        """Raw features of these users, rows in the order of the history's users."""
        return Measures(
            np.array([[len(texts)] for texts in history.values()], np.float64),
            _over_users(history, _style(history)),
            _over_users(history, _presence(history, self.terms, self.settings)),
        )

    def project(self, measures: Measures) -> npt.NDArray[np.float32]:
        """User embeddings (n, d)."""
        shrink = measures.num_texts / (measures.num_texts + self.settings.prior_texts)
        both = np.concatenate([self.style.project(measures.style), self.words.project(measures.words)], axis=1)
        return np.ascontiguousarray(np.clip(both * shrink, -_MAX_SIZE, _MAX_SIZE) @ self.rotation, np.float32)

    def typical_words(self, measures: Measures, max_words: int = 6) -> list[list[str]]:
        """For every user the words that he writes clearly more often than all users do, most typical first."""
        expected = np.maximum(self.words.average, 1e-6)
        scores = (measures.words - expected) / np.sqrt(expected / measures.num_texts)
        names = list(self.terms)
        plain = np.array([place for place, name in enumerate(names) if len(name) > 2 and name.isalpha()], np.int64)
        order = np.argsort(-scores[:, plain], axis=1, kind="stable")[:, :max_words]
        return [
            [names[place] for place in plain[row].tolist() if scores[user, place] > _TYPICAL]
            for user, row in enumerate(order)
        ]


def fit_vectors(history: History, settings: VectorSettings) -> Fit:
    """Fit a basis to these users: the same texts and settings give the same basis."""
    terms = _common_terms(history, settings)
    style = _axes(history, csr_matrix(_style(history)), settings.num_style, settings.prior_texts)
    words = _axes(history, _presence(history, terms, settings), settings.num_words, settings.prior_texts)
    return Fit(settings, terms, style, words, np.eye(settings.num_axes))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _terms(written: Written, settings: VectorSettings) -> set[str]:
    words = words_of(written.text)
    pairs = [" ".join(pair) for pair in zip(["^", *words], [*words, "$"], strict=True)]  # ^ and $: first and last word
    terms = {*words, *pairs, *words_of(written.about)}
    if size := settings.char_ngram:
        padded = f" {written.text} "  # in its own case: capitals and punctuation are style
        terms.update(f"#{padded[i : i + size]}" for i in range(len(padded) - size + 1))
    return terms


def _common_terms(history: History, settings: VectorSettings) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for texts in history.values():
        counts.update(set().union(*(_terms(written, settings) for written in texts)))
    common = sorted(term for term, count in counts.items() if count >= settings.min_users)
    return {term: place for place, term in enumerate(common)}


def _style(history: History) -> FloatArray:
    return np.array([style_features(written.text) for texts in history.values() for written in texts])


def _presence(history: History, terms: Mapping[str, int], settings: VectorSettings) -> csr_matrix:
    """(num_texts, num_terms): 1 where a text has the term."""
    found = [
        sorted(terms[term] for term in _terms(written, settings) if term in terms)
        for texts in history.values()
        for written in texts
    ]
    columns = np.array([column for row in found for column in row], np.int64)
    ends = np.cumsum([0, *map(len, found)])
    return csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(found), len(terms)))


def _over_users(history: History, features: FloatArray | csr_matrix) -> FloatArray:
    """(num_texts, num_features) -> (num_users, num_features): the mean over each user's texts."""
    sizes = np.array([len(texts) for texts in history.values()])
    assert sizes.min() > 0, "every user wrote something"
    ends = np.concatenate([[0], np.cumsum(sizes)])
    averaging = csr_matrix((np.repeat(1 / sizes, sizes), np.arange(sizes.sum()), ends), shape=(len(sizes), sizes.sum()))
    means = averaging @ features
    return np.asarray(means if isinstance(means, np.ndarray) else means.toarray(), np.float64)


def _axes(history: History, features: csr_matrix, num_axes: int, prior_texts: float) -> Axes:
    """The first principal axes over the users, each feature in units of its deviation over single texts.

    So a rare term, or one that varies much from text to text, needs a clear difference between users to count.
    """
    average = np.asarray(features.mean(axis=0)).reshape(-1)
    variance = np.asarray(features.power(2).mean(axis=0)).reshape(-1) - average**2
    scale = 1 / np.sqrt(np.maximum(variance, 1e-6))
    num_texts = np.array([[len(texts)] for texts in history.values()], np.float64)
    shrunk = (_over_users(history, features) - average) * num_texts / (num_texts + prior_texts)
    left, sizes, right = np.linalg.svd(shrunk * scale, full_matrices=False)
    kept = right[:num_axes].T
    # The decomposition leaves the signs open.
    signs = np.where(kept[np.abs(kept).argmax(0), np.arange(num_axes)] < 0, -1.0, 1.0)
    return Axes(average, scale[:, None] * kept * signs / sizes[:num_axes] * np.sqrt(len(left)))
