"""`check --lint`: the gate, the table, the JSON file, and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from spike_export.cli.terminal.lint_text import print_lint
from spike_export.engines.lint.linter import lint_model
from tests.support.lint_cases import CASES, SOUND
from tests.support.lint_graphs import save
from tests.support.terminal_words import too_wide
from tests.support.tiny.bundles import TinyModel, write_bundle
from tests.support.tiny.cli_models import call


def spike_export(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from spike_export.cli.main import main; main()", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "400"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)


def test_a_graph_with_an_error_misses_the_gate(tmp_path: Path) -> None:
    save(SOUND.but(axis=0, quantizer={}).model(), tmp_path, "bad.onnx")
    done = spike_export("check", "bad.onnx", "--lint", "--out", "found.json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    first, last = done.stdout.splitlines()
    assert first.startswith("error: weight-scale-per-input: y.MatMul (MatMul): ")
    assert last == "bad.onnx: 1 error, 0 warnings, 0 notes"
    document = json.loads((tmp_path / "found.json").read_text())
    assert (document["format"], document["model"]) == (1, "bad.onnx")
    assert document["counts"] == {"error": 1, "warning": 0, "note": 0}
    (finding,) = document["findings"]
    assert {key: finding[key] for key in ("rule", "severity", "node", "op", "module", "scope")} == {
        "rule": "weight-scale-per-input",
        "severity": "error",
        "node": "y.MatMul",
        "op": "MatMul",
        "module": "",
        "scope": "",
    }
    assert finding["reason"]
    assert finding["remedy"]


def test_warnings_and_notes_pass(tmp_path: Path) -> None:
    path = save(CASES["shared"].planted, tmp_path)
    done = spike_export("check", path, "--lint", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 products share it (y_a.MatMul, y_b.MatMul, y_c.MatMul)" in done.stdout
    assert call("check", path, "--lint", "--quiet").out == ""


def test_a_bundle_is_linted_as_a_folder(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    assert call("check", bundle, "--lint").out == f"{bundle / 'model.onnx'}: 0 errors, 0 warnings, 0 notes\n"
    module = "model.layers.0.mlp.down_proj"
    wrong = write_bundle(tmp_path / "wrong", TinyModel(wrong_axis=(module,)))
    done = call("check", wrong, "--lint")
    assert done.code == 1
    assert f"error: weight-scale-per-input: {module}.MatMul (MatMul)" in done.out


def test_places_of_one_rule_are_one_row(tmp_path: Path) -> None:
    wrong = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    done = call("check", write_bundle(tmp_path / "b", TinyModel(wrong_axis=wrong)), "--lint")
    assert done.out.count("weight-scale-per-input") == 1
    assert "(and 2 more)" in done.out


def test_a_terminal_gets_lines_in_which_names_are_no_markup(tmp_path: Path) -> None:
    model = SOUND.but(axis=0).model()
    model.graph.node[-1].name = "[red]x[/red]\x1b[2J"
    console = Console(force_terminal=True, width=80, color_system=None)
    with console.capture() as captured:
        print_lint(lint_model(save(model, tmp_path)), console)
    lines = captured.get().splitlines()
    assert "[red]x[/red]\\x1b[2J (MatMul)" in " ".join(lines)
    assert lines[0].startswith("error: weight-scale-per-input: ")
    # A path stays whole, so that it can be copied.
    assert not too_wide([line for line in lines if not line.startswith(str(tmp_path))])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "not a readable ONNX model"),
        (b"# a text\n" * 100, "not a readable ONNX model"),
        (SOUND.model().SerializeToString()[:2000], "truncated"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    done = spike_export("check", "model.onnx", "--lint", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("spike-export: error: model.onnx: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_two_kinds_of_check_are_not_mixed(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    assert "needs --reference MODEL, or one of --lint" in call("check", bundle).error
    assert "--lint needs no model; omit --reference" in call("check", bundle, "--lint", "--reference", "m").error
    assert "give either --lint or --parity" in call("check", bundle, "--lint", "--parity").error


def test_a_json_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    path = save(SOUND.model(), tmp_path)
    assert "cannot write" in call("check", path, "--lint", "--out", path / "found.json").error
