"""Perplexity and divergence of a recipe with other kinds of activation scales, on texts that calibration never saw.

Each row is the unquantized model behind the recipe's prefix with INT8 simulated in torch: weights alone, then the
recipe's weights and static scales with a scale per token at no input, at those that the recipe says, at `down_proj`,
and at all. A text is a .txt file, or a .jsonl or .parquet file whose texts stand under --text-field.
Run: python -m benchmarks.activation_kinds --recipe RUN/recipe.json [--model PATH] [--windows N] TEXT [TEXT ...]
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.fetch_models import smollm2_path
from spike_export.artifacts.recipe import ModulePlan, Recipe, load_recipe
from spike_export.calibration.corpus.chat import rendered
from spike_export.calibration.corpus.files import CorpusOptions, load_corpus
from spike_export.calibration.corpus.token_windows import windows_at
from spike_export.calibration.decoder.equivalent_weights import equivalent_checkpoint
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import ReferenceStates, Score, reference_states, score, with_bos
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint

CONTENT = 511


def variants(recipe: Recipe) -> dict[str, Mapping[str, ModulePlan]]:
    """Return the name of each row → its plans."""
    quantized = {name: plan for name, plan in recipe.modules.items() if plan.number_format}

    def scaled(per_token: Callable[[str], bool]) -> dict[str, ModulePlan]:
        # What calibration never reached has no constant.
        return {
            name: plan.model_copy(update={"activations": "per-token" if per_token(name) else "static"})
            if plan.activation_scale
            else plan
            for name, plan in recipe.modules.items()
            if name in quantized
        }

    weights = {"precision": "float32", "weights": "int8"}
    return {
        "INT8 weights alone": {name: plan.model_copy(update=weights) for name, plan in quantized.items()},
        "static": scaled(lambda name: False),
        "as the recipe says": scaled(lambda name: quantized[name].per_token),
        "down_proj per token": scaled(lambda name: name.endswith("down_proj")),
        "per token": scaled(lambda name: True),
    }


def text_windows(checkpoint: Checkpoint, source: str, text_field: str | None, count: int) -> NDArray[np.int64]:
    """Return evenly spaced windows [count, 511] of a text."""
    corpus = rendered(load_corpus(CorpusOptions(source, text_field)), checkpoint.tokenizer)
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer.backend_tokenizer.encode(corpus.text, add_special_tokens=False).ids
    tokens = np.asarray(ids, np.int64)
    if len(tokens) < count * CONTENT:
        raise SystemExit(f"{source}: {len(tokens)} tokens; {count} windows have {count * CONTENT}: give --windows")
    return windows_at(tokens, np.linspace(0, len(tokens) - CONTENT, count).astype(np.int64), CONTENT)


def evaluate(
    checkpoint: Checkpoint, recipe: Recipe, texts: Mapping[str, NDArray[np.int64]]
) -> Iterator[tuple[str, str, Score, ReferenceStates]]:
    """Yield row, text, what was found and the unquantized model behind the same prefix."""
    prefix, bos = recipe.prefix_ids, checkpoint.bos_token_id
    fed = {text: each if bos in prefix else with_bos(each, bos) for text, each in texts.items()}
    plain, weights = Decoder(checkpoint), QuantizedWeights(recipe.scheme.weights)
    decoder = Decoder(equivalent_checkpoint(checkpoint, recipe.rotation, recipe.smoothing))
    references = {text: reference_states(plain, fed[text], each.shape[1], prefix) for text, each in texts.items()}
    for name, plans in variants(recipe).items():
        visit = Simulation(plans, weights, recipe.attention).visit
        for text, each in texts.items():
            found = score(decoder, fed[text], each.shape[1], prefix, (visit,), reference=references[text])
            yield name, text, found, references[text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--model", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--text-field", help="key of the texts in the records of a .jsonl or .parquet file")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model or str(smollm2_path()))
    texts = {
        source: text_windows(
            checkpoint, source, arguments.text_field if not source.endswith(".txt") else None, arguments.windows
        )
        for source in arguments.texts
    }
    for name, text, found, reference in evaluate(checkpoint, load_recipe(arguments.recipe), texts):
        increase = found.perplexity / reference.perplexity - 1
        print(f"{name:20} {Path(text).name:24} {increase:+7.2%}  KL {found.divergence:.4f}", flush=True)


if __name__ == "__main__":
    main()
