"""`--ray`: the files of one process, whatever the number of workers; what cannot work is refused at once."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spike_export.artifacts.errors import CalibrationError
from spike_export.calibration.corpus.files import CorpusOptions
from spike_export.calibration.methods.context import Calibration, Transform
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.pipeline.checking.check import check
from spike_export.pipeline.cluster.cluster_options import ClusterOptions
from spike_export.pipeline.cluster.ray_workers import RayWorkers, WorkerTask, require_alike, surroundings
from spike_export.pipeline.evaluation_text import EvaluationText
from spike_export.pipeline.execution import ExecutionOptions
from spike_export.pipeline.job import Job
from spike_export.pipeline.run_job import run_job
from tests.support.tiny.cli_models import Outcome, artifacts, call, corpus_text, write_inputs

KILLED_BEHIND_THE_FIRST_PART = """
import os, signal
from spike_export.calibration.statistics import partial_statistics
from spike_export.cli.main import main

save = partial_statistics.save_spikes

def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

partial_statistics.save_spikes = save_and_die
main()
"""

OPTIONS = ("--samples", "10", "--length", "32", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("ray"))


def calibrated(folder: Path, work_dir: Path, *options: str) -> Outcome:
    corpus = ("--corpus", folder / "corpus.txt")
    return call("calibrate", folder / "model", "--work-dir", work_dir, *corpus, *OPTIONS, *options)


def results(work_dir: Path) -> dict[str, bytes]:
    return {name: content for name, content in artifacts(work_dir).items() if not name.endswith(".lock")}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes of two processors each, as Ray sees them, on this machine; the address of the head."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_worker_niceness", "0")  # 15 would take minutes on a busy machine
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        made.add_node(num_cpus=2)
    yield made.address
    made.shutdown()


def finished(folder: Path, run: Path, cluster: ClusterOptions | None) -> dict[str, bytes]:
    """Run all stages but the plan's; return what they left that has no place in it."""
    options = CalibrationOptions(samples=7, length=256)
    corpus = CorpusOptions(folder / "long.txt")
    run_job(Job(str(folder / "model"), run, calibration=options, corpus=corpus, cluster=cluster))
    files = results(run)
    return {name: files[name] for name in files if not name.startswith(("report", "pictures", "commands", "."))}


@pytest.mark.slow
def test_any_number_of_workers_leaves_the_files_of_one_process(folder: Path, tmp_path: Path, cluster: str) -> None:
    """Statistics, prefix, smoothing, recipe, bundle and check; windows long enough for several forward batches."""
    (folder / "long.txt").write_text("\n".join(corpus_text(seed) for seed in range(8)), encoding="utf-8")
    alone = finished(folder, tmp_path / "alone", None)
    assert {"recipe.json", "prefix.json", "smoothing.json", "check.json", "bundle/model.onnx.data"} < alone.keys()
    for workers in (1, 2, 4):
        spread = finished(folder, tmp_path / str(workers), ClusterOptions(address=cluster, workers=workers))
        assert spread == alone
    text = EvaluationText(corpus=CorpusOptions(folder / "long.txt"), samples=7, length=256)
    pair = (tmp_path / "alone/bundle", folder / "model")
    two = ClusterOptions(address=cluster, workers=2)
    assert check(*pair, text, cluster=two, force=True) == check(*pair, text, force=True)


