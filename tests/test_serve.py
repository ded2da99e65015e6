"""The API over real HTTP: what is looked up, written and refused, and that nobody learns what they must not.

With the fake engine: the texts of the real one are compared in test_serve_engine.py.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pydantic import ValidationError

import jobs.whole_run
from e2p_ray.config import ApiConfig, JobConfig, ServeConfig
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.engine.manifest import ProjectorManifest, read_manifest
from e2p_ray.errors import ConfigError, IncompatibleError, InputError, StorageError
from e2p_ray.fingerprint import TextSettings
from e2p_ray.loaded import EngineFactory, LoadedGenerator
from e2p_ray.plan.inputs import Space
from e2p_ray.schema import Content, Reason, Request, RequestKey, Status
from e2p_ray.serve.client import (
    Client,
    DeadlineError,
    InvalidRequestError,
    ServiceError,
    Token,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
)
from e2p_ray.serve.copies import Budget, Copies
from e2p_ray.serve.gate import TokenBucket
from e2p_ray.serve.log import ReplicaLog
from e2p_ray.serve.lookup import Tables
from e2p_ray.serve.loop import ModelLoop
from e2p_ray.serve.messages import Consent, GenerationAnswer, ProblemBody, ScoresAnswer
from e2p_ray.serve.pauses import Pauses
from e2p_ray.serve.problems import ProblemError
from e2p_ray.serve.replica import Replica
from e2p_ray.storage import ObjectInfo, Storage
from jobs.whole_run import generate_run
from tests.bad_engines import without_logits
from tests.plan_world import with_broken
from tests.serve_world import TOKENS, Site, serve_config, serving, slow
from tests.small_job import DIM, SPACE, fake_engine, first_groups, write_small_job
from tests.update_world import serial_batch
from tests.waiting import wait_until

VECTOR = np.linspace(0.1234567, 0.7654321, DIM).tolist()
OPTED_OUT, NO_EMBEDDING, OTHER_SPACE, PLAIN = (f"user-{n:04d}" for n in range(4))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    return write_small_job(tmp_path_factory.mktemp("serve"))[0]


@pytest.fixture(scope="module")
def published(job: JobConfig) -> JobConfig:
    """The same job after its batch: its table is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.whole_run, "run_batch", serial_batch)
        generate_run(job, engine_factory=fake_engine)
    return job


@pytest.fixture(scope="module")
def site(published: JobConfig) -> Iterator[Site]:
    with serving(serve_config(published)) as found:
        yield found


def rows_of(config: JobConfig) -> dict[RequestKey, dict[str, Any]]:
    rows = DeltaTable(config.output.table_uri).to_pyarrow_table().to_pylist()
    return {RequestKey(row["user_id"], row["content_id"], row["task"]): row for row in rows}


def post(site: Site, path: str, body: Any, **options: Any) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {TOKENS[0]}"} | options.pop("headers", {})
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx2.post(f"{site.url}{path}", headers=headers, timeout=30, **given, **options)


# -- looking up --------------------------------------------------------------------------------------------------------


def test_every_published_text_is_returned_at_once_and_an_override_is_not_among_them(site: Site) -> None:
    rows = rows_of(site.service.config)
    assert len(rows) > 300
    before = site.service.loaded.stats
    with site.client() as client:
        for user_ids in [sorted({key.user_id for key in rows})[part::4] for part in range(4)]:
            keys = [key for key in rows if key.user_id in user_ids and key.task == "headline"]
            pairs = [{"user_id": key.user_id, "content_id": key.content_id} for key in keys]
            for key, answer in zip(keys, client.generate_batch("headline", pairs).results, strict=True):
                assert isinstance(answer, GenerationAnswer)
                assert (answer.source, answer.text, answer.status.value, answer.fingerprint) == (
                    "published", *(rows[key][name] for name in ("text", "status", "fingerprint")),
                )  # fmt: skip
        assert site.service.loaded.stats == before, "no model was asked"
        other = client.generate("headline", user_id=PLAIN, content_id="content-003", sampling={"temperature": 0.5})
        assert other.source == "generated", "the control: another sampling has another fingerprint"
        assert other.fingerprint not in {row["fingerprint"] for row in rows.values()}


def test_what_changed_since_is_written_with_the_published_text_as_draft(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.whole_run, "run_batch", serial_batch)
        generate_run(config, engine_factory=fake_engine)
    storage, uri = Storage(), config.inputs.contents_uri
    with serving(serve_config(config)) as site, site.client() as client:
        first = client.generate("headline", user_id=PLAIN, content_id="content-004")
        assert first.source == "published"
        table = storage.read_table(uri)
        bodies = [f"{body} It rained." for body in table["body"].to_pylist()]
        at = table.schema.get_field_index("body")
        storage.write_table(uri, table.set_column(at, "body", pa.array(bodies)))
        answer = _until(
            lambda: client.generate("headline", user_id=PLAIN, content_id="content-004"),
            lambda found: found.source == "generated",
        )
        assert answer.fingerprint != first.fingerprint
        assert site.service.loaded.stats.num_draft_tokens, "the published text was the draft"
        assert answer.text == first.text, "and the model chose it again"


def _until(ask: Callable[[], Any], holds: Callable[[Any], bool], timeout_s: float = 20.0) -> Any:
    """Ask until it holds; fails after a time that no machine needs."""
    over_s = time.monotonic() + timeout_s
    while not holds(found := ask()):
        assert time.monotonic() < over_s, found
        time.sleep(0.02)
    return found


# -- consent -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user_id", "consent", "status", "reason"),
    [
        (OPTED_OUT, Consent.REFUSED, Status.SUPPRESSED, Reason.OPTED_OUT),
        ("never-seen", Consent.UNKNOWN, Status.SUPPRESSED, Reason.OPTED_OUT),
        (NO_EMBEDDING, Consent.GIVEN, Status.FALLBACK, Reason.EMBEDDING_NULL),
        (OTHER_SPACE, Consent.GIVEN, Status.FALLBACK, Reason.EMBEDDING_OTHER_SPACE),
        (PLAIN, Consent.GIVEN, Status.OK, None),
    ],
)
def test_consent_decides_whatever_embedding_comes_with_the_request(
    site: Site, user_id: str, consent: Consent, status: Status, reason: Reason | None
) -> None:
    with site.client() as client:
        stored = client.generate("headline", user_id=user_id, content_id="content-000")
        given = client.generate(
            "headline", user_id=user_id, content_id="content-000", embedding=VECTOR, embedding_space=SPACE
        )
    assert (stored.consent, stored.status, stored.reason) == (consent, status, reason)
    assert given.consent == consent
    assert given.personalized == (consent is Consent.GIVEN), "a newer user embedding is used, with consent alone"


