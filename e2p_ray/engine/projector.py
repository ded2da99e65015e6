"""The projector: user embedding -> soft token(s), and its artifact."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from e2p_ray.engine.manifest import CONFIG_FILE, REFERENCE_FILE, WEIGHTS_FILE, ProjectorManifest, read_manifest
from e2p_ray.errors import IncompatibleError
from e2p_ray.storage import Storage

# Above this many dimensions only the covariance's diagonal is kept: d=1024 is 4 MiB in fp32.
MAX_FULL_COVARIANCE_DIM = 1024
NORM_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceStatistics:
    """What the user embeddings of one space looked like when the projector was trained.

    mean (d,); covariance (d, d), or (d,) above MAX_FULL_COVARIANCE_DIM; norm_quantiles at NORM_QUANTILES; count (1,).
    """

    mean: Tensor
    covariance: Tensor
    norm_quantiles: Tensor
    count: Tensor

    @classmethod
    def of(cls, user_embeddings: Tensor) -> ReferenceStatistics:
        """Statistics of user embeddings (n, d), computed in float64."""
        x = user_embeddings.double()
        mean = x.mean(0)
        centred = x - mean
        denominator = max(len(x) - 1, 1)
        if x.shape[1] <= MAX_FULL_COVARIANCE_DIM:
            covariance = centred.T @ centred / denominator
        else:
            covariance = centred.square().sum(0) / denominator
        quantiles = np.quantile(x.norm(dim=1).numpy(), NORM_QUANTILES)  # torch's takes 16.7 million numbers at most
        return cls(mean.float(), covariance.float(), torch.from_numpy(quantiles).float(), torch.tensor([len(x)]))

    @property
    def std(self) -> Tensor:
        """Standard deviation per dimension (d,), at least 1e-6 of the largest so that a constant one stays finite."""
        std = self._std_as_it_is()
        return torch.maximum(std, (std.max() * 1e-6).clamp_min(1e-12))

    @property
    def is_constant(self) -> Tensor:
        """Which dimensions (d,) were the same for all users, up to the rounding of their float32."""
        return self._std_as_it_is() <= (self.mean.abs() * 1e-7).clamp_min(1e-12)

    def _std_as_it_is(self) -> Tensor:
        variance = self.covariance.diagonal() if self.covariance.ndim == 2 else self.covariance
        return variance.clamp_min(0).sqrt()

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).contiguous() for name in ("mean", "covariance", "norm_quantiles", "count")}


class Projector(nn.Module):
    """E2P's projector (arXiv 2505.17051). Kinds: residual (an MLP beside a linear layer), mlp, linear, constant.

    Input user embeddings (n, d), normalised with the reference statistics; output soft tokens (n, k, d_model) in fp32,
    scaled to the root mean square of the base model's token embeddings. A constant one gives everybody the same soft
    token (prompt tuning, arXiv 2104.08691): the control that separates learning the task from knowing the user.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, manifest: ProjectorManifest, reference: ReferenceStatistics) -> None:
        super().__init__()
        self.manifest = manifest
        self.reference = reference
        width = manifest.num_soft_tokens * manifest.d_model
        self.register_buffer("mean", reference.mean.clone(), persistent=False)
        # Of a dimension in which no user of the training differed nothing was learned: there, nobody differs later.
        std = reference.std.masked_fill(reference.is_constant, torch.inf)
        self.register_buffer("std", std, persistent=False)
        self.bias = nn.Parameter(torch.empty(width))
        self.linear: nn.Linear | None = None
        self.hidden: nn.Linear | None = None
        self.output: nn.Linear | None = None
        if manifest.kind in ("residual", "linear"):
            self.linear = nn.Linear(manifest.embedding_dim, width, bias=False)
        if manifest.kind in ("residual", "mlp"):
            self.hidden = nn.Linear(manifest.embedding_dim, manifest.hidden_dim)
            self.output = nn.Linear(manifest.hidden_dim, width, bias=False)
        self.dropout = nn.Dropout(manifest.dropout)
        self._start()

    def _start(self) -> None:
        """Every user starts at the same point, as large as a token: untrained, it adds no noise per user."""
        nn.init.normal_(self.bias)
        for layer in (self.linear, self.output):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    @torch.no_grad()
    def start_at(self, token_embedding: Tensor) -> None:
        """Begin as this token (d_model,): a base model takes a token it knows more calmly than a random vector."""
        unit = token_embedding.float() / self.manifest.output_rms
        self.bias.copy_(unit.repeat(self.manifest.num_soft_tokens))

    def forward(self, user_embeddings: Tensor) -> Tensor:
        x = (user_embeddings.float() - self.mean) / self.std
        y = self.bias.expand(len(x), -1)
        if self.linear is not None:
            y = y + self.linear(x)
        if self.hidden is not None and self.output is not None:
            y = y + self.output(self.dropout(nn.functional.silu(self.hidden(x))))
        y = y * self.manifest.output_rms
        return y.view(len(x), self.manifest.num_soft_tokens, self.manifest.d_model)

    def save_pretrained(self, storage: Storage, uri: str) -> ProjectorManifest:
        """Write the artifact: weights and statistics first, config.json last. Returns the manifest with its id."""
        weights = save_tensors({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()})
        reference = save_tensors(self.reference.tensors())
        files = {
            WEIGHTS_FILE: hashlib.sha256(weights).hexdigest(),
            REFERENCE_FILE: hashlib.sha256(reference).hexdigest(),
        }
        manifest = self.manifest.with_files(files)
        storage.write_bytes(f"{uri}/{WEIGHTS_FILE}", weights)
        storage.write_bytes(f"{uri}/{REFERENCE_FILE}", reference)
        storage.write_bytes(f"{uri}/{CONFIG_FILE}", manifest.to_json().encode())
        self.manifest = manifest
        return manifest

    @classmethod
    def from_pretrained(cls, storage: Storage, uri: str) -> Projector:
        """Read the artifact; every file must be the one its manifest names. Raises IncompatibleError otherwise."""
        manifest = read_manifest(storage, uri)
        blobs = {}
        for name in (WEIGHTS_FILE, REFERENCE_FILE):
            blobs[name] = storage.read_bytes(f"{uri}/{name}")
            if hashlib.sha256(blobs[name]).hexdigest() != manifest.files.get(name):
                raise IncompatibleError(f"{uri}/{name}: not the file that config.json names. Copy the artifact again")
        projector = cls(manifest, _reference(blobs[REFERENCE_FILE], f"{uri}/{REFERENCE_FILE}"))
        try:
            projector.load_state_dict(_tensors(blobs[WEIGHTS_FILE], f"{uri}/{WEIGHTS_FILE}"))
        except RuntimeError as error:
            raise IncompatibleError(f"{uri}/{WEIGHTS_FILE}: does not fit config.json: {error}") from error
        if not all(bool(torch.isfinite(value).all()) for value in projector.state_dict().values()):
            raise IncompatibleError(f"{uri}/{WEIGHTS_FILE}: holds NaN or Inf. Retrain the projector")
        return projector.eval().requires_grad_(False)


def _tensors(data: bytes, place: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; IncompatibleError for anything else, a pickle or a forged header as well."""
    try:
        return load_tensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise IncompatibleError(f"{place}: not a whole safetensors file ({error}). Copy the artifact again") from error


def _reference(data: bytes, place: str) -> ReferenceStatistics:
    try:
        return ReferenceStatistics(**_tensors(data, place))
    except TypeError as error:
        raise IncompatibleError(f"{place}: holds other tensors than reference statistics. Retrain") from error
