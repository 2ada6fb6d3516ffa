"""What a configuration file may name: tables of commands, and options of the main job in front of them."""

from pathlib import Path

import pytest

from spike_export.artifacts.errors import ArtifactError
from spike_export.cli.config_file import require_config
from spike_export.cli.main import app
from tests.support.tiny.cli_models import call


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[calibrat]\nsamples = 4", r"no command is named \[calibrat\]; give one of calibrate, "),
        ("sample = 4\n[calibrate]", "the main job has no option 'sample'"),
        ('corpus = "a\\u0000b"', r"'a\\x00b' holds a NUL character"),
        ('[calibrate]\ndevice = ["a\\u0000b"]', "NUL character"),
        ("a = ", "not a TOML file"),
    ],
)
def test_a_name_that_nothing_has_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(ArtifactError, match=rf"job\.toml: .*{reason}"):
        require_config(tmp_path / "job.toml", app)


def test_tables_of_other_commands_and_options_of_the_job_are_known(tmp_path: Path) -> None:
    text = (
        "samples = 4\nmax_ppl_increase = 0.1\nmax-fp16-share = 0.1\nqfem = false\n[calibrate]\nlength = 64\n[build]\n"
    )
    (tmp_path / "job.toml").write_text(text)
    require_config(tmp_path / "job.toml", app)


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("[calibrat]\nsamples = 4")
    line = call("calibrate", "m", "--work-dir", tmp_path / "w", "--config", tmp_path / "job.toml").error
    assert "no command is named [calibrat]" in line
    assert "NUL character" in call("calibrate", "a\0b", "--work-dir", tmp_path / "w").error
