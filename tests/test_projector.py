"""The projector and its artifact: what it computes, that it comes back the same, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from e2p_ray.config import BaseModelConfig, JobConfig
from e2p_ray.engine.engine import load_engine
from e2p_ray.engine.manifest import ProjectorManifest, read_manifest, resolve_base_model
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector, ReferenceStatistics
from e2p_ray.errors import ConfigError, IncompatibleError
from e2p_ray.storage import Storage
from tests import tiny_models
from tests.s3 import place_on

STORAGE = Storage()


def make(**changes: Any) -> Projector:
    values: dict[str, Any] = {
        "embedding_dim": 12,
        "embedding_space": "space-1",
        "d_model": 48,
        "base_model_id": "tiny@0",
        "tokenizer_hash": "bytes",
        "output_rms": 0.25,
    }
    manifest = ProjectorManifest(**values | changes)
    x = torch.randn(500, manifest.embedding_dim, generator=torch.Generator().manual_seed(0)) * 3 + 1
    return Projector(manifest, ReferenceStatistics.of(x))


def perturbed(**changes: Any) -> Projector:
    projector = make(**changes)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return projector.eval()


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    return place_on(request.param, request, tmp_path, "artifacts/projector")


class TestModule:
    def test_shapes_for_every_kind_and_number_of_soft_tokens(self) -> None:
        for kind in ("residual", "mlp", "linear", "constant"):
            for k in (1, 2, 4):
                soft = perturbed(kind=kind, num_soft_tokens=k)(torch.randn(5, 12))
                assert soft.shape == (5, k, 48)
                assert soft.dtype == torch.float32

    def test_equals_its_definition(self) -> None:
        projector = perturbed()
        x = torch.randn(7, 12)
        w = {name: value.double().numpy() for name, value in projector.state_dict().items()}
        z = (x.double().numpy() - projector.mean.double().numpy()) / projector.std.double().numpy()
        h = z @ w["hidden.weight"].T + w["hidden.bias"]
        h = h / (1 + np.exp(-h))
        expected = (z @ w["linear.weight"].T + w["bias"] + h @ w["output.weight"].T) * 0.25
        assert np.abs(projector(x)[:, 0].detach().numpy() - expected).max() < 1e-5

    def test_a_kind_is_what_its_name_says(self) -> None:
        x = torch.randn(2, 12)
        assert torch.equal(*perturbed(kind="constant")(x)), "one soft token for everybody"
        linear = perturbed(kind="linear")
        with torch.no_grad():
            linear.mean.zero_()
            torch.testing.assert_close(linear(x.sum(0, True)), linear(x).sum(0, True) - linear(x[:1] * 0))
        assert perturbed(kind="mlp").linear is None

    def test_it_starts_where_it_is_told_to(self) -> None:
        projector = make(num_soft_tokens=2)
        token = torch.randn(48)
        projector.start_at(token)
        torch.testing.assert_close(projector(torch.randn(3, 12)).detach(), token.expand(3, 2, 48))

    def test_untrained_it_is_the_same_token_sized_vector_for_everyone(self) -> None:
        soft = make(d_model=4096)(torch.randn(6, 12)).detach()
        assert torch.equal(soft, soft[:1].expand_as(soft))
        assert float(soft.square().mean().sqrt()) == pytest.approx(0.25, rel=0.1)

    def test_reference_statistics_equal_numpy(self) -> None:
        x = np.random.default_rng(0).standard_normal((300, 5)).astype(np.float32) * [1, 2, 3, 4, 0]
        found = ReferenceStatistics.of(torch.from_numpy(x))
        assert np.allclose(found.mean, x.mean(0), atol=1e-5)
        assert np.allclose(found.covariance, np.cov(x.T), atol=1e-4)
        assert np.allclose(found.norm_quantiles[4], np.median(np.linalg.norm(x, axis=1)), atol=1e-4)
        assert int(found.count) == 300
        assert bool((found.std > 0).all()), "a constant dimension must not divide by zero"

    def test_a_wide_space_keeps_only_the_diagonal(self) -> None:
        x = torch.randn(10, 1100)
        found = ReferenceStatistics.of(x)
        assert found.covariance.shape == (1100,)
        assert torch.allclose(found.std, x.std(0), atol=1e-5)

    @pytest.mark.parametrize("kind", ["residual", "mlp", "linear"])
    @pytest.mark.parametrize("num_dims", [5, 1100])
    def test_a_dimension_that_was_constant_in_training_moves_nobody(self, kind: str, num_dims: int) -> None:
        random = np.random.default_rng(0)
        x = (random.standard_normal((300, num_dims)) * 3 + 1).astype(np.float32)
        x[:, 3] = np.float32(0.1)
        manifest = replace(make(kind=kind).manifest, embedding_dim=num_dims)
        projector = Projector(manifest, ReferenceStatistics.of(torch.from_numpy(x)))
        for parameter in projector.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        projector.eval()
        ordinary = torch.from_numpy(x[:20])
        other = ordinary.clone()
        other[:, 3] = torch.linspace(-5, 5, 20)
        assert torch.equal(projector(other), projector(ordinary))
        other[:, 2] += 1
        assert not torch.isclose(projector(other), projector(ordinary)).all(), "control: what varied is seen"
        # As users of the training have always been seen: they are at the mean there, and the floor does not matter.
        std = projector.std.clone()
        projector.std = projector.reference.std
        before = projector(ordinary)
        projector.std = std
        assert torch.equal(projector(ordinary), before)

    def test_a_dimension_that_hardly_varies_beside_a_huge_one_is_not_constant(self) -> None:
        """As one of embeddings beside a time in seconds that nobody has scaled."""
        x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        x[:, 3] = 1.7e9 + 1e7 * x[:, 3]
        x[:, 2] = 0.1
        assert ReferenceStatistics.of(x).is_constant.tolist() == [False, False, True, False]

    def test_one_user_tells_nothing_apart(self) -> None:
        projector = Projector(make().manifest, ReferenceStatistics.of(torch.randn(1, 12)))
        for parameter in projector.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        soft = projector.eval()(torch.randn(5, 12))
        assert torch.equal(soft, soft[:1].expand_as(soft))
        assert bool(torch.isfinite(soft).all())

    def test_norms_of_more_users_than_torch_takes(self) -> None:
        x = torch.arange((1 << 24) + 2, dtype=torch.float32)[:, None]
        found = ReferenceStatistics.of(x)
        assert found.norm_quantiles[[0, 4, 8]].tolist() == [0, 1 << 23, (1 << 24)]


class TestArtifact:
    def test_comes_back_the_same(self, place: tuple[Storage, str]) -> None:
        storage, uri = place
        saved = perturbed(num_soft_tokens=2)
        manifest = saved.save_pretrained(storage, uri)
        assert len(manifest.projector_id) == 16
        loaded = Projector.from_pretrained(storage, uri)
        assert loaded.manifest == manifest
        x = torch.randn(3, 12)
        assert torch.equal(loaded(x), saved(x))
        assert torch.equal(loaded.reference.covariance, saved.reference.covariance)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())

    def test_the_id_changes_with_weights_and_with_meaning(self, tmp_path: Path) -> None:
        first = perturbed()
        ids = {first.save_pretrained(STORAGE, str(tmp_path / "a")).projector_id}
        with torch.no_grad():
            first.bias[0] += 1e-3
        ids.add(first.save_pretrained(STORAGE, str(tmp_path / "b")).projector_id)
        first.manifest = replace(first.manifest, embedding_space="space-2")
        ids.add(first.save_pretrained(STORAGE, str(tmp_path / "c")).projector_id)
        assert len(ids) == 3

    def test_missing_damaged_and_foreign_artifacts_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no projector artifact"):
            Projector.from_pretrained(STORAGE, str(tmp_path / "nothing"))
        uri = tmp_path / "p"
        perturbed().save_pretrained(STORAGE, str(uri))
        good = (uri / "config.json").read_text()

        def refused(text: str, error: type[Exception], match: str) -> None:
            (uri / "config.json").write_text(text)
            with pytest.raises(error, match=match):
                Projector.from_pretrained(STORAGE, str(uri))

        refused(good[:-20], ConfigError, "not JSON")
        values = json.loads(good)
        refused(json.dumps(values | {"schema_version": 99}), IncompatibleError, "schema version 99")
        refused(json.dumps(values | {"embedding_space": "another"}), IncompatibleError, "changed after")
        refused(json.dumps(values | {"surprise": 1}), IncompatibleError, "surprise")
        (uri / "config.json").write_text(good)
        weights = bytearray((uri / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (uri / "model.safetensors").write_bytes(bytes(weights))
        with pytest.raises(IncompatibleError, match=r"model\.safetensors"):
            Projector.from_pretrained(STORAGE, str(uri))

    def test_weights_that_are_not_finite_are_refused(self, tmp_path: Path) -> None:
        broken = perturbed()
        with torch.no_grad():
            broken.bias[0] = float("nan")
        broken.save_pretrained(STORAGE, str(tmp_path / "p"))
        with pytest.raises(IncompatibleError, match="NaN"):
            Projector.from_pretrained(STORAGE, str(tmp_path / "p"))


class TestBinding:
    """Projector and base model are compared before the model is loaded."""

    @pytest.fixture
    def job(self, tmp_path: Path) -> JobConfig:
        config = LlamaConfig(**tiny_models.common())
        folder = tiny_models.save_model_folder(config, tmp_path / "tiny-llama")
        base = resolve_base_model(BaseModelConfig(uri=str(folder)), STORAGE)
        projector = perturbed(base_model_id=base.base_model_id, tokenizer_hash=base.tokenizer_hash)
        projector.save_pretrained(STORAGE, str(tmp_path / "projector"))
        return JobConfig.model_validate(
            {
                "inputs": {"users_uri": "u", "contents_uri": "c", "candidates_uri": "k"},
                "output": {"uri": str(tmp_path / "out")},
                "base_model": {"uri": str(folder)},
                "projector": {"uri": str(tmp_path / "projector")},
                "tasks": {"headline": tiny_models.task()},
            }
        )

    def test_a_fitting_pair_loads_and_writes(self, job: JobConfig) -> None:
        engine = load_engine(job, STORAGE)
        [content] = tiny_models.contents(1)
        completions = list(engine.generate([tiny_models.group(content, range(3))]))
        assert len(completions) == 3
        assert engine.base_model_id.startswith("tiny-llama@")

    def test_another_model_of_the_same_shape_is_refused_before_loading(
        self, job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(*args: Any) -> None:
            raise AssertionError("the model was loaded")

        monkeypatch.setattr(BaseModel, "load", never)
        folder = Path(job.base_model.uri)
        tiny_models.random_model(LlamaConfig(**tiny_models.common()), seed=5).save_pretrained(folder)
        with pytest.raises(IncompatibleError, match="trained for base model 'tiny-llama@"):
            load_engine(job, STORAGE)

    def test_another_tokenizer_is_refused(self, job: JobConfig, tmp_path: Path) -> None:
        manifest = replace(read_manifest(STORAGE, job.projector.uri), tokenizer_hash="other").with_files({})
        base = resolve_base_model(job.base_model, STORAGE)
        from e2p_ray.engine.manifest import check_compatible

        with pytest.raises(IncompatibleError, match="tokenizer 'other'"):
            check_compatible(manifest, base)

    def test_pickled_weights_are_never_loaded(self, job: JobConfig) -> None:
        folder = Path(job.base_model.uri)
        torch.save({}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match="safetensors"):
            BaseModel.load(folder, "float32", torch.device("cpu"))

    def test_a_model_that_is_nowhere_is_a_clear_error(self, job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        missing = job.model_copy(update={"base_model": BaseModelConfig(uri="nobody/no-such-model")})
        with pytest.raises(ConfigError, match="neither a folder nor a hub model"):
            load_engine(missing, STORAGE)

    def test_the_base_model_stays_frozen(self, job: JobConfig) -> None:
        base = BaseModel.load(Path(job.base_model.uri), "float32", torch.device("cpu"))
        before = base.weights_hash()
        [content] = tiny_models.contents(1)
        list(load_engine(job, STORAGE).generate([tiny_models.group(content, range(3))]))
        assert base.weights_hash() == before
        with torch.no_grad():
            next(iter(base.model.parameters())).add_(1e-3)
        assert base.weights_hash() != before, "the control: a changed weight is found"
