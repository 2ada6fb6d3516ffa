"""What of a bundle is about text, and needs no runtime: tokenizer, manifest, and how its makers generate."""

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spike_export.artifacts.errors import EngineError, one_line
from spike_export.artifacts.files.documents import read_document
from spike_export.artifacts.manifest import Manifest, load_manifest
from spike_export.checkpoint.tokenizer import load_tokenizer
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer, require_tokenizer
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.prompt_tokens import PromptEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class BundleText:
    """The text side of a bundle.

    Attributes:
        defaults: Options of the bundle's `generation_config.json`, with the tokens that end a sequence.
        prompts: Turns prompts into tokens.
    """

    tokenizer: BundleTokenizer
    manifest: Manifest
    defaults: GenerationOptions
    prompts: PromptEncoder

    @classmethod
    def read(cls, bundle: Path) -> "BundleText":
        """Read it, and start the process that encodes prompts, before a runtime takes memory.

        Raises:
            ArtifactError: The manifest cannot be read.
            EngineError: There is no tokenizer, or it cannot be used.
        """
        manifest = load_manifest(bundle)
        tokenizer = BundleTokenizer.read(bundle)
        defaults = default_options(bundle, manifest, tokenizer)
        return cls(tokenizer, manifest, defaults, PromptEncoder(tokenizer, manifest).started())


def default_options(bundle: Path, manifest: Manifest, tokenizer: BundleTokenizer) -> GenerationOptions:
    """Return the options that the model's makers give in `generation_config.json`, else those of transformers.

    The tokens that end a sequence are that file's, else the manifest's, else the tokenizer's.

    Raises:
        EngineError: The file is damaged, or has an impossible value.
    """
    path = bundle / _GENERATION_FILE
    try:
        given = json.loads(read_document(path)) if path.exists() else {}
        eos = given.get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise EngineError(f"{path}: not a JSON object ({one_line(error)}); export the bundle again") from error
    told = {"logprobs", "logprobs_as_drawn"}
    known = {field.name for field in fields(GenerationOptions)} - {"eos_token_ids", "stop_strings", *told}
    # What transformers' generate() takes where neither file nor caller gives a top k.
    values: dict[str, Any] = {"top_k": 50}
    values |= {name: value for name, value in given.items() if name in known and value is not None}
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ends = ends or list(manifest.eos_token_ids) or [tokenizer.eos_token_id]
    try:
        return GenerationOptions(**values, eos_token_ids=tuple(end for end in ends if end is not None))
    except (EngineError, TypeError) as error:
        raise EngineError(f"{path}: {one_line(error)}; correct it") from error


def bundle_tokenizer(bundle: Path) -> "PreTrainedTokenizerBase":
    """Load a bundle's tokenizer as transformers', for text that is read as corpora are.

    Raises:
        EngineError: There is none, or it cannot be used.
    """
    require_tokenizer(bundle)
    from transformers import AutoTokenizer

    load = partial(AutoTokenizer.from_pretrained, bundle, local_files_only=True, trust_remote_code=False)
    return load_tokenizer(load, bundle, EngineError)
