"""Recent events in a request: folded into the user embedding by the documented formula, and used with consent alone.

The formula is written a second time here, in plain Python numbers and without the code under test.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import numpy as np
import pytest
from pydantic import ValidationError

import jobs.whole_run
from e2p_ray.config import JobConfig, ProfileConfig
from e2p_ray.plan.inputs import Space
from e2p_ray.schema import Reason, Status, UserEmbedding
from e2p_ray.serve.client import InvalidRequestError
from e2p_ray.serve.lookup import Tables, User
from e2p_ray.serve.messages import Event, GenerationAnswer, ProblemBody, UserPart
from e2p_ray.serve.problems import ProblemError
from e2p_ray.serve.profile import given_events
from jobs.whole_run import generate_run
from tests.serve_world import TOKENS, Site, serve_config, serving
from tests.small_job import DIM, SPACE, fake_engine, write_small_job
from tests.update_world import serial_batch

OPTED_OUT, NO_EMBEDDING, OTHER_SPACE, PLAIN = (f"user-{n:04d}" for n in range(4))
CONFIG = ProfileConfig()
FIRST = [0.0] * (DIM - 1) + [3.0]  # an event's direction
SECOND = [(-1.0) ** n * (n + 1) for n in range(DIM)]
LATELY = [{"embedding": FIRST, "age_s": 30.0}, {"embedding": SECOND, "age_s": 7200.0, "weight": 2.5}]


def reference(stored: Sequence[float], events: Sequence[dict[str, Any]], config: ProfileConfig) -> list[float]:
    """The formula of the README, number by number."""

    def unit(values: Sequence[float]) -> list[float]:
        length = math.sqrt(math.fsum(value * value for value in values))
        return [value / length for value in values]

    weights = [e.get("weight", 1.0) * 0.5 ** (e.get("age_s", 0.0) / config.half_life_s) for e in events]
    total = math.fsum(weights)
    share = min(total / (total + config.stored_events), config.max_share)
    directions = [unit(event["embedding"]) for event in events]
    mean = [math.fsum(w * d[at] for w, d in zip(weights, directions, strict=True)) / total for at in range(len(stored))]
    turned = unit([(1 - share) * own + share * new for own, new in zip(unit(stored), mean, strict=True)])
    length = math.sqrt(math.fsum(value * value for value in stored))
    return [length * value for value in turned]


def fold(stored: UserEmbedding, events: Sequence[dict[str, Any]], config: ProfileConfig = CONFIG) -> UserEmbedding:
    asked = UserPart.model_validate({"user_id": "u", "embedding_space": "s", "events": list(events)})
    found = given_events(asked, Space("s", len(stored)), config)
    return stored if found is None else found.fold_into(stored, config)


def angle(first: UserEmbedding, second: UserEmbedding) -> float:
    a, b = first.astype(np.float64), second.astype(np.float64)
    return math.acos(min(1.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))))


# -- the formula -------------------------------------------------------------------------------------------------------


def test_events_are_folded_as_the_formula_says() -> None:
    rng = np.random.default_rng(3)
    for number in range(200):
        stored = (rng.standard_normal(16) * 10.0 ** rng.integers(-6, 7)).astype(np.float32)
        events = [
            {"embedding": (rng.standard_normal(16) * 10.0 ** rng.integers(-3, 4)).tolist(),
             "age_s": float(rng.exponential(1e5)), "weight": float(rng.uniform(0.1, 9))}
            for _ in range(1 + number % 9)
        ]  # fmt: skip
        config = ProfileConfig(
            half_life_s=float(rng.uniform(1e3, 1e6)), stored_events=float(rng.uniform(0.5, 20)), max_share=0.49
        )
        events32 = [event | {"embedding": np.float32(event["embedding"]).astype(float).tolist()} for event in events]
        wanted = reference(stored.astype(float).tolist(), events32, config)
        found = fold(stored, events, config)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * float(np.linalg.norm(stored)))
        assert not np.allclose(found, stored, rtol=1e-5), "the control: it is another embedding"


def test_length_stays_and_no_number_of_events_takes_over() -> None:
    stored = np.array([2.0, 0.0, 0.0], np.float32)
    against = {"embedding": [-1.0, 1e-3, 0.0], "weight": 1e6}
    found = fold(stored, [against] * 64)
    assert np.linalg.norm(found) == pytest.approx(2.0)
    assert angle(found, stored) < math.pi / 2, "a share below a half does not turn it around"
    free = fold(stored, [against] * 64, ProfileConfig(max_share=0.49, stored_events=1e-3))
    assert np.linalg.norm(free) == pytest.approx(2.0)
    aside = {"embedding": [0.0, 1.0, 0.0]}
    bends = [angle(fold(stored, [aside] * number), stored) for number in (1, 2, 4, 64)]
    assert bends == sorted(bends)
    assert bends[-1] == pytest.approx(math.atan2(CONFIG.max_share, 1 - CONFIG.max_share))
    assert bends[0] < bends[-1] / 2


def test_an_event_counts_by_weight_and_age_and_not_by_its_length() -> None:
    stored, aside = np.array([1.0, 0.0, 0.0], np.float32), [0.0, 1.0, 0.0]
    base = fold(stored, [{"embedding": aside}])
    twice = fold(stored, [{"embedding": aside, "weight": 2.0, "age_s": CONFIG.half_life_s}])
    np.testing.assert_allclose(twice, base, rtol=1e-6)
    np.testing.assert_array_equal(fold(stored, [{"embedding": [0.0, 64.0, 0.0]}]), base)
    older = fold(stored, [{"embedding": aside, "age_s": CONFIG.half_life_s}])
    assert angle(older, stored) < angle(base, stored), "the control: age alone counts"


def test_without_events_that_count_it_is_the_stored_one_exactly() -> None:
    stored = np.linspace(0.1, 0.7, 7).astype(np.float32)
    assert fold(stored, []) is stored
    assert fold(stored, [{"embedding": [1.0] * 7, "age_s": 1e300}]) is stored, "older than anything counts"
    assert fold(stored, [{"embedding": [1.0] * 7}], ProfileConfig(max_share=0.0)) is stored
    assert fold(stored, [{"embedding": [1.0] * 7}]) is not stored, "the control"


def test_what_cannot_be_folded_is_refused() -> None:
    huge = np.full(4, 3e38, np.float32)
    with pytest.raises(ProblemError) as refused:
        fold(huge, [{"embedding": [1.0, 0.0, 0.0, 0.0], "weight": 1e6}])
    assert refused.value.code == "embedding_non_finite"
    with pytest.raises(ValidationError):
        ProfileConfig(max_share=0.5)
    for wrong in ({"weight": 0.0}, {"weight": math.inf}, {"age_s": -1.0}, {"age_s": math.nan}, {"when": 1}):
        with pytest.raises(ValidationError):
            Event.model_validate({"embedding": [1.0]} | wrong)


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    config, _ = write_small_job(tmp_path_factory.mktemp("profile"), num_users=12)
    _publish(config)
    with serving(serve_config(config, profile={"max_events": 3})) as found:
        yield found


def _publish(config: JobConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.whole_run, "run_batch", serial_batch)
        generate_run(config, engine_factory=fake_engine)


ASK = {"content_id": "content-004", "embedding_space": SPACE}


def test_events_change_the_text_as_the_folded_embedding_would(site: Site) -> None:
    stored = site.service.tables.user(PLAIN, Space(SPACE, DIM)).user_embedding
    assert stored is not None
    moved = fold(stored, LATELY).tolist()
    with site.client() as client:
        published = client.generate("headline", user_id=PLAIN, content_id="content-004")
        assert published.source == "published"
        before = site.service.loaded.stats.num_draft_tokens
        lately = client.generate("headline", user_id=PLAIN, events=LATELY, **ASK)
        assert site.service.loaded.stats.num_draft_tokens > before, "the published text is the draft"
        given = client.generate("headline", user_id=PLAIN, embedding=moved, **ASK)
        assert (lately.source, lately.fingerprint, lately.text) == ("generated", given.fingerprint, given.text)
        assert lately.fingerprint != published.fingerprint, "the control: it is not the stored one's"
        assert lately.personalized
        none = client.generate("headline", user_id=PLAIN, events=[], **ASK)
        assert (none.source, none.text) == ("published", published.text)
        onto = client.generate("headline", embedding=moved, events=LATELY, **ASK)
        twice = client.generate("headline", embedding=fold(np.array(moved, np.float32), LATELY).tolist(), **ASK)
        assert onto.fingerprint == twice.fingerprint
        assert onto.fingerprint != given.fingerprint


def test_events_go_with_pairs_and_rankings_too(site: Site) -> None:
    person: dict[str, Any] = {"user_id": PLAIN, "embedding_space": SPACE, "events": LATELY}
    with site.client() as client:
        alone = client.generate("headline", content_id="content-004", **person)
        pairs = [person | {"content_id": "content-004"}, {"user_id": PLAIN, "content_id": "content-004"}]
        both = client.generate_batch("headline", pairs).results
        assert [one.fingerprint == alone.fingerprint for one in both if isinstance(one, GenerationAnswer)] == [1, 0]
        assert client.scores("headline", [{"content_id": "content-004"}], **person).personalized


def test_a_ranking_is_for_one_state_of_its_user(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table may be written anew, and the user opt out, while the candidates are looked up."""
    asked, plain = list[str](), Tables.user

    def then_opted_out(self: Tables, user_id: str, space: Space) -> User:
        asked.append(user_id)
        return plain(self, user_id if len(asked) == 1 else OPTED_OUT, space)

    monkeypatch.setattr(Tables, "user", then_opted_out)
    with site.client() as client:
        found = client.scores("headline", [{"content_id": f"content-{n:03d}"} for n in range(4)], user_id=PLAIN)
    assert asked == [PLAIN]
    assert found.personalized
    assert all(score.gain is not None for score in found.scores)


