"""The stages of a run, one after another; a stage whose inputs are unchanged is not run again."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.documents import read_document
from spike_export.artifacts.files.sole_writer import sole_writer
from spike_export.artifacts.manifest import DATA_FILE, GRAPH_FILE, MANIFEST_FILE, load_manifest
from spike_export.artifacts.progress import Progress
from spike_export.artifacts.recipe import Recipe, Search, load_recipe, recipe_sha256, recipe_text
from spike_export.artifacts.results.attribution import ATTRIBUTION_FILE, Attribution, load_attribution, save_attribution
from spike_export.artifacts.results.check_document import CHECK_FORMAT, Check, load_check, save_check
from spike_export.artifacts.results.command_log import COMMANDS_FILE, record_command
from spike_export.calibration.ablation import ablations
from spike_export.calibration.corpus.chat import Chats, rendered
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.files import OWN_TEXT as OWN_TEXT_SOURCE
from spike_export.calibration.corpus.files import CorpusOptions, OwnText, load_corpora
from spike_export.calibration.corpus.mixture import Kind, Mixture, shares
from spike_export.calibration.corpus.model_windows import model_windows
from spike_export.calibration.corpus.stored_text import load_documents, save_documents
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.heap import collect_and_return_memory
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.calibration.decoder.simulate import QuantizedWeights
from spike_export.calibration.methods.activation_choice import choose_measured_activations
from spike_export.calibration.methods.attribution import attribute
from spike_export.calibration.methods.context import Calibration, Transform, spread
from spike_export.calibration.methods.kept_weights import choose_kept_weights
from spike_export.calibration.methods.module_choice import choose_kept
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.own_text import own_corpus, unusable, write_own_text
from spike_export.calibration.methods.prefix_choice import PrefixChoice, choose_prefix
from spike_export.calibration.methods.transform_choice import TransformChoice, choose_transform
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.calibration.statistics.partial_statistics import (
    Measure,
    Samples,
    discard_parts,
    measure_in_parts,
    one_by_one,
    shard_samples,
)
from spike_export.calibration.statistics.spikes import SpikeStatistics, load_spikes, save_spikes
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.engines.accuracy.variants import Text, Variant, check_variants
from spike_export.engines.build.reuse import ProvidedEngine, provide_engine
from spike_export.engines.plan.sidecar import sidecar_path
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.preconditions import require_bundle_or_nothing
from spike_export.pipeline.choices import load_prefixes, load_transforms, save_prefixes, save_transforms
from spike_export.pipeline.cluster.ray_workers import RayWorkers
from spike_export.pipeline.execution import execution_of
from spike_export.pipeline.further_texts import further_texts
from spike_export.pipeline.job import Job
from spike_export.pipeline.kept_references import reference_cache
from spike_export.pipeline.run_directory import RunDirectory, stage_key
from spike_export.pipeline.stage_display import StageDisplay

OWN_TEXT = "own text"
SPIKES = "spikes"
PREFIX = "prefix"
BEHIND = "spikes behind the prefix"
SMOOTHING = "smoothing"
AFTER = "spikes after smoothing"
RECIPE = "recipe"
ATTRIBUTION = "what each input causes"
BUNDLE = "bundle"
CHECK = "check"
PLAN = "plan"
REPORT = "report"

RECIPE_FILE = "recipe.json"
OWN_TEXT_FILE = "own_text.jsonl"

ARTIFACTS = (
    *(
        f"{stem}.{ending}"
        for stem in ("spikes", "spikes_prefixed", "spikes_smoothed")
        for ending in ("json", "safetensors")
    ),
    OWN_TEXT_FILE,
    "prefix.json",
    "smoothing.json",
    ATTRIBUTION_FILE,
    "bundle",
    "check.json",
    "report.html",
    "pictures",
    COMMANDS_FILE,
)
"""What a run writes into its work directory and may replace there. A recipe that is there is used."""

Artifact = TypeVar("Artifact")

_PART_SIZE = 4
"""Windows whose statistics a kill may cost."""

_STREAMED_PART_SIZE = 32
"""The same where all weights are read anew for every part."""


def calibration_stages(
    options: CalibrationOptions, corpus: CorpusOptions = CorpusOptions(), *, attributed: bool = False
) -> tuple[str, ...]:
    """Return the names of a calibration's stages, in order; `attributed` where inputs' divergences are measured."""
    written = (OWN_TEXT,) if OWN_TEXT_SOURCE in corpus.sources else ()
    prefix = (PREFIX, BEHIND) if options.qfep else ()
    smoothing = (SMOOTHING, AFTER) if options.searches_smoothing else ()
    return (*written, SPIKES, *prefix, *smoothing, RECIPE, *((ATTRIBUTION,) if attributed else ()))


def stages_of(job: Job) -> tuple[str, ...]:
    """Return the names of the stages a job runs, in order."""
    calibration = calibration_stages(job.calibration, job.corpus) if job.quantize else ()
    plan = (PLAN,) if job.plan else ()
    return (*calibration, BUNDLE, CHECK, *plan, REPORT)


@dataclass(frozen=True)
class Pipeline:
    """A job with its checkpoint, its work directory and the display that follows it.

    Attributes:
        read: The job's corpora, where they were read before; None to read them when they are needed.
        workers: Processes of a cluster that forward the windows; None to do it here.
    """

    job: Job
    checkpoint: Checkpoint
    run: RunDirectory
    display: StageDisplay
    read: tuple[Corpus | Chats | OwnText, ...] | None = None
    workers: RayWorkers | None = None

    @cached_property
    def corpus(self) -> Mixture:
        """The text of calibration and check; text by the model itself is written here, unless it was before."""
        read = self.read or load_corpora(self.job.corpus)
        weights = self.job.corpus.weights or (1.0,) * len(read)
        found = []
        for each, weight, count in zip(read, weights, shares(weights, self.job.calibration.samples), strict=True):
            if not isinstance(each, OwnText):
                found.append(Kind(rendered(each, self.checkpoint.tokenizer), weight))
            elif own := self._own_text(count):
                found.append(Kind(own, weight, judges=False))
        return Mixture(tuple(found))

    @cached_property
    def further_texts(self) -> tuple[Text, ...]:
        """Texts of other kinds than the corpus's, on which the bundle is judged too."""
        return further_texts(self.checkpoint, self.job.texts, self.job.calibration.length - 1)

    def require_texts(self) -> None:
        """Read the further texts that were given, so that a bad one is reported now and not after the calibration.

        Raises:
            CorpusError: As `further_texts`.
        """
        if self.job.texts.chosen:
            _ = self.further_texts

    def _own_text(self, windows: int) -> Corpus | None:
        """Return what the model wrote for so many windows; None where it cannot write, or not soon enough."""
        if not windows or not self.job.quantize:
            return None  # nothing is calibrated on it
        if not self.execution.resident:
            self.display.skip(
                OWN_TEXT, "the layers are streamed, so that each token would read them all; the other corpora are used"
            )
            return None
        options, path = self.job.calibration, self.run.path / OWN_TEXT_FILE
        key = stage_key(
            model=self._model_key,
            template=getattr(self.checkpoint.tokenizer, "chat_template", None),
            compute=self._compute,
            shape=[windows, options.length],
            seed=options.seed,
        )

        def work(progress: Progress) -> None:
            written = write_own_text(self.decoder, windows, options.length, options.seed, progress)
            save_documents(written, path)

        corpus = own_corpus(self._stage(OWN_TEXT, key, [path], work, partial(load_documents, path)))
        obstacle = unusable(corpus, self.checkpoint, windows, options.length - 1)
        if obstacle is not None:
            self.display.skip(OWN_TEXT, f"{obstacle}; the other corpora are used")
            return None
        return corpus

    @cached_property
    def windows(self) -> TokenWindows:
        """Calibration and evaluation windows; one token of the length is BOS."""
        options = self.job.calibration
        return model_windows(
            self.checkpoint, self.corpus, options.samples, options.length - 1, options.seed, options.windows
        )

    @cached_property
    def decoder(self) -> Decoder:
        """The model; the weights are read when a stage first needs them."""
        return Decoder(self.checkpoint, self.execution)

    @cached_property
    def calibration(self) -> Calibration:
        """Model and windows."""
        options = self.job.calibration
        return Calibration(self.checkpoint, self.windows, options, self.execution, self.decoder, workers=self.workers)

    @property
    def _compute(self) -> list[str]:
        """Stands for what rounds the forward passes: precision and kind of device."""
        return [self.execution.dtype, self.execution.devices[0].partition(":")[0]]

    @cached_property
    def execution(self) -> Execution:
        """Where and how the model runs."""
        return execution_of(self.checkpoint, self.job.execution, self.run.path)

    @cached_property
    def _model_key(self) -> str:
        """Stands for what every stage takes from the model: weights, configuration and tokens."""
        tokenizer = self.checkpoint.tokenizer
        return stage_key(
            tool=version("spike-export"),
            weights=self.checkpoint.tensors.sha256(),
            config=asdict(self.checkpoint.config),
            tokenizer=None if tokenizer is None else tokenizer.backend_tokenizer.to_str(),
            bos=self.checkpoint.bos_token_id,
        )

    @property
    def _spikes_key(self) -> str:
        options = self.job.calibration
        return stage_key(
            model=self._model_key,
            corpus=self.corpus.sha256,
            samples=options.samples,
            length=options.length,
            compute=self._compute,
            seed=options.seed,
            windows=options.windows,
            attention=options.attention,
            shares=self.corpus.shares(options.samples),
            # Packed windows come from the text, wherever its documents end. How a chat was rendered is in the text.
            documents=self.corpus.boundaries_sha256 if options.windows == "documents" else None,
        )

    def calibrate(self) -> Recipe:
        """Run the calibration's stages and return the recipe as it now lies in the work directory."""
        plain = self.measure()
        prefixes = self._prefix(plain) if self.job.calibration.qfep else PrefixChoice()
        behind = self._behind(plain, prefixes)
        transforms = self._transform(behind) if self.job.calibration.searches_smoothing else TransformChoice()
        after = self._after(behind, transforms.transform)
        options = {**asdict(self.job.calibration), "prefix": prefixes.token_ids, "transform": transforms.transform}
        path = self.run.path / RECIPE_FILE
        if self.run.is_edited(RECIPE_FILE):
            if not self.job.recompute_recipe:
                self.display.skip(RECIPE, "edited by hand, and kept; --recompute recipe discards it")
                return load_recipe(path)
            self.run.discard(RECIPE_FILE)

        def work(progress: Progress) -> None:
            transform = transforms.transform
            kinds = transforms.kinds
            if not self.job.calibration.searches_smoothing:
                kinds = choose_measured_activations(self.calibration, after, progress)
            choice = choose_kept(self.calibration, after, transform, progress, per_token=kinds.per_token)
            weights = choose_kept_weights(
                self.calibration, after, choice.kept, transform, progress, per_token=kinds.per_token
            )
            chosen = replace(self.calibration.options, excluded_weights=weights.form)
            search = Search(
                reference_perplexity=self.calibration.reference_perplexity(prefixes.token_ids),
                plain_reference_perplexity=self.calibration.reference_perplexity(()),
                forward_tokens=prefixes.forward_tokens or None,
                transforms=transforms.candidates,
                activations=kinds.candidates,
                curve=choice.curve,
                kept_weights=weights.candidates,
                prefixes=prefixes.candidates,
            )
            recipe = build_recipe(
                self.calibration.with_options(chosen), self.corpus, after, choice, transform, search, kinds.per_token
            )
            self.run.write_editable(RECIPE_FILE, recipe_text(recipe))

        key = stage_key(spikes=self._spikes_key, options=options)
        return self._stage(RECIPE, key, [path], work, partial(load_recipe, path))

    def attribute(self, recipe: Recipe) -> Attribution:
        """Measure on windows that calibration never saw how much of the recipe's divergence each input causes."""
        path, wanted = self.run.path / ATTRIBUTION_FILE, self.job.attribution_windows
        content = spread(self.windows.evaluation, wanted)

        def work(progress: Progress) -> None:
            model = self.calibration.transformed(Transform.of(recipe))
            weights = QuantizedWeights(recipe.scheme.weights, keep=self.execution.resident)
            fed = self.calibration.fed(content, recipe.prefix_ids)
            save_attribution(attribute(model.decoder, weights, recipe, fed, content.shape[1], progress), path)

        key = stage_key(spikes=self._spikes_key, recipe=recipe_sha256(recipe), windows=len(content))
        return self._stage(ATTRIBUTION, key, [path], work, partial(load_attribution, path))

    def measure(self, shard: tuple[int, int] | None = None) -> SpikeStatistics:
        """Run the first stage and return the statistics without a prefix.

        Args:
            shard: (i, n): measure only the i-th of n parts of the windows.
        """
        return self._spikes(SPIKES, "spikes", (), shard=shard)

    def _spikes(
        self,
        stage: str,
        stem: str,
        prefix: tuple[int, ...],
        transform: Transform = Transform(),
        shard: tuple[int, int] | None = None,
    ) -> SpikeStatistics:
        place = self.run.path / stem
        samples = self.job.calibration.samples
        chosen = shard_samples(samples, shard if shard else (1, 1))
        whole = self._statistics_key(prefix, transform)
        description = {
            "key": whole,
            "samples": samples,
            "model": {"source": self.checkpoint.name, "sha256": self.checkpoint.tensors.sha256()},
            "corpus": {"name": self.corpus.name, "sha256": self.corpus.sha256},
        }
        parts = place.with_name(f".{stem}.parts")
        part_size = _PART_SIZE if self.execution.resident else _STREAMED_PART_SIZE

        def measure(rows: Samples) -> SpikeStatistics:
            return self.calibration.measure_windows(self.windows.calibration[rows], rows, prefix, transform)

        many: Measure = one_by_one(measure)
        if self.workers is not None:
            many = partial(self.workers.measured, self.windows.calibration, prefix, transform.of_weights)

        def work(progress: Progress) -> None:
            statistics = measure_in_parts(many, chosen, part_size, parts, whole, progress)
            save_spikes(statistics, place, description, self._decode)
            discard_parts(parts)

        files = [place.with_name(f"{stem}.safetensors"), place.with_name(f"{stem}.json")]
        key = stage_key(whole=whole, shard=shard) if shard else whole
        return self._stage(stage, key, files, work, partial(load_spikes, place))

    def _statistics_key(self, prefix: tuple[int, ...], transform: Transform) -> str:
        # What else a transform says, clips and noise, does not change what is measured.
        return stage_key(spikes=self._spikes_key, prefix=prefix, transform=transform.of_weights)

    def _decode(self, token: int) -> str:
        tokenizer = self.checkpoint.tokenizer
        return str(tokenizer.decode([token])) if tokenizer else ""

    def _transform(self, behind: SpikeStatistics) -> TransformChoice:
        path = self.run.path / "smoothing.json"
        chosen = self.job.calibration
        kinds = {"activations": chosen.activations, "max_per_token_share": chosen.max_per_token_share}
        options = {**asdict(_with_every_module_quantized(chosen)), **kinds}
        del options["qfep"], options["prefix_length"]  # the prefix itself is in the key

        def work(progress: Progress) -> None:
            save_transforms(choose_transform(self.calibration, behind, progress), path)

        key = stage_key(spikes=self._spikes_key, options=options, prefix=behind.prefix_ids)
        return self._stage(SMOOTHING, key, [path], work, partial(load_transforms, path, self.checkpoint.config))

    def _after(self, behind: SpikeStatistics, transform: Transform) -> SpikeStatistics:
        if not self.job.calibration.searches_smoothing:
            return behind
        if not transform.changes_weights:
            self.display.skip(AFTER, "the weights are unchanged")
            return behind
        return self._spikes(AFTER, "spikes_smoothed", behind.prefix_ids, transform)

    def _prefix(self, plain: SpikeStatistics) -> PrefixChoice:
        path = self.run.path / "prefix.json"
        chosen = _with_every_module_quantized(self.job.calibration)
        options = asdict(replace(chosen, rotation="never", hadamard="never", value_rotation="never"))

        def work(progress: Progress) -> None:
            save_prefixes(choose_prefix(self.calibration, plain, progress), path)

        key = stage_key(spikes=self._spikes_key, options=options)
        return self._stage(PREFIX, key, [path], work, partial(load_prefixes, path, self.checkpoint.config))

    def _behind(self, plain: SpikeStatistics, prefixes: PrefixChoice) -> SpikeStatistics:
        if not self.job.calibration.qfep:
            return plain
        if not prefixes.token_ids:
            self.display.skip(BEHIND, "no prefix was chosen")
            return plain
        return self._spikes(BEHIND, "spikes_prefixed", prefixes.token_ids)

    def export(self, recipe: Recipe | None) -> Path:
        """Write the bundle and return its folder."""
        bundle = self.run.path / "bundle"
        options = self._export_options(recipe)
        tokenizer = self.checkpoint.tokenizer
        key = stage_key(
            model=self._model_key,
            template=getattr(tokenizer, "chat_template", None),
            special=getattr(tokenizer, "special_tokens_map", None),
            settings=_tokenizer_settings(tokenizer),
            generation=dict(self.checkpoint.generation_config),
            recipe=None if recipe is None else recipe.model_dump(mode="json"),
            options=asdict(options),
        )

        def work(progress: Progress) -> None:
            with sole_writer(bundle):  # `export --out` may name this folder too
                require_bundle_or_nothing(bundle, overwrite=self.run.overwrite)
                export_bundle(self.checkpoint, recipe, options, bundle, progress)

        self._stage(BUNDLE, key, [bundle / name for name in (GRAPH_FILE, DATA_FILE)], work, partial(_whole, bundle))
        return bundle

    def _export_options(self, recipe: Recipe | None) -> ExportOptions:
        """Return what the job asks of the graph, in the recipe's precision, which may have been edited."""
        job = self.job
        dtype = job.calibration.dtype if recipe is None else recipe.scheme.unquantized
        return ExportOptions(dtype, number_format=job.number_format, cache=job.cache, logits=job.logits)

    def check(self, recipe: Recipe | None, bundle: Path) -> Check:
        """Measure the bundle's accuracy, and what each method contributes, and hold it against the limit."""
        path = self.run.path / "check.json"
        manifest = read_document(bundle / MANIFEST_FILE)
        known = {kind.corpus.sha256 for kind in self.corpus.kinds}
        texts = tuple(text for text in self.further_texts if text.sha256 not in known)

        def work(progress: Progress) -> None:
            variants = self._variants(recipe, bundle)
            content = self.windows.evaluation
            options = self._export_options(recipe)
            with self.run.scratch() as scratch:
                checked = check_variants(
                    self.checkpoint,
                    self._take_model,
                    self.corpus.judging,
                    content,
                    variants,
                    options,
                    progress,
                    scratch,
                    texts,
                    reference_cache(self.checkpoint, self.execution, force=self.run.force),
                    self.workers,
                )
            save_check(checked, path)

        # The manifest stands for the recipe and the precision; the ablations take the rest from the statistics.
        key = stage_key(
            spikes=self._spikes_key,
            manifest=manifest,
            weights=self.job.calibration.weights,
            texts=[[text.name, text.sha256, text.content.shape] for text in texts],
            format=CHECK_FORMAT,
        )
        found = self._stage(CHECK, key, [path], work, partial(load_check, path))
        check = found.gated(self.job.limits)
        save_check(check, path)
        return check

    def _take_model(self) -> Decoder:
        """Return the model that calibration read, or a new one; the pipeline forgets it, so that it can be freed."""
        decoder = self.decoder
        self._forget_model()
        return decoder

    def _forget_model(self) -> None:
        self.__dict__.pop("calibration", None)
        self.__dict__.pop("decoder", None)

    def _variants(self, recipe: Recipe | None, bundle: Path) -> list[Variant]:
        if recipe is None:
            return [Variant("unquantized", None, bundle)]
        plain = load_spikes(self.run.path / "spikes")
        behind = self._behind_recipe(recipe, plain)
        recipes = ablations(self.calibration, self.corpus, plain, behind, recipe)
        variants = [Variant("unquantized", None), *(Variant(name, each) for name, each in recipes.items())]
        scheme = recipe.scheme
        static = any(plan.static_scale for plan in recipe.modules.values())
        ranged = static and scheme.activation_range != "max"
        mixed = static and any(plan.per_token for plan in recipe.modules.values())
        parts = (
            ("rotation", recipe.rotation),
            ("Hadamard", recipe.hadamard or recipe.input_hadamard),
            ("smoothing", recipe.smoothing),
            ("value rotation", recipe.value_rotation),
            (scheme.activation_range, ranged),
            ("per-token inputs", mixed),
        )
        more = [name for name, used in parts if used]
        # Without more, the last ablation is the shipped recipe itself, unless it was edited.
        earlier, name = (variants, "+".join((variants[-1].name, *more))) if more else (variants[:-1], variants[-1].name)
        if scheme.head == "unquantized":
            return [*earlier, Variant(name, recipe, bundle)]
        # All else alike: the difference of the last two rows is what the head costs.
        plain_head = recipe.model_copy(update={"scheme": scheme.model_copy(update={"head": "unquantized"})})
        return [*earlier, Variant(name, plain_head), Variant(f"{name}+head {scheme.head}", recipe, bundle)]

    def _behind_recipe(self, recipe: Recipe, plain: SpikeStatistics) -> SpikeStatistics:
        """Return the statistics behind the recipe's prefix, measured here when it was put in by hand."""
        if not recipe.prefix:
            return plain
        place = self.run.path / "spikes_prefixed"
        if self.run.is_stamped(BEHIND, self._statistics_key(recipe.prefix_ids, Transform())):
            return load_spikes(place)
        return self.calibration.measure(recipe.prefix_ids)

    def build(self, bundle: Path) -> ProvidedEngine:
        """Build the engine, or keep the one that is there: its sidecar, not a stamp, tells what it was built from."""
        engine = self.job.plan
        assert engine is not None, "a job without a plan has no build stage"
        # The weights are no longer needed here, and the build process wants the memory.
        self._forget_model()
        collect_and_return_memory()
        with self.display.stage(PLAN) as progress:
            run = self.run
            return provide_engine(bundle, engine, self.job.build, progress, force=run.force, overwrite=run.overwrite)

    def report(self, built: bool) -> Path:
        """Write the HTML page; cheap, and never stale: a plan of an earlier run is left out."""
        from spike_export.report.page import write_report  # matplotlib takes a while to import

        sidecar = sidecar_path(self.job.plan) if self.job.plan and built else None
        with self.display.stage(REPORT):
            record_command(self.run.path, self.job.command)
            return write_report(self.run.path, engine=sidecar)

    def _stage(
        self,
        stage: str,
        key: str,
        artifacts: Iterable[Path],
        work: Callable[[Progress], None],
        read: Callable[[], Artifact],
    ) -> Artifact:
        """Run a stage unless it is done on the same inputs, and what it left can still be read; return what it left."""
        if self.run.is_done(stage, key, artifacts):
            try:
                found = read()
            except ArtifactError:
                pass  # the stage makes it anew
            else:
                self.display.skip(stage, "same inputs")
                return found
        self.run.begin(stage)
        with self.display.stage(stage) as progress:
            try:
                work(progress)
            finally:  # whatever went wrong, weights that change are the reason
                self.checkpoint.require_unchanged()
        self.run.mark_done(stage, key)
        return read()


def _tokenizer_settings(tokenizer: Any) -> dict[str, str]:
    """Return what `tokenizer_config.json` says, but for where the tokenizer lies."""
    settings = getattr(tokenizer, "init_kwargs", None) or {}
    places = ("name_or_path", "tokenizer_file", "vocab_file", "is_local", "local_files_only")
    return {key: str(value) for key, value in settings.items() if key not in places and not key.endswith("_object")}


def _whole(bundle: Path) -> None:
    """See that a bundle has all the files that its manifest lists.

    Raises:
        ArtifactError: The manifest cannot be read, or a file is missing.
    """
    missing = [name for name in load_manifest(bundle).files if not (bundle / name).is_file()]
    if missing:
        raise ArtifactError(f"{bundle / missing[0]} is missing; export the bundle again")


def _with_every_module_quantized(options: CalibrationOptions) -> CalibrationOptions:
    """Return the options that the prefix depends on: how each module is quantized is chosen after it."""
    return replace(
        options,
        activations=options.searched_activations,
        dtype="float32",
        excluded_weights="unquantized",
        qfem=True,
        alpha=None,
        max_fp16_modules=None,
        max_fp16_share=0.0,
        max_per_token_share=0.0,
        tolerance=0.0,
    )
