"""The editors' page: alone, behind its policy, and in a real browser against a service that really runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pyarrow as pa
import pytest

import jobs.whole_run
from e2p_ray.config import JobConfig
from e2p_ray.serve.contents import ContentsAnswer
from e2p_ray.serve.editors import POLICY
from e2p_ray.serve.messages import GenerationAnswer
from e2p_ray.storage import Storage
from jobs.whole_run import generate_run
from tests.browser import CHROMIUM, Tab, browser
from tests.serve_world import TOKENS, Site, serve_config, serving
from tests.small_job import fake_engine, write_small_job
from tests.update_world import serial_batch

EVIL = "<img src=x onerror=\"window.owned=1\"><script>window.owned=1</script> {heading} 'x' & Co."
HEADERS = {"Authorization": f"Bearer {TOKENS[0]}"}
USERS = ["user-0003", "user-0000", "user-0001", "never-seen"]  # plain, opted out, without a user embedding, unknown
PATHS = ("/", "/page.css", "/page.js")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """Published; then one title becomes an attack, and one content gets an older row with a word of its own."""
    config, _ = write_small_job(tmp_path_factory.mktemp("page"), num_users=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.whole_run, "run_batch", serial_batch)
        generate_run(config, engine_factory=fake_engine)
    storage, uri = Storage(), config.inputs.contents_uri
    contents = storage.read_table(uri)
    titles = [EVIL if n == 2 else title for n, title in enumerate(contents["title"].to_pylist())]
    at, when = (contents.schema.get_field_index(name) for name in ("title", "updated_at"))
    older = contents.slice(4, 1).set_column(at, "title", pa.array(["Zeppelin lands"]))
    older = older.set_column(when, "updated_at", pa.array([0], contents.schema.field(when).type))
    now = contents.set_column(at, "title", pa.array(titles))
    rows = pa.concat_tables([older, now])
    for name in ("content_id", "title"):  # as Delta leaves them after a DELETE
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, name, rows[name].cast(pa.string_view()))
    storage.write_table(uri, rows)
    return config


@pytest.fixture(scope="module")
def site(job: JobConfig) -> Iterator[Site]:
    with serving(serve_config(job)) as found:
        yield found


# -- the files ---------------------------------------------------------------------------------------------------------


def test_the_page_is_open_alone_and_behind_its_policy(site: Site) -> None:
    files = {path: httpx2.get(f"{site.url}{path}") for path in PATHS}
    for path, file in files.items():
        assert file.status_code == 200, path
        assert file.headers["content-security-policy"] == POLICY
        assert file.headers["x-content-type-options"] == "nosniff"
        assert not re.findall(r"https?://|//\w|url\(|@import", re.sub(r"^\s*//.*$|: //", "", file.text, flags=re.M))
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none'")
    page, script = files["/"].text, files["/page.js"].text
    assert not re.search(r"<[^>]*\s(on\w+|style)=|<style|<script>", page), "nothing that the policy would not run"
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|localStorage|cookie"
    assert not re.search(markup, script)
    assert re.search(markup, script.replace("textContent", "innerHTML")), "the control"
    for path in ("/v1/contents", "/page", "/page.js/x", "/page/page.js"):
        assert httpx2.get(f"{site.url}{path}").status_code == 401, "and nothing else is open"


def test_both_languages_say_everything(site: Site) -> None:
    page, script = (httpx2.get(f"{site.url}{path}").text for path in ("/", "/page.js"))
    english, japanese = (
        dict(re.findall(r'(\w+): "([^"]*)"', re.split(rf"\n  {name}: {{\n", script)[1].partition("\n  },")[0]))
        for name in ("en", "ja")
    )
    assert english.keys() == japanese.keys()
    assert len(english) > 40
    for name, words in english.items():
        assert set(re.findall(r"{\w+}", words)) == set(re.findall(r"{\w+}", japanese[name])), name
        assert name == "id" or re.search(r"[\u3040-\u9fff]", japanese[name]), name
    asked = set(re.findall(r'data-say="(\w+)"', page)) | set(re.findall(r"words\.(\w+)", script))
    assert asked <= english.keys()
    for name, words in re.findall(r'data-say="(\w+)">([^<]+)<', page):
        assert english[name] == words, "before the script has run it reads the same"


# -- what there is to choose from --------------------------------------------------------------------------------------


def listed(site: Site, search: str, limit: int = 50) -> ContentsAnswer:
    found = httpx2.get(f"{site.url}/v1/contents", params={"search": search, "limit": limit}, headers=HEADERS)
    assert found.status_code == 200, found.text
    return ContentsAnswer.model_validate_json(found.content)


@pytest.mark.parametrize(
    "search",
    ["", "content-", "content-00", "content-003", "bridge", "BRIDGE 4", "港に", "<img", "zeppelin", "zz"],
)
def test_contents_are_found_by_id_and_by_title(site: Site, job: JobConfig, search: str) -> None:
    rows = Storage().read_table(job.inputs.contents_uri).to_pylist()[1:]  # without the older row
    wanted = {
        row["content_id"]: row["title"]
        for row in rows
        if row["content_id"].startswith(search) or search.lower() in row["title"].lower()
    }
    found = listed(site, search)
    assert {content.content_id: content.title for content in found.contents} == wanted
    assert found.complete
    few = listed(site, search, 1)
    assert len(few.contents) == min(len(wanted), 1)
    assert few.complete == (len(wanted) <= 1)


def test_the_exact_id_comes_first_and_a_listing_is_bounded(site: Site) -> None:
    assert listed(site, "content-004", 1).contents[0].content_id == "content-004"
    for values in ({"limit": 51}, {"limit": 0}, {"search": "x" * 513}):
        refused = httpx2.get(f"{site.url}/v1/contents", params=values, headers=HEADERS)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        found.open(site.url)
        yield found


@pytest.fixture
def page(site: Site, tab: Tab) -> Tab:
    """The page afresh, in English, without a token."""
    speak(tab, "en")
    tab.open(f"{site.url}/page.css")
    tab.run("sessionStorage.clear()")
    tab.open(site.url)
    tab.until("document.querySelector('[data-say=heading]').innerText.startsWith('One content')")
    tab.until("performance.getEntriesByName(new URL('v1/models', location.href).href).length > 0")
    tab.complaints.clear()
    return tab


def speak(tab: Tab, language: str) -> None:
    """What the browser's user reads."""
    agent = tab.run("navigator.userAgent")
    tab.send("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)


def give_token(page: Tab) -> None:
    page.fill("#token", TOKENS[0])
    page.press("Enter")
    page.until("document.querySelector('#task').options.length === 2")


def ask(page: Tab, content_id: str, users: list[str], task: str = "headline") -> list[dict[str, Any]]:
    """Pick, ask, and read the cards, the original title first."""
    page.fill("#content-id", content_id)
    page.fill("#users", "\n".join(users))
    page.run(f"document.querySelector('#task').value = {json.dumps(task)}")
    page.click("#ask button.main")
    return cards(page, len(users))


def cards(page: Tab, number: int) -> list[dict[str, Any]]:
    page.until(f"/^(All|すべて).*|件すべて/.test(document.querySelector('#progress').innerText) "
               f"&& document.querySelectorAll('article').length === {number + 1}")  # fmt: skip
    found: list[dict[str, Any]] = page.run(
        """[...document.querySelectorAll('article')].map(card => ({
          heading: card.querySelector('h3').textContent, kind: card.className, lang: card.querySelector('.text')?.lang,
          text: card.querySelector('.text, .trouble').textContent, facts: Object.fromEntries(
            [...card.querySelectorAll('dt')].map(name => [name.textContent, name.nextSibling.textContent]))}))"""
    )
    return found


@needs_browser
def test_texts_stand_beside_the_title_with_what_became_of_them(site: Site, page: Tab) -> None:
    give_token(page)
    original, *found = ask(page, "content-003", USERS)
    (content,) = listed(site, "content-003", 1).contents
    assert (original["heading"], original["text"], original["lang"]) == ("Original title", content.title, "ja")
    with site.client() as client:
        for user_id, card in zip(USERS, found, strict=True):
            answer = client.generate("headline", user_id=user_id, content_id="content-003")
            assert (card["heading"], card["text"], card["kind"]) == (user_id, answer.text, answer.status.value)
            facts = card["facts"]
            assert facts["Status"] == answer.status.value
            assert facts.get("Reason") == (answer.reason and answer.reason.value.replace("_", " "))
            assert facts["Source"] == {"published": "published before", "generated": "written now"}[answer.source]
            assert facts["Projector"] == answer.projector_id
            assert re.fullmatch(r"[\d.]+ ms in the service, [\d.]+ ms for this page", facts["Time"])
    assert {card["facts"]["Source"] for card in found} == {"published before", "written now"}
    assert {card["kind"] for card in found} == {"ok", "fallback", "suppressed"}
    assert not page.complaints


@needs_browser
def test_a_wrong_token_is_said_and_kept_nowhere_and_a_right_one_in_this_tab_only(site: Site, page: Tab) -> None:
    page.fill("#token", "a wrong token, but long")
    page.press("Enter")
    page.until("document.querySelector('#trouble').innerText.includes('does not know this token')")
    assert page.focused() == "token"
    kept = "JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie, location.href])"
    assert page.run(kept) == json.dumps([{}, {}, "", f"{site.url}/"], separators=(",", ":"))
    page.click("#ask button.main")
    page.until("document.querySelector('#trouble').innerText.includes('Give a token')")
    give_token(page)
    assert page.text("#trouble") == ""
    assert page.run("document.querySelector('#token').value") == ""
    assert json.loads(page.run(kept))[0] == {"e2p_ray.token": TOKENS[0]}
    assert json.loads(page.run(kept))[1:] == [{}, "", f"{site.url}/"]
    page.open(site.url)
    page.until("document.querySelector('#task').options.length === 2")  # the tab remembers
    page.click("#forget")
    assert json.loads(page.run(kept))[0] == {}


@needs_browser
def test_what_goes_wrong_is_said(page: Tab) -> None:
    give_token(page)

    def trouble_after(content_id: str, users: str) -> str:
        page.fill("#content-id", content_id)
        page.fill("#users", users)
        page.click("#ask button.main")
        page.until("document.querySelector('#trouble').innerText")
        return page.text("#trouble")

    assert "no content with this id" in trouble_after("content-999", "user-0003")
    assert page.run("document.querySelector('#trouble').getAttribute('role')") == "alert"
    assert "Choose a content" in trouble_after("", "user-0003")
    assert "Give a user id" in trouble_after("content-003", " \n")
    assert "12 users at most" in trouble_after("content-003", "\n".join(f"user-{n}" for n in range(13)))
    _, good, long = ask(page, "content-003", ["user-0003", "u" * 513])
    assert (good["kind"], long["kind"]) == ("ok", "problem"), "one bad user takes no other along"
    assert "invalid_request" in long["text"]


@needs_browser
def test_markup_in_titles_drafts_and_ids_is_shown_and_never_run(site: Site, page: Tab) -> None:
    give_token(page)
    original, _, evil = ask(page, "content-002", ["user-0003", EVIL])
    assert (original["text"], evil["heading"]) == (EVIL, EVIL)
    page.click("input[value=draft]")
    page.fill("#draft-title", EVIL)
    page.fill("#draft-body", f"{EVIL} The bridge opened on Monday.")
    page.click("#ask button.main")
    page.until(f"document.querySelector('article .text').textContent === {json.dumps(EVIL)} && "
               "document.querySelectorAll('article').length === 3")  # fmt: skip
    draft, written, _ = cards(page, 2)
    assert "Id" not in draft["facts"]
    with site.client() as client:
        content = {"title": EVIL, "body": f"{EVIL} The bridge opened on Monday.", "language": "en"}
        answer = client.generate("headline", user_id="user-0003", content=content)
    assert isinstance(answer, GenerationAnswer)
    assert written["text"] == answer.text
    assert page.run("[typeof window.owned, document.querySelectorAll('main script, main img').length]") == [
        "undefined",
        0,
    ]
    assert not page.complaints
    refused = "(() => { try { document.body.innerHTML = 'x'; return false } catch (e) { return e.name } })()"
    assert page.run(refused) == "TypeError", "even a mistake of the page's own could not run it"
    page.open("data:text/html,<title>control</title>")
    page.run(f"document.body.innerHTML = {json.dumps(EVIL)}")
    page.until("window.owned === 1")  # the control: as markup it would have run


@needs_browser
def test_the_keyboard_is_enough_and_japanese_is_spoken(page: Tab) -> None:
    page.click("h1")
    page.press("Tab")
    order = [page.focused()]
    while order[-1] != "task":
        page.press("Tab")
        order.append(page.focused())
        assert len(order) < 20
    assert [name for name in order if name] == ["ui", "token", "forget", "content-id", "users", "task"]
    page.run("document.querySelector('#token').focus()")
    page.type(TOKENS[0])
    page.press("Enter")
    page.until("document.activeElement.id === 'content-id' && document.querySelector('#task').options.length === 2")
    page.type("港に")
    page.until("document.querySelector('#contents').options.length === 3")
    assert page.run("[...document.querySelector('#contents').options].map(o => o.label)")[0].startswith("港に")
    page.run("document.querySelector('#content-id').select()")
    page.type("content-001")
    page.until("document.querySelector('#content-note').innerText.includes('港に新しい橋1が開通')")
    page.press("Tab")
    page.type("user-0003")
    page.press("Tab")
    page.press("Tab")
    page.press("Enter")
    original, card = cards(page, 1)
    assert page.focused() == "results-heading", "what came is where the reader is"
    assert (original["lang"], card["lang"]) == ("ja", "ja")
    page.run("document.querySelector('#ui').value = 'ja'")
    page.run("document.querySelector('#ui').dispatchEvent(new Event('change'))")
    assert page.run("document.documentElement.lang") == "ja"
    again = cards(page, 1)
    assert [one["text"] for one in again] == [original["text"], card["text"]]
    assert again[1]["facts"]["出所"] in ("公開済み", "今書いた")
    plain = page.run("[...document.querySelectorAll('label, legend, h1, h2, button, dt')].map(e => e.innerText)")
    assert not [words for words in plain if words and not re.search(r"[\u3040-\u9fff]|^ID$", words)]
    speak(page, "ja-JP")
    page.run("location.reload()")
    page.until("document.documentElement?.lang === 'ja' && document.readyState === 'complete'")  # as the browser is


@needs_browser
def test_everything_has_a_name_and_a_phone_is_wide_enough(page: Tab) -> None:
    give_token(page)
    ask(page, "content-002", ["user-0003", "u" * 200])

    def nameless() -> list[str]:
        nodes = page.send("Accessibility.getFullAXTree")["nodes"]
        kinds = {"textbox", "combobox", "button", "radio", "region", "heading", "form"} - {"form"}
        found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in kinds]
        assert len(found) > 10
        return [node["role"]["value"] for node in found if not node.get("name", {}).get("value")]

    assert nameless() == []
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    page.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
    try:
        assert not page.run(wide)
        page.run("document.querySelector('main').append(Object.assign(document.createElement('input'), {size: 200}))")
        page.run("document.querySelector('main').lastChild.className = 'control'")
        page.run("document.querySelector('main').lastChild.style.width = '900px'")
        assert page.run(wide), "the control"
        assert nameless() == ["textbox"], "the control"
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")
