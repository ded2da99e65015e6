"""What could harm is refused: pickles under any name, header bombs, names and links out of a folder, YAML tags."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig

import jobs.publish
from e2p_ray.commit import Run, load_run
from e2p_ray.commit.purge import find_users
from e2p_ray.commit.users_in import Users
from e2p_ray.config import BaseModelConfig, JobConfig, load_config
from e2p_ray.engine.manifest import read_manifest, resolve_base_model
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector
from e2p_ray.errors import ConfigError, E2PError, IncompatibleError, StorageError, UnsupportedModelError
from e2p_ray.plan import load_plan
from e2p_ray.storage import Storage
from e2p_ray.train.job.prepared import prepare
from e2p_ray.update.update import load_update
from jobs.cli import run_job
from tests.small_job import write_small_job
from tests.test_imports import ROOT, danger_problems, sources
from tests.train_world import write_train_world
from tests.update_world import Text, make_world

STORAGE = Storage()


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def pickled(target: Path) -> bytes:
    return pickle.dumps(Bomb(target))


def header_bomb(num_bytes: int) -> bytes:
    """A safetensors file that says its header is this long."""
    return struct.pack("<Q", num_bytes) + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4)


def overlapping() -> bytes:
    """Two tensors over the same bytes, and one that is far larger than the file."""
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


UNSAFE: dict[str, Callable[[Path], bytes]] = {
    "pickle": pickled,
    "header of 2**60 bytes": lambda _: header_bomb(2**60),
    "header of 2**31 bytes": lambda _: header_bomb(2**31),
    "header longer than the file": lambda _: header_bomb(4096),
    "tensors beyond the file": lambda _: overlapping(),
    "empty": lambda _: b"",
    "torch.save": lambda target: _torch_saved(target),
}


def _torch_saved(target: Path) -> bytes:
    path = target.parent / "saved.pt"
    torch.save({"x": Bomb(target)}, path)
    return path.read_bytes()


def projector_at(folder: Path) -> Projector:
    from tests.test_projector import perturbed

    made = perturbed()
    made.save_pretrained(STORAGE, str(folder))
    return made


# -- weights


@pytest.mark.parametrize("what", UNSAFE)
@pytest.mark.parametrize("name", ["model.safetensors", "reference.safetensors"])
def test_unsafe_weights_of_a_projector_are_refused(tmp_path: Path, name: str, what: str) -> None:
    """With a manifest that names exactly these bytes: it is the content that is refused, not a wrong hash."""
    folder, target = tmp_path / "projector", tmp_path / "ran"
    projector_at(folder)
    assert Projector.from_pretrained(STORAGE, str(folder)), "control: the artifact as it was is read"
    data = UNSAFE[what](target)
    (folder / name).write_bytes(data)
    manifest = read_manifest(STORAGE, str(folder))
    manifest = manifest.with_files({**manifest.files, name: hashlib.sha256(data).hexdigest()})
    (folder / "config.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(E2PError, match=name) as caught:
        Projector.from_pretrained(STORAGE, str(folder))
    assert not target.exists(), "nothing ran"
    assert isinstance(caught.value, IncompatibleError)


def test_control_the_pickle_does_run_when_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path / "ran"))  # noqa: S301 - the control has to do what is forbidden
    assert (tmp_path / "ran").exists()


def test_a_reference_with_other_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    folder = tmp_path / "projector"
    projector_at(folder)
    data = save({"mean": torch.zeros(3), "__class__": torch.zeros(1)})
    (folder / "reference.safetensors").write_bytes(data)
    manifest = read_manifest(STORAGE, str(folder))
    manifest = manifest.with_files({**manifest.files, "reference.safetensors": hashlib.sha256(data).hexdigest()})
    (folder / "config.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(IncompatibleError, match=r"reference\.safetensors"):
        Projector.from_pretrained(STORAGE, str(folder))


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.mark.parametrize("what", UNSAFE)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "adapter_model.bin"])
def test_unsafe_weights_of_a_base_model_are_refused(tmp_path: Path, base_model: Path, name: str, what: str) -> None:
    folder, target = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(base_model, folder)
    assert BaseModel.load(folder, "float32", torch.device("cpu")), "control: the model as it was is loaded"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(UNSAFE[what](target))
    with pytest.raises(ConfigError, match="safetensors"):
        BaseModel.load(folder, "float32", torch.device("cpu"))
    assert not target.exists(), "nothing ran"


def test_a_pickle_beside_good_weights_is_never_touched(tmp_path: Path, base_model: Path) -> None:
    folder, target = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(base_model, folder)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pickle"):
        (folder / name).write_bytes(pickled(target))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(target)!r}).touch()\nModel = Config = object\n")
    BaseModel.load(folder, "float32", torch.device("cpu"))
    assert not target.exists(), "neither a pickle nor remote code ran"


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, base_model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "other.safetensors").write_bytes((tmp_path / "outside.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="outside"):
        BaseModel.load(folder, "float32", torch.device("cpu"))


@pytest.mark.parametrize("index", ["{", "{}", "[]", "\udcff", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(tmp_path: Path, base_model: Path, index: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"model/model\.safetensors\.index\.json: "):
        BaseModel.load(folder, "float32", torch.device("cpu"))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ('{"model_type": "llama5"}', UnsupportedModelError),
        ("{}", UnsupportedModelError),
        ("[1]", UnsupportedModelError),
        ('{"model_type": "llama", "auto_map"', ConfigError),
        ("null", ConfigError),
        ('{"model_type": "llama", "hidden_size": "16"}', ConfigError),
        ('{"model_type": "llama", "hidden_size": 17}', ConfigError),
        ('{"model_type": "llama", "num_attention_heads": 0}', ConfigError),
    ],
)
def test_a_config_that_transformers_cannot_read_is_named(
    tmp_path: Path, base_model: Path, config: str, error: type[E2PError]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    (folder / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(error, match=f"^{folder}") as caught:
        BaseModel.load(folder, "float32", torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_training_says_the_same(tmp_path: Path) -> None:
    config, _ = write_train_world(tmp_path)
    assert prepare(config).max_positions == 512
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama5"}', encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="llama5"):
        prepare(config)


# -- names


TRAVERSALS = ["../x", "a/b", "..", ".", "", "/etc/passwd", "a\0b", "x" * 200, "a.b", "%2e%2e"]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_ids_that_could_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    places = (f"{tmp_path}/runs/r", f"{tmp_path}/generations", f"{tmp_path}/plans/p")
    with pytest.raises(ConfigError, match="not an id"):
        Run(name, *places, "s", "p", "b", ())
    with pytest.raises(ConfigError, match="not an id"):
        Run("r", *places, "s", "p", "b", (name,))
    with pytest.raises(ConfigError, match="not an id"):
        load_run(STORAGE, str(tmp_path), name)
    run = Run("r", *places, "s", "p", "b", ("a",))
    for place in (run.marker_uri, run.data_uri, run.dead_letter_uri, run.planned_uri):
        assert place("a").startswith(str(tmp_path)), "control: a good one has its places"
        with pytest.raises(ConfigError, match="not an id"):
            place(name)


@pytest.mark.parametrize("name", ["../../secret", "/secret", "a/../../b"])
def test_a_changed_manifest_cannot_name_files_outside(tmp_path: Path, name: str) -> None:
    """Shard ids of plans, updates and runs as they are read back from storage."""
    folder = tmp_path / "out" / "plans" / "p"
    folder.mkdir(parents=True)
    counts = dict.fromkeys(("num_candidates", "num_duplicates", "num_pairs", "num_requests", "num_groups"), 0)
    counts |= dict.fromkeys(("num_contents", "num_users", "content_chars", "request_chars"), 0)
    manifest = {"plan_id": "p", "embedding_space": "s", "embedding_dim": 4, "tasks": ["t"], "shards": [],
                "counts": {**counts, "reasons": {}, "dead_letters": {}}, "changes": {}, "carried_ids": []}  # fmt: skip

    def write(**changes: Any) -> None:
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))

    write()
    assert load_plan(STORAGE, str(folder)).shards == (), "control: the manifest as it was is read"
    write(shards=[[name, 1, 1, 1, 1]])
    with pytest.raises(ConfigError, match="not an id"):
        load_plan(STORAGE, str(folder))
    write(carried_ids=[name])
    with pytest.raises(ConfigError, match="not an id"):
        load_update(STORAGE, str(folder))
    run_folder = tmp_path / "out" / "runs" / "r"
    run_folder.mkdir(parents=True)
    record = {"run_id": "r", "plan_uri": str(folder), "embedding_space": "s", "projector_id": "p",
              "base_model_id": "b", "shard_ids": [name]}  # fmt: skip
    (run_folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="not an id"):
        load_run(STORAGE, str(tmp_path / "out"), "r")


def test_ids_in_tables_never_become_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    evil = "../../../../evil"
    world.contents[evil] = Text("A title", "A body about 4 things in town. " * 4, "en")
    world.users[evil] = world.users["user-004"]
    world.candidates = {("user-004", evil): 0.5, (evil, "content-00"): 0.5, (evil, evil): 0.1}
    world.run()
    assert (evil, evil, "headline") in world.rows(), "control: it is an id like any other"
    assert not list(tmp_path.glob("**/*evil*"))
    assert not list(tmp_path.parent.glob("*evil*"))


def test_jobs_refuse_a_run_id_that_is_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = write_small_job(tmp_path)
    assert run_job(jobs.publish.JOB, ["--config", str(path), "--run", "../../x"]) == 2
    assert "not an id" in capsys.readouterr().err


# -- links


def test_a_link_out_of_an_artifact_is_refused(tmp_path: Path, base_model: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    resolve_base_model(BaseModelConfig(uri=str(folder)), STORAGE)
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(StorageError, match="leads out"):
        resolve_base_model(BaseModelConfig(uri=str(folder)), STORAGE)
    artifact = tmp_path / "projector"
    projector_at(artifact)
    (artifact / "config.json").rename(tmp_path / "config.json")
    (artifact / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(StorageError, match="leads out"):
        Projector.from_pretrained(STORAGE, str(artifact))


def test_a_link_out_of_the_output_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    STORAGE.write_table(f"{outside}/rows.parquet", pa.table({"user_id": ["u1"]}))
    out = tmp_path / "out"
    STORAGE.write_table(f"{out}/plans/p/shards/a.parquet", pa.table({"user_id": ["u1"]}))
    assert [hit.num_found for hit in find_users(STORAGE, str(out), Users(["u1"])).hits] == [1]
    (out / "plans" / "linked").symlink_to(outside)
    with pytest.raises(StorageError, match="leads out"):
        find_users(STORAGE, str(out), Users(["u1"]))
    assert len(list(STORAGE.list_objects(str(out)))) == 1, "a listing does not go there"
    (out / "plans" / "linked").unlink()
    (out / "plans" / "linked.parquet").symlink_to(outside / "rows.parquet")
    with pytest.raises(StorageError, match="leads out"):
        find_users(STORAGE, str(out), Users(["u1"]))


# -- YAML and code


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [{path}]",
        "!!python/object/new:pathlib.Path [{path}]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!something {{a: 1}}",
    ],
)
def test_yaml_tags_are_refused(tmp_path: Path, tag: str) -> None:
    _, path = write_small_job(tmp_path)
    text = path.read_text(encoding="utf-8")
    load_config(JobConfig, ["--config", str(path)], prog="p", description="d")
    target = tmp_path / "ran"
    path.write_text(text + "\nengine: " + tag.format(path=target) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load_config(JobConfig, ["--config", str(path)], prog="p", description="d")
    assert not target.exists()


def unsafe_calls(source: str) -> list[str]:
    """Names of calls that run what a file says, however they were imported."""
    tree, aliases = ast.parse(source), dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            name = aliases.get(first, first) + dot + rest
            if name in UNSAFE_CALLS or (name.startswith("yaml.") and "load" in name and ".safe_" not in name):
                found.append(name)
            if name.endswith("from_pretrained") and "use_safetensors=False" in ast.unparse(node):
                found.append(name)
            if name.endswith(("numpy.load", "np.load")) and "allow_pickle=True" in ast.unparse(node):
                found.append(name)
    return found


UNSAFE_CALLS = {
    f"{module}.{name}"
    for module in ("pickle", "cloudpickle", "dill", "_pickle", "torch", "joblib", "marshal", "shelve")
    for name in ("load", "loads", "Unpickler", "open")
} | {"pandas.read_pickle"}


def test_no_file_of_the_package_can_unpickle() -> None:
    found = {str(path): calls for path in sources() if (calls := unsafe_calls((ROOT / path).read_text("utf-8")))}
    assert not found
    assert not [p for path in sources() for p in danger_problems(path, (ROOT / path).read_text("utf-8"))]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(x)",
        "from torch import load\nload(x)",
        "import torch as t\nt.load(x)",
        "from pickle import loads as read\nread(x)",
        "import yaml\nyaml.load(x)",
        "import yaml\nyaml.unsafe_load(x)",
        "from yaml import full_load\nfull_load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import cloudpickle\ncloudpickle.loads(x)",
    ],
)
def test_control_an_unsafe_call_is_found(source: str) -> None:
    assert unsafe_calls(source)


def test_control_safe_calls_pass() -> None:
    assert not unsafe_calls("import yaml, json\nyaml.safe_load(x)\njson.loads(x)\nself.load(x)")