@pytest.mark.parametrize("user_id", [OPTED_OUT, "never-seen"])
def test_without_consent_events_are_not_used(site: Site, user_id: str) -> None:
    with site.client() as client:
        plain = client.generate("headline", user_id=user_id, content_id="content-002")
        asked = client.generate("headline", user_id=user_id, events=LATELY, **ASK | {"content_id": "content-002"})
    assert (asked.status, asked.reason, asked.personalized) == (Status.SUPPRESSED, Reason.OPTED_OUT, False)
    assert (asked.text, asked.consent) == (plain.text, plain.consent)


@pytest.mark.parametrize(
    ("user_id", "reason"), [(NO_EMBEDDING, "embedding_null"), (OTHER_SPACE, "embedding_other_space")]
)
def test_events_alone_are_no_user_embedding(site: Site, user_id: str, reason: str) -> None:
    with site.client() as client:
        asked = client.generate("headline", user_id=user_id, events=LATELY, **ASK)
    assert (asked.status, asked.reason, asked.personalized) == (Status.FALLBACK, Reason(reason), False)


USER = ASK | {"user_id": PLAIN, "task": "headline"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"events": [{"embedding": FIRST[1:]}]}, "embedding_wrong_size"),
    ({"events": LATELY, "embedding_space": "space-9"}, "embedding_other_space"),
    ({"events": [], "embedding_space": "space-9"}, "embedding_other_space"),
    ({"events": [{"embedding": [0.0] * DIM}]}, "embedding_zero"),
    ({"events": [{"embedding": [*FIRST[1:], 1e39]}]}, "embedding_non_finite"),
    ({"events": [{"embedding": FIRST}] * 4}, "too_many"),
    ({"events": [{"embedding": FIRST}] * 257}, "invalid_request"),
    ({"events": [{"embedding": FIRST, "weight": -1}]}, "invalid_request"),
    ({"events": [{"embedding": FIRST, "happened": "click"}]}, "invalid_request"),
    ({"events": LATELY, "embedding_space": None}, "invalid_request"),
    ({"events": LATELY, "user_id": None}, "invalid_request"),
]


