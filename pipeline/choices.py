"""The chosen prefix and smoothing as documents of the run directory, which a later run takes from there."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from spike_export.artifacts.errors import ArtifactError, RecipeError
from spike_export.artifacts.files.atomic_write import write_text
from spike_export.artifacts.files.documents import read_document
from spike_export.calibration.decoder.equivalent.equivalent_weights import (
    fitting_block,
    require_input_blocks,
    require_value_blocks,
    rotation_obstacle,
    stored_scales,
)
from spike_export.calibration.methods.prefix_choice import PrefixChoice
from spike_export.calibration.methods.transform_choice import TransformChoice
from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.checkpoint.modules import representatives

Choice = TypeVar("Choice")

_PREFIXES = TypeAdapter(PrefixChoice)
_TRANSFORMS = TypeAdapter(TransformChoice)


def save_prefixes(choice: PrefixChoice, path: Path) -> None:
    """Write the choice of a prefix."""
    write_text(path, _PREFIXES.dump_json(choice, indent=1).decode())


def save_transforms(choice: TransformChoice, path: Path) -> None:
    """Write the choice of rotation, smoothing and Hadamard transform."""
    write_text(path, _TRANSFORMS.dump_json(choice, indent=1).decode())


def load_prefixes(path: Path, config: DecoderConfig) -> PrefixChoice:
    """Read the choice of a prefix for a model.

    Raises:
        ArtifactError: The file cannot be read, or holds a token that the model does not know.
    """

    def require(choice: PrefixChoice) -> None:
        for token in (*choice.token_ids, *(each for candidate in choice.candidates for each in candidate.token_ids)):
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"token {token}")

    return _read(_PREFIXES, path, require)


def load_transforms(path: Path, config: DecoderConfig) -> TransformChoice:
    """Read the choice of rotation, smoothing and Hadamard transform for a model.

    Raises:
        ArtifactError: The file cannot be read, or is not of this model.
    """

    def require(choice: TransformChoice) -> None:
        transform, known = choice.transform, set(representatives(config))
        stored_scales(config, transform.smoothing)
        if transform.hadamard is not None:
            fitting_block(transform.hadamard, config)
        require_value_blocks(transform.value_rotation, config)
        require_input_blocks(transform.input_hadamard, config)
        rotation = transform.rotation
        if rotation is not None and (rotation.seed < 0 or rotation_obstacle(config)):
            raise ValueError(f"rotation {rotation.kind} with seed {rotation.seed}")
        if not known.issuperset((*transform.clips, *transform.noise, *transform.token_noise)):
            raise ValueError("a module that the model does not have")
        if not transform.noise.keys() <= transform.token_noise.keys():
            raise ValueError("a module without the noise of a scale per token")
        if not known.issuperset(choice.kinds.per_token):
            raise ValueError("an input that the model does not have")
        if not all(clip > 0 for clip in transform.clips.values()):
            raise ValueError("a clip that covers nothing")

    return _read(_TRANSFORMS, path, require)


def _read(form: TypeAdapter[Choice], path: Path, require: Callable[[Choice], None]) -> Choice:
    try:
        text = read_document(path)
        choice = form.validate_json(text)
        json.loads(text, parse_float=_finite, parse_constant=_finite)
        require(choice)
    except (OSError, ValueError, RecipeError) as error:
        raise ArtifactError(f"{path}: cannot read the choice; run again with --force") from error
    return choice


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no figure")
    return value
