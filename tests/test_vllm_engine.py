"""The engine on vLLM: the same texts as transformers' own generate and as our engine.

Where vLLM is installed (in a virtual environment of its own: python -m pytest tests/test_vllm_engine.py there) all of
it runs; elsewhere a stand-in takes vLLM's place, which decodes greedily through transformers.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from e2p_ray.config import EngineConfig, PromptTemplate, TaskConfig
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.manifest import Layout
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.vllm_core import num_positions, read_config, read_token_embedding, start_vllm
from e2p_ray.engine.vllm_engine import VllmEngine
from e2p_ray.errors import ConfigError, IncompatibleError, UnsupportedModelError
from e2p_ray.schema import Completion, Content, ErrorCode, FinishReason, Group, Request, RequestKey
from tests import tiny_models
from tests.chaos.real_job import FREE, write_real_job
from tests.tiny_models import (
    byte_tokenizer,
    contents,
    group,
    random_projector,
    save_model_folder,
    save_model_of_letters,
    task,
)

HAS_VLLM = importlib.util.find_spec("vllm") is not None
BACKENDS = ["stand_in", pytest.param("vllm", marks=pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed"))]
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")


def config_of(**changes: Any) -> PreTrainedConfig:
    """A tiny Llama with heads of 32, which vLLM's attention on CPU can take."""
    return LlamaConfig(**tiny_models.common(hidden_size=128, initializer_range=0.15, **changes))


@dataclass
class _Job:
    embeds: torch.Tensor
    params: Any
    num_written: int = 0


