"""A small model directory and a corpus for the command line, and calls of it inside this process."""

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from spike_export.artifacts.results.command_log import COMMANDS_FILE
from spike_export.cli.main import run
from tests.support.tiny.checkpoints import as_text, planted_spike_llama, sampled_text, write_hf

LENGTH = 32
SMALL = ("--samples", "4", "--length", str(LENGTH))
"""Options that make every stage short."""


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @classmethod
    def of(cls, process: subprocess.CompletedProcess[str]) -> Self:
        """Return the outcome of a process of its own whose streams were captured."""
        return cls(process.returncode, process.stdout, process.stderr)

    @property
    def stages_run(self) -> tuple[str, ...]:
        """Names of the stages that did their work, in order."""
        return tuple(line.split("] ")[1].split(":")[0] for line in self.out.splitlines() if line.endswith(": started"))

    @property
    def error(self) -> str:
        """The single error line; fails when there is more on stderr, or another exit code than 2."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.err.startswith("spike-export: error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        return self.err.strip()


def call(*arguments: str | Path) -> Outcome:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


@cache
def corpus_text(seed: int = 0) -> str:
    """Return text that the planted model itself says."""
    return as_text(sampled_text(planted_spike_llama(), lines=32, seed=seed))


def write_corpus(path: Path, seed: int = 0) -> Path:
    """Write a `.txt` corpus; return its path."""
    path.write_text(corpus_text(seed), encoding="utf-8")
    return path


def write_model(folder: Path, seed: int = 0) -> Path:
    """Write an HF directory of a model with a planted spike, so that prefix and module choice have work to do."""
    return write_hf(folder, planted_spike_llama(seed))


def write_inputs(folder: Path) -> Path:
    """Write `model` and `corpus.txt` into a folder; return it."""
    write_model(folder / "model")
    write_corpus(folder / "corpus.txt")
    return folder


def artifacts(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder but the log of commands, which tells runs apart: relative path → content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMMANDS_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
