"""Load on a model in a running Triton server, over gRPC streams, with the requests and figures of `spike-export bench`.

Each client is a coroutine that streams one request after another. It needs the package tritonclient[grpc].
Run: python -m benchmarks.speed.triton HOST:PORT MODEL [--concurrency N ...] [--requests N] [--new-tokens N]
"""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from spike_export.serving.load import Load, Report, Request


def request_of(model: str, text: str, parameters: dict[str, Any], **flags: bool) -> dict[str, Any]:
    """Return the arguments of one call of tritonclient's gRPC clients.

    Args:
        model: Name of the model.
        text: The prompt.
        parameters: Sampling parameters.
        flags: Further tensors.
    """
    values: dict[str, Any] = {"text_input": text, "sampling_parameters": json.dumps(parameters)} | flags
    return {"model_name": model, "inputs": [_tensor(name, value) for name, value in values.items()]}


def _tensor(name: str, value: str | bool) -> Any:
    from tritonclient.grpc import InferInput

    text = isinstance(value, str)
    tensor = InferInput(name, [1], "BYTES" if text else "BOOL")
    tensor.set_data_from_numpy(np.array([value.encode()], np.object_) if isinstance(value, str) else np.array([value]))
    return tensor


async def streamed(client: Any, call: dict[str, Any]) -> AsyncIterator[Any]:
    """Yield the results of a decoupled model for one request; leaving the loop cancels the request.

    Raises:
        tritonclient.utils.InferenceServerException: Triton or the model answers with an error.
    """

    async def calls() -> AsyncIterator[dict[str, Any]]:
        yield call

    responses = client.stream_infer(calls())
    try:
        async for result, error in responses:
            if error is not None:
                raise error
            yield result
    finally:
        responses.cancel()


async def _asked(client: Any, model: str, prompt: str, new_tokens: int) -> Request:
    from tritonclient.utils import InferenceServerException

    parameters = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    flags = {"stream": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
    begun, first, prompt_tokens, tokens = time.perf_counter(), 0.0, 0, 0
    try:
        async for result in streamed(client, request_of(model, prompt, parameters, **flags)):
            first = first or time.perf_counter()
            prompt_tokens = int(result.as_numpy("num_input_tokens")[0])
            tokens += int(result.as_numpy("num_output_tokens")[0])
    except InferenceServerException as error:
        return Request(error=str(error))
    ended = time.perf_counter()
    return Request((first or ended) - begun, ended - begun, prompt_tokens, tokens)


async def measured(address: str, model: str, load: Load) -> Report:
    """Return what a load on a model comes to."""
    from tritonclient.grpc.aio import InferenceServerClient

    async with InferenceServerClient(address) as client:
        waiting, found = iter(load.calls()), list[Request]()

        async def ask_on() -> None:
            for prompt, new_tokens in waiting:
                found.append(await _asked(client, model, prompt, new_tokens))

        begun = time.perf_counter()
        await asyncio.gather(*(ask_on() for _ in range(load.concurrency)))
        return Report(load, time.perf_counter() - begun, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("model")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    for clients in options.concurrency:
        load = Load(requests=options.requests, concurrency=clients, new_tokens=options.new_tokens)
        print(json.dumps(asyncio.run(measured(options.address, options.model, load)).as_json()), flush=True)


if __name__ == "__main__":
    main()
