"""How much memory this machine has left, and steps that would need more, refused before they start."""

from pathlib import Path

from spike_export.artifacts.errors import SpikeExportError

_GIB = 1 << 30


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes that can be used without swapping; None where the system does not say."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def require_available(needed: int, what: str, remedy: str, error: type[SpikeExportError]) -> None:
    """Refuse a step that would need more memory than the machine has left; nothing is refused where that is unknown.

    Args:
        needed: Estimated bytes.
        what: What needs them, as the beginning of a sentence.
        remedy: What to do instead.
        error: What to raise.

    Raises:
        SpikeExportError: Of that type; names both figures.
    """
    available = available_memory()
    if available is not None and needed > available:
        raise error(
            f"{what} needs about {needed / _GIB:.1f} GiB of memory, {available / _GIB:.1f} GiB are available; {remedy}"
        )