class StandIn:
    """The part of vLLM's LLMEngine that is used, over transformers: one greedy token a request and step."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._jobs: dict[str, _Job] = {}
        self.max_running = 0

    def add_request(self, name: str, prompt: dict[str, torch.Tensor], params: Any) -> None:
        self._jobs[name] = _Job(prompt["prompt_embeds"], params)
        self.max_running = max(self.max_running, len(self._jobs))

    def abort_request(self, names: Sequence[str]) -> None:
        for name in names:
            self._jobs.pop(name, None)

    @torch.inference_mode()
    def step(self) -> list[Any]:
        outputs = []
        for name, job in list(self._jobs.items()):
            logits = self._model(inputs_embeds=job.embeds[None]).logits[0, -1].float()
            token = int(logits.argmax())
            logprob = float(logits.log_softmax(-1)[token])
            job.num_written += 1
            job.embeds = torch.cat([job.embeds, self._model.get_input_embeddings().weight[token : token + 1]])
            finished = token in job.params.stop_token_ids or job.num_written >= job.params.max_tokens
            if finished:
                del self._jobs[name]
            written = SimpleNamespace(token_ids=[token], logprobs=[{token: SimpleNamespace(logprob=logprob)}])
            outputs.append(SimpleNamespace(request_id=name, outputs=[written], finished=finished, num_cached_tokens=0))
        return outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(config_of(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def real_vllm(folder: Path) -> Any:
    """One vLLM for the whole file: starting it takes seconds."""
    if not HAS_VLLM:
        return None
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return start_vllm(folder, "float32", EngineConfig(max_rows=16, max_bytes=1 << 30), 512, eager=True)


@pytest.fixture
def backend(
    request: pytest.FixtureRequest, folder: Path, real_vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    if request.param == "vllm":
        assert real_vllm.reset_prefix_cache()
        yield real_vllm
        return
    package, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vars(package)["SamplingParams"] = SimpleNamespace
    vars(params)["RequestOutputKind"] = SimpleNamespace(DELTA=1)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    yield StandIn(folder)


def engine_on(
    backend: Any,
    folder: Path,
    tasks: dict[str, TaskConfig],
    *,
    layout: Layout = "content_first",
    num_soft_tokens: int = 1,
    max_rows: int = 8,
) -> VllmEngine:
    projector = random_projector(128, layout=layout, num_soft_tokens=num_soft_tokens)
    return VllmEngine(backend, folder, torch.float32, projector, byte_tokenizer(), tasks, max_rows=max_rows)


def our_engine(folder: Path, tasks: dict[str, TaskConfig]) -> Engine:
    base = BaseModel.load(folder, "float32", torch.device("cpu"))
    return Engine(base, random_projector(128), byte_tokenizer(), tasks, EngineConfig(max_rows=16))


def groups(num: int = 4) -> list[Group]:
    return [group(content, range(at, at + 4), without=(at + 1,)) for at, content in enumerate(contents(num))]


def by_key(completions: Iterator[Completion]) -> dict[RequestKey, Completion]:
    found = list(completions)
    assert len({completion.key for completion in found}) == len(found)
    return {completion.key: completion for completion in found}


@torch.inference_mode()
def hf_texts(folder: Path, engine: VllmEngine, given: list[Group], *, swap: int = 0) -> dict[RequestKey, str]:
    """transformers' generate, one row at a time; `swap` gives every user the soft token of one further on."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    embed, tokenizer, found = model.get_input_embeddings(), byte_tokenizer(), {}
    for item in given:
        segments = engine.layout.segments(item.content, item.task)
        vectors = [request.user_embedding for request in item.requests]
        for at, request in enumerate(item.requests):
            vector = vectors[(at + swap) % len(vectors)]
            parts = [embed(torch.tensor(segments.left, dtype=torch.long))]
            if vector is not None:
                parts.append(engine._projector(torch.from_numpy(vector[None]))[0])
            parts.append(embed(torch.tensor(segments.right, dtype=torch.long)))
            embeds = torch.cat(parts)[None]
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            ids = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=8, do_sample=False)
            text = tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
            found[request.key] = str(text).lstrip().rstrip("\ufffd")
    return found


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("layout", "num_soft"), [("content_first", 1), ("content_first", 2), ("soft_first", 1)])
def test_greedy_texts_are_transformers_own(backend: Any, folder: Path, layout: Layout, num_soft: int) -> None:
    tasks = {"headline": task(cue_after=":")}
    engine = engine_on(backend, folder, tasks, layout=layout, num_soft_tokens=num_soft)
    given = groups()
    found = by_key(engine.generate(given))
    texts = {key: completion.text for key, completion in found.items()}
    assert texts == hf_texts(folder, engine, given)
    swapped = hf_texts(folder, engine, given, swap=1)
    assert sum(texts[key] == swapped[key] for key in texts) < len(texts) / 2, "control: another user's text differs"
    assert len(set(texts.values())) > len(texts) / 2


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_texts_end_as_in_our_engine(backend: Any, folder: Path) -> None:
    """Stop strings, caps on characters and tokens, end tokens, log-probabilities and counts."""
    frequent = frequent_letters(folder)
    tasks = {
        "headline": task(max_new_tokens=12, stop=frequent),
        "short": task(max_new_tokens=12, max_chars=4),
        "both": task(max_new_tokens=12, max_chars=6, stop=frequent[:1]),
    }
    given = [group(content, range(6), task_name=name, without=(3,)) for content in contents(3) for name in tasks]
    engine = engine_on(backend, folder, tasks)
    found, expected = by_key(engine.generate(given)), by_key(our_engine(folder, tasks).generate(given))
    assert found.keys() == expected.keys()
    for key, ours in expected.items():
        theirs = found[key]
        assert (theirs.text, theirs.finish_reason) == (ours.text, ours.finish_reason)
        assert theirs.num_output_tokens == ours.num_output_tokens
        assert theirs.num_prompt_tokens == ours.num_prompt_tokens
        assert theirs.mean_logprob == pytest.approx(ours.mean_logprob, abs=1e-3)
    reasons = {completion.finish_reason for completion in expected.values()}
    assert {FinishReason.STOP_STRING, FinishReason.MAX_CHARS, FinishReason.MAX_TOKENS} <= reasons, "all were met"
    assert engine.stats.num_output_tokens == sum(completion.num_output_tokens for completion in found.values())


