"""Decode steps ready to be launched: an execution context, and a CUDA graph, per batch size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.engines.tensorrt.device import Device
from spike_export.engines.tensorrt.station import Shape, Station

LARGEST_NUMBER = 8
"""Of buckets; the one used longest ago makes room."""


@dataclass
class DecodeBucket:
    """The decode profile at one batch size; its shapes and addresses never change.

    A context of its own, because a graph is only good as long as the context it was captured from is left alone.
    """

    station: Station
    device: Device
    captures: bool
    _runs: int = 0
    _replay: Callable[[], None] | None = None

    def enqueue(self) -> None:
        """Queue one step.

        The first run is a plain one, in which TensorRT may still prepare itself; the second is captured.
        """
        if self._replay is None and self.captures and self._runs == 1:
            self._replay = self._captured()
        if self._replay is None:
            self.station.enqueue()
        else:
            self._replay()
        self._runs += 1

    def _captured(self) -> Callable[[], None]:
        try:
            return self.device.capture(self.station.enqueue)
        except (EngineError, RuntimeError) as error:
            raise EngineError(
                f"a decode step cannot be captured as a CUDA graph ({one_line(error)}); open the plan with "
                "--no-cuda-graphs (RuntimeOptions(cuda_graphs=False))"
            ) from error


@dataclass
class DecodeBuckets:
    """Buckets by batch size, made when first needed.

    Attributes:
        make: Makes an execution context of the decode profile.
        captures: Make CUDA graphs.
    """

    make: Callable[[], Station]
    device: Device
    captures: bool
    _buckets: dict[int, DecodeBucket] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget all: the addresses they have are no longer right."""
        if self._buckets:
            self.device.finish()  # a context or graph must outlive its launches
        self._buckets.clear()

    def bucket(
        self, rows: int, shapes: Mapping[str, Shape], addresses: Callable[[], Mapping[str, int]]
    ) -> DecodeBucket:
        """Return the bucket of so many rows.

        Args:
            rows: Of the batch.
            shapes: Of the inputs.
            addresses: Gives those of inputs and outputs; asked when the bucket is new.
        """
        bucket = self._buckets.pop(rows, None)
        if bucket is None:
            if len(self._buckets) >= LARGEST_NUMBER:
                self.device.finish()
                del self._buckets[next(iter(self._buckets))]
            bucket = DecodeBucket(self.make(), self.device, self.captures)
            bucket.station.set_shapes(shapes)
            bucket.station.bind(addresses())
        self._buckets[rows] = bucket  # the last is the one used last
        return bucket
