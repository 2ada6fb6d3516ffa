"""Plans of tests: built and audited by what the product builds and audits with, without what decides whether to."""

from collections.abc import Mapping
from pathlib import Path

from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.audit.program_products import read_program_text
from spike_export.engines.audit.verdict import PlanAudit, judge
from spike_export.engines.build.builder import (
    BuildEnvironment,
    BuildResult,
    build_engine,
    detect_environment,
    plan_build,
)
from spike_export.engines.plan.build_options import BuildOptions


def build_plan(
    bundle: Path,
    plan: Path,
    options: BuildOptions,
    progress: Progress = silent,
    environment: BuildEnvironment | None = None,
) -> BuildResult:
    """Build a plan in one file; one that is there is replaced."""
    environment = environment or detect_environment()
    (result,) = build_engine(plan_build(bundle, plan, options, environment), None, progress, environment)
    return result


def audit_plan(plan: Path, planned: Mapping[str, str]) -> PlanAudit:
    """Compare a plan of TensorRT-RTX with what was asked for: HF module name -> precision."""
    return judge(read_program_text(plan), planned)
