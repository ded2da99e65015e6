"""The state of a training as one object: tensors with plain values in their header, no pickle.

Not one of Ray's checkpoint directories: one object, replaced in one put, is whole on every kind of storage, needs no
second file system with credentials of its own, and is found again by the next call of the job.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from e2p_ray.errors import ObjectNotFoundError
from e2p_ray.storage import Storage

_FORMAT = "1"  # counts up when a state of an earlier build can no longer be gone on from


class Checkpoint(NamedTuple):
    """What `Fit.state` gave, with anything else that JSON can hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class UnusableCheckpoint(NamedTuple):
    """There is an object, but not one to go on from."""

    why: str


def checkpoint_uri(output_uri: str, train_id: str) -> str:
    """Where the checkpoint of a training lies."""
    return f"{output_uri}/checkpoints/{train_id}.safetensors"


def write_checkpoint(storage: Storage, uri: str, train_id: str, checkpoint: Checkpoint) -> None:
    """Write or replace it; whoever reads gets the old one or the new one."""
    said = json.dumps(checkpoint.values)
    header = {"format": _FORMAT, "train_id": train_id, "values": said, "digest": _digest(checkpoint.tensors, said)}
    storage.write_bytes(uri, save(checkpoint.tensors, metadata=header))


def read_checkpoint(storage: Storage, uri: str, train_id: str) -> Checkpoint | UnusableCheckpoint | None:
    """The checkpoint, None where there is none."""
    try:
        data = storage.read_bytes(uri)
    except ObjectNotFoundError:
        return None
    try:
        tensors, header = load(data), _header(data)
        values = json.loads(header["values"])
    except (SafetensorError, ValueError, KeyError):
        return UnusableCheckpoint("it is damaged")
    if header.get("format") != _FORMAT:
        return UnusableCheckpoint("another build wrote it")
    if header.get("train_id") != train_id:
        return UnusableCheckpoint(f"it belongs to the training {header.get('train_id')}")
    if header.get("digest") != _digest(tensors, header["values"]):
        return UnusableCheckpoint("it is damaged")
    return Checkpoint(tensors, values)


def _header(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors object: 8 bytes of length, then JSON."""
    size = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return found


def _digest(tensors: dict[str, Tensor], values: str) -> str:
    """safetensors itself would not notice a changed byte of a weight."""
    digest = hashlib.sha256(values.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
