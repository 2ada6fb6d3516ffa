"""Memory of one bundle opened twice for generation in one process.

ONNX Runtime packs weights for the processor when it opens a session, into memory of the session's own. Compared are
one session; the bundle opened twice, which is one session; and two sessions, as they come, with packing switched off,
with weights given to both from one mapped file, and with packed weights read from a file that a first session wrote.
Memory is what belongs to the process alone;
weights that it only reads from a file are shared with other sessions and processes.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peak_memory import in_own_process

PROMPT = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="folder that export wrote")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spike-export-sessions-") as folder:
        print(f"{'sessions':36} | {'private MB':>10} | {'from files MB':>13}")
        for name, use in WAYS.items():
            before = in_own_process(_memory_of, None, arguments.bundle, arguments.threads, Path(folder))
            after = in_own_process(_memory_of, use, arguments.bundle, arguments.threads, Path(folder))
            private, mapped = ((new - old) / 1e6 for old, new in zip(before, after, strict=True))
            print(f"{name:36} | {private:10.0f} | {mapped:13.0f}", flush=True)
    return 0


def _memory_of(
    use: Callable[[Path, int, Path], list[Any]] | None, bundle: Path, threads: int, folder: Path
) -> tuple[int, int]:
    """Return the process's private and file-backed resident bytes after each session has read a prompt."""
    import numpy as np

    from spike_export.artifacts.manifest import load_manifest
    from spike_export.engines.onnx_runtime.session import BundleSession

    sessions = [] if use is None else use(bundle, threads, folder)
    manifest = load_manifest(bundle)
    for session in sessions:
        BundleSession(manifest, session).begin(1).step(np.zeros((1, PROMPT), np.int64))
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    private, mapped = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return private, mapped


def _one(bundle: Path, threads: int, _: Path) -> list[Any]:
    from spike_export.engines.onnx_runtime.session import open_for_generation

    return [open_for_generation(bundle, threads).session]


def _opened_twice(bundle: Path, threads: int, folder: Path) -> list[Any]:
    return _one(bundle, threads, folder) + _one(bundle, threads, folder)


def _two(bundle: Path, threads: int, _: Path) -> list[Any]:
    return [_session(bundle, threads) for _ in range(2)]


def _two_unpacked(bundle: Path, threads: int, _: Path) -> list[Any]:
    return [_session(bundle, threads, {"session.disable_prepacking": "1"}) for _ in range(2)]


def _two_given_weights(bundle: Path, threads: int, _: Path) -> list[Any]:
    import numpy as np
    import onnx
    import onnxruntime as ort
    from onnx.external_data_helper import ExternalDataInfo

    from spike_export.artifacts.manifest import DATA_FILE, load_manifest
    from spike_export.engines.onnx_runtime.generation_graph import generation_graph

    data, given = np.memmap(bundle / DATA_FILE, np.uint8, "r"), {}
    graph = generation_graph(bundle, load_manifest(bundle), lowering=False)
    for tensor in onnx.load_from_string(graph.serialized).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = ExternalDataInfo(tensor)
            start = place.offset or 0
            raw = data[start : start + (place.length or 0)]
            values = raw.view(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))
            given[tensor.name] = ort.OrtValue.ortvalue_from_numpy(values)
    return [_session(bundle, threads, given=given) for _ in range(2)]


def _two_from_packed_file(bundle: Path, threads: int, folder: Path) -> list[Any]:
    import onnxruntime as ort

    from spike_export.engines.onnx_runtime.session import session_options

    path = folder / "packed.onnx"
    if not path.is_file():
        in_own_process(_write_packed, bundle, threads, path)
    return [ort.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"]) for _ in range(2)]


def _write_packed(bundle: Path, threads: int, path: Path) -> None:
    entries = {
        "session.optimized_model_external_initializers_file_name": f"{path.name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": "1",
    }
    _session(bundle, threads, entries, path)


def _session(
    bundle: Path,
    threads: int,
    entries: dict[str, str] | None = None,
    saved: Path | None = None,
    given: dict[str, Any] | None = None,
) -> Any:
    import onnxruntime as ort

    from spike_export.artifacts.manifest import load_manifest
    from spike_export.engines.onnx_runtime.generation_graph import generation_graph
    from spike_export.engines.onnx_runtime.session import session_options

    options = session_options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    if given:
        options.add_external_initializers(list(given), list(given.values()))
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    graph = generation_graph(bundle, load_manifest(bundle), lowering=False)
    return ort.InferenceSession(graph.serialized, options, providers=["CPUExecutionProvider"])


WAYS: dict[str, Callable[[Path, int, Path], list[Any]]] = {
    "one": _one,
    "opened twice": _opened_twice,
    "two": _two,
    "two, weights not packed": _two_unpacked,
    "two, weights given to both": _two_given_weights,
    "two, packed weights from a file": _two_from_packed_file,
}


if __name__ == "__main__":
    sys.exit(main())
