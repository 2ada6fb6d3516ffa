"""Datasets of the hub, read in processes of their own from a hub on this machine, and without any."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.support.tiny.hub import tiny_hub

_READ = """
import json, sys
from spike_export.calibration.corpus.files import CorpusOptions, load_corpora
from spike_export.artifacts.errors import CorpusError
found = []
for name, split in json.loads(sys.argv[1]):
    try:
        (corpus,) = load_corpora(CorpusOptions(name, split=split))
        found.append([corpus.name, *corpus.documents])
    except CorpusError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def read(cache: Path, hub: str, *corpora: tuple[str, str | None], **environment: str) -> list[list[str] | str]:
    """Read corpora in a process of its own: huggingface_hub takes its settings when it is imported."""
    settings = os.environ | {"HF_HOME": str(cache), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    command = [sys.executable, "-c", _READ, json.dumps(corpora)]
    done = subprocess.run(command, env=settings, cwd=cache, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[list[str] | str] = json.loads(done.stdout)
    return found


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two configurations; one of parquet files in two shards, one of lines."""
    folder = tmp_path / "repository"
    for config in ("en", "de"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            for shard in (0, 1):
                table = pyarrow.table({"text": [f"{config} {split} {shard}"], "id": [shard]})
                parquet.write_table(table, folder / config / f"{split}-0000{shard}-of-00002.parquet")
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("en", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_a_split_is_downloaded_alone_and_is_there_without_the_hub(repository: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with tiny_hub(repository) as (hub, asked):
        wanted = [("org/name:de", None), ("org/name:en", "test"), ("org/name", None), ("org/name:en", "dev")]
        german, english, missing, split = read(cache, hub, *wanted)
        data = sorted(name for name in asked if name.endswith(".parquet"))
        (nobody,) = read(cache, hub, ("nobody/nothing", None))
    assert german == ["org/name:de (train)", "de train 0", "de train 1"]
    assert english == ["org/name:en (test)", "en test 0", "en test 1"]
    assert data == [
        *(f"de/train-0000{shard}-of-00002.parquet" for shard in (0, 1)),
        *(f"en/test-0000{shard}-of-00002.parquet" for shard in (0, 1)),
    ]
    assert "['en', 'de']" in missing
    assert str(missing).endswith("name one: org/name:CONFIG")
    assert split == "org/name:en: no split 'dev'; choose one with --corpus-split: train, test"
    assert str(nobody).startswith("nobody/nothing: no such local path, and no dataset on the hub that you may read")
    # The hub is gone, or known to be out of reach: what was downloaded is read, and every report says so.
    for offline in ("0", "1"):
        again, other = read(cache, hub, ("org/name:de", None), ("org/other", None), HF_HUB_OFFLINE=offline)
        assert again == ["org/name:de (train, what was downloaded before)", "de train 0", "de train 1"]
        assert str(other).startswith("org/other: no such local path, and the hub cannot be reached (")
        assert "hf download --repo-type dataset org/other --local-dir FOLDER" in str(other)


def test_a_hub_that_is_not_there_is_noticed_at_once(tmp_path: Path) -> None:
    started = time.perf_counter()
    (found,) = read(tmp_path, "http://127.0.0.1:9", ("org/name", None))
    assert str(found).startswith("org/name: no such local path, and the hub cannot be reached (")
    assert time.perf_counter() - started < 15  # of which almost all is starting Python; `datasets` tries for 23
