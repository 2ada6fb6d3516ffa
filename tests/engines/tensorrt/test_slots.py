"""Rows of a plan over a pretended GPU: each sequence is computed as alone, whatever shares the calls."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.slots import SavingSlots, Slots
from spike_export.engines.tensorrt.decoding import TensorRtDecoding
from spike_export.engines.tensorrt.engines import RuntimeOptions
from spike_export.engines.tensorrt.slots import SavingPlanSlots
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.graph_parity import assert_close, reference_logits
from tests.support.tiny.models import TinyModel, tiny_llama, unquantized_recipe
from tests.support.trt_simulation import CAPACITY, Greedy, Simulation, simulate

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, PART = 4, 4
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(0, 99, length) for length in (9, 3, 16, 1)]
STAGED = 25
"""Slots of a cache whose rows begin where TensorRT takes no address: 12.5 times 256 bytes each."""


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


Bundles = dict[tuple[bool, int], Path]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, model: TinyModel) -> Bundles:
    """By whether there is a prefix, and by capacity; 0 stands for a growing cache."""
    folders = {}
    for prefix, capacity in [*product((False, True), (CAPACITY, STAGED)), (False, 0)]:
        folder = folders[prefix, capacity] = tmp_path_factory.mktemp("bundles") / f"{prefix}-{capacity}"
        cache = CacheOptions("static", capacity) if capacity else CacheOptions()
        recipe = unquantized_recipe(model.checkpoint, (5, 1) if prefix else ())
        export_bundle(model.checkpoint, recipe, ExportOptions("float32", logits="last", cache=cache), folder)
    return folders


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulation:
    return simulate(monkeypatch, tmp_path)


def opened(simulation: Simulation, bundle: Path, prompt: int = 16) -> TensorRtDecoding:
    plan = simulation.plan(bundle, "prefill", "decode", prompt=prompt, batch=ROWS)
    return TensorRtDecoding([plan], Greedy, RuntimeOptions(), simulation.device)


def parts(slots: Slots, prompt: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    chunk = slots.chunk or len(prompt)
    return (prompt[start : start + chunk] for start in range(0, len(prompt), chunk))


def read(slots: Slots, row: int, prompt: NDArray[np.int64]) -> NDArray[np.float32]:
    first, *more = parts(slots, prompt)
    logits = slots.admit(row, first)
    for part in more:
        logits = slots.extend(row, part)
    return logits


@pytest.mark.parametrize("capacity", [CAPACITY, STAGED], ids=["in place", "staged"])
@pytest.mark.parametrize("prefix", [False, True], ids=["plain", "prefix"])
def test_rows_that_come_and_go_have_the_logits_of_transformers(
    simulation: Simulation, bundles: Bundles, model: TinyModel, prefix: bool, capacity: int
) -> None:
    """Prompts enter in parts between the steps of other rows; rows move together when one of them goes."""
    slots = opened(simulation, bundles[prefix, capacity], prompt=16 if prefix else PART).open_slots(ROWS)
    assert (slots.chunk, slots.longest_prompt) == ((None, 16) if prefix else (PART, CAPACITY))
    random, fed, reading = np.random.default_rng(2), dict[int, list[int]](), dict[int, Iterator[NDArray[np.int64]]]()
    compared = 0

    def compare(row: int, logits: NDArray[np.float32]) -> None:
        nonlocal compared
        compared += 1
        assert_close(logits, reference_logits(model, np.array([fed[row]]), (5, 1) if prefix else ())[0, -1])

    for turn in range(40):
        row = int(random.integers(ROWS))
        if row not in fed:
            reading[row], fed[row] = parts(slots, PROMPTS[row]), []
        elif row not in reading and turn % 3 == 0:
            slots.release(row)
            del fed[row]
        for each in list(reading):
            part = next(reading[each], None)
            if part is None:
                del reading[each]
                continue
            logits = (slots.extend if fed[each] else slots.admit)(each, part)
            fed[each] += part.tolist()
            compare(each, logits)
        rows = [each for each in fed if each not in reading and len(fed[each]) < CAPACITY and random.random() < 0.8]
        if rows:
            tokens = random.integers(0, 99, len(rows))
            for each, token, logits in zip(rows, tokens, slots.step(rows, tokens), strict=True):
                fed[each].append(int(token))
                compare(each, logits)
    assert compared > 60


def test_saved_keys_and_values_are_as_good_as_read_ones(
    simulation: Simulation, bundles: Bundles, model: TinyModel
) -> None:
    for capacity in (CAPACITY, STAGED):
        slots = opened(simulation, bundles[False, capacity], prompt=8).open_slots(ROWS)
        assert isinstance(slots, SavingPlanSlots)
        slots.block = 8
        read(slots, 3, PROMPTS[3])
        read(slots, 2, PROMPTS[2])
        blocks = [slots.save(2, number) for number in range(2)]
        slots.release(2)
        slots.restore(1, blocks)
        more = PROMPTS[0][:3]
        expected = reference_logits(model, np.array([[*PROMPTS[2], *more]]), ())[0, -1]
        assert_close(slots.extend(1, more), expected)
    plain = opened(simulation, bundles[True, CAPACITY]).open_slots(ROWS)
    assert not isinstance(plain, SavingSlots), "its prefill cannot go on behind restored tokens"


def test_a_row_that_overflowed_leaves_nothing_to_the_next_sequence(
    simulation: Simulation, bundles: Bundles, model: TinyModel
) -> None:
    for capacity in (CAPACITY, STAGED):
        slots = opened(simulation, bundles[False, capacity], prompt=PART).open_slots(ROWS)
        read(slots, 0, PROMPTS[1])
        simulation.trt.overflowing = True
        read(slots, 1, PROMPTS[0])
        simulation.trt.overflowing = False
        slots.release(1)
        assert_close(read(slots, 1, PROMPTS[1]), reference_logits(model, PROMPTS[1][None], ())[0, -1])


def test_steps_run_in_batches_of_powers_of_two(simulation: Simulation, bundles: Bundles) -> None:
    """Each batch size has a context and a graph, of which a plan keeps a few."""
    slots = opened(simulation, bundles[False, CAPACITY]).open_slots(ROWS)
    for row, prompt in enumerate(PROMPTS):
        slots.admit(row, prompt[:2])
    simulation.trt.runs.clear()
    for rows in ([0], [0, 1], [2], [3, 1]):
        slots.step(rows, np.zeros(len(rows), np.int64))
    assert simulation.trt.runs == [("decode", (batch, 1)) for batch in (1, 2, 4, 4)]


def test_what_a_plan_cannot_do_is_told(simulation: Simulation, bundles: Bundles) -> None:
    runtime = opened(simulation, bundles[True, CAPACITY], prompt=8)
    slots = runtime.open_slots(100)
    assert (slots.rows, slots.longest_prompt) == (ROWS, 8)
    slots.admit(0, PROMPTS[1])
    with pytest.raises(EngineError, match="reads a prompt in one call"):
        slots.extend(0, PROMPTS[1])
    with pytest.raises(EngineError, match="9 tokens were given and the plan reads 8 in one call"):
        slots.admit(1, PROMPTS[0])
    for token in range(CAPACITY - len(PROMPTS[1])):
        slots.step([0], np.array([token]))
    with pytest.raises(EngineError, match=f"24 tokens, 1 more do not fit into the plan's context of {CAPACITY}"):
        slots.step([0], np.array([1]))
    with pytest.raises(EngineError, match="the plan's rows are in use; close the plan first"):
        next(runtime.decode(PROMPTS[1:2], GenerationOptions(max_new_tokens=2)))
    growing = opened(simulation, bundles[False, 0])
    with pytest.raises(EngineError, match=r"growing cache decodes whole batches.* --kv-cache static and build again"):
        growing.open_slots(ROWS)
    simulation.trt.failing = True
    with pytest.raises(EngineError, match="does not run the plan"):
        slots.admit(1, PROMPTS[1])
