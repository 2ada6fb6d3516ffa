"""The class that Triton's Python backend runs: requests go to the server's scheduler, pieces come back as responses.

Triton hands requests to `execute` and goes on at once (a decoupled model); all requests in progress are coroutines on
one event loop, over one worker.
"""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.engines.generation.generated_text import Piece
from spike_export.engines.plan_runtime import is_plan
from spike_export.engines.runtime_choice import RuntimeChoice
from spike_export.serving.openai.errors import RequestError, failed, timed_out
from spike_export.serving.openai.requests import encoded, new_tokens, works_of
from spike_export.serving.scheduling.answer import Answer
from spike_export.serving.scheduling.batch import Work
from spike_export.serving.service import Service, open_service
from spike_export.serving.triton.answer_tensors import AnswerTensors, Arrays
from spike_export.serving.triton.model_settings import BUNDLE, ModelSettings
from spike_export.serving.triton.request import DEFAULT_TOKENS, TritonRequest

_LOOK_SECONDS = 0.1
"""How often a request in progress is asked whether its client has left."""


def model_class(triton: Any) -> type:
    """Return the class `TritonPythonModel`.

    Args:
        triton: The module `triton_python_backend_utils`, which only Triton has.
    """

    class TritonPythonModel:
        """A bundle or a plan as a model of Triton."""

        def initialize(self, args: dict[str, str]) -> None:
            """Open the engine; what this raises keeps the model from being ready."""
            service = _open(args, triton)
            self._requests = _Requests(service, triton)

        def execute(self, requests: list[Any]) -> None:
            """Take requests; their responses come later."""
            for request in requests:
                self._requests.begin(request)

        def finalize(self) -> None:
            """Let requests in progress end, and release the engine."""
            self._requests.close()

    return TritonPythonModel


def _open(args: dict[str, str], triton: Any) -> Service:
    name = args["model_name"]
    folder = Path(triton.get_model_dir())
    settings = ModelSettings.of(json.loads(args["model_config"]).get("parameters", {}), name)

    def log(event: str, fields: dict[str, object]) -> None:
        triton.Logger.log_info(json.dumps({"event": event, **fields}))

    return open_service(_choice(folder, settings, args), settings.service(name), log)


def _choice(folder: Path, settings: ModelSettings, args: dict[str, str]) -> RuntimeChoice:
    engine = folder / settings.engine
    if not engine.exists() or not is_plan(engine):
        return RuntimeChoice.of(engine, threads=settings.threads or None)
    from spike_export.engines.tensorrt.engines import RuntimeOptions

    gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
    return RuntimeChoice.of(engine, bundle=folder / BUNDLE, runtime=RuntimeOptions(gpu=gpu))


class _Requests:
    """The requests in progress, on an event loop of their own."""

    def __init__(self, service: Service, triton: Any) -> None:
        self._service, self._triton = service, triton
        self._running: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def begin(self, request: Any) -> None:
        """Take a request: its tensors are read now, because Triton takes them back when `execute` returns."""
        sender = request.get_response_sender()
        try:
            asked = TritonRequest.read(request, self._triton)
        except RequestError as error:
            self._refuse(sender, error)
            return
        self._loop.call_soon_threadsafe(self._start, asked, sender)

    def close(self) -> None:
        """Wait for the requests in progress, stop the loop, release the engine."""
        asyncio.run_coroutine_threadsafe(self._ended(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._service.close()

    async def _ended(self) -> None:
        await asyncio.gather(*self._running, return_exceptions=True)

    def _start(self, asked: TritonRequest, sender: Any) -> None:
        task = self._loop.create_task(self._unless_cancelled(asked, sender))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _unless_cancelled(self, asked: TritonRequest, sender: Any) -> None:
        """Answer, and look meanwhile whether the client is still there; a prompt that waits yields no piece."""
        answering = asyncio.ensure_future(self._answered(asked, sender))
        while not (await asyncio.wait({answering}, timeout=_LOOK_SECONDS))[0]:
            if sender.is_cancelled():
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)
                code = self._triton.TritonError.CANCELLED
                self._finish(sender, self._triton.TritonError("the request was cancelled", code))
                return
        try:
            answering.result()
        except RequestError as error:
            self._refuse(sender, error)
        except Exception as error:  # a fault of this program ends the request and not the model
            self._triton.Logger.log_error(f"spike-export: {one_line(error)}")
            self._finish(sender, self._triton.TritonError(f"the model has a fault: {one_line(error)}"))

    async def _answered(self, asked: TritonRequest, sender: Any) -> None:
        works = await self._works(asked)
        text = self._service.model.tokenizer.backend_tokenizer
        tensors = AnswerTensors(len(works), len(works[0].prompt), asked.added, text)
        left = len(works)
        try:
            with Answer(self._service.worker, works, self._service.settings.timeout) as answer:
                async for number, piece in answer.pieces():
                    if not isinstance(piece, Piece):
                        continue
                    left -= piece.finish_reason is not None
                    if tensors.take(number, piece) and asked.streams and left:
                        sender.send(self._response(tensors.arrays()))
        except TimeoutError as error:
            raise timed_out(self._service.settings.timeout) from error
        except EngineError as error:
            raise failed(error) from error
        last = self._response(tensors.arrays(asked.text if asked.repeats_prompt else ""))
        sender.send(last, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _works(self, asked: TritonRequest) -> list[Work]:
        service, form = self._service, asked.form
        (prompt,) = await encoded(service, [asked.text], "text_input")
        bos = service.model.manifest.bos_token_id
        if prompt[:2].tolist() == [bos, bos]:  # a chat template spelled it, and the tokenizer added it
            prompt = prompt[1:]
        size = new_tokens(service, len(prompt), form.max_tokens, DEFAULT_TOKENS, "max_tokens")
        return await works_of(service, form, [prompt], [size], asked.logprobs)

    def _response(self, arrays: Arrays) -> Any:
        tensors = [self._triton.Tensor(name, array) for name, array in arrays.items()]
        return self._triton.InferenceResponse(output_tensors=tensors)

    def _refuse(self, sender: Any, error: RequestError) -> None:
        kinds, code = self._triton.TritonError, "INTERNAL"
        if error.status < 500:
            code = "INVALID_ARG" if error.status != 429 else "UNAVAILABLE"
        elif error.status in (503, 504):
            code = "UNAVAILABLE"
        self._finish(sender, kinds(error.message, getattr(kinds, code)))

    def _finish(self, sender: Any, error: Any) -> None:
        response = self._triton.InferenceResponse(output_tensors=[], error=error)
        sender.send(response, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
