"""How far a recipe's model is from the unquantized one on texts that calibration never saw.

For each text, each recipe and each variant: the perplexity's increase over the unquantized model's behind the same
prefix, its 95 % interval over the windows, and the divergence. Variants: INT8 weights alone and a scale per token
everywhere (what no choice of scales goes below), the recipe as it is, and a constant scale everywhere. All variants
have the recipe's smoothing: that of an input with a scale per token does not suit a constant, so that the last variant
tells what `--activations static` is worth only in a recipe of that option. Further recipes are also compared with the
first one, window by window. Simulated in torch, computing what the bundle computes. A text is a .txt, .jsonl or
.parquet file; its windows of 511 tokens are evenly spaced.
Run: python -m benchmarks.accuracy.unseen_text --recipe RUN/recipe.json [--model PATH|gemma3] [--windows N] TEXT ...
"""

import argparse
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks.fetch_models import MODELS, model_path
from spike_export.artifacts.recipe import ActivationKind, ModulePlan, Recipe, load_recipe
from spike_export.calibration.corpus.chat import rendered
from spike_export.calibration.corpus.files import CorpusOptions, OwnText, load_corpora
from spike_export.calibration.corpus.token_windows import windows_throughout
from spike_export.calibration.decoder.equivalent.equivalent_weights import transformed_checkpoint
from spike_export.calibration.decoder.layerwise import Decoder, Head, Visit
from spike_export.calibration.decoder.perplexity import content_states, divergence_sum, likelihood, with_bos
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.calibration.methods.qfem import macs_per_token
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import split_name
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.accuracy.intervals import Interval

if TYPE_CHECKING:
    import torch

CONTENT = 511
WINDOWS = 16

WEIGHTS, PER_TOKEN, AS_CHOSEN, STATIC = "INT8 weights alone", "per token", "as the recipe says", "static"

_EVERY = 4
"""Every how many tokens the divergence is taken."""

Windows = NDArray[np.float64]
"""[windows] float64."""


@dataclass(frozen=True)
class Measured:
    """One variant of one recipe on one text, window by window.

    Attributes:
        negative: Mean negative log-likelihood of a token over the unquantized model's behind the same prefix, in nats.
        divergence: KL(unquantized || variant), mean over every fourth token, in nats.
    """

    negative: Windows
    divergence: Windows

    @property
    def increase(self) -> Interval:
        """The perplexity's increase, as a fraction."""
        return Interval.of(self.negative).as_increase

    def over(self, other: "Measured") -> "Measured":
        """Return the differences from another recipe on the same windows."""
        return Measured(self.negative - other.negative, self.divergence - other.divergence)


def variants(recipe: Recipe) -> dict[str, Mapping[str, ModulePlan]]:
    """Return the name of each variant → its plans."""
    quantized = {name: plan for name, plan in recipe.modules.items() if plan.number_format}
    kept = {"precision": "float32", "weights": "int8", "activations": None}
    return {
        WEIGHTS: {**recipe.modules, **{name: plan.model_copy(update=kept) for name, plan in quantized.items()}},
        PER_TOKEN: _scaled(recipe, "per-token"),
        AS_CHOSEN: recipe.modules,
        STATIC: _scaled(recipe, "static"),
    }


def _told(recipe: Recipe) -> list[str]:
    """Return the variants that say something: where all inputs are alike, the recipe's own one repeats another."""
    found = variants(recipe)
    repeated = recipe.modules in (found[STATIC], found[PER_TOKEN])
    return [name for name in found if name != AS_CHOSEN or not repeated]


def _scaled(recipe: Recipe, kind: ActivationKind) -> dict[str, ModulePlan]:
    # What calibration never reached has no constant.
    return {
        name: plan.model_copy(update={"activations": kind}) if plan.number_format and plan.activation_scale else plan
        for name, plan in recipe.modules.items()
    }


def static_share(recipe: Recipe, checkpoint: Checkpoint) -> float:
    """Return the share of the linears' multiply-accumulates whose inputs have a constant scale."""
    macs = macs_per_token(checkpoint.config)
    of = {name: macs[split_name(name)[1]] for name, plan in recipe.modules.items() if plan.reason != "router"}
    return math.fsum(of[name] for name in of if recipe.modules[name].static_scale is not None) / math.fsum(of.values())


def text_windows(checkpoint: Checkpoint, source: str, text_field: str | None, count: int) -> NDArray[np.int64]:
    """Return evenly spaced windows [count, 511] of a text."""
    field = None if source.endswith(".txt") else text_field
    (text,) = load_corpora(CorpusOptions(source, field))
    assert not isinstance(text, OwnText), "a text that nothing was fitted to"
    corpus = rendered(text, checkpoint.tokenizer)
    return windows_throughout(corpus, checkpoint.tokenizer, count, CONTENT, checkpoint.bos_token_id).calibration


