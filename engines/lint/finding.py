"""What a linter rule is and what it reports."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spike_export.engines.lint.view import GraphModel, Node

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Error: TensorRT refuses the graph, or an engine computes something else than ONNX says. Warning: slow, a silent
fallback, or refused by one engine only. Note: worth knowing."""

FORMAT = 1
"""Version of the JSON document."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One place where a rule applies.

    Attributes:
        reason: What is wrong there, in one sentence without the node's name.
        node: The node, or None where the rule speaks of the file, an input or a tensor.
        subject: What is meant where there is no node.
    """

    reason: str
    node: Node | None = None
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the linter.

    Attributes:
        id: Stable name, for documents and filters.
        title: What it looks for.
        remedy: What to do about a finding.
        find: Yields the places where it applies.
    """

    id: str
    severity: Severity
    title: str
    remedy: str
    find: Callable[[GraphModel], Iterator[Hit]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        node: Name of the node, or of its first output where it has none; or the input, tensor or file meant.
        op: The node's operator; empty where the finding is about no node.
        module: The module that the node's metadata names, or an empty string.
        scope: The subgraph or function the node is in; empty for the main graph.
    """

    rule: str
    severity: Severity
    node: str
    op: str
    module: str
    scope: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class LintReport:
    """All findings over one model, the gravest first."""

    model: str
    findings: tuple[Finding, ...]

    def count(self, severity: Severity) -> int:
        """Return the number of findings of one severity."""
        return Counter(finding.severity for finding in self.findings)[severity]

    @property
    def passed(self) -> bool:
        """Whether there is no error."""
        return self.count("error") == 0

    def document(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "format": FORMAT,
            "model": self.model,
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [asdict(finding) for finding in self.findings],
        }


def finding_of(rule: Rule, hit: Hit) -> Finding:
    """Return a rule's hit as a finding."""
    node = hit.node
    return Finding(
        rule=rule.id,
        severity=rule.severity,
        node=node.label if node else hit.subject,
        op=node.kind if node else "",
        module=node.module if node else "",
        scope=node.scope.label if node else "",
        reason=hit.reason,
        remedy=rule.remedy,
    )