def frequent_letters(folder: Path) -> tuple[str, ...]:
    """Characters that some texts of this model have, and some have not."""
    plain = our_engine(folder, {"headline": task(max_new_tokens=12)})
    texts = [completion.text for completion in plain.generate(groups(3))]
    counts = {char: sum(char in text for text in texts) for char in set("".join(texts)) if char != "\ufffd"}
    some = sorted((char for char, count in counts.items() if 2 <= count < len(texts)), key=lambda c: -counts[c])
    assert some, "a stop string must be met by some texts and not by others"
    return tuple(some[:2])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_rows_in_trouble_become_errors_and_harm_nobody(backend: Any, folder: Path) -> None:
    only_english = task().model_copy(update={"prompts": {"en": task().prompts["default"]}})
    content = contents(1)[0]
    bad = Request(RequestKey("bad", content.content_id, "headline"), np.full(12, np.nan, np.float32))
    healthy = group(content, range(3))
    mixed = Group(content, "headline", (healthy.requests[0], bad, *healthy.requests[1:]))
    japanese = group(Content("ja", "橋", "東京都は橋を建てる。", "ja"), range(2))
    engine = engine_on(backend, folder, {"headline": only_english})
    found = by_key(engine.generate([japanese, mixed]))
    errors = {key: completion.error_code for key, completion in found.items() if completion.error_code}
    without_template = {request.key: ErrorCode.NO_PROMPT for request in japanese.requests}
    assert errors == {bad.key: ErrorCode.NON_FINITE_LOGITS, **without_template}
    alone = by_key(engine_on(backend, folder, {"headline": only_english}).generate([healthy]))
    assert {key: found[key].text for key in alone} == {key: item.text for key, item in alone.items()}


@pytest.mark.parametrize("backend", ["stand_in"], indirect=True)
def test_at_most_max_rows_are_with_vllm_and_none_is_left_there(backend: Any, folder: Path) -> None:
    tasks = {"headline": task(), "long": task(max_new_tokens=16)}
    engine = engine_on(backend, folder, tasks, max_rows=3)
    given = [group(content, range(3), task_name=name) for content in contents(3) for name in tasks]
    assert len(list(engine.generate(given))) == 18
    assert backend.max_running == 3
    assert not backend._jobs
    cut = engine.generate([group(contents(1)[0], range(2), task_name=name) for name in tasks])
    next(cut)
    assert backend._jobs
    cut.close()  # type: ignore[attr-defined]
    assert not backend._jobs


@needs_vllm
@pytest.mark.parametrize("backend", ["vllm"], indirect=True)
def test_a_sampled_text_depends_on_its_request_and_attempt_only(backend: Any, folder: Path) -> None:
    tasks = {"headline": task(temperature=0.9, top_p=0.95, top_k=50, seed=7)}
    engine = engine_on(backend, folder, tasks)
    given = groups()
    first = {key: item.text for key, item in by_key(engine.generate(given)).items()}
    again = {key: item.text for key, item in by_key(engine.generate(list(reversed(given)))).items()}
    alone = {key: item.text for key, item in by_key(engine.generate(given[:1])).items()}
    assert again == first
    assert alone.items() <= first.items()
    retried = [replace(group, attempt=1) for group in given]
    other = {key: item.text for key, item in by_key(engine.generate(retried)).items()}
    assert sum(other[key] == first[key] for key in first) < len(first) / 2, "control: another attempt, other texts"


@needs_vllm
@pytest.mark.parametrize("backend", ["vllm"], indirect=True)
def test_the_users_of_a_content_share_its_blocks(backend: Any, folder: Path) -> None:
    content = Content("long", "Bridge", "river " * 40, "en")  # 260 tokens: two blocks of 128
    shared = engine_on(backend, folder, {"headline": task()})
    list(shared.generate([group(content, range(6))]))
    stats = shared.stats
    assert stats.num_prompt_tokens - stats.num_computed_tokens >= 5 * 256
    assert backend.reset_prefix_cache()
    apart = engine_on(backend, folder, {"headline": task()}, layout="soft_first")
    list(apart.generate([group(content, range(6))]))
    assert apart.stats.num_computed_tokens == apart.stats.num_prompt_tokens, "control: soft token first shares nothing"


@needs_vllm
def test_a_whole_job_writes_what_our_engine_writes(tmp_path: Path) -> None:
    """Through Ray, whose actor starts vLLM as every job does: compiled, in a process of its own."""
    checks = dict.fromkeys((*FREE, "retry"), False)  # a second try is sampled, and drawn otherwise
    write_real_job(tmp_path, model=config_of(), save=save_model_of_letters, checks=checks)
    tables = []
    for kind in ("native", "vllm"):
        options = ["--config", str(tmp_path / "job.yaml"), "--engine.kind", kind, "--output.uri", str(tmp_path / kind)]
        subprocess.run([sys.executable, "-m", "jobs.generate", *options], check=True)
        tables.append(pl.read_delta(str(tmp_path / kind / "generations")).sort("user_id", "content_id", "task"))
    ours, theirs = tables
    written = ours.filter(pl.col("arm") == "soft_token")["text"]
    assert written.n_unique() > len(ours) / 4, "control: texts differ, so that equal ones say something"
    for name in ("user_id", "content_id", "task", "text", "status", "reason", "arm"):
        assert ours[name].equals(theirs[name], null_equal=True), name
    both = pl.DataFrame({"ours": ours["mean_logprob"], "theirs": theirs["mean_logprob"]})
    assert both.filter((pl.col("ours") - pl.col("theirs")).abs() > 1e-3).is_empty()