def test_an_opt_out_counts_after_the_refresh_and_old_tables_count_as_no_consent(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=6)
    storage, uri = Storage(), config.inputs.users_uri
    with serving(serve_config(config, tables={"max_staleness_s": 2.0})) as site, site.client() as client:

        def ask() -> GenerationAnswer:
            return client.generate("headline", user_id=PLAIN, content_id="content-000")

        def until(consent: Consent) -> GenerationAnswer:
            answer: GenerationAnswer = _until(ask, lambda found: found.consent is consent)
            assert answer.personalized == (consent is Consent.GIVEN)
            return answer

        until(Consent.GIVEN)
        users = storage.read_table(uri)
        refused = pc.and_(users["personalize"], pc.not_equal(users["user_id"], PLAIN))
        at = users.schema.get_field_index("personalize")
        storage.write_table(uri, users.set_column(at, "personalize", refused))
        until(Consent.REFUSED)
        storage.write_table(uri, users)
        until(Consent.GIVEN)
        storage.write_bytes(uri, b"this is no Parquet")
        assert until(Consent.UNKNOWN).reason is Reason.OPTED_OUT
        assert httpx2.get(f"{site.url}/readyz").json()["code"] == "stale_tables"
        storage.write_table(uri, users)
        until(Consent.GIVEN)
        assert httpx2.get(f"{site.url}/readyz").status_code == 200


def test_of_a_user_s_copies_the_latest_counts_and_of_equals_the_refusal(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=6)
    storage, uri = Storage(), config.inputs.users_uri
    users = storage.read_table(uri)
    again = users.filter(pc.is_in(users["user_id"], pa.array([PLAIN, "user-0004"])))
    at, when = users.schema.get_field_index("personalize"), users.schema.get_field_index("updated_at")
    again = again.set_column(at, "personalize", pa.array([False, False]))
    moment = again["updated_at"][0].value
    again = again.set_column(when, "updated_at", pa.array([moment, moment - 1], users.schema.field(when).type))
    storage.delete(uri)
    storage.write_table(f"{uri}/a.parquet", users)
    storage.write_table(f"{uri}/b.parquet", again)
    with serving(serve_config(config)) as site, site.client() as client:
        assert client.generate("headline", user_id=PLAIN, content_id="content-000").consent is Consent.REFUSED
        assert client.generate("headline", user_id="user-0004", content_id="content-000").consent is Consent.GIVEN


def test_tables_of_dictionaries_and_several_row_groups_are_read_as_the_plan_reads_them(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=20)
    for uri in (config.inputs.users_uri, config.inputs.contents_uri):
        table = Storage().read_table(uri)
        for at, name in enumerate(table.schema.names):
            if table.schema.field(at).type == pa.string():
                table = table.set_column(at, name, table[name].dictionary_encode())
        pq.write_table(table, uri, row_group_size=3)
        assert pq.ParquetFile(uri).metadata.num_row_groups > 1
    with serving(serve_config(config)) as site, site.client() as client:
        for number in range(20):
            answer = client.generate("headline", user_id=f"user-{number:04d}", content_id=f"content-00{number % 6}")
            kinds = [Status.SUPPRESSED, Status.FALLBACK, Status.FALLBACK]
            assert answer.status is (kinds + [Status.OK] * 7)[number % 10]


@pytest.mark.parametrize(("table", "column"), [("users", "user_id"), ("contents", "title")])
def test_bytes_that_are_no_text_are_named(table: str, column: str, tmp_path: Path) -> None:
    """At the start; later they are logged, and what was read before goes on."""
    config, _ = write_small_job(tmp_path, num_users=6)
    uri = getattr(config.inputs, f"{table}_uri")
    whole = Storage().read_table(uri)
    with serving(serve_config(config)) as site:
        pq.write_table(with_broken(whole, column, 4), uri, row_group_size=3)
        said = f"{uri}, column '{column}', row 4 .counted from 0.: not UTF-8. Write it anew"
        with pytest.raises(InputError, match=said):
            site.service.tables.refresh()
        with site.client() as client:
            assert client.generate("headline", user_id=PLAIN, content_id="content-000").consent is Consent.GIVEN
    with pytest.raises(InputError, match=said), serving(serve_config(config)):
        pass


def test_copies_are_bounded_in_bytes(job: JobConfig) -> None:
    config = serve_config(job)
    config = config.model_copy(update={"tables": config.tables.model_copy(update={"max_bytes": 1000})})
    with pytest.raises(ConfigError, match=r"tables\.max_bytes"), serving(config):
        pass


def test_a_table_that_takes_long_to_copy_makes_no_consent_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = write_small_job(tmp_path, num_users=6)
    config = serve_config(config, tables={"max_staleness_s": 0.5})
    free, space, plain = threading.Event(), Space(SPACE, DIM), Tables._refresh_published

    def copied(tables: Tables) -> None:
        free.wait(60)
        plain(tables)

    monkeypatch.setattr(Tables, "_refresh_published", copied)
    tables = Tables(config, Storage(), ReplicaLog())
    opening = threading.Thread(target=tables.open)
    opening.start()
    began_s = time.monotonic()
    wait_until(lambda: time.monotonic() > began_s + 1.5, "it is copied for longer than consent may be old")
    assert opening.is_alive(), "the control"
    wait_until(lambda: tables.user(PLAIN, space).consent is Consent.GIVEN, "it is known while it starts")
    free.set()
    opening.join(30)
    free.clear()
    wait_until(lambda: tables.ages_s()["published"] > 1.5, "it is copied again")
    wait_until(lambda: tables.user(PLAIN, space).consent is Consent.GIVEN, "it is known meanwhile")
    wait_until(lambda: tables.are_fresh, "so are contents")
    tables.close()
    free.set()


def test_a_table_that_cannot_be_read_keeps_no_other_one_old(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=6)
    storage, uri = Storage(), config.inputs.contents_uri
    contents = storage.read_table(uri)
    new = contents.slice(0, 1).set_column(0, "content_id", pa.array(["new"]))
    with serving(serve_config(config)) as site:
        storage.write_bytes(config.inputs.users_uri, b"this is no Parquet")
        storage.write_table(uri, pa.concat_tables([contents, new]))
        wait_until(lambda: site.service.tables.content("new"), "the new content")


