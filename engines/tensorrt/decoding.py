"""Tokens drawn by a TensorRT plan: the GPU runs ahead, and the host looks at tokens only when they have arrived."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spike_export.artifacts.closing import Closing
from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.decoding import DecodedStep, require_finite
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.slots import Slots
from spike_export.engines.plan.safety import CheckedPlan
from spike_export.engines.tensorrt.buffers import Buffers
from spike_export.engines.tensorrt.device import CudaDevice, Device, Fetched
from spike_export.engines.tensorrt.engines import LoadedPlans, RuntimeOptions
from spike_export.engines.tensorrt.failures import gpu_failures
from spike_export.engines.tensorrt.limits import plan_limits, require_fit
from spike_export.engines.tensorrt.sampling import Drawn, Sampler, seen_tokens
from spike_export.engines.tensorrt.slots import open_slots
from spike_export.engines.tensorrt.steps import StaticSteps, Steps, make_steps


class Drawing(Protocol):
    """Draws a batch's tokens on the device, without waiting for it."""

    def draw(self, logits: torch.Tensor, seen: torch.Tensor | None) -> Drawn:
        """Draw a token for every row from logits [rows, vocab] float32.

        What is drawn is added to `seen` [rows, vocab] bool, the tokens that rows hold.
        """
        ...


MakeSampler = Callable[[GenerationOptions, int, torch.device], Drawing]
"""Makes what draws for one batch of so many rows."""


