"""What every worker does: load the base model, go on from the checkpoint, train, score."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor, nn

from e2p_ray.engine.manifest import BaseModelFolder
from e2p_ray.engine.model import BaseModel, pick_device
from e2p_ray.engine.projector import ReferenceStatistics
from e2p_ray.errors import E2PError, RunError
from e2p_ray.train.controls import score_controls
from e2p_ray.train.data.inputs import folder_here
from e2p_ray.train.fit import Fit
from e2p_ray.train.job.board import TrainProgress
from e2p_ray.train.job.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from e2p_ray.train.job.contract import Trained, WorkerJob
from e2p_ray.train.lessons import LessonTable, UserTable
from e2p_ray.train.projector import check_frozen, new_projector, start_calmly
from e2p_ray.train.records import StepRecord

_POST_EVERY_S = 0.5


class Workers:
    """The `World` of Ray Train's workers: gradients through DistributedDataParallel, sums through all_reduce."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()

    def wrap(self, module: nn.Module) -> nn.Module:
        return ray.train.torch.prepare_model(module, move_to_device=self._device)

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(value)
        return value


def work(job: WorkerJob) -> Trained | None:
    """Rank 0 returns what came out; errors that a new start would not mend go to the board."""
    num_starts, go_on = ray.get(job.board.start.remote(ray.train.get_context().get_world_rank()))
    if not go_on:
        return None  # Ray Train starts failed workers again: an error that was posted ends this
    try:
        return _train(job, num_starts)
    except torch.OutOfMemoryError as error:
        ray.get(job.board.fail.remote(_out_of_memory()))
        raise _out_of_memory() from error
    except E2PError as error:
        ray.get(job.board.fail.remote(error))
        raise


def _out_of_memory() -> RunError:
    return RunError(
        "a worker ran out of accelerator memory. Lower training.contents_per_step, training.users_per_content or "
        "training.max_prefix_bytes, or use base_model.dtype bfloat16"
    )


def _train(job: WorkerJob, num_starts: int) -> Trained | None:
    torch.set_num_threads(max(1, int(job.workers.num_cpus)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    device = _device(job)
    folder = folder_here(job.base_model, job.folder, job.storage)
    base = BaseModel.load(folder.path, job.base_model.dtype, device)
    weights_hash = base.weights_hash()
    world = Workers(device)
    fit, validation = _fit(job, base, folder, world)
    log = _Log(job, fit, world, num_starts)
    for record in fit.run():
        log.add(record)
    projector = fit.finish()
    scores = None if validation is None else score_controls(fit, projector, validation)
    check_frozen(base, weights_hash)
    ray.get(job.board.post_hash.remote(world.rank, weights_hash))
    if world.rank:
        return None
    weights = {name: value.detach().cpu().numpy() for name, value in projector.state_dict().items()}
    return Trained(
        projector.manifest, weights, tuple(fit.records), scores, weights_hash, log.seconds_s, _hardware(device)
    )


def _device(job: WorkerJob) -> torch.device:
    """The accelerator that Ray gave this worker; none where it asked for none."""
    wanted = job.base_model.device
    if wanted in ("auto", "cuda"):
        if job.workers.num_gpus:
            return ray.train.torch.get_device()
        wanted = "cpu" if wanted == "auto" else wanted
    return pick_device(wanted)


def _fit(job: WorkerJob, base: BaseModel, folder: BaseModelFolder, world: Workers) -> tuple[Fit, LessonTable | None]:
    lessons: LessonTable = ray.get(job.training)
    validation: LessonTable | None = None if job.validation is None else ray.get(job.validation)
    statistics = {name: torch.from_numpy(value.copy()) for name, value in ray.get(job.reference).items()}
    users = UserTable((), lessons.user_embeddings, job.embedding_space)
    projector = new_projector(base, folder, users, job.settings, ReferenceStatistics(**statistics))
    start_calmly(projector, base, lessons)
    return Fit(base, projector, lessons, job.settings, validation=validation, world=world), validation


class _Log:
    """Takes up a checkpoint, then writes checkpoints and progress as the steps go by."""

    def __init__(self, job: WorkerJob, fit: Fit, world: Workers, num_starts: int) -> None:
        self._job, self._fit, self._world = job, fit, world
        words, self._seconds_before_s = self._take_up()
        self._progress = TrainProgress(
            job.settings.num_steps, fit.num_steps_done, fit.num_steps_done, num_starts=num_starts, words=words
        )
        self._started_s, self._posted_s = time.monotonic(), 0.0
        self._post()

    @property
    def seconds_s(self) -> float:
        return self._seconds_before_s + time.monotonic() - self._started_s

    def _take_up(self) -> tuple[str, float]:
        """Every worker reads the checkpoint itself: none is written before all of them take their first step."""
        job = self._job
        found = read_checkpoint(job.storage, job.checkpoint_uri, job.train_id)
        if isinstance(found, Checkpoint):
            self._fit.load_state(found.tensors, found.values)
            return f"resumes at step {self._fit.num_steps_done:,}", found.values["seconds_s"]
        if found is not None:
            return f"the checkpoint {job.checkpoint_uri} is not used, {found.why}: starts from step 0", 0.0
        return "", 0.0

    def add(self, record: StepRecord) -> None:
        if self._world.rank:
            return
        progress = self._progress
        self._progress = replace(
            progress,
            step=record.step,
            loss=record.loss,
            validation_loss=progress.validation_loss if record.validation_loss is None else record.validation_loss,
            num_tokens=progress.num_tokens + record.num_tokens,
            seconds_s=time.monotonic() - self._started_s,
        )
        if record.step % self._job.checkpoint_every == 0 or self._fit.finished:
            tensors, values = self._fit.state()
            checkpoint = Checkpoint(tensors, values | {"seconds_s": self.seconds_s})
            write_checkpoint(self._job.storage, self._job.checkpoint_uri, self._job.train_id, checkpoint)
        if self._fit.finished or time.monotonic() - self._posted_s >= _POST_EVERY_S:
            self._post()

    def _post(self) -> None:
        if self._world.rank == 0:
            self._posted_s = time.monotonic()
            self._job.board.post.remote(self._progress)


def _hardware(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = models[0].partition(":")[2].strip() if models else platform.processor()
    return {"device": name, "cpu": cpu, "torch": str(torch.__version__)}