def test_a_table_written_anew_has_room_though_both_have_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is said at the start. Old users go once they are too old; published rows at once."""
    config, _ = write_small_job(tmp_path, num_users=400)
    storage, uri = Storage(), config.inputs.users_uri
    with serving(serve_config(config)) as site:
        whole = site.service.tables.budget.num_bytes
        assert "table_without_room" not in capfd.readouterr().err, "the control"
    config = serve_config(config, tables={"max_staleness_s": 1.0})
    config = config.model_copy(update={"tables": config.tables.model_copy(update={"max_bytes": whole * 3 // 2})})
    with serving(config) as site:
        tables, space = site.service.tables, Space(SPACE, DIM)
        (said,) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "table_without_room" in line]
        assert said["table"] == "users"
        assert tables.user(PLAIN, space).consent is Consent.GIVEN
        users = storage.read_table(uri)
        refused = pc.and_(users["personalize"], pc.not_equal(users["user_id"], PLAIN))
        storage.write_table(uri, users.set_column(users.schema.get_field_index("personalize"), "personalize", refused))
        wait_until(lambda: tables.user(PLAIN, space).consent is Consent.REFUSED, "the new users")
        assert tables.budget.num_bytes <= whole


def test_what_may_be_forgotten_makes_room(tmp_path: Path) -> None:
    def written(name: str, rows: int) -> ObjectInfo:
        uri = str(tmp_path / name)
        Storage().write_table(uri, pa.table({"user_id": [f"{name}{n}" for n in range(rows)]}))
        info = Storage().info(uri)
        assert info is not None
        return info

    kept, old, new, larger = (written(name, rows) for name, rows in (("k", 100), ("o", 900), ("n", 900), ("l", 5000)))
    budget = Budget(60_000)
    copies = Copies(Storage(), ["user_id"], ["user_id"], budget, str(tmp_path))
    copies.refresh([kept, old])
    taken = budget.num_bytes
    with pytest.raises(ConfigError, match=r"tables\.max_bytes, 60,000.* twice"):
        copies.refresh([kept, new])
    assert copies.find("o8"), "the control: what was there goes on"
    copies.refresh([kept, new], may_forget=True)
    assert [bool(copies.find(key)) for key in ("k8", "o8", "n8")] == [True, False, True]
    assert budget.num_bytes == taken
    with pytest.raises(ConfigError):
        copies.refresh([kept, larger], may_forget=True)
    assert copies.find("k8"), "what stays is not given up"
    copies.refresh([])
    assert budget.num_bytes == 0


def test_no_room_for_copies_is_said_with_their_place(job: JobConfig, tmp_path: Path) -> None:
    place = str(tmp_path / "nothing")
    with pytest.raises(StorageError, match=rf"{place}: No such file or directory\. .*tables\.folder"):
        Tables(serve_config(job, tables={"folder": place}), Storage(), ReplicaLog()).open()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(StorageError, match=rf"{tmp_path}: File too large\. Make room there"):
            Tables(serve_config(job, tables={"folder": str(tmp_path)}), Storage(), ReplicaLog()).open()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_looks_that_come_too_late_for_consent_are_refused(job: JobConfig) -> None:
    with pytest.raises(ValidationError, match="below max_staleness_s"):
        serve_config(job, tables={"refresh_s": 300.0})


def test_languages_that_clients_make_up_are_not_kept(site: Site) -> None:
    def num_kept() -> int:
        return sum(type(found) is TextSettings for found in gc.get_objects())

    before, loaded = num_kept(), site.service.loaded
    request = Request(RequestKey(PLAIN, "content-000", "headline"), None)
    found = {loaded.fingerprint_of(request, Content("content-000", "T", "B.", f"x-{n}")) for n in range(1000)}
    assert len(found) == 1000, "the control: each counts"
    assert num_kept() - before <= 256


@pytest.mark.parametrize("field", ["title", "body", "user_id", "task"])
def test_half_a_character_is_refused(field: str, site: Site) -> None:
    """JSON can say a lone surrogate, UTF-8 cannot; found by 100,000 fuzzed requests."""
    content = {"title": "Bridge", "body": "The bridge opened.", "language": "en"}
    body = {"user_id": PLAIN, "task": "headline", "content": content}
    for broken, status in ((True, 422), (False, 200)):  # the second is the control
        asked = json.loads(json.dumps(body))
        (asked["content"] if field in content else asked)[field] += "\ud800" if broken else ""
        headers = {"Authorization": f"Bearer {TOKENS[0]}", "Content-Type": "application/json"}
        answer = httpx2.post(f"{site.url}/v1/generations", content=json.dumps(asked).encode(), headers=headers)
        assert answer.status_code == status
        assert not broken or ProblemBody.model_validate_json(answer.content).code


def test_a_copy_has_no_name_at_any_moment(tmp_path: Path) -> None:
    """So a replica that is killed leaves no user embeddings behind, also while it copies."""
    rows = pa.table({"user_id": [f"u{n}" for n in range(2000)], "value": range(2000)})
    pq.write_table(rows, tmp_path / "users.parquet", row_group_size=500)
    folder, seen = tmp_path / "copies", list[list[Path]]()
    folder.mkdir()

    def looking(table: pa.Table) -> pa.Table:
        seen.append(list(folder.iterdir()))
        return table

    files = [info for info in Storage().list_objects(str(tmp_path)) if info.name == "users.parquet"]
    copies = Copies(Storage(), ["user_id"], ["user_id", "value"], Budget(1 << 20), str(folder), change=looking)
    copies.refresh(files)
    assert len(seen) == 5, "once for the schema, once for each row group"
    assert not any(seen)
    assert copies.find("u1234")[0]["value"].to_pylist() == [1234]
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert [line.rpartition(" ")[2] for line in mapped] == ["(deleted)"], "control: it is in this folder, on the disk"


# -- streams, deadlines, disconnects -----------------------------------------------------------------------------------


def test_a_stream_ends_with_the_answer_that_it_gives_without(site: Site) -> None:
    content = {"title": "Bridge", "body": "The bridge opened. It cost 3 million.", "language": "en"}
    with site.client() as client:
        for user_id in (PLAIN, "user-0004", OPTED_OUT):
            plain = client.generate("headline", user_id=user_id, content=content)
            *tokens, done = client.stream("headline", user_id=user_id, content=content)
            assert isinstance(done, GenerationAnswer)
            assert (done.text, done.fingerprint, done.status) == (plain.text, plain.fingerprint, plain.status)
            drafts = "".join(token.text for token in tokens if isinstance(token, Token))
            assert drafts in ("", done.text), "the unpersonalised text is everybody's, and not streamed"
            assert bool(drafts) == done.personalized
        *_, done = client.stream("headline", user_id=PLAIN, content_id="a\u2028b\x85", content=content)
        assert isinstance(done, GenerationAnswer), "whatever else ends a line in some clients"
        assert done.content_id == "a\u2028b\x85"
        (only,) = client.stream("headline", user_id=PLAIN, content_id="content-003")
        assert isinstance(only, GenerationAnswer), "a published text needs no stream"
        assert only.source == "published"


def test_a_draft_that_is_rejected_is_taken_back(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=6)
    key = RequestKey(PLAIN, "content-000", "headline")

    def engine(config: JobConfig, storage: Storage) -> FakeEngine:
        made = fake_engine(config, storage)
        made._texts = {key: ["It cost 99 billion.", "Mayor Anna Berg said it cost 40 million."]}
        return made

    with serving(serve_config(config), engine) as site, site.client() as client:
        *tokens, done = client.stream("headline", user_id=PLAIN, content_id="content-000")
        assert isinstance(done, GenerationAnswer)
        assert done.text == "Mayor Anna Berg said it cost 40 million."
        assert done.reason is Reason.FOREIGN_NUMBER
        restarts = [at for at, token in enumerate(tokens) if isinstance(token, Token) and token.restart]
        assert len(restarts) == 1
        texts = [token.text for token in tokens if isinstance(token, Token)]
        assert "".join(texts[restarts[0] :]) == done.text
        assert "99" in "".join(texts[: restarts[0]]), "the control: the rejected draft was seen"


def _idle(site: Site) -> Any:
    return _until(lambda: (site.service.loop.num_waiting, site.service.loop.num_running), lambda found: found == (0, 0))


def test_deadlines_and_disconnects_stop_the_decoding(job: JobConfig) -> None:
    """With a second a token no text is ever finished: a row that is not taken out keeps the model for a minute."""
    with serving(serve_config(job, replica={"max_waiting": 4}), slow(1.0)) as site, site.client() as client:
        with pytest.raises(DeadlineError) as late:
            client.generate("headline", user_id=PLAIN, content_id="content-000", timeout_ms=100)
        assert late.value.code == "deadline_passed"
        _idle(site)
        with pytest.raises(DeadlineError):
            list(client.stream("headline", user_id=PLAIN, content_id="content-000", timeout_ms=100))
        _idle(site)
        with site.client() as leaving:
            next(leaving.stream("headline", user_id=PLAIN, content_id="content-000"))
            assert site.service.loop.num_running == 1, "the control: it is being written"
        _idle(site)
        body = {"user_id": PLAIN, "content_id": "content-000", "task": "headline"}
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(
                f"{site.url}/v1/generations", json=body, headers={"Authorization": f"Bearer {TOKENS[0]}"}, timeout=0.3
            )
        _idle(site)


def test_who_waits_behind_is_served_when_the_one_before_leaves(job: JobConfig) -> None:
    with serving(serve_config(job), slow(0.02)) as site, site.client() as client, ThreadPoolExecutor(2) as pool:
        asks = {"task": "explanation", "content_id": "content-000"}
        late = pool.submit(lambda: client.generate(user_id=PLAIN, timeout_ms=60, **asks))
        fine = pool.submit(lambda: client.generate(user_id="user-0004", **asks))
        assert fine.result().status is Status.OK
        with pytest.raises(DeadlineError):
            late.result()


def test_what_needs_no_writing_is_answered_while_the_queue_is_full(published: JobConfig) -> None:
    known = next(key for key in rows_of(published) if key.task == "headline")
    contents = [{"title": f"Bridge {n}", "body": "The bridge opened.", "language": "en"} for n in range(3)]
    config = serve_config(published, replica={"max_waiting": 1}, engine={"max_rows": 1})
    with serving(config, slow(1.0)) as site, site.client() as client, ThreadPoolExecutor(2) as pool:

        def wait(content: dict[str, str]) -> None:
            with site.client() as own, pytest.raises(DeadlineError):
                own.generate("headline", user_id=PLAIN, content=content, timeout_ms=2000)

        crowd = [pool.submit(wait, content) for content in contents[:2]]
        _until(site.service.loop.may_wait, lambda may: not may)
        assert client.generate("headline", user_id=known.user_id, content_id=known.content_id).source == "published"
        with pytest.raises(TooManyRequestsError) as full:
            client.generate("headline", user_id=PLAIN, content=contents[2])
        assert full.value.retry_after_s is not None
        pair = {"user_id": known.user_id, "content_id": known.content_id}
        (only,) = client.generate_batch("headline", [pair]).results
        assert isinstance(only, GenerationAnswer)
        assert only.source == "published"
        half = b'{"user_id": "\\ud800", "content_id": "content-000", "task": "headline"}'
        long = json.dumps({"user_id": "u" * 600_000, "content_id": "c", "task": "headline"}).encode()
        others = ((long, 422), (half, 422), (b"[]", 429), (b'{"user_id": 3}', 429))
        for body, status in ((b"{", 422), (b"[" * 5000, 422), *others):
            assert post(site, "/v1/generations", body).status_code == status
        for one in crowd:
            one.result()


def test_a_model_that_gives_nan_is_not_the_client_s_fault(job: JobConfig) -> None:
    with serving(serve_config(job), without_logits) as site:
        answer = post(site, "/v1/generations", {"user_id": PLAIN, "content_id": "content-000", "task": "headline"})
    assert (answer.status_code, answer.json()["code"]) == (500, "non_finite_logits")


def test_a_full_queue_says_when_to_come_again(job: JobConfig) -> None:
    with serving(serve_config(job, replica={"max_waiting": 2}, engine={"max_rows": 1}), slow(0.05)) as site:

        def ask(number: int) -> GenerationAnswer | TooManyRequestsError:
            try:
                with site.client() as client:
                    return client.generate("headline", user_id=f"user-{number:04d}", content_id="content-000")
            except TooManyRequestsError as error:
                return error

        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(ask, range(3, 19)))
        refused = [one for one in found if isinstance(one, TooManyRequestsError)]
        assert 1 <= len(refused) <= 13, "three at least were taken, and sixteen are too many"
        assert {error.code for error in refused} == {"queue_full"}
        assert all(error.retry_after_s is not None and error.retry_after_s >= 1 for error in refused)
        contents = [{"title": f"Bridge {n}", "body": "The bridge opened.", "language": "en"} for n in range(4)]
        pairs = [{"user_id": PLAIN, "content": content} for content in contents]
        with site.client() as client:
            assert len(client.generate_batch("headline", pairs[:3]).results) == 3, "one place, two may wait"


def test_a_batch_that_never_fits_is_let_in_while_nobody_waits(job: JobConfig) -> None:
    contents = [{"title": f"Bridge {n}", "body": "The bridge opened.", "language": "en"} for n in range(9)]
    pairs = [{"user_id": PLAIN, "content": content} for content in contents]
    config = serve_config(job, replica={"max_waiting": 2}, engine={"max_rows": 1})
    with serving(config, slow(0.02)) as site, site.client() as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.generate_batch, "headline", pairs)
        wait_until(lambda: site.service.loop.num_waiting, "it waits")
        with site.client() as other, pytest.raises(TooManyRequestsError):
            other.generate_batch("headline", pairs[:4])
        texts = [found.text for found in first.result().results if isinstance(found, GenerationAnswer)]
        assert len(texts) == 9
        assert len(client.generate_batch("headline", pairs[:4]).results) == 4, "the control: nobody waits any more"


def test_rankings_that_cannot_wait_are_told_so(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    over, plain = threading.Event(), LoadedGenerator.score

    def held(self: LoadedGenerator, *words: Any) -> Any:
        over.wait(60)
        return plain(self, *words)

    monkeypatch.setattr(LoadedGenerator, "score", held)
    with serving(serve_config(job, replica={"max_waiting": 4})) as site, ThreadPoolExecutor(2) as pool:

        def rank() -> ScoresAnswer:
            with site.client() as client:
                return client.scores("headline", [{"content_id": "content-000"}] * 16, user_id=PLAIN)

        with site.client() as client:
            fine = [pool.submit(rank), pool.submit(rank)]
            _until(lambda: _has_room_to_score(site), lambda has: not has)
            with pytest.raises(TooManyRequestsError) as full:
                rank()
            assert (full.value.code, full.value.retry_after_s is not None) == ("queue_full", True)
            text = pool.submit(lambda: client.generate("headline", user_id=PLAIN, content_id="content-000"))
            over.set()
            assert [len(one.result().scores) for one in fine] == [16, 16], "the control: one ran, one waited"
            assert text.result().text


def _has_room_to_score(site: Site) -> bool:
    try:
        site.service.loop.require_room_to_score(1)
    except ProblemError:
        return False
    return True


def test_equal_requests_are_written_once_and_unequal_ones_of_one_key_apart(job: JobConfig) -> None:
    """Eight clients ask for the same, eight with an embedding of their own: nobody gets another's text."""
    with serving(serve_config(job), slow(0.005)) as site:
        other = [0.0] * (DIM - 1) + [5.0]

        def ask(number: int) -> GenerationAnswer:
            more = {"embedding": other, "embedding_space": SPACE} if number % 2 else {}
            with site.client() as client:
                return client.generate("headline", user_id=PLAIN, content_id="content-000", **more)

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(16)))
        for kind in (0, 1):
            assert len({(answer.text, answer.fingerprint) for answer in answers[kind::2]}) == 1
        assert answers[0].fingerprint != answers[1].fingerprint
        assert answers[0].text != answers[1].text, "the control: the embeddings differ in their text"


