"""Which files a dataset's split consists of: in a folder like a hub repository, or on the hub itself.

The package `datasets` knows the rules (splits in file names, configurations in the README); it only lists the files
here. Reading them ourselves leaves no second copy in its cache, takes one column alone, and reads nothing that could
hold a pickle.
"""

import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from spike_export.artifacts.errors import CorpusError, one_line
from spike_export.calibration.corpus.records import DataFile, optional_package

_HUB_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?")
_HUB_FILE = re.compile(r"hf://datasets/(?P<repository>[^@]+)@(?P<revision>[^/]+)/(?P<file>.+)")

_PATIENCE = 5.0
"""Seconds within which the hub must answer."""

_REFUSALS = (401, 403, 404)
"""HTTP statuses that are an answer; any other error means that there is none now."""


def looks_like_hub_dataset(source: str) -> bool:
    """Return whether `source` has the form `organization/name` or `organization/name:config`."""
    return _HUB_NAME.fullmatch(source) is not None


def datasets_package(label: str) -> Any:
    """Import `datasets`, silenced: what it reports besides its errors is about formats and caches not used here.

    Raises:
        CorpusError: It is not installed.
    """
    datasets = optional_package("datasets", label)
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    return datasets


def folder_files(folder: Path, config: str | None, split: str, label: str) -> list[DataFile]:
    """List the data files of a split, in a folder laid out as dataset repositories are.

    Raises:
        CorpusError: There are no data files, or no such configuration or split; or `datasets` is not installed.
    """
    whole = folder.resolve()
    files = _split_files(str(whole), config, split, label)
    for file in files:
        # By its name: in the hub's cache files are links into a neighbouring folder.
        if not Path(os.path.normpath(file)).is_relative_to(whole):
            raise CorpusError(f"{label}: its README names {file}, outside of the folder; correct data_files there")
    return [DataFile(Path(file), file) for file in files]


@dataclass(frozen=True)
class HubFiles:
    """The data files of a hub dataset's split, on the disk.

    Attributes:
        files: In the split's order.
        complete: False where the hub could not be asked, so that files of the split may be missing.
    """

    files: Sequence[DataFile]
    complete: bool


def hub_files(source: str, split: str) -> HubFiles:
    """List the data files of a hub dataset's split, downloading those that are not in huggingface_hub's cache.

    Where the hub cannot be reached, what was downloaded before is used.

    Args:
        source: `organization/name`, or `organization/name:config`.
        split: Name of the split.

    Raises:
        CorpusError: The hub cannot be reached and nothing was downloaded before; it has no such dataset, configuration
            or split; a download failed; or `datasets` is not installed.
    """
    from huggingface_hub import hf_hub_download

    parts = _HUB_NAME.fullmatch(source)
    assert parts is not None, "only names that look like a hub dataset's come here"
    repository, config = parts["repository"], parts["config"]
    datasets_package(source)  # before anything is downloaded
    unreachable = _reach(repository, source)
    if unreachable is not None:
        folder = _downloaded_before(repository, source, unreachable)
        return HubFiles(folder_files(folder, config, split, source), complete=False)
    files = []
    for address in _split_files(repository, config, split, source):
        file = _HUB_FILE.fullmatch(address)
        if file is None:
            raise CorpusError(f"{source}: holds {address}, which is not on the hub; download it and give the file")
        try:
            path = hf_hub_download(
                file["repository"], file["file"], repo_type="dataset", revision=unquote(file["revision"])
            )
        except Exception as error:  # network, authentication, disk: each has its own type
            raise CorpusError(
                f"{source}: cannot download {file['file']} ({one_line(error)}); is it gated, or the network down?"
            ) from error
        files.append(DataFile(Path(path), f"{repository}/{file['file']}"))
    return HubFiles(files, complete=True)


def _reach(repository: str, source: str) -> Exception | None:
    """Ask the hub for a dataset once; return why it does not answer, or None.

    Without this, `datasets` would try for half a minute to reach a hub that is not there.

    Raises:
        CorpusError: The hub answers that there is no such dataset, or that this user may not read it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(repository, timeout=_PATIENCE)
    except HFValidationError as error:
        raise CorpusError(f"{source}: no such local path, and not a valid name on the hub; correct the name") from error
    except HfHubHTTPError as error:
        if error.response.status_code in _REFUSALS:
            raise CorpusError(
                f"{source}: no such local path, and no dataset on the hub that you may read ({one_line(error)}); "
                "correct the name, or log in with: hf auth login"
            ) from error
        return error
    except Exception as error:  # whatever a network can lack, each with its own type
        return error
    return None


def _downloaded_before(repository: str, source: str, reason: Exception) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        raise CorpusError(
            f"{source}: no such local path, and the hub cannot be reached ({one_line(reason)}); give a local file, "
            f"or download it first, where there is a network: hf download --repo-type dataset {repository} "
            "--local-dir FOLDER, and give the folder"
        ) from reason


def _split_files(place: str, config: str | None, split: str, label: str) -> Sequence[str]:
    """Return paths or `hf://` addresses of a split's files."""
    datasets = datasets_package(label)
    with tempfile.TemporaryDirectory(prefix="spike-export-") as scratch:
        try:
            builder: Any = datasets.load_dataset_builder(place, config, cache_dir=scratch)
        except Exception as error:  # no data files, no such configuration, a README that is no YAML, ...
            hint = "" if config else f"; where it has configurations, name one: {label}:CONFIG"
            raise CorpusError(f"{label}: cannot be read as a data set ({one_line(error)}){hint}") from error
    splits: Mapping[Any, Sequence[str]] = builder.config.data_files or {}
    for name, files in splits.items():
        if str(name) == split:
            return [str(file) for file in files]
    names = ", ".join(str(name) for name in splits) or "none"
    raise CorpusError(f"{label}: no split {split!r}; choose one with --corpus-split: {names}")
