"""The documents of a run's choices: what is written is read, and what is not of the model is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.recipe import PrefixCandidate, RotationPlan, SmoothingPlan, TransformCandidate
from spike_export.calibration.methods.context import Transform
from spike_export.calibration.methods.prefix_choice import PrefixChoice
from spike_export.calibration.methods.transform_choice import TransformChoice
from spike_export.pipeline.choices import load_prefixes, load_transforms, save_prefixes, save_transforms
from tests.support.tiny.models import tiny_llama

CONFIG = tiny_llama().checkpoint.config
SITE = "model.layers.0.mlp.up_proj"
OUTPUT = "model.layers.0.self_attn.o_proj"
CANDIDATE = PrefixCandidate(token_ids=(1,), text="a", worst_module="m", ratio=3.5, verdict="chosen")
PREFIXES = PrefixChoice((1, 98), (CANDIDATE,), 40)
ZEROS = SmoothingPlan(form="smoothquant", parameter=0.5, exponents="A" * 64)  # 48 channels, each scaled by 1
TRANSFORMS = TransformChoice(
    Transform(
        RotationPlan(kind="orthogonal", seed=0),
        {SITE: ZEROS},
        {SITE: 0.9},
        {SITE: 0.25},
        {SITE: 0.1},
        value_rotation={OUTPUT: 16},
        input_hadamard={SITE: 16},
    ),
    (TransformCandidate(name="smoothing", perplexity=12.5, divergence=0.25, verdict="chosen"),),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    save_prefixes(PREFIXES, tmp_path / "prefix.json")
    assert load_prefixes(tmp_path / "prefix.json", CONFIG) == PREFIXES
    save_transforms(TRANSFORMS, tmp_path / "smoothing.json")
    assert load_transforms(tmp_path / "smoothing.json", CONFIG) == TRANSFORMS


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [99]},  # beyond the vocabulary
        {"token_ids": [-1]},
        {"candidates": [CANDIDATE.model_dump() | {"token_ids": [99]}]},
        {"candidates": [CANDIDATE.model_dump() | {"ratio": 1e999}]},
        {"candidates": 1},
    ],
)
def test_prefixes_that_no_model_can_be_fed_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "prefix.json"
    save_prefixes(PREFIXES, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ArtifactError, match=r"prefix\.json: cannot read the choice; run again with --force"):
        load_prefixes(path, CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"smoothing": {"model.layers.7.mlp.up_proj": ZEROS.model_dump()}},
        {"smoothing": {SITE: ZEROS.model_dump() | {"exponents": "AAAA"}}},
        {"rotation": {"kind": "orthogonal", "seed": -1}},
        {"value_rotation": {SITE: 8}},
        {"input_hadamard": {OUTPUT: 8}},
        {"input_hadamard": {SITE: 32}},
        {"input_hadamard": {"model.layers.7.mlp.up_proj": 16}},
        {"value_rotation": {OUTPUT: 32}},
        {"value_rotation": {"model.layers.7.self_attn.o_proj": 8}},
        {"clips": {SITE: -1.5}},
        {"clips": {SITE: 0.0}},
        {"noise": {"x": 0.5}, "token_noise": {"x": 0.5}},
        {"token_noise": {}},
        {"noise": {SITE: float("nan")}},
    ],
)
def test_transforms_of_no_such_model_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "smoothing.json"
    save_transforms(TRANSFORMS, path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"transform": document["transform"] | changes}))
    with pytest.raises(ArtifactError, match=r"smoothing\.json: cannot read the choice; run again with --force"):
        load_transforms(path, CONFIG)
