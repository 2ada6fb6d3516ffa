"""Choices whose windows several processes forward: the same values as in one process, bit by bit."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.layerwise import BATCH_TOKENS, batches
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.module_choice import ModuleChoice, choose_kept
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.prefix_choice import PrefixChoice, choose_prefix
from spike_export.calibration.methods.spreading import Result, even_parts, unheard, window_parts
from spike_export.calibration.methods.transform_choice import TransformChoice, choose_transform
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.checkpoints import planted_spike_llama, sampled_text, write_hf

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = CalibrationOptions(samples=7, length=256, prefix_length=2, max_fp16_share=0.1, head="int8-per-token-dynamic")


class Processes:
    """Workers that are calibrations of this process; the last one is begun anew after every call."""

    def __init__(self, checkpoint: Checkpoint, count: int) -> None:
        self._checkpoint = checkpoint
        self._calibrations = [self._begun() for _ in range(count)]
        self.calls: list[int] = []

    def _begun(self) -> Calibration:
        nothing = TokenWindows(np.empty((0, 0), np.int64), np.empty((0, 0), np.int64))
        return Calibration(self._checkpoint, nothing, OPTIONS)

    @property
    def count(self) -> int:
        return len(self._calibrations)

    def results(
        self, work: Callable[..., Result], calls: Sequence[tuple[Any, ...]], done: Callable[[int], None] = unheard
    ) -> list[Result]:
        self.calls.append(len(calls))
        found = [work(each, *call) for each, call in zip(self._calibrations, calls, strict=False)]
        self._calibrations[-1] = self._begun()
        assert len(found) == len(calls)
        for number in reversed(range(len(calls))):
            done(number)
        return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_hf(tmp_path_factory.mktemp("model"), planted_spike_llama())))


@pytest.fixture(scope="module")
def windows() -> TokenWindows:
    tokens = sampled_text(planted_spike_llama(), lines=38)
    return TokenWindows(np.resize(tokens, (7, 255)), np.resize(tokens[::-1], (2, 255)))


def chosen(calibration: Calibration) -> tuple[PrefixChoice, TransformChoice, ModuleChoice, float]:
    prefix = choose_prefix(calibration, calibration.measure(()))
    behind = calibration.measure(prefix.token_ids)
    transform = choose_transform(calibration, behind)
    after = calibration.measure(prefix.token_ids, transform.transform)
    kept = choose_kept(calibration, after, transform.transform, per_token=transform.kinds.per_token)
    return prefix, transform, kept, calibration.reference_perplexity(prefix.token_ids)


def test_spread_windows_lead_to_the_same_choices(checkpoint: Checkpoint, windows: TokenWindows) -> None:
    alone = chosen(Calibration(checkpoint, windows, OPTIONS))
    processes = Processes(checkpoint, 2)
    assert chosen(Calibration(checkpoint, windows, OPTIONS, workers=processes)) == alone
    assert len(alone[0].candidates) > 1
    assert len(processes.calls) > 9
    assert set(processes.calls) == {2}


@pytest.mark.parametrize(
    ("count", "tokens", "processes"), [(8, 512, 2), (8, 512, 3), (9, 512, 2), (3, 32, 4), (5, 2000, 2)]
)
def test_parts_are_of_whole_batches(count: int, tokens: int, processes: int) -> None:
    fed = np.arange(count * tokens).reshape(count, tokens)
    parts = window_parts(count, tokens, processes)
    assert len(parts) <= processes
    found = [batch for rows in parts for batch in batches(fed[rows])]
    assert [batch.shape for batch in found] == [batch.shape for batch in batches(fed, BATCH_TOKENS)]
    np.testing.assert_array_equal(np.concatenate(found), fed)


@pytest.mark.parametrize(("windows", "processes", "sizes"), [(7, 2, [4, 3]), (4, 4, [1] * 4), (2, 3, [1, 1])])
def test_even_parts_cover_all_windows(windows: int, processes: int, sizes: list[int]) -> None:
    parts = even_parts(windows, processes)
    assert [rows.stop - rows.start for rows in parts] == sizes
    assert [index for rows in parts for index in range(rows.start, rows.stop)] == list(range(windows))
