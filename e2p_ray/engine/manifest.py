"""What a projector was trained for, read and compared before any model is loaded; no torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from e2p_ray.config import BaseModelConfig, JobConfig
from e2p_ray.engine.node_cache import HashedFolder, cached_folder, hashed
from e2p_ray.errors import ConfigError, IncompatibleError, ObjectNotFoundError
from e2p_ray.storage import Storage
from e2p_ray.storage.local import refuse_links_out

SCHEMA_VERSION = 1
Kind = Literal["residual", "mlp", "linear", "constant"]
Layout = Literal["content_first", "soft_first"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
REFERENCE_FILE = "reference.safetensors"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json")
_MODEL_PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt")


@dataclass(frozen=True, slots=True)
class ProjectorManifest:
    """The config.json of a projector artifact.

    `layout` names the place the projector was trained for: the soft token after the content (and the cue before it),
    or before everything. `output_rms` is the root mean square of the base model's token embeddings, to which the soft
    token is scaled. `projector_id` is a hash of everything else here and of both weight files.
    """

    embedding_dim: int
    embedding_space: str
    d_model: int
    base_model_id: str
    tokenizer_hash: str
    output_rms: float
    kind: Kind = "residual"
    layout: Layout = "content_first"
    hidden_dim: int = 256
    num_soft_tokens: int = 1
    dropout: float = 0.0
    schema_version: int = SCHEMA_VERSION
    trained: dict[str, Any] = field(default_factory=dict)  # provenance: prompts, steps, data, losses
    files: dict[str, str] = field(default_factory=dict)  # sha256 of the weight files
    projector_id: str = ""

    @property
    def target_prefixes(self) -> Mapping[str, str]:
        """What stood before every target in its training, by language; none where the artifact does not say."""
        found: Any = self.trained
        for name in ("settings", "training", "target_prefix"):
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def with_files(self, files: dict[str, str]) -> ProjectorManifest:
        """The manifest that binds these weight files: hashes in, id recomputed."""
        values = asdict(self) | {"files": files, "projector_id": ""}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        return ProjectorManifest(**(values | {"projector_id": digest[:16]}))


def read_manifest(storage: Storage, uri: str) -> ProjectorManifest:
    """Read and check a projector's config.json. Raises ConfigError, IncompatibleError for another schema version."""
    place = f"{uri}/{CONFIG_FILE}"
    storage.refuse_links_out(uri)
    try:
        values = json.loads(storage.read_bytes(place))
    except ObjectNotFoundError as error:
        raise ConfigError(f"{place}: no projector artifact here. Train one, or correct projector.uri") from error
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON ({error}). The artifact is damaged: copy it again") from error
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        found = values.get("schema_version") if isinstance(values, dict) else None
        raise IncompatibleError(
            f"{place}: schema version {found}, this build reads {SCHEMA_VERSION}. Retrain or convert it"
        )
    known = {item.name for item in fields(ProjectorManifest)}
    if unknown := sorted(set(values) - known):
        raise IncompatibleError(f"{place}: unknown keys {unknown}. It was written by a newer build: update this one")
    try:
        manifest = ProjectorManifest(**values)
    except TypeError as error:
        raise ConfigError(f"{place}: {error}. The artifact is damaged: copy it again") from error
    if manifest.layout not in get_args(Layout) or manifest.kind not in get_args(Kind):
        raise IncompatibleError(f"{place}: layout {manifest.layout!r} or kind {manifest.kind!r} is unknown here")
    if manifest.with_files(manifest.files).projector_id != manifest.projector_id:
        raise IncompatibleError(f"{place}: changed after it was written (its id does not match). Copy it again")
    return manifest


@dataclass(frozen=True, slots=True)
class BaseModelFolder:
    """A base model at one revision, on this machine, not yet loaded."""

    path: Path
    base_model_id: str
    tokenizer_hash: str


def resolve_base_model(config: BaseModelConfig, storage: Storage) -> BaseModelFolder:
    """Find the base model's files (local folder, s3:// folder or hub id) and name them.

    The id is `name@revision`: the hub's commit, or a hash of the files themselves for a folder (about 1 GB/s). What
    lies on S3 is downloaded once a node.
    Raises ConfigError when there is no such model.
    """
    name = config.uri.rstrip("/").rsplit("/", 1)[-1]
    if config.uri.startswith("s3://"):
        folder = cached_folder(storage, config.uri, config.cache_folder)
    elif Path(config.uri).is_dir():
        path = Path(config.uri)
        name = path.absolute().name  # `.` has one, too
        # A hub cache has its files in blobs/, and links to them in snapshots/REVISION/.
        refuse_links_out(path, path.parent.parent if path.resolve().parent.name == "snapshots" else path)
        folder = _hashed(path, _is_named)
    else:
        folder = _hashed(_fetch_from_hub(config), _TOKENIZER_FILES.__contains__)
        return BaseModelFolder(folder.path, f"{config.uri}@{folder.path.name}", _tokenizer_hash(folder))
    if CONFIG_FILE not in folder.digests:
        raise ConfigError(f"{config.uri}: no {CONFIG_FILE}. base_model.uri must be a transformers model folder")
    return BaseModelFolder(folder.path, f"{name}@{_content_hash(folder)}", _tokenizer_hash(folder))


def check_compatible(manifest: ProjectorManifest, base: BaseModelFolder) -> None:
    """Refuse a projector that was trained for another base model or tokenizer."""
    for what, trained, given in (
        ("base model", manifest.base_model_id, base.base_model_id),
        ("tokenizer", manifest.tokenizer_hash, base.tokenizer_hash),
    ):
        if trained != given:
            raise IncompatibleError(
                f"projector {manifest.projector_id} was trained for {what} {trained!r}, the configuration gives "
                f"{given!r}. A soft token means nothing to another {what}: set base_model to the one it was trained "
                "for, or train a projector for this one"
            )


def load_manifest(config: JobConfig, storage: Storage) -> tuple[ProjectorManifest, BaseModelFolder]:
    """Both sides of a job's configuration, found to belong together."""
    manifest = read_manifest(storage, config.projector.uri)
    base = resolve_base_model(config.base_model, storage)
    check_compatible(manifest, base)
    return manifest, base


def _fetch_from_hub(config: BaseModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.uri, revision=config.revision, allow_patterns=list(_MODEL_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"base_model.uri {config.uri!r} is neither a folder nor a hub model in reach ({type(error).__name__})"
        ) from error


def _is_named(name: str) -> bool:
    """Whether a file of this name is part of what a base model's id names."""
    is_ours = name == CONFIG_FILE or name in _TOKENIZER_FILES or name.endswith(".safetensors")
    return is_ours and "/" not in name


def _hashed(folder: Path, is_wanted: Callable[[str], bool]) -> HashedFolder:
    return hashed(folder, sorted(path.name for path in folder.iterdir() if path.is_file() and is_wanted(path.name)))


def _hash_files(folder: HashedFolder, is_wanted: Callable[[str], bool]) -> str:
    digest = hashlib.sha256()
    for name in sorted(filter(is_wanted, folder.digests)):
        digest.update(name.encode())
        digest.update(folder.digests[name])
    return digest.hexdigest()[:16]


def _content_hash(folder: HashedFolder) -> str:
    return _hash_files(folder, _is_named)


def _tokenizer_hash(folder: HashedFolder) -> str:
    return _hash_files(folder, _TOKENIZER_FILES.__contains__)