@pytest.mark.slow
def test_a_full_disk_of_a_worker_names_the_machine(folder: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")

    def on_a_full_disk(_: Calibration) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/activations")

    model = str(folder / "model")
    options = CalibrationOptions(samples=2, length=8)
    task = WorkerTask(model, open_checkpoint(model).tensors.sha256(), options, ExecutionOptions(), 1)
    message = f"Ray worker on {socket.gethostname()}: /scratch/activations: cannot write: the disk is full"
    with (
        RayWorkers(ClusterOptions(address="local", workers=1), task) as workers,
        pytest.raises(CalibrationError, match=message),
    ):
        workers.results(on_a_full_disk, [()])


@pytest.mark.slow
def test_a_killed_worker_is_begun_anew(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    import ray

    assert calibrated(folder, tmp_path / "alone").code == 0
    measured, killed = RayWorkers.measured, []

    def one_is_killed(self: RayWorkers, *arguments: object) -> object:
        for found in measured(self, *arguments):  # type: ignore[arg-type]
            if not killed:
                process = ray.get(self._workers[0].__ray_call__.remote(lambda _: os.getpid()))
                assert os.getpriority(os.PRIO_PROCESS, process) == os.getpriority(os.PRIO_PROCESS, 0)
                os.kill(process, signal.SIGKILL)
                killed.append(process)
            yield found

    monkeypatch.setattr(RayWorkers, "measured", one_is_killed)
    done = calibrated(folder, tmp_path / "ray", "--ray", "local", "--ray-workers", "2")
    assert done.code == 0, done.err
    assert killed
    assert results(tmp_path / "ray") == results(tmp_path / "alone")


@pytest.mark.slow
def test_a_killed_command_goes_on_from_the_parts_that_are_done(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    assert calibrated(folder, tmp_path / "alone").code == 0
    run = tmp_path / "ray"
    words = ("calibrate", folder / "model", "--work-dir", run, "--corpus", folder / "corpus.txt", *OPTIONS)
    command = [sys.executable, "-c", KILLED_BEHIND_THE_FIRST_PART, *words, "--ray", "local", "--ray-workers", "1"]
    killed = subprocess.run([str(word) for word in command], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(run.glob(".spikes.parts/*.json"))) == 1
    done = calibrated(folder, run, "--ray", "local", "--ray-workers", "2")
    assert done.code == 0, done.err
    assert results(run) == results(tmp_path / "alone")


@pytest.mark.slow
def test_a_worker_without_the_model_names_its_machine(folder: Path, tmp_path: Path) -> None:
    """As where the storage is not shared, or holds other weights."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    where = socket.gethostname()
    for model, sha256, message in (
        (str(tmp_path / "none"), "", f"Ray worker on {where}: "),
        (str(folder / "model"), "0" * 64, f"Ray worker on {where}: .* has other weights here"),
    ):
        task = WorkerTask(model, sha256, CalibrationOptions(samples=2, length=8), ExecutionOptions(), 1)
        windows, rows = np.zeros((2, 7), np.int64), [np.arange(2)]
        with (
            RayWorkers(ClusterOptions(address="local", workers=1), task) as workers,
            pytest.raises(CalibrationError, match=message),
        ):
            list(workers.measured(windows, (), Transform(), rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "nowhere"), "--ray nowhere: expected auto, local, or HOST:PORT of a cluster's head"),
        (("--ray", "local", "--ray-workers", "0"), "--ray-workers is 0; expected 1 or more"),
        (("--ray", "local", "--ray-cpus", "0"), "--ray-cpus is 0; expected 1 or more"),
        (("--ray", "local", "--ray-gpus", "-1"), "--ray-gpus is -1; expected 0 or more"),
        (("--ray-workers", "2"), "--ray-workers is of a Ray cluster; give --ray too"),
        (("--ray", "local", "--shard", "1/2"), "--shard and --ray divide the same windows; give one"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in calibrated(folder, tmp_path / "run", *options).error


def test_the_main_job_takes_the_same_options(folder: Path, tmp_path: Path) -> None:
    words = (folder / "model", "--out", tmp_path / "engine.plan", "--corpus", folder / "corpus.txt", *OPTIONS)
    assert "--ray nowhere: expected auto, local, or HOST:PORT" in call(*words, "--ray", "nowhere").error


def test_a_check_takes_a_cluster_for_its_windows_only(folder: Path, tmp_path: Path) -> None:
    asked = ("check", tmp_path / "bundle", "--ray", "nowhere")
    assert "--ray nowhere: expected auto, local, or HOST:PORT" in call(*asked, "--reference", folder / "model").error
    assert "check --lint runs in one process; omit --ray" in call(*asked[:-1], "local", "--lint").error


def test_an_address_without_a_cluster_is_refused_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would wait for minutes."""
    monkeypatch.setattr("spike_export.pipeline.cluster.ray_workers.find_spec", lambda _: object())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    refused = calibrated(folder, tmp_path / "run", "--ray", address).error
    assert f"--ray {address}: there is no cluster (Connection refused)" in refused


@pytest.mark.parametrize("name", ["spike-export", "torch", "Python", "processor kernels"])
def test_a_worker_of_another_kind_is_refused(name: str) -> None:
    here = surroundings("cpu")
    require_alike("node7", here, dict(here))
    with pytest.raises(
        CalibrationError, match=f"Ray worker on node7: {name} other, here {re.escape(here[name])}: .*last bits"
    ):
        require_alike("node7", here, here | {name: "other"})


def test_ray_is_an_extra(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spike_export.pipeline.cluster.ray_workers.find_spec", lambda _: None)
    refused = calibrated(folder, tmp_path / "run", "--ray", "local").error
    assert "install the extra: pip install 'spike-export[ray]'" in refused


@pytest.mark.parametrize(
    ("options", "resources", "count"),
    [
        ({}, (8, 0), 8),
        ({"cpus": 4}, (9, 0), 2),
        ({"gpus": 1, "cpus": 2}, (64, 4), 4),
        ({"workers": 3}, (8, 0), 3),
    ],
)
def test_workers_fill_the_cluster(options: dict[str, int], resources: tuple[float, float], count: int) -> None:
    assert ClusterOptions(**options).count(*resources) == count  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "resources"), [({"workers": 9}, (8, 0)), ({"gpus": 1}, (8, 0)), ({"cpus": 16}, (8, 0))]
)
def test_a_cluster_without_room_is_refused(options: dict[str, int], resources: tuple[float, float]) -> None:
    with pytest.raises(CalibrationError, match="change --ray-workers, --ray-cpus or --ray-gpus"):
        ClusterOptions(**options).count(*resources)  # type: ignore[arg-type]
