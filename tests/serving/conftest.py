"""One bundle, and one server over it, for all tests of serving."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("openai", reason="the official client is not installed")

from tests.support.tiny.service import Running, running, write_served_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_bundle(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[Running]:
    with running(bundle) as server:
        yield server
