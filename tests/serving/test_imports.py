"""A process that generates in ONNX Runtime, or serves, has neither torch nor transformers: both import for seconds."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
from pathlib import Path
from spike_export.cli.main import run
from spike_export.engines.runtime_choice import RuntimeChoice
bundle = sys.argv[1]
loaded = []
sampled = ["--seed", "1", "--top-p", "0.9", "--repetition-penalty", "1.2", "--max-new-tokens", "3", "--threads", "1"]
code = run(["generate", bundle, "--chat", "--prompt", "a", *sampled])
loaded.append(sorted(sys.modules))
from spike_export.serving.server import serve
from spike_export.serving.service import open_service
from spike_export.serving.settings import Settings
service = open_service(RuntimeChoice.of(bundle, threads=1), Settings(model="m", engine_process=False), print)
service.grammars.compile("regex", "a+").allowed()
service.close()
loaded.append(sorted(sys.modules))
print(json.dumps([code, *loaded]), file=sys.stderr)
"""


def test_generating_and_serving_need_no_torch(bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(bundle)], capture_output=True, text=True, check=True, timeout=300
    )
    code, *stages = json.loads(done.stderr)
    assert code == 0
    for modules in stages:
        assert "onnxruntime" in modules
        assert {"torch", "transformers"}.isdisjoint(modules)