def _post(site: Site, path: str, body: str) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {TOKENS[0]}", "Content-Type": "application/json"}
    return httpx2.post(f"{site.url}{path}", content=body.encode(), headers=headers, timeout=30)


@pytest.mark.parametrize("user_id", [PLAIN, OPTED_OUT])
@pytest.mark.parametrize(("change", "code"), REFUSED)
def test_events_that_do_not_fit_are_problems_whatever_the_consent(
    site: Site, change: dict[str, Any], code: str, user_id: str
) -> None:
    response = _post(site, "/v1/generations", json.dumps(USER | {"user_id": user_id} | change))
    problem = ProblemBody.model_validate_json(response.content)
    assert (response.status_code, problem.code) == (422, code)


def test_numbers_that_are_none_are_refused_and_the_client_says_so(site: Site) -> None:
    good = json.dumps(USER | {"events": LATELY})
    assert _post(site, "/v1/generations", good).status_code == 200, "the control"
    for number in ("NaN", "Infinity", "1e999"):
        response = _post(site, "/v1/generations", good.replace("3.0]", f"{number}]"))
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    with site.client() as client, pytest.raises(InvalidRequestError) as refused:
        client.generate("headline", user_id=PLAIN, events=[{"embedding": FIRST[1:]}], **ASK)
    assert refused.value.code == "embedding_wrong_size"


