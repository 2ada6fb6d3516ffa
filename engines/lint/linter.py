"""Lints an ONNX file against what TensorRT, TensorRT-RTX and ONNX Runtime accept and fuse; none of them is needed."""

from pathlib import Path

from spike_export.artifacts.errors import ArtifactError, one_line
from spike_export.artifacts.files.sole_writer import finish_dead_replacement
from spike_export.artifacts.manifest import GRAPH_FILE
from spike_export.engines.lint.attention import ATTENTION_RULES
from spike_export.engines.lint.cache import CACHE_RULES
from spike_export.engines.lint.files import FILE_RULES
from spike_export.engines.lint.finding import SEVERITIES, Finding, LintReport, Rule, finding_of
from spike_export.engines.lint.operators import OPERATOR_RULES
from spike_export.engines.lint.products import PRODUCT_RULES
from spike_export.engines.lint.quantization import QUANTIZER_RULES
from spike_export.engines.lint.reading import read_model
from spike_export.engines.lint.view import GraphModel, view_of

RULES: tuple[Rule, ...] = (
    *QUANTIZER_RULES,
    *PRODUCT_RULES,
    *ATTENTION_RULES,
    *CACHE_RULES,
    *OPERATOR_RULES,
    *FILE_RULES,
)

LINT_KEYS = ("format", "counts", "findings")
"""Which every result of the linter has."""

_OF_AN_INVALID_MODEL = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
"""What an attribute of the wrong type or a tensor of impossible sizes raises; no rule is to check for all of them."""


def lint_model(path: Path | str) -> LintReport:
    """Apply every rule to a model.

    Args:
        path: An .onnx file, with or without its external data, or a bundle's folder.

    Raises:
        ArtifactError: There is no readable ONNX model.
    """
    path = Path(path)
    finish_dead_replacement(path)
    file = path / GRAPH_FILE if path.is_dir() else path
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file; give an .onnx file or the folder of a bundle")
    model = view_of(read_model(file))
    findings = [finding for rule in RULES for finding in _findings(rule, model)]
    # Stable: within one severity the rules' order, and within one rule the graph's.
    return LintReport(str(file), tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))))


def _findings(rule: Rule, model: GraphModel) -> list[Finding]:
    try:
        return [finding_of(rule, hit) for hit in rule.find(model)]
    except _OF_AN_INVALID_MODEL as error:
        raise ArtifactError(
            f"{model.file.path}: rule {rule.id} met what no valid ONNX model holds ({one_line(error)}); see "
            "onnx.checker, and export the model again"
        ) from error
