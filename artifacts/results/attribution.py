"""The content of `attribution.json`: how much of a quantized model's divergence each input causes."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.atomic_write import write_text
from spike_export.artifacts.files.documents import read_document
from spike_export.artifacts.recipe import Recipe, recipe_sha256

ATTRIBUTION_FILE = "attribution.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class InputDivergence(_Part):
    """KL(unquantized || model) of two models, in nats per token.

    Attributes:
        alone: Of the model in which only the linears that read this input are quantized.
        without: Of the model in which all linears but those are quantized.
    """

    alone: float
    without: float


class Attribution(_Part):
    """How much of a recipe's divergence each input causes.

    Attributes:
        recipe_sha256: Hash of the recipe's text, so that figures of another one are not shown.
        windows: Windows it was measured on.
        divergence: KL(unquantized || quantized) of the model whose linears are quantized as the recipe says, in nats
            per token.
        inputs: Representative module → what its input causes.
    """

    recipe_sha256: str
    windows: int
    divergence: float
    inputs: Mapping[str, InputDivergence] = Field(default_factory=dict)

    def saved_without(self, name: str) -> float:
        """Return how much smaller the divergence is without the quantization at one input; may be negative."""
        return self.divergence - self.inputs[name].without


def save_attribution(attribution: Attribution, path: Path) -> None:
    """Write `attribution.json`."""
    write_text(path, attribution.model_dump_json(indent=1) + "\n")


def load_attribution(path: Path) -> Attribution:
    """Read what `save_attribution` wrote.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    try:
        return Attribution.model_validate_json(read_document(path))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot read what each input causes; run again with --force") from error


def attribution_of(recipe: Recipe, run: Path) -> Attribution | None:
    """Read what was measured of a run's recipe; None where nothing was, or of a recipe that was edited since.

    Raises:
        ArtifactError: The file is damaged.
    """
    path = run / ATTRIBUTION_FILE
    if not path.exists():
        return None
    found = load_attribution(path)
    return found if found.recipe_sha256 == recipe_sha256(recipe) else None
