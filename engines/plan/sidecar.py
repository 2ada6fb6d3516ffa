"""`engine.json`: what a plan was built from and for, and what it turned out to be."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.atomic_write import temporary_path
from spike_export.artifacts.files.documents import read_document
from spike_export.artifacts.files.json_document import first_fault
from spike_export.artifacts.ownership import is_document
from spike_export.engines.plan.build_options import HardwareCompatibility, ProfileName
from spike_export.engines.plan.bundle_identity import hash_plan
from spike_export.engines.plan.program_audit import ProgramAudit

_NUMBER_LIST = re.compile(r"\[[\d,\s]+\]")
"""A shape, which is to stand on one line: a plan has hundreds of them."""


class _Document(BaseModel):
    """A part of the sidecar: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BackendVersion(_Document):
    """The compiler, and why it was taken."""

    name: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    reason: str


class InputShapes(_Document):
    """Smallest, tuned-for and largest shape of an input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class ProfileShapes(_Document):
    """One optimization profile; its place in the list is its index in the plan."""

    name: ProfileName
    inputs: Mapping[str, InputShapes]


class PlanFile(_Document):
    """Identifies the plan the sidecar belongs to; `size` in bytes."""

    sha256: str
    size: int


class AuditedModule(_Document):
    """A module's planned precision, those found over all profiles, and the verdict."""

    planned: str
    found: tuple[str, ...]
    as_planned: bool


class Audit(_Document):
    """Precision proved from the plan (see `audit.verdict`).

    Attributes:
        readable: False when nothing could be read of the plan: then nothing is proved.
        evidence: How all this is known, in a sentence; empty in sidecars of older versions.
        programs: What each profile compiles to; empty in sidecars of older versions.
    """

    readable: bool
    int8_products: int
    fp8_products: int = 0
    other_products: int
    modules: Mapping[str, AuditedModule]
    evidence: str = ""
    programs: tuple[ProgramAudit, ...] = ()


class PlanKey(_Document):
    """All that an engine follows from: the same key, the same engine. The plans of a split engine share theirs.

    Attributes:
        tool: Version of spike-export.
        bundle: As `bundle_identity.hash_bundle` computes it.
        version: Of the backend.
        device: Name of the GPU, where the backend compiles for the one at hand.
        batch: Smallest, typical, largest.
        context, typical_prompt, max_prompt: Tokens, as in `build_profiles.Limits`.
        capacity: Own tokens of a static cache where it is not the bundle's.
    """

    tool: str
    bundle: str
    backend: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    targets: tuple[str, ...]
    device: str | None
    profiles: tuple[ProfileName, ...]
    split: bool
    batch: tuple[int, int, int]
    context: int
    typical_prompt: int
    max_prompt: int
    capacity: int | None
    optimization_level: int
    refit: bool
    strip_weights: bool
    weight_streaming: bool
    hardware_compatible: HardwareCompatibility | None
    version_compatible: bool

    def changes_since(self, earlier: "PlanKey") -> tuple[str, ...]:
        """Return what differs from an earlier key, each as words: `optimization level 3 -> 5`, `bundle changed`."""
        differing = [name for name in type(self).model_fields if getattr(self, name) != getattr(earlier, name)]
        return tuple(
            "bundle changed"
            if name == "bundle"
            else f"{_KEY_LABELS.get(name) or name.replace('_', ' ')} "
            f"{_in_words(getattr(earlier, name))} -> {_in_words(getattr(self, name))}"
            for name in differing
        )


_KEY_LABELS: Mapping[str, str] = {
    "tool": "spike-export",
    "version": "backend version",
    "split": "a plan per profile",
    "context": "max context",
}


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "+".join(str(part) for part in value) or "none"
    return "none" if value is None else str(value)


class PlanSidecar(_Document):
    """What `engine.json` holds.

    Attributes:
        bundle_sha256: As `bundle_identity.hash_bundle` computes it.
        prefix: P, tokens the plan puts into the cache of a fresh sequence by itself.
        max_context: Most own tokens of a sequence.
        rope_by_length: The rope type where that depends on a sequence's length, so that a prompt must enter in one
            call; None else, and in sidecars of older versions.
        build_seconds: Time in the compiler.
        peak_memory: Of the build process, in bytes.
        key: What the engine was built from and how; None in sidecars of older versions.
    """

    format: Literal[1] = 1
    backend: BackendVersion
    targets: tuple[str, ...]
    profiles: tuple[ProfileShapes, ...]
    prefix: int
    max_context: int
    rope_by_length: str | None = None
    bundle_sha256: str
    plan: PlanFile
    build_seconds: float
    peak_memory: int
    key: PlanKey | None = None
    audit: Audit


def sidecar_path(plan: Path) -> Path:
    """Return the sidecar's place: `engine.plan` → `engine.json`."""
    return plan.with_suffix(".json")


def is_sidecar(path: Path) -> bool:
    """Return whether a file carries the mark of a plan's sidecar, of whatever version."""
    return is_document(path, "format", "bundle_sha256", "plan")


def finish_interrupted(plan: Path) -> None:
    """Put a sidecar into its place where a build was killed between its last two steps.

    A build renames the plan first and then its sidecar, which is complete by then under its temporary name.
    """
    waiting = temporary_path(sidecar_path(plan))
    if not plan.is_file() or not is_sidecar(waiting):
        return
    try:
        described = PlanSidecar.model_validate_json(read_document(waiting)).plan
    except (OSError, ValueError):
        return
    if described.size == plan.stat().st_size and described.sha256 == hash_plan(plan):
        waiting.replace(sidecar_path(plan))


def sidecar_text(sidecar: PlanSidecar) -> str:
    """Return what is written beside the plan, in UTF-8."""
    text = json.dumps(sidecar.model_dump(mode="json"), indent=1, ensure_ascii=False)
    return _NUMBER_LIST.sub(lambda match: " ".join(match.group().split()), text) + "\n"


def load_sidecar(plan: Path) -> PlanSidecar:
    """Read the sidecar of a plan and see that it belongs to it (by size: hashing gigabytes is the caller's choice).

    Raises:
        ArtifactError: The sidecar is missing, malformed or that of another plan.
    """
    path = sidecar_path(plan)
    try:
        text = read_document(path)
        size = plan.stat().st_size
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path}: cannot read the plan's sidecar ({reason}); build the plan again") from error
    try:
        sidecar = PlanSidecar.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_fault(error)}; build the plan again") from error
    if sidecar.plan.size != size:
        raise ArtifactError(
            f"{path} belongs to a plan of {sidecar.plan.size} bytes, but {plan} has {size}; build the plan again"
        )
    return sidecar
