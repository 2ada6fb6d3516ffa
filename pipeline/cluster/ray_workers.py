"""Windows that the workers of a Ray cluster forward: the same bits as in this process, in any order.

Each worker opens the model from storage that all machines share, and is given one part of the windows after another. A
worker that is lost is begun anew by Ray, on another machine where need be, and its part is done again.
"""

import os
import platform
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CalibrationError, SpikeExportError, one_line
from spike_export.artifacts.files.atomic_write import describe_os_error
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.methods.context import Calibration, Transform
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.spreading import Result, unheard
from spike_export.calibration.statistics.partial_statistics import Samples
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.pipeline.cluster.cluster_options import LOCAL, ClusterOptions
from spike_export.pipeline.execution import ExecutionOptions, execution_of

_RESTARTS = 3
"""How often a worker, and a part, is begun anew."""

_FORWARDED = ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "HF_HOME", "HF_HUB_OFFLINE")
"""Variables that have to say the same in all processes: the first two decide the last bits of products."""

_TOOLS = ("spike-export", "torch", "numpy")


@dataclass(frozen=True)
class WorkerTask:
    """What a worker needs to know besides windows.

    Attributes:
        model: HF directory, `.gguf` file, or hub id; the same for all machines.
        sha256: Of the model's weights.
    """

    model: str
    sha256: str
    options: CalibrationOptions
    execution: ExecutionOptions
    threads: int

    @classmethod
    def of(
        cls,
        model: str,
        checkpoint: Checkpoint,
        cluster: ClusterOptions,
        options: CalibrationOptions = CalibrationOptions(),
        execution: ExecutionOptions = ExecutionOptions(),
    ) -> Self:
        """Return the task for a model that is open here; a local place becomes an absolute path, as workers need it."""
        place = str(Path(model).resolve()) if Path(model).exists() else model
        return cls(place, checkpoint.tensors.sha256(), options, execution, cluster.cpus)

    @property
    def device(self) -> str:
        """The first torch device."""
        return (self.execution.devices or ("cpu",))[0]


def surroundings(device: str) -> dict[str, str]:
    """Return what the bits of a measurement depend on besides model and options."""
    import torch

    found = {tool: version(tool) for tool in _TOOLS} | {"Python": platform.python_version()}
    if device == "cpu":
        found["processor kernels"] = torch.backends.cpu.get_cpu_capability()
    return found


