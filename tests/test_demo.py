"""The synthetic newsroom: texts true to their articles, a right measure, a base model that reads and writes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from random import Random

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from e2p_ray.config import EvaluateConfig, JobConfig, TrainConfig, load_config
from e2p_ray.demo.angles import Truth, angle_accuracy, load_truth, shown_angle
from e2p_ray.demo.configs import BASE_MODEL, demo_tasks, write_configs
from e2p_ray.demo.newsroom import (
    ANGLE_WORDS,
    ANGLES,
    CUES,
    LANGUAGES,
    TASKS,
    TEXT_PREFIX,
    Article,
    make_article,
    make_articles,
    templates,
)
from e2p_ray.demo.packing import NO_TARGET, Packer
from e2p_ray.demo.world import World, write_world
from e2p_ray.engine.prompt import PromptLayout, load_tokenizer
from e2p_ray.schema import INPUT_TABLES, Content, validate_schema

_NUMBER = re.compile(r"\d+")
_ENGLISH_NAME = re.compile(r"(?<=[a-z0-9,:] )[A-Z][a-z]+")
_JAPANESE_WORD = re.compile(r"[一-鿿々]{2,}|[ァ-ヶー]{2,}")


@pytest.fixture(scope="module")
def articles() -> list[Article]:
    return make_articles("test", 400, seed=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), seed=5, num_users=160, num_contents=20)


def _all_texts(article: Article) -> list[str]:
    told = [text for angle in article.angles for task in TASKS for text in angle.texts[task]]
    return told + [text for task in TASKS for text in article.plain[task]]


def test_numbers_and_names_of_every_text_are_in_its_body(articles: list[Article]) -> None:
    for article in articles:
        content = f"{article.title}\n{article.body}"
        names = _ENGLISH_NAME if article.language == "en" else _JAPANESE_WORD
        told = [text for angle in article.angles for text in angle.texts["headline"]]
        for text in told:
            missing = [name for name in names.findall(text) if name not in content]
            assert not missing, f"{article.content_id}: {missing} of {text!r} is not in {content!r}"
        for text in _all_texts(article):
            assert set(_NUMBER.findall(text)) <= set(_NUMBER.findall(content)), (text, content)


def test_every_text_shows_its_own_angle_and_plain_texts_show_none(articles: list[Article]) -> None:
    for article in articles:
        markers = {angle.angle: angle.markers for angle in article.angles}
        for angle in article.angles:
            assert all(marker in article.body for marker in angle.markers)
            for text in (text for task in TASKS for text in angle.texts[task]):
                assert shown_angle(text, markers) == angle.angle, (text, markers)
        assert {shown_angle(text, markers) for task in TASKS for text in article.plain[task]} == {None}


def test_there_is_enough_to_tell() -> None:
    assert len(ANGLES) >= 8
    for language in LANGUAGES:
        for angle in ANGLES:
            stories = templates(language)["angles"][angle]
            assert len(stories) >= 3
            assert all(len(story["headline"]) >= 3 and len(story["explanation"]) >= 2 for story in stories)
    sizes = {len(make_article("x", "ja", Random(seed)).angles) for seed in range(20)}
    assert sizes == {5, 6}


@pytest.mark.parametrize(
    ("text", "angle"),
    [
        ("42 million dollars for the pier", "money"),
        ("142 million dollars for the pier", None),  # another number that ends alike
        ("Ada Lorwick, 42, and 7 jobs", "money"),  # two facts beat one
        ("Ada Lorwick and 42", None),  # level
        ("ネクソラ技研が7人を雇う", "money"),
        ("The pier opens in May", None),
        ("", None),
    ],
)
def test_the_measure_on_hand_made_texts(text: str, angle: str | None) -> None:
    markers = {"money": ["42", "7", "ネクソラ技研"], "people": ["Ada Lorwick", "63"]}
    assert shown_angle(text, markers) == angle


def _generations(rows: list[tuple[str, str, str, str]]) -> pa.Table:
    names = ["user_id", "content_id", "text", "status"]
    table = pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})
    return table.append_column("task", pa.array(["headline"] * len(rows)))


def test_accuracy_on_a_hand_made_table() -> None:
    truth = Truth(
        ranking={"ann": ["money", "people"], "bob": ["people", "money"], "cy": ["health", "money", "people"]},
        markers={"c": {"money": ["42"], "people": ["63"]}},
        language={"c": "en"},
    )
    perfect = _generations([("ann", "c", "42!", "ok"), ("bob", "c", "63!", "ok")])
    found = angle_accuracy(perfect, truth)["en"]
    assert (found.num_texts, found.right, found.shuffled) == (2, 1.0, 0.0)
    same = angle_accuracy(_generations([("ann", "c", "42", "ok"), ("bob", "c", "42", "fallback")]), truth)["en"]
    assert (same.right, same.shuffled, same.ratio) == (0.5, 0.5, 1.0)
    quiet = angle_accuracy(_generations([("ann", "c", "42", "ok"), ("bob", "c", "42", "suppressed")]), truth)["en"]
    assert (quiet.num_texts, quiet.right) == (1, 1.0)
    assert truth.expected_angle("cy", "c") == "money", "the best-liked angle that the content has"


def test_the_world_is_a_function_of_its_seed(world: World, tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", seed=5, num_users=160, num_contents=20)
    other = write_world(tmp_path / "other", seed=6, num_users=160, num_contents=20)
    names = sorted(path.name for path in world.folder.iterdir())
    hashes = [_hashes(item.folder, names) for item in (world, again, other)]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0].values()) & set(hashes[2].values())
    assert again.embedding_space == world.embedding_space != other.embedding_space


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_the_tables_fit_their_schemas_and_each_other(world: World) -> None:
    for table in INPUT_TABLES:
        validate_schema(table, pq.read_schema(world.uri(table)), world.uri(table))
    truth = load_truth(world.folder)
    candidates, targets = pl.read_parquet(world.uri("candidates")), pl.read_parquet(world.uri("targets"))
    contents, users = pl.read_parquet(world.uri("contents")), pl.read_parquet(world.uri("users"))
    assert not set(candidates["content_id"]) & set(targets["content_id"]), "what is learned from is not written about"
    assert set(candidates["content_id"]) | set(targets["content_id"]) <= set(contents["content_id"])
    assert set(candidates["user_id"]) - set(targets["user_id"]), "some users were never trained on"
    assert set(users["personalize"]) == {True, False, None}
    language = dict(contents.select("content_id", "language").iter_rows())
    locale = dict(users.select("user_id", "locale").iter_rows())
    assert all(locale[user] == language[item] for user, item in candidates.select("user_id", "content_id").iter_rows())
    for user_id, content_id, text in targets.select("user_id", "content_id", "text").iter_rows():
        assert shown_angle(text, truth.markers[content_id]) == truth.expected_angle(user_id, content_id)


def test_the_shipped_base_model_is_small_and_loads() -> None:
    assert sum(path.stat().st_size for path in BASE_MODEL.iterdir()) < 15e6
    tokenizer = load_tokenizer(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32, local_files_only=True)
    assert model.config.vocab_size == len(tokenizer)
    for words in ANGLE_WORDS.values():
        assert all(len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in words.values())
    for text in ("Kelmont's 42 trams — “new”!", "水森町の路面電車、420人が歓迎。😀 髙﨑"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_prompts_have_the_tokens_that_the_base_model_was_trained_on(articles: list[Article]) -> None:
    tokenizer = load_tokenizer(BASE_MODEL)
    layout = PromptLayout(tokenizer, "content_first", demo_tasks(), num_soft_tokens=1, max_positions=1024)
    for article in (articles[0], articles[-1]):
        packed = Packer(tokenizer).pack(article, Random(1))
        content = Content(article.content_id, article.title, article.body, article.language)
        for cue, task in enumerate(TASKS, start=1):
            trunk = [
                token
                for token, its_cue, branch in zip(packed.ids, packed.cues, packed.branches, strict=True)
                if branch == 0 and its_cue in (0, cue)
            ]
            segments = layout.segments(content, task)
            assert (list(segments.left), segments.right, segments.truncated) == (trunk, (), False)
        assert len(segments.left) < 200


def test_branches_of_a_packed_article_do_not_see_each_other(articles: list[Article]) -> None:
    """One packed forward pass gives every text the logits that it has alone, behind its own prompt."""
    tokenizer = load_tokenizer(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32, local_files_only=True).eval()
    packer = Packer(tokenizer)
    packed = packer.pack(articles[0], Random(1))
    batch = packer.batch([packed])
    mask = torch.zeros(batch.visible.shape).masked_fill(~batch.visible, -torch.inf)
    with torch.no_grad():
        together = model(batch.ids, attention_mask=mask, position_ids=batch.positions).logits[0]
        for branch in range(2, max(packed.branches) + 1):
            places = [place for place, its in enumerate(packed.branches) if its == branch]
            cue = packed.cues[places[0]]
            trunk = [
                p for p, (c, b) in enumerate(zip(packed.cues, packed.branches, strict=True)) if not b and c in (0, cue)
            ]
            alone = model(batch.ids[:, trunk + places]).logits[0, len(trunk) :]
            torch.testing.assert_close(together[places], alone, atol=1e-4, rtol=1e-4)
            assert all(packed.targets[place] != NO_TARGET for place in places)


def test_the_base_model_follows_the_angle_word() -> None:
    """Greedy texts for every angle of unseen articles: they show the angle, and the numbers are the article's."""
    tokenizer = load_tokenizer(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32, local_files_only=True).eval()
    for language in LANGUAGES:
        shown = total = 0
        for seed in range(6):
            article = make_article("x", language, Random(f"unseen/{seed}"))
            prompt = [
                tokenizer.bos_token_id,
                *tokenizer.encode(f"{article.title}\n\n{article.body}", add_special_tokens=False),
                *tokenizer.encode(CUES[language]["headline"], add_special_tokens=False),
            ]
            words = [tokenizer.encode(ANGLE_WORDS[language][a.angle], add_special_tokens=False) for a in article.angles]
            ids = torch.tensor([prompt + word for word in words])
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
            texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            markers = {angle.angle: angle.markers for angle in article.angles}
            for angle, text in zip(article.angles, texts, strict=True):
                shown += shown_angle(text, markers) == angle.angle
                total += 1
        assert shown >= 0.8 * total, f"{language}: {shown} of {total}"


