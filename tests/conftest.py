"""Fixtures that more than one test file uses."""

import gc
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.fetch_models import GEMMA3, SMOLLM2, FetchError, PackagedModel, model_path
from spike_export.artifacts.process.threads import allow_threads
from spike_export.cli.repeatable import multiply_repeatably
from spike_export.engines.onnx_runtime.denormals import denormals_flushed
from spike_export.pipeline.kept_references import CACHE_VARIABLE
from tests.support.blank_pictures import pictures_left_blank


def fetched(model: PackagedModel) -> Path:
    try:
        return model_path(model)
    except FetchError as error:
        # In CI a skip would hide that the real model was never tried.
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked `slow` too")


def pytest_configure() -> None:
    """Multiply as the command does, and share the processors: more threads than processors wait for each other."""
    multiply_repeatably(os.environ)  # before torch's first product
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        allow_threads(max(1, (os.cpu_count() or 1) // processes))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage meanwhile: imports make a million objects and hardly any."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Real models take the longest: when they come last, one process works alone at the end.
    items.sort(key=lambda item: item.get_closest_marker("model") is None)
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes: give --slow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection: a million objects that live to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between files, leave out what later imports made too: a calibration collects garbage again and again."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what checks keep of unquantized models apart from the user's own; processes that tests start do so too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; for tests marked `model`."""
    return fetched(SMOLLM2)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M as a GGUF file; for tests marked `model`."""
    return fetched(GEMMA3)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch use one thread: products this small lose more to waiting for a second than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def denormals_as_before() -> Iterator[None]:
    """Restore how this thread treats denormals: a foreign session of a bundle flushes them on it, for good."""
    with denormals_flushed():
        yield


@pytest.fixture(scope="module")
def blank_pictures() -> Iterator[None]:
    """Let no report draw its pictures: tests/report and the main job's test see them."""
    with pictures_left_blank():
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt this process and those it starts, also where the suite was started with SIGINT ignored.

    `nohup` and a script's background jobs ignore it, and a process inherits that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