# -- what is refused ---------------------------------------------------------------------------------------------------

ASK = {"user_id": PLAIN, "content_id": "content-000", "task": "headline"}
ALONE = {"embedding": VECTOR, "embedding_space": SPACE, "content_id": "content-000", "task": "headline"}
REFUSED: list[tuple[Any, int, str]] = [
    ({}, 422, "invalid_request"),
    ([], 422, "invalid_request"),
    (b"{", 422, "invalid_request"),
    (b"\xf8{", 400, "bad_request"),
    (b"[" * 50_000, 400, "bad_request"),
    (b'{"user_id": "\\ud800", "content_id": "content-000", "task": "headline"}', 422, "invalid_request"),
    (ASK | {"colour": "red"}, 422, "invalid_request"),
    (ASK | {"user_id": ""}, 422, "invalid_request"),
    (ASK | {"user_id": "u" * 513}, 422, "invalid_request"),
    ({"content_id": "content-000", "task": "headline"}, 422, "invalid_request"),
    ({"user_id": PLAIN, "task": "headline"}, 422, "invalid_request"),
    (ASK | {"embedding": VECTOR}, 422, "invalid_request"),
    (ASK | {"sampling": {"temperature": -1}}, 422, "invalid_request"),
    (ASK | {"sampling": {"stop": ["a"]}}, 422, "invalid_request"),
    (ASK | {"timeout_ms": 0}, 422, "invalid_request"),
    (json.dumps(ALONE).replace("0.1234567", "NaN").encode(), 422, "invalid_request"),
    (json.dumps(ALONE).replace("0.1234567", "1e999").encode(), 422, "invalid_request"),
    (ALONE | {"embedding": [*VECTOR[1:], 1e39]}, 422, "embedding_non_finite"),
    (ALONE | {"embedding": [0.0] * DIM}, 422, "embedding_zero"),
    (ALONE | {"embedding": VECTOR[1:]}, 422, "embedding_wrong_size"),
    (ALONE | {"embedding_space": "space-9"}, 422, "embedding_other_space"),
    (ASK | {"task": "poem"}, 422, "unknown_task"),
    (ASK | {"content_id": "content-999"}, 404, "unknown_content"),
    (ASK | {"content": {"title": " ", "body": "\n", "language": "en"}}, 422, "empty_content"),
    (ASK | {"content": {"title": "T", "body": "B.", "language": "fr"}}, 422, "no_prompt"),
    (ASK | {"content": {"body": "b" * 2001, "language": "en"}}, 413, "content_too_long"),
    (b" " * 70_000, 413, "body_too_large"),
]


