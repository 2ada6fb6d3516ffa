"""The model repository: parsed by Triton's own protobuf, kept apart from what is not ours."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.manifest import MANIFEST_FILE
from spike_export.serving.triton.model_settings import ModelSettings
from spike_export.serving.triton.repository import model_config, write_repository
from spike_export.serving.triton.tensors import INPUTS, OUTPUTS
from tests.support.tiny.cli_models import call
from tests.support.tiny.service import write_served_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_bundle(tmp_path_factory.mktemp("bundle"))


def protobuf_of_configurations() -> ModuleType:
    """Return `model_config_pb2` by itself: the package around it imports gRPC, which configurations do not need."""
    client = pytest.importorskip("tritonclient", reason="needs tritonclient: pip install --no-deps tritonclient")
    path = Path(client.__path__[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("on_gpu", [False, True])
def test_tritons_protobuf_parses_the_configuration(on_gpu: bool) -> None:
    types: Any = protobuf_of_configurations()
    from google.protobuf import text_format

    settings = ModelSettings(rows=3, engine='a "b"\\c.plan')
    config = text_format.Parse(model_config("tiny-1.0", settings, on_gpu=on_gpu), types.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny-1.0", "python", 0)
    assert config.model_transaction_policy.decoupled
    (group,) = config.instance_group
    assert types.ModelInstanceGroup.Kind.Name(group.kind) == ("KIND_GPU" if on_gpu else "KIND_CPU")
    for found, specs in ((config.input, INPUTS), (config.output, OUTPUTS)):
        assert [
            (each.name, types.DataType.Name(each.data_type), list(each.dims), getattr(each, "optional", False))
            for each in found
        ] == [(spec.name, spec.type, [spec.size], spec.optional) for spec in specs]
    parameters = {key: {"string_value": value.string_value} for key, value in config.parameters.items()}
    assert ModelSettings.of(parameters, "tiny") == settings


def test_a_model_has_all_it_needs_and_is_replaced_alone(tmp_path: Path, bundle: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "other").mkdir(parents=True)
    for _ in range(2):
        folder = write_repository(bundle, repository, "tiny", ModelSettings())
    assert folder == repository / "tiny"
    assert (folder / "config.pbtxt").is_file()
    assert (folder / "1/bundle" / MANIFEST_FILE).read_bytes() == (bundle / MANIFEST_FILE).read_bytes()
    assert compile((folder / "1/model.py").read_text(), "model.py", "exec")
    assert (repository / "other").is_dir()
    with pytest.raises(ArtifactError, match="is not a model that spike-export wrote"):
        write_repository(bundle, repository, "other", ModelSettings())


def test_a_plan_has_its_bundle_beside_it_and_a_gpu(tmp_path: Path, bundle: Path) -> None:
    for name in ("engine.plan", "engine.json"):
        (tmp_path / name).write_bytes(name.encode())
    folder = write_repository(tmp_path / "engine.plan", tmp_path / "models", "tiny", ModelSettings(), bundle=bundle)
    assert (folder / "1/engine.plan").read_bytes() == b"engine.plan"
    assert (folder / "1/engine.json").read_bytes() == b"engine.json"
    assert (folder / "1/bundle" / MANIFEST_FILE).is_file()
    config = (folder / "config.pbtxt").read_text()
    assert "kind: KIND_GPU" in config
    assert 'key: "ENGINE" value { string_value: "engine.plan" }' in config


def test_the_command_says_where_the_model_is(tmp_path: Path, bundle: Path) -> None:
    outcome = call("triton", bundle, "--out", tmp_path, "--model-name", "tiny", "--rows", "3", "--threads", "1")
    assert outcome.code == 0, outcome.err
    assert str(tmp_path / "tiny") in outcome.err
    config = (tmp_path / "tiny/config.pbtxt").read_text()
    assert 'key: "ROWS" value { string_value: "3" }' in config
    assert 'key: "THREADS" value { string_value: "1" }' in config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-name", "a/b"), "a model's name has letters"),
        (("--rows", "0"), "rows is 0"),
        (("--bundle", "elsewhere"), "bundle was given"),
    ],
)
def test_what_no_model_can_have_is_refused(
    tmp_path: Path, bundle: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message in call("triton", bundle, "--out", tmp_path / "repository", *arguments).error
    assert not (tmp_path / "repository").exists()


def test_no_bundle_is_refused(tmp_path: Path) -> None:
    assert call("triton", tmp_path / "none", "--out", tmp_path / "repository").error


def test_an_edited_figure_that_is_none_is_refused() -> None:
    with pytest.raises(EngineError, match=r"tiny: parameter ROWS of config.pbtxt is 'many'; expected a whole number"):
        ModelSettings.of({"ROWS": {"string_value": "many"}}, "tiny")
