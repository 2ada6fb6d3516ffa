"""Rows of a server: each is computed as alone, whatever is in the other rows, and however rows are moved."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.engines.generation.slots import SavingSlots
from spike_export.engines.onnx_runtime import sequences
from spike_export.engines.onnx_runtime.session import BundleSession, open_for_generation
from spike_export.engines.onnx_runtime.slots import StaticSlots, open_slots
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.models import input_scales, tiny_llama, tiny_recipe, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY, ROWS = 96, 6
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(3, 99, length) for length in (40, 3, 17, 64, 9, 33)]


@pytest.fixture(scope="module", params=["static", "last", "dynamic"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BundleSession:
    """An INT8 model with a prefix; a static cache with all or the last logits, or a growing one."""
    model = tiny_llama(max_positions=CAPACITY)
    recipe = tiny_recipe(model.checkpoint, input_scales(model, PROMPTS[3][None]), prefix=(5, 1))
    cache = CacheOptions() if request.param == "dynamic" else CacheOptions("static", CAPACITY)
    options = ExportOptions("float32", cache=cache, logits="last" if request.param == "last" else "all")
    folder = tmp_path_factory.mktemp(request.param)
    export_bundle(model.checkpoint, recipe, options, folder)
    return open_for_generation(folder, threads=1)


def alone(session: BundleSession, prompt: NDArray[np.int64], fed: Sequence[int]) -> NDArray[np.float32]:
    """Logits behind a prompt and behind each token fed, in rows of its own."""
    slots = open_slots(session, 1)
    return np.stack([slots.admit(0, prompt), *(slots.step([0], np.array([token]))[0] for token in fed)])


def test_a_row_is_computed_as_alone_bit_by_bit(session: BundleSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come and go while the others are stepped; buffers grow, shrink and are compacted."""
    monkeypatch.setattr(sequences, "BUCKET", 8)
    slots, random = open_slots(session, ROWS), np.random.default_rng(1)
    fed: dict[int, list[int]] = {}
    seen: dict[int, list[NDArray[np.float32]]] = {}
    for turn in range(60):
        row = int(random.integers(ROWS))
        if row not in fed:
            fed[row], seen[row] = [], [slots.admit(row, PROMPTS[row])]
        elif turn % 3 == 0:
            slots.release(row)
            np.testing.assert_array_equal(np.stack(seen.pop(row)), alone(session, PROMPTS[row], fed.pop(row)))
        rows = [each for each in fed if random.random() < 0.8 and len(PROMPTS[each]) + len(fed[each]) < CAPACITY]
        if rows:
            tokens = random.integers(3, 99, len(rows))
            for each, token, logits in zip(rows, tokens, slots.step(rows, tokens), strict=True):
                fed[each].append(int(token))
                seen[each].append(logits)
    assert len(fed) > 1


def test_a_row_that_overflowed_leaves_nothing_to_the_next_sequence(tmp_path: Path) -> None:
    """Attention of the standard operators multiplies what a query does not see by zero, which NaN survives."""
    model = tiny_llama(max_positions=CAPACITY)
    options = ExportOptions("float32", cache=CacheOptions("static", CAPACITY))
    export_bundle(model.checkpoint, unquantized_recipe(model.checkpoint), options, tmp_path / "bundle")
    session = open_for_generation(tmp_path / "bundle", threads=1, lowering=False)
    for spoiled in (True, False):
        slots = open_slots(session, 2)
        assert isinstance(slots, StaticSlots)
        for row in range(2):
            slots.admit(row, PROMPTS[4])
        for buffer in slots.sequences.buffers:
            buffer[0] = np.nan
        slots.release(0, spoiled=spoiled)  # the other row is moved into its place
        assert np.isfinite(slots.step([1], np.array([5]))).all() == spoiled


def test_saved_keys_and_values_are_as_good_as_read_ones(session: BundleSession) -> None:
    slots = open_slots(session, 3)
    if not isinstance(slots, SavingSlots):
        pytest.skip("a growing cache saves nothing")
    slots.admit(0, PROMPTS[3])
    blocks = [slots.save(0, number) for number in range(2)]
    slots.restore(2, blocks)
    restored = slots.extend(2, PROMPTS[3][64:]) if len(PROMPTS[3]) > 64 else slots.step([2], np.array([7]))[0]
    other = open_slots(session, 1)
    other.admit(0, PROMPTS[3][:64])
    np.testing.assert_array_equal(restored, other.step([0], np.array([7]))[0])
    assert blocks[0].bytes > blocks[1].bytes, "the first block holds the prefix too"
