"""Fixtures that more than one test file uses."""

import os
from pathlib import Path

import pytest

from benchmarks.fetch_smollm2 import FetchError, smollm2_path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; for tests marked `model`."""
    try:
        return smollm2_path()
    except FetchError as error:
        # In CI a skip would hide that the real model was never tried.
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
