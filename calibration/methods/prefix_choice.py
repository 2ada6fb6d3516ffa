"""Which prefix: found candidates compete, by the perplexity of the model that is quantized behind each of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from spike_export.artifacts.process.bounded_process import BudgetError, within_budget
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import PrefixCandidate
from spike_export.calibration.methods import qfep
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration, Transform
from spike_export.calibration.methods.smoothing_search import default_smoothing
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.checkpoint import Checkpoint

NEUTRALITY = 0.005
"""Largest relative increase of the unquantized model's perplexity that a prefix may cost."""

_PROPOSALS = 4
"""Proposals with the best rates that compete; each costs two passes over the search windows."""

_WORTH = 0.002
"""Smallest relative decrease of perplexity for which a prefix is made a token longer."""


@dataclass(frozen=True)
class PrefixChoice:
    """The outcome of the competition.

    Attributes:
        token_ids: The winner; empty for no prefix.
        candidates: Every competitor with its verdict, the empty prefix first.
        forward_tokens: What the competition cost: tokens through the whole model, parts of it in proportion.
    """

    token_ids: tuple[int, ...] = ()
    candidates: tuple[PrefixCandidate, ...] = ()
    forward_tokens: int = 0


def choose_prefix(calibration: Calibration, plain: SpikeStatistics, progress: Progress = silent) -> PrefixChoice:
    """Let no prefix, `[BOS]`, the found prefixes and longer forms of the best compete.

    A prefix is accepted when it lowers the worst max-median ratio and leaves the unquantized model's perplexity as it
    is; of the accepted ones the one with the lowest simulated perplexity wins, smoothed and quantized.

    Args:
        calibration: The model and its windows.
        plain: Statistics without a prefix, of all calibration windows.
        progress: Told after each candidate.
    """
    bos = calibration.checkpoint.bos_token_id
    if bos is None:
        return PrefixChoice()
    competition = _Competition(calibration, progress)
    competition.enter((), None)
    for prefix in _proposals(calibration, plain, bos, progress):
        if len(prefix) <= calibration.options.prefix_length:
            competition.enter(prefix, competition.candidates[0])
    competition.lengthen(calibration.options.prefix_length, bos)
    return competition.outcome()


def _proposals(calibration: Calibration, plain: SpikeStatistics, bos: int, progress: Progress) -> list[tuple[int, ...]]:
    found = qfep.propose_prefixes(calibration.model.decoder, plain, bos, progress)
    return qfep.distinct([(bos,), *(prefix.token_ids for prefix in found[:_PROPOSALS])])


