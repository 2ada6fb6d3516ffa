"""One monotonic percentage out of the builder's nested, repeating phases."""

from dataclasses import dataclass, field

_LONG_PHASE = "Computing profile costs"
"""Nearly all of a build's time passes in this phase; the phases around it share the first and last 5 %."""
_MARGIN = 0.05


@dataclass
class _Phase:
    """A phase that has begun: `steps` in all, `done` of them, `children` finished within the current step."""

    parent: str | None
    steps: int
    done: int = 0
    children: int = 0
    child: str | None = None


@dataclass
class BuildProgress:
    """Follows TensorRT's phases.

    Phases nest: a child advances within its parent's current step. Several children may follow each other within
    one step, their number unknown; each takes half of what is left of it, so that progress never goes back.
    """

    _phases: dict[str, _Phase] = field(default_factory=dict)
    _root: str | None = None
    _fraction: float = 0.0
    _long_phase_over: bool = False

    @property
    def percent(self) -> int:
        """Return 0 to 100; never less than before."""
        return int(100 * self._fraction)

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` steps begins."""
        self._phases[name] = _Phase(parent, max(steps, 1))
        if parent is None:
            self._root = name
        elif parent in self._phases:
            self._phases[parent].child = name
        self._update()

    def step(self, name: str, index: int) -> None:
        """Step `index`, counted from 0, of a phase is complete."""
        phase = self._phases.get(name)
        if phase is None:
            return
        phase.done, phase.children, phase.child = min(index + 1, phase.steps), 0, None
        self._update()

    def finish(self, name: str) -> None:
        """A phase is over, whether all its steps were taken or not."""
        phase = self._phases.pop(name, None)
        parent = self._phases.get(phase.parent) if phase and phase.parent else None
        if parent is not None and parent.child == name:
            parent.child, parent.children = None, parent.children + 1
        if name == _LONG_PHASE:
            self._long_phase_over = True
        self._update(over=name == self._root)

    def _update(self, over: bool = False) -> None:
        if over:
            current = 1.0
        elif self._long_phase_over:
            current = 1.0 - _MARGIN
        elif _LONG_PHASE in self._phases:
            current = _MARGIN + (1.0 - 2 * _MARGIN) * self._share(_LONG_PHASE)
        else:
            current = _MARGIN * self._share(self._root)
        self._fraction = max(self._fraction, min(current, 1.0))

    def _share(self, name: str | None) -> float:
        """Return how much of a phase is done, 0 to 1."""
        phase = self._phases.get(name) if name else None
        if phase is None:
            return 0.0
        left = 0.5**phase.children
        within = 1.0 - left + 0.5 * left * self._share(phase.child)
        return min((phase.done + within) / phase.steps, 1.0) if phase.done < phase.steps else 1.0
