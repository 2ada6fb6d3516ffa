"""The exit code that a check or a plan deserves, and the line that says why."""

from typing import TYPE_CHECKING

from spike_export.cli.exit_codes import DONE, GATE_MISSED
from spike_export.cli.terminal.messages import say

if TYPE_CHECKING:
    from spike_export.engines.build.reuse import ProvidedEngine


def accuracy_verdict(passed: bool) -> int:
    """Return the exit code of a check."""
    if passed:
        return DONE
    say("the accuracy limit was missed; see the check")
    return GATE_MISSED


def plan_verdict(engine: "ProvidedEngine", allow_fallback: bool) -> int:
    """Return the exit code of a build: a module that does not run as planned misses the gate, unless allowed."""
    if engine.complaint is None or allow_fallback:
        return DONE
    say(f"{engine.complaint}; accept the plan with --allow-fallback")
    return GATE_MISSED
