"""A small job with every kind of row: inputs, a projector whose weights are none, a base model without weights.

Drivers never load either of the two, so that a whole run goes through with the fake engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from e2p_ray.config import JobConfig, StorageConfig
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.engine.manifest import REFERENCE_FILE, WEIGHTS_FILE, ProjectorManifest, load_manifest, resolve_base_model
from e2p_ray.schema import Group
from e2p_ray.storage import Storage

SPACE, DIM = "space-1", 8
NUM_BAD_CANDIDATES = 3  # unknown user, missing content, a repeated pair

TITLE = {"en": "Harbour opens a new bridge {n}", "ja": "港に新しい橋{n}が開通"}
BODY = {
    "en": "The city opened bridge {n} on Monday. Mayor Anna Berg said it cost 40 million. " * 4,
    "ja": "市は月曜日に橋{n}を開通した。費用は四千万円だと市長が述べた。" * 4,
}
TASKS = {
    "headline": {"prompts": {"en": {"cue_before": "\nHeadline:"}, "ja": {"cue_before": "\n見出し："}}},
    "explanation": {"prompts": {"en": {"cue_before": "\nFor you:"}, "ja": {"cue_before": "\nおすすめ："}}},
}


def users_table(num_users: int) -> pa.Table:
    """Of every ten users one opted out, one has no user embedding, one is of another space."""
    random = np.random.default_rng(1)
    vectors = random.normal(size=(num_users, DIM)).astype(np.float32)
    return pa.table(
        {
            "user_id": [f"user-{n:04d}" for n in range(num_users)],
            "embedding": pa.array(
                [None if n % 10 == 1 else vector for n, vector in enumerate(vectors)], pa.list_(pa.float32(), DIM)
            ),
            "embedding_space": ["space-0" if n % 10 == 2 else SPACE for n in range(num_users)],
            "personalize": [n % 10 != 0 for n in range(num_users)],
            "updated_at": pa.array([1_700_000_000_000_000] * num_users, pa.timestamp("us", "UTC")),
        }
    )


def contents_table(num_contents: int) -> pa.Table:
    languages = [("en", "ja")[n % 2] for n in range(num_contents)]
    return pa.table(
        {
            "content_id": [f"content-{n:03d}" for n in range(num_contents)],
            "title": [TITLE[language].format(n=n) for n, language in enumerate(languages)],
            "body": [BODY[language].format(n=n) for n, language in enumerate(languages)],
            "language": languages,
            "updated_at": pa.array([1_700_000_000_000_000] * num_contents, pa.timestamp("us", "UTC")),
        }
    )


def candidates_table(num_users: int, num_contents: int, per_user: int) -> pa.Table:
    pairs = [
        (f"user-{n:04d}", f"content-{(n + step) % num_contents:03d}")
        for n in range(num_users)
        for step in range(per_user)
    ]
    pairs += [("user-unknown", "content-000"), ("user-0003", "content-unknown"), pairs[0]]
    return pa.table(
        {
            "user_id": [user for user, _ in pairs],
            "content_id": [content for _, content in pairs],
            "rank": pa.array(range(len(pairs)), pa.int32()),
            "score": pa.array([0.5] * len(pairs), pa.float32()),
            "source": ["test"] * len(pairs),
        }
    )


def first_groups(groups: Iterable[Group | None]) -> tuple[list[Group], Iterator[Group | None]]:
    """The groups that wait when an engine begins, and all of them as it is to read them."""
    source = iter(groups)
    known = [group for group in takewhile(lambda group: group is not None, source) if group is not None]
    return known, chain(known, source)


def fake_engine(config: JobConfig, storage: Storage) -> FakeEngine:
    """What takes the place of `load_engine`: the ids of the job's artifacts, and no model."""
    manifest, base = load_manifest(config, storage)
    return FakeEngine(
        tasks=config.tasks,
        projector_id=manifest.projector_id,
        base_model_id=base.base_model_id,
        embedding_space=manifest.embedding_space,
        embedding_dim=manifest.embedding_dim,
    )


def write_base_model(folder: Path) -> Path:
    """What names a base model, without anything that could be loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_projector(storage: Storage, uri: str, manifest: ProjectorManifest) -> None:
    """The artifact of a manifest, whole but for weights that could be loaded."""
    files = dict.fromkeys((WEIGHTS_FILE, REFERENCE_FILE), b"nothing that could be loaded")
    for name, data in files.items():
        storage.write_bytes(f"{uri}/{name}", data)
    manifest = manifest.with_files({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    storage.write_bytes(f"{uri}/config.json", manifest.to_json().encode())


def write_small_job(
    folder: Path,
    *,
    place: str | None = None,
    storage: StorageConfig | None = None,
    num_users: int = 60,
    num_contents: int = 6,
    per_user: int = 3,
    **changes: Any,
) -> tuple[JobConfig, Path]:
    """The job's configuration and its file. `place` is where tables and results go, default `folder` itself."""
    place, storage_config = place or str(folder), storage or StorageConfig()
    values: dict[str, Any] = {
        "inputs": {f"{name}_uri": f"{place}/in/{name}.parquet" for name in ("users", "contents", "candidates")},
        "output": {"uri": f"{place}/out"},
        "base_model": {"uri": str(write_base_model(folder / "base")), "device": "cpu"},
        "projector": {"uri": f"{place}/projector"},
        "tasks": TASKS,
        "plan": {"requests_per_shard": 40},
        "storage": json.loads(storage_config.model_dump_json(exclude_none=True)),
        "gates": {"max_fallback_share": 1.0, "max_dead_letter_share": 0.2, "max_same_text_share": 1.0},
        **changes,
    }
    for name in ("access_key_id", "secret_access_key"):
        secret = getattr(storage_config, name)
        if secret is not None:
            values["storage"][name] = secret.get_secret_value()
    config = JobConfig.model_validate(values)
    _write_world(Storage(config.storage), config, num_users, num_contents, per_user)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return config, path


def _write_world(storage: Storage, config: JobConfig, num_users: int, num_contents: int, per_user: int) -> None:
    storage.write_table(config.inputs.users_uri, users_table(num_users))
    storage.write_table(config.inputs.contents_uri, contents_table(num_contents))
    storage.write_table(config.inputs.candidates_uri, candidates_table(num_users, num_contents, per_user))
    base = resolve_base_model(config.base_model, storage)
    manifest = ProjectorManifest(
        embedding_dim=DIM,
        embedding_space=SPACE,
        d_model=4,
        base_model_id=base.base_model_id,
        tokenizer_hash=base.tokenizer_hash,
        output_rms=1.0,
    )
    write_projector(storage, config.projector.uri, manifest)