@dataclass
class _States:
    """What a model yields on one text's windows: the last layer's outputs [tokens, hidden], and what they predict."""

    rows: "list[torch.Tensor]"
    negative: Windows

    @classmethod
    def of(
        cls, decoder: Decoder, head: Head, content: NDArray[np.int64], prefix: Sequence[int], visits: Sequence[Visit]
    ) -> "_States":
        bos = decoder.checkpoint.bos_token_id
        fed = content if bos in prefix else with_bos(content, bos)
        rows, negative = [], []
        for tokens, states in content_states(decoder, fed, content.shape[1], prefix, visits):
            found = likelihood(head, states, tokens)
            negative.append(found.negative / found.tokens)
            rows.append(states[::_EVERY].clone())
        return cls(rows, np.array(negative))


class Judge:
    """Compares quantized models with the unquantized one, which is run once on each text behind each prefix.

    Args:
        checkpoint: The unquantized model.
        texts: Name → windows [windows, tokens].
    """

    def __init__(self, checkpoint: Checkpoint, texts: Mapping[str, NDArray[np.int64]]) -> None:
        self._plain, self.texts = Decoder(checkpoint), texts
        self._references: dict[tuple[str, tuple[int, ...]], _States] = {}

    def decoder(self, recipe: Recipe) -> Decoder:
        """Return the model whose weights a recipe quantizes."""
        return Decoder(transformed_checkpoint(self._plain.checkpoint, recipe))

    def measured(self, text: str, recipe: Recipe, decoder: Decoder, visits: Sequence[Visit]) -> Measured:
        """Return what the recipe's model is worth on a text with these visits around its layers."""
        reference = self._reference(text, recipe.prefix_ids)
        head = decoder.head(recipe.scheme.head, recipe.head_smoothing)
        found = _States.of(decoder, head, self.texts[text], recipe.prefix_ids, visits)
        expected, pairs = self._plain.head(), zip(reference.rows, found.rows, strict=True)
        divergence = [divergence_sum(expected, one, head, other) / len(one) for one, other in pairs]
        return Measured(found.negative - reference.negative, np.array(divergence))

    def _reference(self, text: str, prefix: tuple[int, ...]) -> _States:
        if (text, prefix) not in self._references:
            found = _States.of(self._plain, self._plain.head(), self.texts[text], prefix, ())
            self._references[text, prefix] = found
        return self._references[text, prefix]


def evaluate(
    judge: Judge, recipes: Mapping[str, Recipe], only: Collection[str] = ()
) -> Iterator[tuple[str, str, str, Measured]]:
    """Yield text, recipe, variant and what was found; a recipe's prefix stands before the unquantized model too.

    Args:
        judge: Has the texts.
        recipes: Name → recipe.
        only: Variants to evaluate; empty for all that say something of the recipe.
    """
    for name, recipe in recipes.items():
        decoder, weights, wanted = judge.decoder(recipe), QuantizedWeights(recipe.scheme.weights), only or _told(recipe)
        for text in judge.texts:
            for variant, plans in variants(recipe).items():
                if variant not in wanted:
                    continue
                visit = Simulation(plans, weights, recipe.attention, kv_cache=recipe.kv_cache).visit
                yield text, name, variant, judge.measured(text, recipe, decoder, (visit,))


def line(text: str, recipe: str, variant: str, measured: Measured) -> str:
    """Return a row of the table."""
    increase, divergence = measured.increase, Interval.of(measured.divergence)
    return (
        f"{Path(text).name:24} {recipe:24} {variant:24} {increase.mean:+7.2%} ± {increase.margin:.2%}"
        f"  KL {divergence.mean:+.4f} ± {divergence.margin:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--recipe", type=Path, required=True, action="append", help="may be given several times")
    parser.add_argument("--model", default="smollm2", help="a checkpoint's path, or smollm2 (default) or gemma3")
    parser.add_argument("--text-field", help="key of the texts in the records of a .jsonl or .parquet file")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of each text")
    names = [WEIGHTS, PER_TOKEN, AS_CHOSEN, STATIC]
    parser.add_argument("--only", action="append", default=[], choices=names, help="a variant; all by default")
    arguments = parser.parse_args()
    given = arguments.model
    checkpoint = open_checkpoint(str(model_path(MODELS[given])) if given in MODELS else given)
    texts = {
        source: text_windows(checkpoint, source, arguments.text_field, arguments.windows) for source in arguments.texts
    }
    recipes = {str(path.parent): load_recipe(path) for path in arguments.recipe}
    for name, recipe in recipes.items():
        print(f"{name}: prefix {list(recipe.prefix_ids)}, {static_share(recipe, checkpoint):.0%} of the MACs static")
    found: dict[tuple[str, str, str], Measured] = {}
    for text, name, variant, measured in evaluate(Judge(checkpoint, texts), recipes, arguments.only):
        found[text, name, variant] = measured
        print(line(text, name, variant, measured), flush=True)
    first = next(iter(recipes))
    for (text, name, variant), measured in found.items():
        if name != first and (text, first, variant) in found:
            print(line(text, f"{name} - {first}", variant, measured.over(found[text, first, variant])))


if __name__ == "__main__":
    main()