class TensorRtDecoding(Closing):
    """A plan as a runtime (see `decoding.Decoding`): one batch at a time.

    Attributes:
        limits: What it was built for.
        vocab: Size of the vocabulary.
    """

    def __init__(
        self,
        plans: Sequence[CheckedPlan],
        make_sampler: MakeSampler = Sampler,
        options: RuntimeOptions = RuntimeOptions(),  # noqa: B008  # frozen
        device: Device | None = None,
        bundle: Path | None = None,
    ) -> None:
        """Load a plan with both profiles, or a prefill plan and a decode plan of one build.

        Args:
            plans: Compared with bundle and machine already.
            make_sampler: Of the sampler.
            options: How to run them.
            device: The GPU named in `options` when omitted.
            bundle: What the plans were built from; needed where they were built without their weights.

        Raises:
            EngineError: There is no GPU, the backend is missing, the plans do not belong together, or cannot be loaded.
        """
        self.limits = plan_limits([plan.sidecar for plan in plans])
        self._device = device or CudaDevice(options.gpu)
        self._make_sampler, self._options = make_sampler, options
        buffers = Buffers(self._device)
        with gpu_failures():
            loaded = LoadedPlans(plans, options, self._device, buffers, bundle)
            steps = make_steps(loaded, self.limits, self._device, buffers, graphs=options.cuda_graphs)
        self._plans: LoadedPlans | None = loaded
        self._steps: Steps | None = steps
        self.vocab = loaded.io.vocab
        self._use = ""
        self._kept_rows: set[int] = set()

    def close(self) -> None:
        """Wait for what is queued, keep what was compiled while running, and give the GPU's memory back."""
        if self._plans is None:
            return
        self._device.finish()
        self._plans.keep_kernels()
        self._steps = None  # the contexts, before the engines that they were made of
        self._plans.release()
        self._plans = None

    def decode(self, prompts: Sequence[NDArray[np.int64]], options: GenerationOptions) -> Iterator[DecodedStep]:
        """See `Decoding`."""
        require_fit(self.limits, prompts, options.max_new_tokens, self.vocab)
        return self._decode(prompts, options)

    def open_slots(self, rows: int) -> Slots:
        """See `SlotRuntime`: at most as many rows as the plan was built for. They have the plan until it is closed.

        Raises:
            EngineError: The plan has a growing cache, or is decoding a batch; or the GPU has not enough memory.
        """
        steps = self._opened()
        if not isinstance(steps, StaticSteps):
            raise EngineError(
                "a plan with a growing cache decodes whole batches, and sequences cannot come and go; export with "
                "--kv-cache static and build again, or serve the bundle that the plan was built from"
            )
        with self._alone():
            slots = open_slots(steps, self.limits, self._device, rows)
        self._use = "the plan's rows are in use; close the plan first"
        return slots

    def logits(self, prompt: NDArray[np.int64], continuation: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits behind a prompt and behind each token of a given continuation, to compare engines by.

        Args:
            prompt: [rows, tokens].
            continuation: [rows, tokens], fed token by token.

        Returns:
            [rows, 1 + tokens of the continuation, vocab].

        Raises:
            EngineError: As `decode`.
        """
        with self.queued(list(prompt), continuation.shape[1] + 1) as steps:
            given = self._device.upload(continuation)
            fetched = [self._device.fetch([steps.begin(list(prompt), continuation.shape[1] + 1)])]
            fetched += [self._device.fetch([steps.step(given[:, column])]) for column in range(continuation.shape[1])]
        with self._alone():
            return np.stack([each.wait()[0] for each in fetched], axis=1)

    @contextmanager
    def queued(self, prompts: Sequence[NDArray[np.int64]], new_tokens: int) -> Iterator[Steps]:
        """Give the steps of one batch to a caller who drives them itself; torch's work joins theirs on the stream.

        Args:
            prompts: What the batch will begin with.
            new_tokens: How many each row may get.

        Raises:
            EngineError: As `decode`.
        """
        require_fit(self.limits, prompts, new_tokens, self.vocab)
        with self._alone(), self._device.queue():
            yield self._opened()

    def _opened(self) -> Steps:
        if self._steps is None:
            raise EngineError("the plan is closed; open it again")
        return self._steps

    def _decode(self, prompts: Sequence[NDArray[np.int64]], options: GenerationOptions) -> Iterator[DecodedStep]:
        """Queue steps ahead of those that are handed out.

        No step needs anything of the host but its launch, so that the GPU is never without work while the host looks at
        earlier tokens; what was queued when the caller stops is wasted, `lag` steps at most.
        """
        with self._alone(), self._kept(len(prompts)):
            flying: deque[Fetched] = deque()
            with self._device.queue():
                sampler = self._make_sampler(options, len(prompts), self._device.device)
                seen = seen_tokens(prompts, self.vocab, options, self._device.device)
                # Logits lie in our buffers, which this iterator must not keep alive behind `close`.
                tokens = self._draw(sampler, self._opened().begin(prompts, options.max_new_tokens), seen, flying)
            for _ in range(1, options.max_new_tokens):
                if len(flying) > self._options.lag:
                    yield _step(flying.popleft())
                with self._device.queue():
                    tokens = self._draw(sampler, self._opened().step(tokens), seen, flying)
            while flying:
                yield _step(flying.popleft())

    def _draw(
        self, sampler: Drawing, logits: torch.Tensor, seen: torch.Tensor | None, flying: deque[Fetched]
    ) -> torch.Tensor:
        drawn = sampler.draw(logits, seen)
        tokens = drawn[0]
        finite = logits.isfinite().all(dim=-1)
        flying.append(self._device.fetch([finite, *(tensor for tensor in drawn if tensor is not None)]))
        return tokens

    @contextmanager
    def _kept(self, rows: int) -> Iterator[None]:
        """Keep what the first batch of so many rows had compiled: not every caller closes a runtime."""
        try:
            yield
        finally:
            if self._plans is not None and rows not in self._kept_rows:
                self._kept_rows.add(rows)
                self._plans.keep_kernels()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second batch while one is in progress: they would share cache and scratch memory."""
        if self._use:
            raise EngineError(self._use)
        self._use = "the plan is decoding another batch; read that to its end or close it first"
        try:
            with gpu_failures():
                yield
        finally:
            self._use = ""


def _step(fetched: Fetched) -> DecodedStep:
    finite, *drawn = fetched.wait()
    require_finite(finite, "export the bundle with --dtype float32 or bfloat16 and build again")
    return DecodedStep(*drawn)
