"""The program text inside a TensorRT-RTX plan: finding it, and reading its tensors and operations.

TensorRT-RTX 1.7 stores one program per profile as text: a header, declarations of tensors with their types
(`descriptors`), and operations in the order of their launch (`main`), each of which names the ONNX nodes it stands
for. A kernel that is specialised when the plan is loaded has a program of its own, for any target. The format is
undocumented; `CHECKED_VERSION` is the release it was read in.
"""

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.header import TENSORRT_RTX_TAG, VERSION

CHECKED_VERSION = (1, 7)
"""Release of TensorRT-RTX whose program text this module and its users were checked with."""

_PROGRAM = b"descriptors {"
_ACCELERATORS = re.compile(r"accelerators=\{([^}]*)\}")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_MAIN = re.compile(r"^main \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_TENSOR = re.compile(r"^  (?:sub_)?tensor=\{(.*)\}$", re.MULTILINE)
_TENSOR_NAME = re.compile(r' name="([^"]*)"')
_TENSOR_TYPE = re.compile(r" type=(\w+)")
_PAYLOAD = re.compile(r"\bconst_payload_size=(\d+)")
_OFFSET = re.compile(r" offset=(\d+)")
_REGION = re.compile(r' region="?([^ "]*)"?')
_OPERATION = re.compile(r'^  (\w+)=\{ name=(?:"([^"]*)"|(\S+))(.*)$', re.MULTILINE)
_NAMES = r'=\{((?: ?"[^"]*")*) ?\}'
_INPUTS = re.compile(r" input(?:_args)?" + _NAMES)
_OUTPUTS = re.compile(r" output(?:_args)?" + _NAMES)
_LAYERS = re.compile(r' layers="([^"]*)"')
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_QUOTED = re.compile(r'"([^"]*)"')

_ON_THE_HOST = frozenset({"shape_call", "jmp", "cjmp", "assert"})
"""Operations that launch nothing. Any other is taken for a kernel, so that an unknown kind is never overlooked."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a program.

    Attributes:
        kind: The program's name of its type, e.g. `half`.
        payload: Bytes when it is a constant, else 0.
        place: Region and offset; constants of one place are stored once.
    """

    kind: str
    payload: int
    place: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Operation:
    """A step of a program; `nodes` are the ONNX nodes it stands for, some of them only in part."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def launches(self) -> bool:
        """Whether the GPU is given something to do."""
        return self.kind not in _ON_THE_HOST


@dataclass(frozen=True, slots=True)
class Program:
    """One program of a plan.

    Attributes:
        targets: Such as `SM86`; empty for the inner program of a kernel, which its caller's targets hold for.
        profile: Index of the optimization profile.
    """

    targets: tuple[str, ...]
    profile: int
    tensors: Mapping[str, Tensor]
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class PlanText:
    """What a plan says of itself.

    Attributes:
        version: Of the TensorRT-RTX that wrote the plan; empty where it is no plan of TensorRT-RTX.
        programs: In the plan's order; empty where it holds no program text.
    """

    version: tuple[int, ...]
    programs: tuple[Program, ...]


def read_plan_text(plan: Path) -> PlanText:
    """Read version and programs of a plan, of whatever compiler; nothing of it is executed.

    Raises:
        EngineError: The plan cannot be read, or is empty.
    """
    try:
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            version = tuple(data[VERSION]) if data[: len(TENSORRT_RTX_TAG)] == TENSORRT_RTX_TAG else ()
            return PlanText(version, tuple(_programs(data)))
    except (OSError, ValueError) as error:  # ValueError: mmap refuses an empty file
        raise EngineError(f"{plan}: cannot read the plan: {error}") from error


def _programs(data: mmap.mmap) -> Iterator[Program]:
    # Looking for the marker and parsing from there on takes a second where a pattern over gigabytes takes a minute.
    start = data.find(_PROGRAM)
    while start >= 0:
        end = data.find(b"\0", start)
        end = len(data) if end < 0 else end
        header = data[data.rfind(b"\0", 0, start) + 1 : start].decode(errors="replace")
        yield _program(header, data[start:end].decode(errors="replace"))
        start = data.find(_PROGRAM, end)


def _program(header: str, text: str) -> Program:
    accelerators, profile, main = _ACCELERATORS.search(header), _PROFILE.search(text), _MAIN.search(text)
    targets = accelerators.group(1).split() if accelerators else []
    return Program(
        targets=tuple(target.upper() for target in targets if target != "*"),
        profile=int(profile.group(1)) if profile else 0,
        tensors=dict(_tensors(text)),
        operations=tuple(_operations(main.group(1))) if main else (),
    )


def _tensors(text: str) -> Iterator[tuple[str, Tensor]]:
    for match in _TENSOR.finditer(text):
        line = match.group(1)
        name, kind = _TENSOR_NAME.search(line), _TENSOR_TYPE.search(line)
        if name and kind:
            payload, region, offset = _PAYLOAD.search(line), _REGION.search(line), _OFFSET.search(line)
            place = (region.group(1) if region else "", offset.group(1) if offset else "")
            yield name.group(1), Tensor(kind.group(1), int(payload.group(1)) if payload else 0, place)


def _operations(main: str) -> Iterator[Operation]:
    for match in _OPERATION.finditer(main):
        kind, quoted, bare, rest = match.groups()
        inputs, outputs, layers = _INPUTS.search(rest), _OUTPUTS.search(rest), _LAYERS.search(rest)
        yield Operation(
            kind=kind,
            name=bare if quoted is None else quoted,
            inputs=tuple(_QUOTED.findall(inputs.group(1))) if inputs else (),
            outputs=tuple(_QUOTED.findall(outputs.group(1))) if outputs else (),
            nodes=tuple(_NODE.findall(layers.group(1))) if layers else (),
        )
