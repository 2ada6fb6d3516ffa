"""What a checkpoint for vLLM is worth: an engine that quantizes the prefix too, against the bundle's constant prefix.

Perplexity on windows of the help topics, relative to the unquantized model behind the same prefix:
- the bundle: its prefix is computed in full precision (simulated);
- the checkpoint, read by the definition of its format and computed by transformers' own model;
- the same simulated: values that two orders of summation round to different steps keep their logits apart;
- the same without scales per token for the inputs in which the prefix exceeds the recipe's constants (simulated).
Run: python -m benchmarks.accuracy.written_checkpoint --recipe RUN/recipe.json [--model PATH] [--windows N]
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.compressed_reading import computed_model
from benchmarks.fetch_models import smollm2_path
from spike_export.artifacts.recipe import ModulePlan, Recipe, load_recipe
from spike_export.calibration.corpus.corpus import default_corpus
from spike_export.calibration.corpus.token_windows import windows_throughout
from spike_export.calibration.decoder.equivalent.equivalent_weights import transformed_checkpoint
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.export.compressed_tensors.checkpoint_export import write_checkpoint
from spike_export.export.compressed_tensors.prefix_range import with_token_scales

if TYPE_CHECKING:
    import torch

CONTENT = 255


@dataclass(frozen=True)
class Compared:
    """What was found.

    Attributes:
        perplexities: Variant → perplexity of the content.
        exceeded: Inputs that the checkpoint scales per token because of the prefix.
    """

    perplexities: Mapping[str, float]
    exceeded: int


def compare(checkpoint: Checkpoint, recipe: Recipe, content: NDArray[np.int64], folder: Path) -> Compared:
    """Write the checkpoint into a folder, and score the variants on content windows [windows, tokens]."""
    written = write_checkpoint(checkpoint, recipe, "float32", folder)
    decoder = Decoder(transformed_checkpoint(checkpoint, recipe))
    moved = with_token_scales(recipe.modules, frozenset(written.exceeded))
    prefix, behind = recipe.prefix_ids, _behind(recipe.prefix_ids, content)
    model, weights = computed_model(folder), QuantizedWeights(recipe.scheme.weights)

    def simulated(windows: NDArray[np.int64], before: tuple[int, ...], plans: Mapping[str, ModulePlan]) -> float:
        visits = (Simulation(plans, weights).visit,) if plans else ()
        return perplexity(_logits(decoder, windows, before, visits), content)

    variants = {
        "unquantized": simulated(content, prefix, {}),
        "bundle": simulated(content, prefix, recipe.modules),
        "checkpoint": perplexity(_computed(model, behind), content),
        "checkpoint, simulated": simulated(behind, (), moved),
        "checkpoint, constants as in the recipe": simulated(behind, (), recipe.modules),
    }
    return Compared(variants, len(written.exceeded))


def _behind(prefix: tuple[int, ...], content: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.tile(np.array(prefix, np.int64), (len(content), 1)), content], axis=1)


def _logits(decoder: Decoder, windows: NDArray[np.int64], prefix: tuple[int, ...], visits: Any) -> "torch.Tensor":
    import torch

    states, head = decoder.run(windows, prefix, visits=visits), decoder.head()
    return torch.cat([head.logits(states.get(index)).float() for index in range(len(states))])


def _computed(model: Any, windows: NDArray[np.int64]) -> "torch.Tensor":
    import torch

    with torch.inference_mode():
        rows = [model(torch.from_numpy(window[None]), use_cache=False).logits for window in windows]
    return torch.cat(rows)


def perplexity(logits: "torch.Tensor", content: NDArray[np.int64]) -> float:
    """Return the perplexity of content [windows, tokens] but for its first tokens.

    Args:
        logits: [windows, tokens, vocab]; of a prefix too, where there is one.
        content: What the last of them predict.
    """
    import torch

    targets = torch.from_numpy(content[:, 1:])
    behind = logits[:, -content.shape[1] : -1]
    scores = torch.log_softmax(behind, dim=-1).gather(-1, targets[..., None])
    return float(torch.exp(-scores.double().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--model", help="the recipe's model; SmolLM2 by default")
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model or str(smollm2_path()))
    recipe = load_recipe(options.recipe)
    bos = checkpoint.bos_token_id
    windows = windows_throughout(default_corpus(), checkpoint.tokenizer, options.windows, CONTENT, bos).calibration
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(checkpoint, recipe, windows, Path(scratch) / "checkpoint")
    first = found.perplexities["unquantized"]
    for name, value in found.perplexities.items():
        print(f"{name:40} {value:8.3f} {value / first - 1:+8.2%}")
    print(f"inputs scaled per token because of the prefix: {found.exceeded}")


if __name__ == "__main__":
    main()