@pytest.mark.parametrize("name", ["a #1", "run: 2", "[x]", "- a", "%20", "$output", 'a "b"', "a\\nb", "記事 😀"])
def test_the_job_files_name_any_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    found = write_configs(folder, world=folder / "world", base_model=folder / "base")
    job, train, evaluate = (
        yaml.safe_load(path.read_text("utf-8")) for path in (found.generate, found.train, found.evaluate)
    )
    for config in (job, train, evaluate):
        assert config["inputs"]["users_uri"] == f"{folder}/world/users.parquet"
        assert config["base_model"]["uri"] == f"{folder}/base"
    outputs = [config["output"]["uri"] for config in (job, train, evaluate)]
    assert outputs == [f"{folder}/{name}" for name in ("output", "training", "evaluation")]
    assert job["projector"]["uri"] == evaluate["projector"]["uri"] == f"{folder}/training/projector"


def test_the_job_files_are_valid_configurations(world: World, tmp_path: Path) -> None:
    found = write_configs(tmp_path, world=world.folder)
    job = load_config(JobConfig, ["--config", str(found.generate)], prog="test", description="")
    train = load_config(TrainConfig, ["--config", str(found.train)], prog="test", description="")
    evaluate = load_config(EvaluateConfig, ["--config", str(found.evaluate)], prog="test", description="")
    assert job.inputs.users_uri == train.inputs.users_uri == evaluate.inputs.users_uri == world.uri("users")
    assert job.projector.uri == evaluate.projector.uri == train.output.projector_uri
    assert job.tasks == train.tasks == evaluate.tasks == demo_tasks()
    for task in TASKS:
        for language in LANGUAGES:
            prompt = job.tasks[task].prompt_for(language)
            assert prompt is not None
            assert (prompt.cue_before, prompt.cue_after) == (CUES[language][task], "")
    assert TEXT_PREFIX.keys() == set(LANGUAGES)
    assert train.training.target_prefix == {language: text for language, text in TEXT_PREFIX.items() if text}