def test_without_vllm_the_error_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'e2p_ray\[vllm\]'.*engine\.kind to native"):
        start_vllm(folder, "float32", EngineConfig(kind="vllm"), 512)


def test_what_vllm_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.headline\.sampling: vLLM has no penalties"):
        engine_on(None, folder, {"headline": task(repetition_penalty=1.2)})
    with pytest.raises(ConfigError, match="no penalties"):
        engine_on(None, folder, {"headline": task(no_repeat_ngram_tokens=3)})
    gemma = save_model_folder(tiny_models.configs()["gemma2"], tmp_path / "gemma")
    with pytest.raises(UnsupportedModelError, match="'gemma2' is not supported with"):
        engine_on(None, gemma, {"headline": task()})
    llama = save_model_folder(tiny_models.configs()["llama"], tmp_path / "llama")
    with pytest.raises(IncompatibleError, match="width 128, the base model's tokens have 48"):
        engine_on(None, llama, {"headline": task()})


@pytest.mark.parametrize("layout", ["content_first", "soft_first"])
def test_prompts_of_a_long_template_are_those_of_our_engine(layout: Layout, tmp_path: Path) -> None:
    long = PromptTemplate(head="x" * 1500, cue_before="y" * 90, cue_after="z" * 30)
    short = PromptTemplate(head="News. ")
    tasks = {
        "long": TaskConfig(prompts={"en": long, "default": short}),
        "short": TaskConfig(prompts={"default": short}, max_content_tokens=700),
    }
    content = Content("c", "Bridge", "river " * 200, "en")
    lengths = []
    for positions in (4096, 2000):  # in the smaller window the long template leaves the content less
        folder = save_model_folder(config_of(max_position_embeddings=positions), tmp_path / str(positions))
        theirs = engine_on(None, folder, tasks, layout=layout, num_soft_tokens=2).layout
        base = BaseModel.load(folder, "float32", torch.device("cpu"))
        projector = random_projector(128, layout=layout, num_soft_tokens=2)
        ours = Engine(base, projector, byte_tokenizer(), tasks, EngineConfig()).layout
        found = [theirs.segments(content, name) for name in tasks]
        assert found == [ours.segments(content, name) for name in tasks]
        lengths.append([segments.num_tokens for segments in found])
    wide, narrow = lengths
    assert wide[0] == 1 + 1500 + 512 + 90 + 30
    assert narrow[0] < wide[0], "control: the window matters"
    assert narrow[1] == wide[1]


def test_vllm_has_room_for_the_longest_prompt_and_no_more(folder: Path) -> None:
    tasks = {"headline": task(cue_after=":", max_new_tokens=8), "other": task(cue_before="", max_new_tokens=9)}
    tasks["other"] = tasks["other"].model_copy(update={"max_content_tokens": 100})
    tasks["headline"] = tasks["headline"].model_copy(update={"max_content_tokens": 100})
    engine = engine_on(None, folder, tasks, num_soft_tokens=3)
    content = Content("c", "", "river " * 100, "en")
    lengths = [
        engine.layout.segments(content, name).num_tokens + 3 + task.sampling.max_new_tokens
        for name, task in tasks.items()
    ]
    assert lengths[0] == lengths[1] + 2
    assert num_positions(read_config(folder), byte_tokenizer(), tasks, 3) == max(lengths)


def test_a_folder_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json: "):
        read_token_embedding(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama5"}', encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="llama5"):
        read_config(tmp_path / "model")


def test_token_embeddings_are_read_from_one_file_or_several(folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.get_input_embeddings().weight
    assert torch.equal(read_token_embedding(folder), expected)
    model.save_pretrained(tmp_path / "several", max_shard_size="200KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    assert torch.equal(read_token_embedding(tmp_path / "several"), expected)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no token embeddings"):
        read_token_embedding(tmp_path / "none")
