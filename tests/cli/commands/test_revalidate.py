"""`revalidate RUN MODEL`: the verdict as table and as JSON, and bad input."""

import json
from pathlib import Path

import pytest

from spike_export.artifacts.recipe import save_recipe
from spike_export.checkpoint.modules import linears
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.cli_models import SMALL, call, write_inputs
from tests.support.tiny.models import tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_table_json_and_refusals(tmp_path: Path) -> None:
    model = write_inputs(tmp_path) / "model"
    checkpoint = open_checkpoint(str(model))
    (tmp_path / "run").mkdir()
    save_recipe(
        tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 1e-3)), tmp_path / "run" / "recipe.json"
    )
    whole = ("revalidate", tmp_path / "run", model, "--corpus", tmp_path / "corpus.txt", *SMALL)
    done = call(*whole)
    assert (done.code, done.err) == (1, "")
    assert "calibrate this model anew" in done.out
    assert "saturates: the input reaches " in done.out
    document = json.loads(call(*whole, "--json").out)
    assert (document["format"], document["passed"], document["windows"]) == (1, False, 4)
    assert sorted(document) == ["compared", "drifted", "format", "increase", "increases", "passed", "tokens", "windows"]
    assert "has no recipe.json" in call("revalidate", tmp_path, model).error
    assert "no such file or directory" in call("revalidate", tmp_path / "run", tmp_path / "none").error