class Worker:
    """Lives in a process of the cluster. Its errors name its machine."""

    def __init__(self, task: WorkerTask) -> None:
        import torch

        torch.set_num_threads(task.threads)
        self._task = task
        self._calibration: Calibration | None = None
        self._node = socket.gethostname()

    def surroundings(self) -> tuple[str, dict[str, str]]:
        """Return the machine's name, and what its bits depend on."""
        return self._node, surroundings(self._task.device)

    def done(self, work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        """Return what `work` does with this worker's calibration.

        Raises:
            CalibrationError: Names the machine.
        """
        try:
            return work(self._opened(), *arguments)
        except SpikeExportError as error:
            raise CalibrationError(f"Ray worker on {self._node}: {error}") from error
        except OSError as error:
            fault = describe_os_error(error, Path(error.filename or tempfile.gettempdir()))
            raise CalibrationError(f"Ray worker on {self._node}: {fault}") from error

    def _opened(self) -> Calibration:
        if self._calibration is None:
            task = self._task
            checkpoint = open_checkpoint(task.model)
            if checkpoint.tensors.sha256() != task.sha256:
                raise CalibrationError(f"{task.model} has other weights here; let all machines share one storage")
            execution = execution_of(checkpoint, task.execution, Path(tempfile.gettempdir()))
            none = TokenWindows(np.empty((0, 0), np.int64), np.empty((0, 0), np.int64))
            self._calibration = Calibration(checkpoint, none, task.options, execution)
        return self._calibration


@dataclass
class RayWorkers:
    """A cluster that is connected during the block; its workers start with the first measurement."""

    options: ClusterOptions
    task: WorkerTask
    _workers: list[Any] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            CalibrationError: Ray is not installed, there is no cluster at the address, or no room in it.
        """
        if find_spec("ray") is None:
            raise CalibrationError("--ray needs the package ray; install the extra: pip install 'spike-export[ray]'")
        self.options.require_reachable()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self.options.address == LOCAL:
            os.environ.setdefault("RAY_worker_niceness", "0")  # 15 would let everything else on this machine go first
        import ray

        try:
            ray.init(address=self.options.address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except Exception as error:
            raise CalibrationError(
                f"--ray {self.options.address}: cannot connect: {one_line(error)}; start a cluster with `ray start "
                "--head` and the same versions of Python and Ray, or give local"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()

    @cached_property
    def count(self) -> int:
        """How many workers the cluster has room for, or was asked for; a node that is lost later does not change it."""
        import ray

        total = ray.cluster_resources()
        return self.options.count(total.get("CPU", 0), total.get("GPU", 0))

    def measured(
        self, windows: NDArray[np.int64], prefix: tuple[int, ...], transform: Transform, parts: Sequence[Samples]
    ) -> Iterator[tuple[int, SpikeStatistics]]:
        """Yield each part's number and statistics, in the order in which they are done.

        Args:
            windows: All of the calibration's, [samples, tokens].
            prefix: Token ids before every window.
            transform: Rotation and smoothing.
            parts: Rows of `windows`.

        Raises:
            CalibrationError: As `as_done`.
        """
        calls = ((windows[rows], rows, prefix, transform) for rows in parts)
        return self.as_done(Calibration.measure_here, calls, len(parts))

    def results(
        self, work: Callable[..., Result], calls: Sequence[tuple[Any, ...]], done: Callable[[int], None] = unheard
    ) -> list[Result]:
        """Return what the workers do, in the order of the calls; `done` is told the number of each.

        Raises:
            CalibrationError: As `as_done`.
        """
        found = dict[int, Result]()
        for number, result in self.as_done(work, calls, len(calls)):
            found[number] = result
            done(number)
        return [found[number] for number in range(len(calls))]

    def as_done(
        self, work: Callable[..., Result], calls: Iterable[tuple[Any, ...]], most: int
    ) -> Iterator[tuple[int, Result]]:
        """Yield each call's number and result, in the order in which they are done.

        Args:
            work: Called with a worker's calibration, and arguments.
            calls: The arguments.
            most: How many workers have something to do at the same time.

        Raises:
            CalibrationError: A worker's model or versions differ, or it failed or was lost too often.
        """
        import ray

        waiting, running = iter(enumerate(calls)), dict[Any, tuple[Any, int]]()

        def begin(worker: Any) -> None:
            number, arguments = next(waiting, (None, ()))
            if number is not None:
                running[worker.done.remote(work, arguments)] = (worker, number)

        for worker in self._started(most):
            begin(worker)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            worker, number = running.pop(ready)
            yield number, _result(ready)
            begin(worker)

    def _started(self, most: int) -> list[Any]:
        """Return as many workers as have something to do; they stay for later calls."""
        wanted = min(self.count, max(1, most))
        if len(self._workers) < wanted:
            added = [self._made.remote(self.task) for _ in range(wanted - len(self._workers))]
            self._workers += added
            here = surroundings(self.task.device)
            for worker in added:
                node, there = _result(worker.surroundings.remote())
                require_alike(node, here, there)
        return self._workers[:wanted]

    @property
    def _made(self) -> Any:
        """The class `Worker` as an actor: where it is placed, and in which environment."""
        import ray

        variables = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
        return ray.remote(Worker).options(
            num_cpus=self.options.cpus,
            num_gpus=self.options.gpus,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
            runtime_env={"env_vars": variables | {"OMP_NUM_THREADS": str(self.task.threads)}},
        )


def require_alike(node: str, here: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Refuse a worker whose measurements would differ in their last bits.

    Args:
        node: Its machine.
        here: Surroundings of this process.
        there: Those of the worker.

    Raises:
        CalibrationError: Names the machine and the difference.
    """
    for name, value in here.items():
        if there.get(name) != value:
            raise CalibrationError(
                f"Ray worker on {node}: {name} {there.get(name)}, here {value}: the statistics would differ in their "
                "last bits; give all machines the same versions and kind of processor"
            )


def _result(reference: Any) -> Any:
    """Return what a worker has computed.

    Raises:
        CalibrationError: Names the machine where the worker could say so.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SpikeExportError):
            raise CalibrationError(str(error.cause)) from error
        raise CalibrationError(f"a Ray worker failed: {one_line(error.cause)}; see the cluster's logs") from error
    except ray.exceptions.RayError as error:
        raise CalibrationError(
            f"a Ray worker was lost and could not be begun anew {_RESTARTS} times: {one_line(error)}; see that its "
            "machine has spike-export installed and memory for the model"
        ) from error
