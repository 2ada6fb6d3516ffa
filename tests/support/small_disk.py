"""A disk of a few kilobytes, for tests of what a full disk leaves."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_HOLD = 'mount -t tmpfs -o size="$1" none "$2" && echo mounted && read end'


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a new file system of `size` (such as `96k`) on a new folder; skip the test where nobody may.

    Another process holds the mount in a namespace of its own. The path in the block leads through that process, so that
    what writes there need not be started in the namespace. Paths of this kind cannot be made canonical, as onnx does.
    """
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare to mount a small disk with")
    folder.mkdir()
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", _HOLD, "sh", size, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout is not None
        disk = Path(f"/proc/{holder.pid}/root{folder}")
        if holder.stdout.readline() != b"mounted\n" or not os.access(disk, os.W_OK):
            pytest.skip("this machine lets nobody mount a small disk")
        yield disk
