"""One profile of an engine with its execution context: shapes and addresses in, work on the stream out."""

from collections.abc import Mapping
from typing import Any

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.backend import Backend
from spike_export.engines.tensorrt.device import Device
from spike_export.engines.tensorrt.log import BuildLog

Shape = tuple[int, ...]


class Station:
    """An execution context that is given its scratch memory, and all else, by us."""

    def __init__(self, backend: Backend, context: Any, profile: int, device: Device, log: BuildLog) -> None:
        """Select the profile.

        Args:
            backend: Named in messages.
            context: Created without memory of its own.
            profile: Its index in the engine.
            device: Whose stream is used.
            log: What TensorRT says.

        Raises:
            EngineError: TensorRT refuses the profile.
        """
        self._backend, self._context, self._device, self._log = backend, context, device, log
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        with device.queue():
            self._require(context.set_optimization_profile_async(profile, device.stream), f"select profile {profile}")

    def use_scratch(self, address: int, size: int) -> None:
        """Compute in `size` bytes at `address`, which no other work of the stream's present may use."""
        self._context.set_device_memory(address, size)

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Set the shapes of inputs; those set before stay.

        Raises:
            EngineError: One is outside the profile.
        """
        for name, shape in shapes.items():
            if self._shapes.get(name) == shape:
                continue
            self._require(self._context.set_input_shape(name, shape), f"take {name} of shape {list(shape)}")
            self._shapes[name] = shape

    def output_shape(self, name: str) -> Shape:
        """Return an output's shape under the inputs' present shapes."""
        return tuple(int(size) for size in self._context.get_tensor_shape(name))

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Set where inputs and outputs lie, also those without elements; those set before stay.

        Raises:
            EngineError: TensorRT refuses one.
        """
        for name, address in addresses.items():
            if self._addresses.get(name) == address:
                continue
            self._require(self._context.set_tensor_address(name, address), f"take the address of {name}")
            self._addresses[name] = address

    def enqueue(self) -> None:
        """Queue one run on the device's stream.

        Raises:
            EngineError: TensorRT does not.
        """
        self._require(self._context.execute_async_v3(self._device.stream), "run the plan")

    def _require(self, done: bool, what: str) -> None:
        reason = self._log.reason
        self._log.errors.clear()  # a later call has reasons of its own
        if not done:
            raise EngineError(f"{self._backend.title} does not {what}: {reason}")
