"""From the start of `spike-export generate` to the first text: seconds, processor seconds and peak memory.

Warm: the bundle's files and the installed packages are in the system's page cache. Cold: before each start their pages
are given back, except those that another process maps. Each start is a process of its own.

Run: python -m benchmarks.speed.start_up BUNDLE
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PROMPT = "The largest city of the country is"


@dataclass(frozen=True)
class Start:
    """What one process took.

    Attributes:
        first_text: Seconds from its start to the first byte of text.
        processor: Seconds of user and system time of it and of the processes that it waited for.
        peak: Bytes of memory, of the one that had the most.
    """

    first_text: float
    processor: float
    peak: int


def started(command: Sequence[str]) -> Start:
    """Run a command that writes text, to its end.

    Raises:
        RuntimeError: It fails, or writes nothing.
    """
    with tempfile.TemporaryFile() as messages:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages)
        assert process.stdout is not None, "a pipe was asked for"
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
        process.stdout.close()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not first:
            messages.seek(0)
            raise RuntimeError(f"exit code {process.returncode}: {messages.read().decode(errors='replace')[-500:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Start(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * unit)


def forget(folders: Sequence[Path]) -> None:
    """Give back the page cache of all files in some folders, as far as they are written."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                file = os.open(path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="folder that export wrote")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights-copy", choices=["never", "auto"], default="never")
    given = parser.parse_args(arguments)
    command = [sys.executable, "-P", "-c", "from spike_export.cli.main import main; main()", "generate"]
    command += [str(given.bundle), "--prompt", PROMPT, "--max-new-tokens", "1", "--threads", str(given.threads)]
    command += ["--weights-copy", given.weights_copy]
    folders = [given.bundle, Path(sysconfig.get_path("platlib"))]
    size = sum(path.stat().st_size for path in given.bundle.iterdir())
    started(command)
    print(f"bundle: {size / 1e6:.0f} MB\n{'':5} | first text, s | processor, s | peak RSS, MB")
    ways: dict[str, Callable[[], None]] = {"warm": lambda: None, "cold": lambda: forget(folders)}
    for name, prepare in ways.items():
        starts = []
        for _ in range(given.rounds):
            prepare()
            starts.append(started(command))
        seconds, processor, peak = (
            [getattr(each, field) for each in starts] for field in ("first_text", "processor", "peak")
        )
        spread = f"{median(seconds):4.2f} ({min(seconds):4.2f} to {max(seconds):4.2f})"
        print(f"{name:5} | {spread} | {median(processor):4.2f} | {median(peak) / 1e6:4.0f}", flush=True)


if __name__ == "__main__":
    main()
