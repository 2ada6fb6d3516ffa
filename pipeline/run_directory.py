"""The work directory of a run: which stages are done, and from what, so that a killed run goes on where it was."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path, PurePath
from types import FunctionType
from typing import Any

from pydantic import BaseModel

from spike_export.artifacts.files.atomic_write import write_text
from spike_export.artifacts.files.documents import read_document, require_file
from spike_export.artifacts.files.sole_writer import sole_writer
from spike_export.artifacts.ownership import require_replaceable


def stage_key(**inputs: Any) -> str:
    """Return a hash of everything a stage's outcome depends on: the same in every process.

    Raises:
        TypeError: An input has no text of its own, or one that names a place in memory.
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=_plain).encode()).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _plain(value: Any) -> Any:
    """Return what stands for a value that JSON does not know."""
    if isinstance(value, frozenset | set):
        return sorted(value)  # their order changes from process to process
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a stage's key")


@dataclass(frozen=True)
class RunDirectory:
    """Artifacts of a run, and a stamp per finished stage.

    Attributes:
        path: The work directory.
        force: Take no stage as done.
        overwrite: Replace also what was not written here.
    """

    path: Path
    force: bool = False
    overwrite: bool = False

    def sole_writer(self) -> AbstractContextManager[None]:
        """Let no other process write to the work directory during the block.

        Raises:
            ArtifactError: Another process does, and is named.
        """
        return sole_writer(self.path, self.path / ".lock")  # inside: what is around the folder may be read-only

    @property
    def is_one(self) -> bool:
        """Whether a stage was ever begun here."""
        return self._stamps.is_dir()

    def require_own(self, artifacts: Iterable[str]) -> None:
        """Refuse a folder that holds files of these names and is no run's: they would be replaced.

        Raises:
            ArtifactError: Names the first such file.
        """
        if self.is_one or self.overwrite:
            return
        for name in artifacts:
            require_replaceable(self.path / name, "part of a run", lambda _: False)

    def write_editable(self, name: str, text: str) -> None:
        """Write a document that a hand may edit, and remember what was written.

        The hash is noted first, beside that of the text that is there: killed in between, both texts are known.
        """
        new = _sha256(text.encode())
        write_text(self._hashes(name), json.dumps([*self._written(name), new]) + "\n")
        write_text(self.path / name, text)
        write_text(self._hashes(name), json.dumps([new]) + "\n")

    def is_edited(self, name: str) -> bool:
        """Return whether a document is there that `write_editable` did not write."""
        try:
            require_file(self.path / name)
            content = (self.path / name).read_bytes()
        except OSError:
            return False
        return _sha256(content) not in self._written(name)

    def discard(self, name: str) -> None:
        """Move a document aside, to its name with `.old` behind it."""
        path = self.path / name
        path.replace(path.with_name(f"{name}.old"))

    def _written(self, name: str) -> list[str]:
        try:
            known = json.loads(read_document(self._hashes(name)))
        except (OSError, ValueError, RecursionError):
            return []
        return [each for each in known if isinstance(each, str)] if isinstance(known, list) else []

    def _hashes(self, name: str) -> Path:
        return self._stamps / f"{name}.sha256"

    def is_done(self, stage: str, key: str, artifacts: Iterable[Path]) -> bool:
        """Return whether a stage ended well on the same inputs, and its artifacts are still there."""
        return not self.force and all(artifact.exists() for artifact in artifacts) and self.is_stamped(stage, key)

    def is_stamped(self, stage: str, key: str) -> bool:
        """Return whether a stage ended well on these inputs, in this run or an earlier one."""
        try:
            stamp = json.loads(read_document(self._stamp(stage)))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(stamp, dict) and stamp.get("key") == key

    def begin(self, stage: str) -> None:
        """Forget that a stage was done, before its artifacts are replaced."""
        self._stamp(stage).unlink(missing_ok=True)

    def mark_done(self, stage: str, key: str) -> None:
        """Record that a stage's artifacts are complete."""
        write_text(self._stamp(stage), json.dumps({"key": key}) + "\n")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder for the block; what a killed run left there is removed first."""
        folder = self.path / ".scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _stamps(self) -> Path:
        return self.path / ".stages"

    def _stamp(self, stage: str) -> Path:
        return self._stamps / f"{stage.replace(' ', '-')}.json"