def test_an_event_is_in_no_answer_no_error_and_no_log(
    site: Site, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    canary = [0.918273645546372, *FIRST[1:]]
    event = {"embedding": canary, "weight": 7.65432198, "age_s": 1234.56789}
    bodies: list[dict[str, Any]] = [USER | {"events": [event]}]
    bodies += [USER | {"events": [event | change]} for change in ({"embedding": canary[1:]}, {"x": 1}, {"weight": "a"})]
    bodies += [USER | {"events": [event], name: "other"} for name in ("embedding_space", "task", "timeout_ms")]
    bodies += [USER | {"events": event}, USER | {"events": [canary]}, USER | {"events": [event] * 4}]
    said = ""
    for body in bodies:
        for path in ("/v1/generations", "/v1/scores", "/v1/generations:batch"):
            response = _post(site, path, json.dumps(body))
            assert response.status_code < 500
            said += response.text + str(response.headers)
    stream = _post(site, "/v1/generations", json.dumps(bodies[0] | {"stream": True}))
    assert "event: done" in stream.text
    logs = capfd.readouterr()
    said += stream.text + logs.out + logs.err + caplog.text
    data = np.array(canary, "<f4").tobytes()
    for mark in ("0.918273", ".91827", "7.6543", "1234.5", data.hex()[:16], base64.b64encode(data).decode()[:12]):
        assert mark not in said
    assert "0.918273" in json.dumps(bodies), "the control: it is found where it is"
    asked = UserPart.model_validate({"user_id": PLAIN, "embedding_space": SPACE, "events": [event]})
    assert "0.918273" not in repr(asked)


def test_openapi_shows_events(site: Site) -> None:
    headers = {"Authorization": f"Bearer {TOKENS[0]}"}
    found = httpx2.get(f"{site.url}/openapi.json", headers=headers).json()["components"]["schemas"]
    assert "events" in found["Pair"]["properties"]
    (example,) = [one for one in found["GenerationRequest"]["examples"] if "events" in one]
    assert (
        len(UserPart.model_validate({k: example[k] for k in UserPart.model_fields if k in example}).events or ()) == 2
    )
