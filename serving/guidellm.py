"""Load by guidellm, a program of its own environment: the same requests as `load` sends, and figures in its terms.

guidellm is asked through its files alone: a configuration with the requests goes in, a report comes out.
"""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spike_export.artifacts.errors import EngineError
from spike_export.serving.load import Load, Report, Request

PROGRAM = "guidellm"

_REMEDY = "install guidellm 0.8 in an environment of its own, such as `pipx install 'guidellm>=0.8,<0.9'`"


def run_guidellm(url: str, load: Load, *, model: str | None = None, api_key: str | None = None) -> Report:
    """Let guidellm ask a server and return what came of it; see `run_load`.

    Raises:
        EngineError: guidellm is missing, or fails.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise EngineError(f"there is no program {PROGRAM}; {_REMEDY}")
    with TemporaryDirectory() as place:  # a folder of this user alone: the configuration holds the key
        folder = Path(place)
        _write_requests(load, folder / "requests.jsonl")
        config = _config(url.rstrip("/").removesuffix("/v1"), load, model, api_key, folder)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        command = [program, "run", "--config", str(folder / "config.json"), "--disable-console"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            return report_of(load, json.loads((folder / "report.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError) as error:
            said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
            raise EngineError(f"{PROGRAM} has not measured {url}: {said[-1].strip()[:200]}; {_REMEDY}") from error


def _write_requests(load: Load, path: Path) -> None:
    lines = [{"prompt": prompt, "output_tokens_count": new_tokens} for prompt, new_tokens in load.calls()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _config(url: str, load: Load, model: str | None, api_key: str | None, folder: Path) -> dict[str, Any]:
    route = "/v1/chat/completions" if load.chat else "/v1/completions"
    backend = {"kind": "openai_http", "target": url, "request_format": route, "model": model, "api_key": api_key}
    return {
        "spec": {
            "backend": {name: value for name, value in backend.items() if value is not None},
            "profile": {"kind": "concurrent", "streams": [load.concurrency]},
            "constraints": [{"kind": "max_requests", "count": load.requests}],
            "data": [{"kind": "json_file", "path": str(folder / "requests.jsonl")}],
            "outputs": [{"kind": "json", "path": str(folder / "report.json")}],
        }
    }


def report_of(load: Load, document: Mapping[str, Any]) -> Report:
    """Return guidellm's report as this project's.

    Raises:
        LookupError: It has another form.
        TypeError: As before.
    """
    (benchmark,) = document["benchmarks"]
    answered = [
        Request(
            first=found["time_to_first_token_ms"] / 1e3,
            whole=found["request_latency"],
            prompt_tokens=found["prompt_tokens"],
            tokens=found["output_tokens"],
        )
        for found in benchmark["requests"]["successful"]
    ]
    failed = [Request(error=str(found["info"]["error"])) for found in benchmark["requests"]["errored"]]
    return Report(load, benchmark["end_time"] - benchmark["start_time"], [*answered, *failed])
