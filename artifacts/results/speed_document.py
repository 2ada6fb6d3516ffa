"""What `bench --json` measured of a server, kept as `speed.json` in a work directory for the report."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from spike_export.artifacts.files.json_document import load_document

SPEED_FILE = "speed.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Percentiles(_Part):
    """Of a time over the answered requests, in seconds; None where no request was answered."""

    p50: float | None
    p90: float | None
    p99: float | None


class Speed(_Part):
    """One load.

    Attributes:
        concurrency: Clients at once.
        requests: Of all clients.
        tokens_per_second: Of all answers together.
        time_to_first_token: From the request to the first token.
        time_per_token: Between two tokens of an answer.
    """

    concurrency: int
    requests: int
    tokens_per_second: float
    time_to_first_token: Percentiles
    time_per_token: Percentiles


def load_speeds(path: Path) -> tuple[Speed, ...]:
    """Read what `bench --json` printed.

    Raises:
        ArtifactError: The file cannot be read, or holds something else.
    """
    return load_document(path, tuple[Speed, ...], "write it anew with bench --json")
