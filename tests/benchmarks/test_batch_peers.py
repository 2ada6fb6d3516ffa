"""Batches of bundles and of other tools are of the same rows, and go on with the same tokens."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from benchmarks.speed import batches
from benchmarks.speed.batch_peers import BatchPeer, Play, Played, play_in_torch, timed
from benchmarks.speed.batches import Leg, peer_legs, play_bundle, prompts
from benchmarks.speed.peers import TORCH, Sources, require
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.onnx_runtime.session import open_for_generation
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.checkpoints import random_llama, write_hf

pytestmark = pytest.mark.usefixtures("one_thread", "denormals_as_before")

STEPS = 6


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("batches")
    checkpoint = open_checkpoint(str(write_hf(folder / "model", random_llama())))
    options = ExportOptions("float32", logits="last", cache=CacheOptions("static", 40))
    export_bundle(checkpoint, None, options, folder / "bundle")
    return Sources(lambda: checkpoint, folder / "bundle", folder / "peers")


def no_play(*_: object) -> NoReturn:
    raise AssertionError


def test_a_leg_that_needs_rows_of_one_length_gets_as_many_tokens() -> None:
    own, equal = (prompts(Leg("leg", kind, no_play), 5, 12, 99) for kind in ("own", "equal"))
    assert [len(row) for row in own] == [6, 9, 12, 15, 18]
    assert [len(row) for row in equal] == [12] * 5


def test_the_step_behind_the_prompts_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.speed.batch_peers.time.perf_counter", lambda: now[0])

    def take(seconds: list[float]) -> None:
        now[0] += seconds.pop(0)

    assert timed(partial(take, [3.0]), partial(take, [50.0, 1.0, 2.0]), 2) == (3.0, 3.0)


def test_a_bundle_and_torch_go_on_with_the_tokens_of_each_row_alone(sources: Sources) -> None:
    session = open_for_generation(sources.float32, 1)
    bundle = partial(play_bundle, session)
    torch = play_in_torch(TORCH.built(sources), 1, dtype="float32")
    rows = prompts(Leg("bundle", "own", bundle), 3, 10, 99)
    expected = np.concatenate([torch([row], STEPS).tokens for row in rows])
    assert expected.shape == (3, STEPS + 2)
    assert len({tuple(row) for row in expected}) == 3
    for play in (bundle, torch):
        np.testing.assert_array_equal(play(rows, STEPS).tokens, expected)


def test_a_peer_that_cannot_play_is_left_out_and_named(
    sources: Sources, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def played(rows: Any, steps: int) -> Played:
        return Played(1.0, 1.0, np.zeros((len(rows), steps + 2), np.int64))

    def opened(_: Path, __: int) -> Play:
        return played

    def absent(_: Path, __: int) -> Play:
        require("no_such_tool", "no-such-tool")
        return played

    def short(_: Path, __: int) -> Play:
        return lambda rows, steps: played(rows, steps - 1)

    def unable(_: Path, __: int) -> Play:
        def play(*_: object) -> NoReturn:
            raise RuntimeError("no kernel\nfor this")

        return play

    def peer(name: str, opening: Callable[[Path, int], Play]) -> BatchPeer:
        return BatchPeer(name, "padded", name, lambda *_: None, opening)

    monkeypatch.setattr(
        batches, "PEERS", (peer("absent", absent), peer("whole", opened), peer("unable", unable), peer("short", short))
    )
    assert [leg.name for leg in peer_legs(sources, 1)] == ["whole"]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("absent is left out: no-such-tool is not installed (")
    assert said[1:] == [
        "unable is left out: no kernel for this",
        "short is left out: short: (2, 3) tokens, and not (2, 4)",
    ]
