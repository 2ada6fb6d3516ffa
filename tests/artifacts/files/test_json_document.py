"""A document that cannot be read is one line: its place, the first fault, and the remedy."""

from pathlib import Path

import pytest

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.results.command_log import CommandLog, load_commands

SOUND = '{"commands": [{"words": ["spike-export"], "versions": {}}]}'


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot be read ([Errno 2] No such file or directory"),
        (b"\xff", "cannot be read ('utf-8' codec"),
        (b"{", "the document: Invalid JSON"),
        (b"[" * 100_000, "the document: Invalid JSON"),
        (b"[]", "the document: Input should be an object"),
        (SOUND.replace('"spike-export"', "1").encode(), "commands.0.words.0: Input should be a valid string"),
    ],
)
def test_the_first_fault_is_named(tmp_path: Path, content: bytes | None, fault: str) -> None:
    path = tmp_path / "commands.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError) as raised:
        load_commands(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: {fault}")
    assert message.endswith("; delete the file")


def test_a_sound_document_is_read(tmp_path: Path) -> None:
    (tmp_path / "commands.json").write_text(SOUND)
    assert load_commands(tmp_path / "commands.json") == CommandLog.model_validate_json(SOUND)
