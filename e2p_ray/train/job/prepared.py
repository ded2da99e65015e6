"""What a training configuration names, found to belong together before anything large is read or Ray starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from e2p_ray.config import ShapeConfig, TrainConfig, TrainingConfig
from e2p_ray.config.uris import absolute
from e2p_ray.engine.manifest import (
    REFERENCE_FILE,
    WEIGHTS_FILE,
    BaseModelFolder,
    ProjectorManifest,
    read_manifest,
    resolve_base_model,
)
from e2p_ray.engine.supported import read_model_config, refuse_unsupported
from e2p_ray.errors import ConfigError, IncompatibleError, ObjectNotFoundError
from e2p_ray.storage import Storage
from e2p_ray.train.data.tables import SourceTable, scan_tables
from e2p_ray.train.job.checkpoint import checkpoint_uri
from e2p_ray.train.job.provenance import train_id_of
from e2p_ray.train.settings import TrainSettings


def settings_of(shape: ShapeConfig, training: TrainingConfig) -> TrainSettings:
    """The loop's settings, as the configuration says them."""
    left_out = {"validation_share", "checkpoint_every"}
    return TrainSettings(**shape.model_dump(exclude={"embedding_space"}), **training.model_dump(exclude=left_out))


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a configuration names, found to belong together; nothing large is read."""

    config: TrainConfig  # its local places are absolute
    storage: Storage
    folder: BaseModelFolder
    sources: dict[str, SourceTable]
    train_id: str
    max_positions: int


def prepare(config: TrainConfig) -> Prepared:
    """Scan the inputs and find the base model. Raises ConfigError, InputError, UnsupportedModelError."""
    config = _with_absolute_places(config)
    if config.base_model.dtype == "float16":
        raise ConfigError("gradients are lost in float16: train with base_model.dtype bfloat16 or float32")
    storage = Storage(config.storage)
    if (
        config.training.patience is not None
        and not config.inputs.validation_uri
        and not config.training.validation_share
    ):
        raise ConfigError(
            "training.patience needs something to validate on: give inputs.validation_uri or a "
            "training.validation_share"
        )
    sources = scan_tables(config.inputs, storage)
    folder = resolve_base_model(config.base_model, storage)
    model = read_model_config(folder.path)
    refuse_unsupported(model, config.base_model.uri)
    train_id = train_id_of(config, sources, folder.base_model_id)
    return Prepared(config, storage, folder, sources, train_id, int(model.max_position_embeddings))


def _with_absolute_places(config: TrainConfig) -> TrainConfig:
    """Ray's workers have working folders of their own."""
    inputs = {name: uri and absolute(uri) for name, uri in config.inputs.model_dump().items()}
    changes = {
        "inputs": config.inputs.model_copy(update=inputs),
        "output": config.output.model_copy(update={"uri": absolute(config.output.uri)}),
        "base_model": config.base_model.with_absolute_place(),
    }
    return config.model_copy(update=changes)


def finished_manifest(prepared: Prepared, record_uri: str) -> ProjectorManifest | None:
    """The artifact of this very training where it is there and whole, with its record, which is written last."""
    uri, storage = prepared.config.output.projector_uri, prepared.storage
    if not storage.exists(record_uri):
        return None
    try:
        record = json.loads(storage.read_bytes(record_uri))
        manifest = read_manifest(storage, uri)
        files = {name: storage.read_bytes(f"{uri}/{name}") for name in (WEIGHTS_FILE, REFERENCE_FILE)}
    except (ValueError, ConfigError, IncompatibleError, ObjectNotFoundError):
        return None  # what is there is of another time, or damaged: it is replaced
    ids = (record.get("train_id"), manifest.trained.get("train_id"))
    is_whole = all(hashlib.sha256(data).hexdigest() == manifest.files.get(name) for name, data in files.items())
    return manifest if is_whole and ids == (prepared.train_id, prepared.train_id) else None


def forget(prepared: Prepared) -> None:
    """Remove the checkpoint: the training starts from its first step."""
    prepared.storage.delete(checkpoint_uri(prepared.config.output.uri, prepared.train_id))
