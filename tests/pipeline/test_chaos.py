"""A sample of `make chaos`: a calibration that is killed, interrupted and cut off from its disk, and then resumed."""

import subprocess
import sys
from pathlib import Path


def test_a_disturbed_job_leaves_what_an_undisturbed_one_leaves() -> None:
    points = ("--kills", "1", "--interrupts", "1", "--full-disks", "1", "--calibrate-only", "--seed", "5")
    command = [sys.executable, "-m", "tests.support.chaos", *points]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL  1 of 1" in done.stdout
    assert "SIGINT   1 of 1" in done.stdout
    assert "files    1 of 1" in done.stdout
