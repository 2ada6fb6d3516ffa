"""The JSON beside stored statistics: what they are of, and what stands out in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.documents import read_document
from spike_export.artifacts.files.json_document import first_fault

Count = Annotated[int, Field(ge=0, le=1 << 31)]


class _Part(BaseModel):
    """A part of the document; what only people read in it, such as quantiles, is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class DescribedModel(_Part):
    """The model that was measured."""

    source: str
    sha256: str


class DescribedCorpus(_Part):
    """The text it was measured on."""

    name: str
    sha256: str


class LargeToken(_Part):
    """A token with a large scale, with its text."""

    amax: float
    token_id: Count
    sample: Count
    position: Count
    text: str = ""


class DescribedModule(_Part):
    """A module's largest tokens, largest first."""

    top_tokens: tuple[LargeToken, ...] = ()


class SpikesDescription(_Part):
    """What `spikes.json` holds.

    Attributes:
        key: Stands for model, corpus and options; None where a caller stored none.
        samples: Windows of the whole calibration, of which a shard measures some.
        prefix_ids: The prefix that was in place.
        attentions: Attention blocks whose operands were recorded.
        modules: In execution order.
    """

    key: str | None = None
    samples: Annotated[int, Field(ge=1, le=10**6)] | None = None
    model: DescribedModel | None = None
    corpus: DescribedCorpus | None = None
    prefix_ids: tuple[Count, ...] = ()
    attentions: tuple[str, ...] = ()
    modules: Mapping[str, DescribedModule]


def load_description(stem: Path) -> SpikesDescription:
    """Read the JSON file that `save_spikes` wrote.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    path = stem.with_name(stem.name + ".json")
    try:
        return SpikesDescription.model_validate_json(read_document(path))
    except ValidationError as error:
        raise ArtifactError(
            f"{path}: cannot read the spike statistics ({first_fault(error)}); calibrate again"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot read the spike statistics ({error}); calibrate again") from error
