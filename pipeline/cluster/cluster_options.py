"""Which Ray cluster windows are spread over, and what each worker there takes."""

import socket
from dataclasses import dataclass

from spike_export.artifacts.errors import CalibrationError

LOCAL, AUTO = "local", "auto"

_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """A cluster and its workers.

    Attributes:
        address: `auto` for the cluster that this machine belongs to (or `RAY_ADDRESS`), `local` for a new one on this
            machine alone, `HOST:PORT` of a cluster's head.
        workers: How many; None for as many as the cluster has processors (or GPUs) for.
        cpus: Processors, and threads, of a worker.
        gpus: GPUs of a worker.
    """

    address: str = AUTO
    workers: int | None = None
    cpus: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        """Refuse figures that mean no worker."""
        checks = (
            ("--ray-workers", self.workers, self.workers is None or self.workers >= 1),
            ("--ray-cpus", self.cpus, self.cpus >= 1),
            ("--ray-gpus", self.gpus, self.gpus >= 0),
        )
        for name, value, holds in checks:
            if not holds:
                raise CalibrationError(f"{name} is {value}; expected {0 if name == '--ray-gpus' else 1} or more")
        if self.address not in (LOCAL, AUTO):
            self._host_and_port()

    def _host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or int(port) >= 1 << 16:
            raise CalibrationError(f"--ray {self.address}: expected auto, local, or HOST:PORT of a cluster's head")
        return host, int(port)

    def require_reachable(self) -> None:
        """See that something listens at a given address: Ray itself waits for minutes, and ends the process then.

        Raises:
            CalibrationError: Nothing does.
        """
        if self.address in (LOCAL, AUTO):
            return
        try:
            socket.create_connection(self._host_and_port(), _CONNECT_SECONDS).close()
        except OSError as error:
            raise CalibrationError(
                f"--ray {self.address}: there is no cluster ({error.strerror or error}); start one with `ray start "
                "--head`, or give local"
            ) from error

    def count(self, processors: float, gpus: float) -> int:
        """Return how many workers a cluster with these resources gets.

        Raises:
            CalibrationError: It has no room for them.
        """
        room = int(min(processors // self.cpus, gpus // self.gpus if self.gpus else processors // self.cpus))
        wanted = self.workers or room
        if not 1 <= wanted <= room:
            raise CalibrationError(
                f"--ray {self.address}: the cluster has {processors:g} processors and {gpus:g} GPUs, room for {room} "
                f"workers of {self.cpus} and {self.gpus}; change --ray-workers, --ray-cpus or --ray-gpus"
            )
        return wanted
