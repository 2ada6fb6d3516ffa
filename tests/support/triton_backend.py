"""A stand-in of `triton_python_backend_utils`, written from the documentation of Triton's Python backend.

Source: https://github.com/triton-inference-server/python_backend, README.md: InferenceRequest, InferenceResponse,
Tensor, TritonError, the decoupled mode and its response sender. It enforces what the documentation demands of a model.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: NDArray[Any]) -> None:
        assert isinstance(name, str)
        assert isinstance(array, np.ndarray)
        assert array.dtype != np.object_ or all(isinstance(each, (bytes, str)) for each in array.reshape(-1))
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


@dataclass
class ResponseSender:
    responses: list[InferenceResponse] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    came: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.ended.is_set(), "a response behind the final one"
        if response is not None:
            self.responses.append(response)
            self.came.set()
        if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class InferenceRequest:
    def __init__(self, tensors: Sequence[Tensor], parameters: Mapping[str, Any]) -> None:
        self._tensors = {tensor.name(): tensor for tensor in tensors}
        self._parameters, self._sender = json.dumps(dict(parameters)), ResponseSender()
        self.released = False

    def parameters(self) -> str:
        assert not self.released
        return self._parameters

    def get_response_sender(self) -> ResponseSender:
        return self._sender

    def tensor(self, name: str) -> Tensor | None:
        assert not self.released, "tensors of a request belong to Triton once `execute` has returned"
        return self._tensors.get(name)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.tensor(name)


class Logger:
    lines: list[str]

    def __init__(self) -> None:
        self.lines = []

    def log_info(self, line: str) -> None:
        self.lines.append(line)

    log_error = log_info


class Backend:
    """What `import triton_python_backend_utils` gives in the process of one model, and Triton's side of it."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = TRITONSERVER_RESPONSE_COMPLETE_FINAL
    TritonError, Tensor, InferenceResponse = TritonError, Tensor, InferenceResponse
    get_input_tensor_by_name = staticmethod(get_input_tensor_by_name)

    def __init__(self, model: Path, config: Mapping[str, Any]) -> None:
        self.Logger, self._folder, self._config = Logger(), model, config

    def get_model_dir(self) -> str:
        return str(self._folder / "1")

    def arguments(self) -> dict[str, str]:
        """Return the `args` of `initialize`, all of them texts."""
        return {
            "model_config": json.dumps(self._config),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": str(self._folder),
            "model_version": "1",
            "model_name": self._folder.name,
        }


def request_of(inputs: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> InferenceRequest:
    """Return a request whose tensors are arrays of one element, texts as bytes."""
    tensors = []
    for name, value in inputs.items():
        array = np.array([value.encode()], np.object_) if isinstance(value, str) else np.array([value])
        tensors.append(Tensor(name, array))
    return InferenceRequest(tensors, parameters or {})


def ask(
    model: Any, inputs: Mapping[str, Any], parameters: Mapping[str, Any] | None = None
) -> list[dict[str, NDArray[Any]]]:
    """Return the tensors of all responses to a request.

    Raises:
        TritonError: The response is an error.
    """
    request = request_of(inputs, parameters)
    assert model.execute([request]) is None
    request.released = True
    sender = request.get_response_sender()
    assert sender.ended.wait(60)
    found = []
    for response in sender.responses:
        error = response.error()
        if error is not None:
            raise error
        found.append({tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()})
    return found
