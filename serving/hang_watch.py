"""Tells a process that hangs from one that works for long: the latter uses the processor."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LOOKS = 10
"""Looks within the time after which a process hangs.

Looks are counted, and not seconds: none takes place while a machine sleeps, or server and engine are paused together.
"""


@dataclass(frozen=True)
class HangWatch:
    """What to expect of a process that owes an answer; times in seconds.

    Attributes:
        idle: How long it may use no processor time.
        longest: How long it may work.
        cpu_ticks: Returns the processor time that it has used; None where this system does not tell.
    """

    idle: float
    longest: float
    cpu_ticks: Callable[[], int | None]

    def hang(self, arrived: Callable[[float], bool]) -> str | None:
        """Wait for an answer; return what the process has not done where it hangs, None where the answer is there.

        Args:
            arrived: Waits so many seconds, and returns whether the answer is there.
        """
        pause, looks, idle_looks = self.idle / _LOOKS, 0, 0
        used = self.cpu_ticks()
        while not arrived(pause):
            before, used = used, self.cpu_ticks()
            looks += 1
            idle_looks = idle_looks + 1 if used is not None and used == before else 0
            if idle_looks == _LOOKS:
                return f"has not answered and has used no processor time for {self.idle:g} seconds"
            if looks * pause >= self.longest:
                return f"has not answered for {self.longest:g} seconds"
        return None


def cpu_ticks(pid: int) -> int | None:
    """Return the processor time of all threads of a process, in ticks of the kernel's clock; None where unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    user, system = text.rpartition(")")[2].split()[11:13]  # proc(5): fields 14 and 15; the name may hold spaces
    return int(user) + int(system)
