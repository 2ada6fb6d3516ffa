"""A bundle and the model that it was made of, opened together."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.manifest import Manifest
from spike_export.artifacts.recipe import Recipe, load_recipe, recipe_sha256
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer
from spike_export.engines.onnx_runtime.session import runnable_manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_RECIPE, _TOKENIZER = "recipe.json", "tokenizer.json"

_SAMPLE = "def f(x):\n\treturn [0x1F, 'naïve']  # 3.14 %\n\nÜber 1,000 \u201cwords\u201d: 中文, 🙂"
"""Text that tokenizers of one vocabulary split differently."""


def opened_pair(bundle: Path, reference: str) -> tuple[Manifest, Checkpoint]:
    """Return a bundle's manifest, and the model that the bundle was made of.

    Raises:
        ArtifactError: The manifest cannot be read, or the bundle was made of another checkpoint, or has another
            tokenizer.
        CheckpointError: The model cannot be read.
        EngineError: ONNX Runtime cannot run the bundle, or its tokenizer cannot be read.
    """
    manifest, checkpoint = runnable_manifest(bundle), open_checkpoint(reference)
    if manifest.model.checkpoint_sha256 != checkpoint.tensors.sha256():
        raise ArtifactError(f"{bundle}: was made of {manifest.model.source}, and {reference} has other weights")
    if checkpoint.tokenizer is not None and (bundle / _TOKENIZER).is_file():
        _require_same_tokens(bundle, checkpoint.tokenizer.backend_tokenizer, reference)
    return manifest, checkpoint


def _require_same_tokens(bundle: Path, tokenizer: "Tokenizer", reference: str) -> None:
    """Refuse a bundle whose tokenizer gives other tokens than the model's: users would send other tokens than a check.

    Raises:
        ArtifactError: Says so.
        EngineError: The bundle's tokenizer cannot be read.
    """
    own = BundleTokenizer.read(bundle).backend_tokenizer
    read = (each.encode(_SAMPLE, add_special_tokens=False).ids for each in (own, tokenizer))
    if own.get_vocab() != tokenizer.get_vocab() or next(read) != next(read):
        raise ArtifactError(
            f"{bundle / _TOKENIZER}: gives other tokens than the tokenizer of {reference}; export the bundle again, or "
            "give the model it was made of"
        )


def recipe_of(bundle: Path, manifest: Manifest, recipe: Path | None) -> Recipe | None:
    """Return the recipe that a bundle was made by; None for a bundle without quantization.

    Args:
        bundle: Its folder.
        manifest: Its manifest.
        recipe: Where the recipe is; None for `recipe.json` beside the bundle, where the main job leaves it.

    Raises:
        ArtifactError: There is no recipe, or the bundle was made by another one.
        RecipeError: The recipe is malformed.
    """
    wanted = manifest.model.recipe_sha256
    if wanted is None:
        if recipe is not None:
            raise ArtifactError(f"{bundle}: was made without a recipe; omit --recipe")
        return None
    path = recipe or bundle.absolute().parent / _RECIPE
    if recipe is None and not path.is_file():
        raise ArtifactError(f"{path}: the recipe of {bundle} is not there; name it with --recipe")
    found = load_recipe(path)
    # An earlier version, which knew fewer keys, hashed the file as it wrote it.
    if wanted not in (recipe_sha256(found), hashlib.sha256(path.read_bytes()).hexdigest()):
        raise ArtifactError(f"{path}: {bundle} was made by another recipe; give that one, or export again")
    return found