@pytest.fixture(scope="module")
def strict(published: JobConfig) -> Iterator[Site]:
    with serving(serve_config(published, api={"max_body_bytes": 65_536, "max_content_chars": 2000})) as found:
        yield found


@pytest.mark.parametrize(("body", "status", "code"), REFUSED)
def test_what_is_refused_is_a_problem_with_a_code(strict: Site, body: Any, status: int, code: str) -> None:
    response = post(strict, "/v1/generations", body, headers={"Content-Type": "application/json"})
    problem = ProblemBody.model_validate_json(response.content)
    assert (response.status_code, problem.status, problem.code) == (status, status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"


def test_paths_methods_and_sizes_are_problems_too(strict: Site) -> None:
    headers = {"Authorization": f"Bearer {TOKENS[1]}"}
    for method, path, status, code in (
        ("GET", "/v1/generations", 405, "method_not_allowed"),
        ("POST", "/nothing", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
    ):
        response = httpx2.request(method, f"{strict.url}{path}", headers=headers)
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert response.headers["content-type"] == "application/problem+json"
    pairs = [{"user_id": PLAIN, "content_id": "content-000"}] * 257
    assert post(strict, "/v1/generations:batch", {"task": "headline", "pairs": pairs}).json()["code"] == "too_many"

    def chunks() -> Iterator[bytes]:
        yield from [b" " * 10_000] * 10

    chunked = httpx2.post(f"{strict.url}/v1/generations", content=chunks(), headers=headers)
    assert (chunked.status_code, chunked.json()["code"]) == (413, "body_too_large"), "also without a length"
    assert post(strict, "/v1/generations", ASK).status_code == 200, "the control: a good request is answered"


def test_one_bad_pair_of_a_batch_takes_no_other_with_it(site: Site) -> None:
    pairs = [{"user_id": PLAIN, "content_id": "content-000"}, {"user_id": PLAIN, "content_id": "nothing"}]
    with site.client() as client:
        good, bad = client.generate_batch("headline", pairs).results
        assert isinstance(good, GenerationAnswer)
        assert isinstance(bad, ProblemBody)
        assert bad.code == "unknown_content"
        with pytest.raises(InvalidRequestError) as refused:
            client.scores("headline", [{"content_id": "nothing"}], user_id=PLAIN)
        assert refused.value.status == 404
        candidates = [{"content_id": "content-000"}, {"content_id": "nothing"}]
        with pytest.raises(InvalidRequestError, match="candidate 1: "):
            client.scores("headline", candidates, user_id=PLAIN)
        with pytest.raises(InvalidRequestError) as other:
            client.scores("poem", candidates, user_id=PLAIN)
        assert "candidate" not in str(other.value), "the control: no candidate is to blame"


def test_a_body_without_its_type_is_told_which_it_needs(strict: Site) -> None:
    """As `curl -d` sends it: the schema's own words would be about a body that fits."""
    body = json.dumps(ASK).encode()
    form = "application/x-www-form-urlencoded"
    for kind, status in (("", 422), (form, 422), ("application/json; charset=utf-8", 200)):
        answer = post(strict, "/v1/generations", body, headers={"Content-Type": kind} if kind else {})
        assert answer.status_code == status
        assert ("Content-Type: application/json" in answer.text) == (status == 422)
    bad = post(strict, "/v1/generations", {})
    assert "Content-Type" not in bad.json()["detail"], "the control: it has its type"


@pytest.mark.parametrize(("query", "at"), [("limit=0", "query.limit"), (f"search={'x' * 600}", "query.search")])
def test_what_is_wrong_with_a_query_has_its_name(site: Site, query: str, at: str) -> None:
    headers = {"Authorization": f"Bearer {TOKENS[0]}"}
    answer = httpx2.get(f"{site.url}/v1/contents?{query}", headers=headers)
    assert (answer.status_code, [found["at"] for found in answer.json()["errors"]]) == (422, [at])


def engines_of(kind: type[FakeEngine], made: list[FakeEngine]) -> EngineFactory:
    """A factory of fake engines of this kind, which notes them."""

    def engine(config: JobConfig, storage: Storage) -> FakeEngine:
        one = fake_engine(config, storage)
        one.__class__ = kind
        made.append(one)
        return one

    return engine


def test_a_request_that_makes_the_engine_fail_takes_no_other_with_it(job: JobConfig) -> None:
    poison = RequestKey("user-0005", "content-002", "headline")

    class Failing(FakeEngine):
        def generate(self, groups: Any) -> Any:
            known, groups = first_groups(groups)
            if any(request.key == poison for group in known for request in group.requests):
                raise RuntimeError("a secret of the engine: 0.123456")
            return super().generate(groups)

    with serving(serve_config(job), engines_of(Failing, [])) as site, site.client() as client:
        pairs = [{"user_id": f"user-{n:04d}", "content_id": "content-002"} for n in range(3, 9)]
        results = client.generate_batch("headline", pairs).results
        assert [isinstance(found, ProblemBody) for found in results] == [n == 5 for n in range(3, 9)]
        assert "0.123" not in str(results)
        with pytest.raises(UnavailableError) as failed:
            client.generate("headline", user_id="user-0005", content_id="content-002")
        assert (failed.value.status, failed.value.code) == (500, "internal")


class Breaking(FakeEngine):
    """Fails at contents of this title, and at all once it is broken."""

    is_broken = False

    def generate(self, groups: Any) -> Any:
        known, groups = first_groups(groups)
        if self.is_broken or any(group.content.title == "Poison" for group in known):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().generate(groups)

    def score(self, groups: Any, texts: Any) -> Any:
        if self.is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().score(groups, texts)


def test_a_replica_that_fails_at_all_that_it_scores_is_replaced(job: JobConfig) -> None:
    made = list[FakeEngine]()

    def is_ranked(client: Client, number: int) -> bool:
        candidates = [{"content_id": f"content-{number % 2:03d}", "text": "A line"}]
        try:
            return bool(client.scores("headline", candidates, user_id=f"user-{number:04d}").scores)
        except UnavailableError as error:
            return error.status != 500

    with serving(serve_config(job), engines_of(Breaking, made)) as site, site.client() as client:
        replica = cast(Replica, SimpleNamespace(service=site.service))
        assert is_ranked(client, 0)
        made[0].is_broken = True  # type: ignore[attr-defined]
        assert not any(is_ranked(client, 3) or is_ranked(client, 4) for _ in range(10)), "some requests again and again"
        asyncio.run(Replica.check_health(replica))
        for number in range(20):
            assert not is_ranked(client, number)
            if number % 5 == 0:
                made[0].is_broken = False  # type: ignore[attr-defined]
                assert is_ranked(client, number)
                made[0].is_broken = True  # type: ignore[attr-defined]
        asyncio.run(Replica.check_health(replica))
        assert not any(is_ranked(client, number) for number in range(10))
        with pytest.raises(RuntimeError, match="failed at all"):
            asyncio.run(Replica.check_health(replica))


def test_a_replica_that_fails_at_all_that_a_batch_asks_for_is_replaced() -> None:
    loop, keys = ModelLoop(max_rows=1, max_waiting=1), [RequestKey(f"u{n}", f"c{n}", "headline") for n in range(10)]

    def failing(_: Pauses) -> None:
        raise RuntimeError("the GPU had an error")

    for number, key in enumerate([*keys, *keys]):
        assert isinstance(loop.run_behind(failing, key).exception(30), RuntimeError)
        if number % 5 == 0:
            loop.run_behind(lambda pauses: None, key).result(30)
    assert loop.is_alive
    for key in keys:
        assert isinstance(loop.run_behind(failing, key).exception(30), RuntimeError)
    wait_until(lambda: not loop.is_alive, "the last one is counted")
    loop.close(30)


def test_a_replica_whose_model_fails_at_everything_is_replaced_and_no_other(job: JobConfig) -> None:
    made = list[FakeEngine]()

    def ask(client: Client, number: int, title: str) -> bool:
        content = {"title": title, "body": f"The bridge opened {number} times.", "language": "en"}
        try:
            return bool(client.generate("headline", user_id=f"user-{number:04d}", content=content).text)
        except UnavailableError as error:
            return error.status != 500

    with serving(serve_config(job), engines_of(Breaking, made)) as site, site.client() as client:
        replica = cast(Replica, SimpleNamespace(service=site.service))
        poison = {"title": "Poison", "body": "The bridge opened.", "language": "en"}
        found = client.generate_batch("headline", [{"user_id": f"u{n}", "content": poison} for n in range(20)]).results
        assert not [one for one in found if isinstance(one, GenerationAnswer)], "one content makes it fail for all"
        assert ask(client, 0, "Bridge")
        assert [ask(client, n % 2, "Poison") for n in range(20)] == [False] * 20, "some requests again and again"
        for number in range(20):
            assert not ask(client, number, "Poison")
            if number % 5 == 0:
                assert ask(client, number, "Bridge")
        asyncio.run(Replica.check_health(replica))
        made[0].is_broken = True  # type: ignore[attr-defined]
        assert not any(ask(client, number, "Bridge") for number in range(10))
        with pytest.raises(RuntimeError, match="failed at all"):
            asyncio.run(Replica.check_health(replica))
        assert httpx2.get(f"{site.url}/healthz").status_code == 503


def test_a_model_s_thread_that_ends_by_itself_is_seen_and_nobody_waits_for_it(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(serve_config(job), slow(0.001)) as site, site.client() as client:
        replica = cast(Replica, SimpleNamespace(service=site.service))
        asyncio.run(Replica.check_health(replica))
        assert client.generate("headline", user_id=PLAIN, content_id="content-000").text, "control"

        def broken(self: ModelLoop) -> None:
            raise SystemError("a bug of ours")

        monkeypatch.setattr(ModelLoop, "run_errands", broken)
        monkeypatch.setattr(threading, "excepthook", lambda words: None)
        for _ in range(2):  # who waited when it ended, and who comes later
            with pytest.raises(UnavailableError) as refused:
                client.generate("headline", user_id=PLAIN, content_id="content-001", timeout_ms=20_000)
            assert refused.value.code == "shutting_down"
        assert httpx2.get(f"{site.url}/healthz").status_code == 503
        with pytest.raises(RuntimeError, match="by itself"):
            asyncio.run(Replica.check_health(replica))
        assert httpx2.get(f"{site.url}/readyz").status_code == 200, "its tables are well"


class Panic(BaseException):
    """As what is written in Rust raises: no Exception."""


class Panicking(FakeEngine):
    """Fails where a request is among others, and panics at one that is alone."""

    def generate(self, groups: Any) -> Any:
        known, groups = first_groups(groups)
        if sum(len(group.requests) for group in known) > 1:
            raise RuntimeError("one of these is bad")
        raise Panic


def test_nobody_waits_for_a_wave_in_which_the_model_s_thread_ended(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda words: None)
    with serving(serve_config(job), engines_of(Panicking, [])) as site, site.client() as client:
        content = {"title": "Bridge", "body": "The bridge opened.", "language": "en"}
        pairs = [{"user_id": f"user-{n:04d}", "content": content} for n in range(3, 9)]
        found = client.generate_batch("headline", pairs, timeout_ms=20_000).results
        assert [getattr(one, "code", one) for one in found] == ["shutting_down"] * len(pairs)
        assert httpx2.get(f"{site.url}/healthz").status_code == 503


def test_nobody_waits_for_a_model_s_thread_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor an errand, nor a shard's call."""
    began, over = threading.Event(), threading.Event()
    loop = ModelLoop(max_rows=1, max_waiting=1)

    def hold(_: Pauses) -> bool:
        began.set()
        return over.wait(30)

    key = RequestKey("u", "c", "headline")
    first = loop.run_behind(hold, key)
    assert began.wait(30)
    second, errand = loop.run_behind(lambda pauses: None, key), loop.run(lambda: None)

    def broken(self: ModelLoop) -> None:
        raise SystemError("a bug of ours")

    monkeypatch.setattr(ModelLoop, "run_errands", broken)
    monkeypatch.setattr(threading, "excepthook", lambda words: None)
    over.set()
    assert first.result(30)
    assert isinstance(second.exception(30), InterruptedError)
    assert isinstance(errand.exception(30), ProblemError)
    wait_until(lambda: not loop.is_alive, "its end")
    with pytest.raises(ProblemError):
        loop.run(lambda: None)


# -- who may ask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer nobody's"}, {"Authorization": f"Basic {TOKENS[0]}"}, {"Authorization": "Bearer"},
     {"Authorization": f"Bearer {TOKENS[0]}x"}, {"Authorization": TOKENS[0]}],
)  # fmt: skip
def test_nothing_is_answered_without_a_token_but_the_probes(site: Site, headers: dict[str, str]) -> None:
    for method, path in (
        ("POST", "/v1/generations"), ("POST", "/v1/generations:batch"), ("POST", "/v1/scores"),
        ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/nothing"),
    ):  # fmt: skip
        response = httpx2.request(method, f"{site.url}{path}", headers=headers)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        assert ProblemBody.model_validate_json(response.content).code == "unauthorized"
    for path in ("/healthz", "/readyz"):
        assert httpx2.get(f"{site.url}{path}", headers=headers).status_code == 200


def test_the_client_raises_its_own_error_for_each(site: Site) -> None:
    with site.client("a wrong token, but long") as client, pytest.raises(UnauthorizedError):
        client.models()
    with site.client(TOKENS[1]) as client:
        assert client.models().tasks == ["explanation", "headline"]
        with pytest.raises(InvalidRequestError) as refused:
            client.generate("headline")
        assert refused.value.code == "invalid_request"
    with Site("http://127.0.0.1:9", site.service).client() as client, pytest.raises(UnavailableError) as gone:
        client.models()
    assert gone.value.status == 0
    with Site(f"{site.url}/page.js?", site.service).client() as client, pytest.raises(UnavailableError) as other:
        client.models()
    assert (other.value.status, other.value.code) == (200, "no_answer_body"), "of somebody who is not the service"


def test_a_token_s_rate_is_its_own(job: JobConfig) -> None:
    with serving(serve_config(job, api={"rate_per_s": 0.001, "burst": 5})) as site:
        pairs = [{"user_id": PLAIN, "content_id": "content-000"}] * 4
        with site.client() as client, site.client(TOKENS[1]) as other:
            client.generate("headline", user_id=PLAIN, content_id="content-000")
            client.generate_batch("headline", pairs[:1])
            client.generate_batch("headline", pairs)  # on credit
            with pytest.raises(TooManyRequestsError) as refused:
                client.models()
            assert refused.value.code == "rate_limited"
            assert refused.value.retry_after_s is not None
            assert other.models().tasks, "the control: another token has a rate of its own"
    with serving(serve_config(job, api={"rate_per_s": 0.001, "burst": 1})) as site, site.client() as client:
        assert len(client.generate_batch("headline", pairs).results) == 4  # on credit, however small the burst
        with pytest.raises(TooManyRequestsError):
            client.models()


def test_a_bucket_fills_with_time() -> None:
    now = [0.0]
    bucket = TokenBucket(2.0, 3, clock=lambda: now[0])
    for _ in range(3):
        bucket.take()
    with pytest.raises(ProblemError) as refused:
        bucket.take()
    assert refused.value.retry_after_s == 1
    now[0] = 0.5
    bucket.take()
    bucket.charge(4)  # on credit: 4 below nothing
    now[0] = 2.5
    with pytest.raises(ProblemError):
        bucket.take()
    now[0] = 3.1
    bucket.take()


def test_no_tokens_are_refused_and_short_ones_too() -> None:
    with pytest.raises(ValidationError, match="no tokens"):
        ApiConfig()
    with pytest.raises(ValidationError, match="characters or more") as caught:
        ApiConfig.model_validate({"tokens": ["tooshort"]})
    assert "tooshort" not in str(caught.value)
    for token in (f"{TOKENS[0]} ", f"\t{TOKENS[0]}", f"{TOKENS[0]}é", f"{TOKENS[0]}\n{TOKENS[0]}"):
        with pytest.raises(ValidationError, match="printable ASCII") as caught:
            ApiConfig.model_validate({"tokens": [token]})
        assert token.strip() not in str(caught.value)
    assert ApiConfig(allow_anonymous=True).tokens == ()


# -- another projector -------------------------------------------------------------------------------------------------


def _projector(config: JobConfig, uri: str, name: str) -> str:
    """Another artifact for the same base model; returns its id."""
    storage = Storage()
    old = read_manifest(storage, config.projector.uri)
    values = {field: getattr(old, field) for field in ("embedding_dim", "embedding_space", "d_model", "base_model_id")}
    made = ProjectorManifest(
        **values, tokenizer_hash=old.tokenizer_hash, output_rms=1.0, trained={"name": name}
    ).with_files({})
    storage.write_bytes(f"{uri}/config.json", made.to_json().encode())
    return made.projector_id


def test_swaps_under_load_lose_and_mix_nothing(tmp_path: Path) -> None:
    """The engine's text names its projector: every answer must say the id that its text says."""
    config, _ = write_small_job(tmp_path, num_users=12)
    uris = [config.projector.uri, str(tmp_path / "other"), str(tmp_path / "third")]
    ids = [read_manifest(Storage(), uris[0]).projector_id]
    ids += [_projector(config, uri, uri) for uri in uris[1:]]

    class Signing(FakeEngine):
        def _write(self, content: Any, request: Any, attempt: int) -> str:
            return f"{content.title} {self.projector_id}"

    # An id that begins with ten digits is a telephone number.
    checks = {f"foreign_{name}": False for name in ("numbers", "names", "contacts")} | {"language": False}
    serve = serve_config(config, checks=checks)
    over, answers, errors = threading.Event(), list[GenerationAnswer](), list[ServiceError]()

    def ask(number: int) -> None:
        with here.client() as client:
            while not over.is_set():
                user = f"user-{3 + number % 5:04d}"
                try:
                    if number % 2:
                        answers.append(client.generate("headline", user_id=user, content_id="content-000"))
                        continue
                    batch = client.generate_batch("headline", [{"user_id": user, "content_id": "content-002"}] * 3)
                    found = [answer for answer in batch.results if isinstance(answer, GenerationAnswer)]
                    assert {answer.projector_id for answer in found} == {batch.projector_id}
                    answers.extend(found)
                except ServiceError as error:
                    errors.append(error)

    with serving(serve, engines_of(Signing, [])) as here, ThreadPoolExecutor(4) as pool:
        work = [pool.submit(ask, number) for number in range(4)]
        swapped = []
        for turn in range(1, 13):
            wanted = len(answers) + 5
            swapped.append(asyncio.run(here.service.swap(uris[turn % 3])))
            _until(lambda: len(answers), wanted.__le__)
        refused = asyncio.run(here.service.swap(str(tmp_path / "nothing")))
        served = here.client().models()
        over.set()
        for one in work:
            one.result()
    assert all(swapped)
    assert not errors
    assert not refused
    assert served.projector_id == ids[0], "the twelfth swap's, kept when the next one failed"
    assert served.swap is not None
    assert not served.swap.done
    assert "nothing" in (served.swap.error or "")
    assert {answer.projector_id for answer in answers} == set(ids), "the control: all three were served"
    assert not [answer for answer in answers if not answer.text.endswith(answer.projector_id)]


def test_a_new_replica_that_cannot_take_its_projector_over_does_not_begin(job: JobConfig, tmp_path: Path) -> None:
    """Beside others it would serve the old one; one that has begun goes on with what it has."""
    nothing, there = {"projector_uri": str(tmp_path / "nothing")}, {"projector_uri": job.projector.uri}
    begun: list[list[dict[str, Any]]] = [[], [there], [{}]]
    for before in begun:
        with serving(serve_config(job)) as site:
            replica = cast(Replica, SimpleNamespace(service=site.service, _is_configured=False))
            for settings in before:
                asyncio.run(Replica.reconfigure(replica, settings))
            if before:
                asyncio.run(Replica.reconfigure(replica, nothing))
            else:
                with pytest.raises(IncompatibleError, match=str(tmp_path / "nothing")):
                    asyncio.run(Replica.reconfigure(replica, nothing))
            assert site.service.swap_state is not None
            assert not site.service.swap_state.done


# -- what nobody may learn ---------------------------------------------------------------------------------------------


def test_a_user_embedding_is_in_no_answer_no_error_and_no_log(
    strict: Site, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    canary = [0.918273645546372, *VECTOR[1:]]
    bodies: list[Any] = [
        ALONE | {"embedding": canary},
        ALONE | {"embedding": canary[1:]},
        ALONE | {"embedding": [*canary, "x"]},
    ]
    bodies += [ALONE | {"embedding": canary, "embedding_space": "space-9"}, ALONE | {"embedding": str(canary)}]
    bodies += [ALONE | {"embedding": canary, "task": "poem"}, {str(canary[0]): 1} | ASK, ASK | {"user_id": canary}]
    bodies += [ALONE | {"embedding": canary, "timeout_ms": "soon"}, [canary], ALONE | {"embedding": [canary]}]
    said = ""
    for body in bodies:
        for path in ("/v1/generations", "/v1/scores", "/v1/generations:batch"):
            response = post(strict, path, body)
            assert response.status_code < 500
            said += response.text + str(response.headers)
    stream = post(strict, "/v1/generations", bodies[0] | {"stream": True})
    assert "event: done" in stream.text
    logs = capfd.readouterr()
    said += stream.text + logs.out + logs.err + caplog.text
    data = np.array(canary, "<f4").tobytes()
    for mark in ("0.918273", ".91827", data.hex()[:16], base64.b64encode(data).decode()[:12]):
        assert mark not in said
    assert TOKENS[0] not in said
    assert "0.918273" in json.dumps(bodies), "the control: it is found where it is"


def test_openapi_has_examples_and_every_path(site: Site) -> None:
    found = httpx2.get(f"{site.url}/openapi.json", headers={"Authorization": f"Bearer {TOKENS[0]}"}).json()
    assert set(found["paths"]) == {
        "/v1/generations", "/v1/generations:batch", "/v1/scores", "/v1/models", "/v1/contents", "/healthz", "/readyz",
    }  # fmt: skip
    for name in ("GenerationRequest", "BatchRequest", "ScoresRequest"):
        schema = found["components"]["schemas"][name]
        assert schema["examples"], name
    assert issubclass(ServeConfig, JobConfig)


def test_the_best_candidate_comes_first(site: Site) -> None:
    """The fake engine finds likelier what it would have written itself: for this user the second sentence."""
    user = {"user_id": PLAIN, "embedding": [0.0, 5.0] + [0.0] * (DIM - 2), "embedding_space": SPACE}
    with site.client() as client:
        own = client.generate("headline", content_id="content-002", **user).text
        texts = ["Another line", own, "A third line"]
        candidates = [{"content_id": "content-002", "text": text} for text in texts]
        found = client.scores("headline", candidates, **user)
        assert found.personalized
        assert [(score.place, score.gain) for score in found.scores] == [(1, 0.75), (0, 0.0), (2, 0.0)]
        nobody = client.scores("headline", candidates, user_id=OPTED_OUT)
    assert not nobody.personalized
    assert [score.gain for score in nobody.scores] == [None] * 3
