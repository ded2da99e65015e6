"""Ray Train around the workers: started, watched through the board, started again when one is lost."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from e2p_ray.errors import E2PError, IncompleteRunError
from e2p_ray.train.data.inputs import PreparedLessons
from e2p_ray.train.job.board import Board, TrainProgress
from e2p_ray.train.job.checkpoint import checkpoint_uri
from e2p_ray.train.job.contract import Trained, WorkerJob, run_worker
from e2p_ray.train.job.prepared import Prepared, settings_of
from e2p_ray.train.job.session import typed_errors

_POLL_S = 0.5
_MAX_START_FAILURES = 3  # of the workers' group, each after ten minutes of waiting for room


def train_on_workers(
    prepared: Prepared,
    lessons: PreparedLessons,
    board: Any,
    say: Callable[[str], None],
    on_progress: Callable[[TrainProgress], None],
) -> tuple[Trained, dict[int, str]]:
    """Ray Train in a thread of its own: in the main one it would take Ctrl-C for itself."""
    job = _worker_job(prepared, lessons, board)
    with tempfile.TemporaryDirectory(prefix="e2p_ray-train-", ignore_cleanup_errors=True) as scratch:
        fitting = _Fitting(_trainer(prepared, job, scratch))
        fitting.start()
        with typed_errors():
            _watch(fitting, board, say, on_progress)
            _, failure = ray.get(board.read.remote())
    if failure is not None:
        raise failure
    if fitting.error is not None:
        raise _stopped(fitting.error, prepared) from fitting.error
    assert isinstance(fitting.result, Trained), "the first worker brings back what came out"
    return fitting.result, ray.get(board.hashes.remote())


def _watch(
    fitting: _Fitting, board: Any, say: Callable[[str], None], on_progress: Callable[[TrainProgress], None]
) -> None:
    """Tell what the workers post until they are through."""
    said = ""
    while fitting.is_alive():
        fitting.join(_POLL_S)
        progress, _ = ray.get(board.read.remote())
        if progress is not None:
            if progress.words not in ("", said):
                say(progress.words)
            said = progress.words
            on_progress(progress)


def new_board() -> Any:
    """On the driver's own node, which no lost worker takes along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()


class _Fitting(threading.Thread):
    """One `TorchTrainer.fit`, with its result or error."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self._trainer.fit().return_value  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001 - it is told by the thread that waits for this one
            self.error = error


def _worker_job(prepared: Prepared, lessons: PreparedLessons, board: Any) -> WorkerJob:
    config = prepared.config
    return WorkerJob(
        train_id=prepared.train_id,
        storage=prepared.storage,
        base_model=config.base_model,
        folder=prepared.folder,
        workers=config.workers,
        settings=settings_of(config.projector, config.training),
        embedding_space=lessons.space.name,
        checkpoint_uri=checkpoint_uri(config.output.uri, prepared.train_id),
        checkpoint_every=config.training.checkpoint_every,
        training=lessons.training,
        validation=lessons.validation,
        reference=lessons.reference,
        board=board,
    )


def _trainer(prepared: Prepared, job: WorkerJob, scratch: str) -> TorchTrainer:
    workers = prepared.config.workers
    resources = {"CPU": workers.num_cpus} | ({"GPU": workers.num_gpus} if workers.num_gpus else {})
    # Ray's hints are those of the trainer before this one: its RunConfig has neither logging nor environment.
    return TorchTrainer(
        run_worker,  # type: ignore[arg-type]
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.num_gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=prepared.train_id,
            storage_path=scratch,  # Ray's own records; ours are in the output
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=workers.max_failures, controller_failure_limit=_MAX_START_FAILURES
            ),
            logging_config=LoggingConfig(log_level="CRITICAL"),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(workers.num_cpus)))}},
        ),
    )


def _stopped(error: Exception, prepared: Prepared) -> E2PError:
    """What Ray Train gave up on. A worker's own typed errors are on the board; this is the rest."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = lines[-1][:300] if lines else type(error).__name__
    return IncompleteRunError(
        f"the workers failed more than {prepared.config.workers.max_failures} times, the last time with: {what}\n"
        "What was trained is in the checkpoint. Run the same command again: it resumes from there"
    )
