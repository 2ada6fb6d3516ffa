"""schemathesis holds the server against its own OpenAPI description, with the settings that docs/serving.md names."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.tiny.service import Running

SETTINGS = Path(__file__).with_name("schemathesis.toml")

TOOL = shutil.which("schemathesis")


@pytest.mark.slow
@pytest.mark.skipif(TOOL is None, reason="schemathesis is not installed; it needs an environment of its own")
def test_no_request_that_the_description_allows_fails(server: Running, tmp_path: Path) -> None:
    assert TOOL is not None
    command = [TOOL, "--config-file", str(SETTINGS), "run", f"{server.url}/openapi.json", "--no-color", "--seed", "1"]
    chosen = ["--phases", "coverage", "--include-path-regex", "^/(de)?tokenize$"]
    done = subprocess.run([*command, *chosen], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert "2 selected" in done.stdout
    assert done.returncode == 0, done.stdout[-4000:]