class _Competition:
    """The candidates so far, with what was measured of each."""

    def __init__(self, calibration: Calibration, progress: Progress) -> None:
        self._calibration, self._progress = calibration, progress
        self._statistics: dict[tuple[int, ...], SpikeStatistics] = {}
        self._started = calibration.meter.tokens
        self.candidates: list[PrefixCandidate] = []

    def enter(self, prefix: tuple[int, ...], without: PrefixCandidate | None) -> PrefixCandidate:
        """Measure one candidate; `without` is the empty prefix, or None while that itself enters."""
        calibration = self._calibration
        rows = calibration.prefix_rows
        statistics = calibration.measure_windows(calibration.windows.calibration[rows], rows, prefix)
        self._statistics[prefix] = statistics
        module, ratio = qfep.worst_ratio(statistics)
        verdict, perplexity = "accepted", None
        if without is not None and not qfep.lowers_worst_ratio(ratio, without.ratio):
            verdict = "turned down: does not lower the worst ratio"
        else:
            transform = _default_transform(calibration, statistics)
            perplexity = calibration.predicted(statistics, (), transform, compare=False).perplexity
        candidate = PrefixCandidate(
            token_ids=prefix,
            text=prefix_text(calibration.checkpoint, prefix),
            worst_module=module,
            ratio=ratio,
            perplexity=perplexity,
            verdict=verdict,
        )
        self.candidates.append(candidate)
        self._progress("prefixes", len(self.candidates), 0)
        return candidate

    @property
    def best(self) -> PrefixCandidate:
        """The accepted candidate with the lowest perplexity; the shortest of equals."""
        return min(self.candidates, key=lambda c: float("inf") if c.perplexity is None else c.perplexity)

    def lengthen(self, most: int, bos: int) -> None:
        """Append to the best, one at a time, the token that still spikes most behind it, as long as that pays."""
        best = self.best
        while best.token_ids and len(best.token_ids) < most:
            statistics = self._statistics[best.token_ids]
            entered = [
                self.enter((*best.token_ids, token), self.candidates[0]) for token in self._next_tokens(statistics, bos)
            ]
            better = [each for each in entered if each.perplexity is not None]
            winner = min(better, key=lambda c: c.perplexity or 0.0, default=None)
            if winner is None or winner.perplexity > (1 - _WORTH) * best.perplexity:  # type: ignore[operator]
                return
            best = winner

    def _next_tokens(self, statistics: SpikeStatistics, bos: int) -> Iterator[int]:
        """Yield the token that spikes most at the worst module that has one the prefix lacks."""
        tried = {candidate.token_ids for candidate in self.candidates}
        for module in statistics.ratios():
            for token in qfep.spiking_tokens(statistics, module, bos, 1):
                if token not in statistics.prefix_ids and (*statistics.prefix_ids, token) not in tried:
                    yield token
                    return

    def outcome(self) -> PrefixChoice:
        """Return the winner and everybody's verdict.

        Only who would win is asked whether it leaves the unquantized model as it is; if not, the next one is.
        """
        plain = self._calibration.reference_perplexity(())
        judged: dict[tuple[int, ...], dict[str, object]] = {(): {"reference_perplexity": plain}}
        winner: tuple[int, ...] = ()
        entered = [(each.perplexity, each.token_ids) for each in self.candidates if each.perplexity is not None]
        for _, prefix in sorted(entered, key=lambda each: each[0]):
            if not prefix:
                break
            reference = self._calibration.reference_perplexity(prefix)
            judged[prefix] = {"reference_perplexity": reference}
            if reference <= (1 + NEUTRALITY) * plain:
                winner = prefix
                break
            judged[prefix] |= {"perplexity": None, "verdict": "turned down: changes the unquantized model"}
        return PrefixChoice(
            winner,
            tuple(_with_verdict(each, winner, judged.get(each.token_ids, {})) for each in self.candidates),
            self._calibration.meter.tokens - self._started,
        )


def _with_verdict(candidate: PrefixCandidate, winner: tuple[int, ...], judged: Mapping[str, object]) -> PrefixCandidate:
    """Return the candidate with what was judged of it, and with its place where it is still in the competition."""
    found = candidate.model_copy(update=judged)
    if found.perplexity is None:
        return found
    verdict = "chosen" if candidate.token_ids == winner else "higher perplexity"
    return found.model_copy(update={"verdict": verdict})


def _default_transform(calibration: Calibration, statistics: SpikeStatistics) -> Transform:
    """Return a smoothing without a search: every candidate is judged with the same."""
    if not calibration.options.smoothing:
        return NO_TRANSFORM
    config = calibration.checkpoint.config
    return Transform(smoothing=default_smoothing(statistics, config, calibration.column_amax, rotated=False))


def prefix_text(checkpoint: Checkpoint, token_ids: tuple[int, ...]) -> str:
    """Return the tokens as text; empty without a tokenizer."""
    return str(checkpoint.tokenizer.decode(list(token_ids))) if checkpoint.tokenizer and token_ids else ""


def prefix_notes(checkpoint: Checkpoint, token_ids: tuple[int, ...]) -> tuple[str, ...]:
    """Return what a caller of a model with this prefix has to know: where a second BOS would come from."""
    try:
        return within_budget(partial(_notes, checkpoint, token_ids))
    except BudgetError:  # a text of one letter is too much for its template or tokenizer; then nothing can be said
        return ()


def _notes(checkpoint: Checkpoint, token_ids: tuple[int, ...]) -> tuple[str, ...]:
    tokenizer, bos = checkpoint.tokenizer, checkpoint.bos_token_id
    if tokenizer is None or bos not in token_ids:
        return ()
    notes = []
    if bos in tokenizer.encode("a")[:1]:
        notes.append("the prefix holds BOS: the model's own tokenizer would add a second one; use the bundle's")
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "a"}]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception:  # a template may demand what these messages lack; then nothing can be said
            return tuple(notes)
        if tokenizer.encode(text, add_special_tokens=False)[:1] == [bos]:
            notes.append("the chat template begins with BOS, which the prefix holds already: drop its first token")
    return tuple(notes)
