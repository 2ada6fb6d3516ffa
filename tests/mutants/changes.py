"""What is changed in a source file, one thing at a time, by the operators of mutmut.

mutmut itself runs no mutant here: docs/decisions/mutants.md says why.
"""

import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

from tests.mutants.mutant import Mutant

_UNCHANGED = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise, cst.Assert)
"""Types, and what a refusal says: its text is read by people."""

_UNCHANGED_CALLS = ("cast", "isinstance", "len", "TypeVar")


@dataclass(frozen=True)
class Change:
    """One change that a mutant could have; the mutant is made when it is tried, which takes a fifth of a second."""

    file: str
    source: str
    module: cst.Module
    old: cst.CSTNode
    new: cst.CSTNode
    lines: tuple[int, int]

    def mutant(self) -> Mutant | None:
        """Return the mutant, or None where the change makes no program, or no other one."""
        try:
            changed = self.module.deep_replace(self.old, self.new)
            assert isinstance(changed, cst.Module)
            compile(changed.code, self.file, "exec")
        except (SyntaxError, cst.CSTValidationError, TypeError):
            return None
        if changed.code == self.source:
            return None
        return Mutant(self.file, self.lines, *_difference(self.source, changed.code), changed.code)


def changes_of(root: Path, file: str) -> list[Change]:
    """Return all changes of a file that the operators make."""
    source = (root / file).read_text(encoding="utf-8")
    wrapper = MetadataWrapper(cst.parse_module(source))
    visitor = _Changes(wrapper.resolve(PositionProvider))
    wrapper.module.visit(visitor)
    return [Change(file, source, wrapper.module, *each) for each in visitor.changes]


def _difference(source: str, changed: str) -> tuple[str, str]:
    """Return the lines that differ, without their indentation: before, after."""
    old, new = source.splitlines(), changed.splitlines()
    found = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    steps = [step for step in found if step[0] != "equal"]
    before = [line.strip() for _, start, stop, _, _ in steps for line in old[start:stop]]
    after = [line.strip() for _, _, _, start, stop in steps for line in new[start:stop]]
    return "\n".join(before), "\n".join(after)


class _Changes(cst.CSTVisitor):
    """Collects (node, what replaces it, lines of its statement)."""

    def __init__(self, positions: Mapping[cst.CSTNode, CodeRange]) -> None:
        super().__init__()
        self._positions = positions
        self._depth = 0
        self._statement: tuple[int, int] | None = None
        self.changes: list[tuple[cst.CSTNode, cst.CSTNode, tuple[int, int]]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, _UNCHANGED) or self._is_text_or_type(node):
            return False
        if isinstance(node, cst.Arg) and _is_strictness(node):
            return False
        self._depth += isinstance(node, cst.FunctionDef)
        if isinstance(node, cst.SimpleStatementLine):
            self._statement = self._range(node)
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                for new in operator(node):
                    if not _differ_in_strictness_only(node, new):
                        self.changes.append((node, new, self._statement or self._range(node)))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self._depth -= isinstance(original_node, cst.FunctionDef)
        if isinstance(original_node, cst.SimpleStatementLine):
            self._statement = None

    def _range(self, node: cst.CSTNode) -> tuple[int, int]:
        position = self._positions.get(node)
        if position is None:  # an operator has no place of its own
            return self._statement or (0, 0)
        return position.start.line, position.end.line

    def _is_text_or_type(self, node: cst.CSTNode) -> bool:
        """Return whether people or type checkers read this: sentences, aliases of types, blocks for type checkers."""
        match node:
            case cst.SimpleString():
                return " " in node.value
            case cst.ConcatenatedString() | cst.FormattedString():
                return True
            case cst.Call(func=cst.Name(value=name)):
                return name in _UNCHANGED_CALLS
            case cst.If(test=cst.Name(value="TYPE_CHECKING")):
                return True
            case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))]):
                return not self._depth and name[:1].isupper() and not name.isupper()
        return False


def _differ_in_strictness_only(old: cst.CSTNode, new: cst.CSTNode) -> bool:
    """Return whether two calls differ in `strict=` only: an assertion, which holds unless the program is wrong."""
    if not (isinstance(old, cst.Call) and isinstance(new, cst.Call) and old.func.deep_equals(new.func)):
        return False
    before, after = ([arg.value for arg in call.args if not _is_strictness(arg)] for call in (old, new))
    return len(before) == len(after) and all(one.deep_equals(other) for one, other in zip(before, after, strict=True))


def _is_strictness(arg: cst.Arg) -> bool:
    return arg.keyword is not None and arg.keyword.value == "strict"


def sample(groups: Sequence[Sequence[Change]], count: int, seed: int) -> Iterator[Mutant]:
    """Yield `count` different mutants at random, of each file in proportion to how many changes it has."""
    generator = random.Random(seed)
    placed = [
        ((place + generator.random()) / len(group), change)
        for group in groups
        for place, change in enumerate(generator.sample(list(group), len(group)))
    ]
    mutants = (change.mutant() for _, change in sorted(placed, key=lambda each: each[0]))
    seen: set[str] = set()
    for mutant in mutants:
        if len(seen) == count:
            return
        if mutant is not None and mutant.source not in seen:
            seen.add(mutant.source)
            yield mutant
