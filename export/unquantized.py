"""The model without quantization behind a prefix: a bundle that a quantized one is compared with."""

from collections.abc import Sequence

from spike_export.artifacts.recipe import CorpusSource, ModelSource, ModulePlan, Prefix, Recipe, Scheme
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import linears


def unquantized_recipe(checkpoint: Checkpoint, prefix: Sequence[int], text: str) -> Recipe:
    """Return a recipe that keeps every linear in float32.

    Args:
        checkpoint: The model.
        prefix: Token ids before every sequence; none for no prefix.
        text: Their text.
    """
    source = ModelSource(
        source=checkpoint.name, architecture=checkpoint.config.family.model_type, sha256=checkpoint.tensors.sha256()
    )
    return Recipe(
        model=source,
        corpus=CorpusSource(name="none", sha256="", samples=0, length=0, seed=0),
        scheme=Scheme(unquantized="float32"),
        alpha=None,
        prefix=Prefix(token_ids=tuple(prefix), text=text, ratio=0.0) if prefix else None,
        modules={name: ModulePlan(precision="float32", reason="unquantized") for name in linears(checkpoint.config)},
    )
