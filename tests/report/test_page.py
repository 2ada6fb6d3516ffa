"""The report page, its figures and the check table, on a synthetic run directory with a planted spike."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.recipe import (
    CorpusSource,
    CurvePoint,
    ModelSource,
    ModulePlan,
    Prefix,
    PrefixCandidate,
    Recipe,
    Scheme,
    Search,
    recipe_sha256,
    save_recipe,
)
from spike_export.artifacts.results.check_document import load_check
from spike_export.artifacts.results.command_log import COMMANDS_FILE, load_commands, record_command
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics, save_spikes
from spike_export.checkpoint.modules import linears, representatives
from spike_export.report.check_table import gate_sentence, plain_lines, print_check
from spike_export.report.figures.cost_chart import cost_chart
from spike_export.report.figures.drawing import Drawing, save_png, svg_text
from spike_export.report.figures.input_map import input_map, input_table
from spike_export.report.figures.kept_curve import qfem_curve
from spike_export.report.figures.ratio_chart import ratio_chart
from spike_export.report.figures.spike_map import position_edges, spike_map, spike_picture
from spike_export.report.page import write_report
from spike_export.report.spiking_tokens import spiking_tokens
from tests.support.blank_pictures import pictures_left_blank
from tests.support.browser import CHROMIUM, browser
from tests.support.check_costs import cost_document, noise_document
from tests.support.tiny.models import tiny_llama

LAYERS = 4
CONFIG = tiny_llama(layers=LAYERS).checkpoint.config
PLANTED = "model.layers.2.mlp.down_proj"
HOSTILE_ID = 5
HOSTILE_TEXT = "<script>alert(1)</script>"
SVG = "{http://www.w3.org/2000/svg}"


def statistics(spike: float = 5000.0, tokens: int = 200, prefix: tuple[int, ...] = ()) -> SpikeStatistics:
    """Two samples of mild activations with one spike at the first token of `PLANTED`."""
    random = np.random.default_rng(0)
    token_ids = random.integers(6, 20, (2, tokens), dtype=np.int64)
    token_ids[:, 0] = HOSTILE_ID
    modules = {}
    for name in representatives(CONFIG):
        amax = random.uniform(0.9, 1.1, (2, tokens)).astype(np.float32)
        if name == PLANTED:
            amax[:, 0] = spike
        modules[name] = ModuleSpikes(amax, np.ones((2, 8), np.float32), np.ones(2, np.float32))
    return SpikeStatistics(modules, token_ids, prefix)


def recipe(prefix: tuple[int, ...] = (HOSTILE_ID,)) -> Recipe:
    plans = {
        name: ModulePlan(precision="int8", activation_scale=0.01, ratio=1.1, noise=0.5) for name in linears(CONFIG)
    }
    plans[PLANTED] = ModulePlan(precision="float16", ratio=5000.0, reason="ratio <b>over</b> alpha")
    return Recipe(
        model=ModelSource(source="acme/<i>tiny</i>", architecture="llama", sha256="0" * 64),
        corpus=CorpusSource(name="topics", sha256="1" * 64, samples=2, length=200, seed=0),
        scheme=Scheme(),
        alpha=21.5,
        prefix=Prefix(token_ids=prefix, text=HOSTILE_TEXT, ratio=2.0) if prefix else None,
        modules=plans,
        search=Search(
            reference_perplexity=11.0,
            curve=(
                CurvePoint(fp16_modules=0, alpha=9000.0, perplexity=25.0),
                CurvePoint(fp16_modules=1, alpha=21.5, perplexity=12.0),
            ),
            prefixes=(
                PrefixCandidate(
                    token_ids=prefix,
                    text=HOSTILE_TEXT,
                    worst_module=PLANTED,
                    ratio=2.0,
                    perplexity=12.0,
                    verdict="chosen & kept",
                ),
            ),
        ),
    )


NOISE = (
    "Noise floor (4 windows): nudging its embeddings by 1e-06 changes the shipped bundle's perplexity by "
    "-0.01 +/- 0.02 % and its KL divergence by 3e-05 +/- 0.0002 nats per token."
)
WORST = {"window": 3, "position": 71, "divergence": 3.25, "text": "before → behind"}


def check_document() -> dict[str, Any]:
    return {
        "format": 2,
        "corpus": {"name": "[bold]topics[/bold]", "windows": 8, "length": 511, "seed": 3},
        "dtype": "float16",
        "reference": {"perplexity": 11.546, "new_key": 1},
        "variants": [
            {"name": "w8a8", "perplexity": 25.65, "increase": 1.2215},
            {
                "name": "w8a8+qfem+qfep",
                "perplexity": 12.84,
                "increase": 0.1121,
                "cost": cost_document(increase=0.1121, divergence=0.0625, agreement=0.875, margin=0.015, worst=[WORST]),
                "int8_linears": 27,
                "kept_linears": 1,
                "prefix_length": 1,
                "shipped": True,
            },
        ],
        "noise": noise_document(),
        "gates": [{"name": "max-ppl-increase", "limit": 0.05, "value": 0.1271, "passed": False}],
    }


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {f"word{index}": index for index in range(20) if index != HOSTILE_ID}
    path.parent.mkdir(parents=True, exist_ok=True)
    Tokenizer(WordLevel({**vocabulary, HOSTILE_TEXT: HOSTILE_ID}, unk_token="word0")).save(str(path))


def write_run(folder: Path) -> Path:
    """Write a complete work directory."""
    description = {"corpus": {"name": "topics", "sha256": "1" * 64}}
    save_spikes(statistics(), folder / "spikes", description)
    save_spikes(statistics(spike=2.0, prefix=(HOSTILE_ID,)), folder / "spikes_prefixed", description)
    save_recipe(recipe(), folder / "recipe.json")
    write_tokenizer(folder / "bundle" / "tokenizer.json")
    manifest = {
        "format": 1,
        "dtype": "float16",
        "model": {"source": "acme/tiny"},
        "inputs": [{"name": f"past.{i}"} for i in range(60)],
        "linears": {"int8": {"modules": 27, "mac_share": 0.97, "per_token_share": 0.25}},
    }
    (folder / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "check.json").write_text(json.dumps(check_document()))
    engine = {
        "backend": "tensorrt-rtx",
        "targets": ["SM80", "SM120"],
        "plan": {"sha256": "ab", "bytes": 3145728, "size": 3145728},
        "audit": {"int8": 27, "float16": 1, "<img src=x>": None},
    }
    (folder / "engine.json").write_text(json.dumps(engine))
    record_command(folder, ("spike-export", "acme/tiny", "--out", "a b.plan"))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with its report, pictures and all."""
    run = write_run(tmp_path_factory.mktemp("drawn"))
    write_report(run)
    return run


@pytest.fixture
def no_pictures() -> Iterator[None]:
    """For tests of the page's text."""
    with pictures_left_blank():
        yield


class Elements(HTMLParser):
    """Collects tags with their attributes and the text that a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data


def read(run: Path) -> tuple[str, Elements]:
    page = write_report(run).read_text(encoding="utf-8")
    return page, Elements(page)


def seen(run: Path) -> tuple[str, Elements]:
    page = (run / "report.html").read_text(encoding="utf-8")
    return page, Elements(page)


def test_the_page_needs_nothing_from_outside(drawn: Path) -> None:
    page, elements = seen(drawn)
    assert {"script", "link", "iframe", "object", "embed", "base", "form"}.isdisjoint(tag for tag, _ in elements.tags)
    references = [
        value or ""
        for _, attributes in elements.tags
        for name, value in attributes.items()
        if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
    ]
    assert references, "the figures refer to their own shapes and images"
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)|@import", page))
    assert len(page) < 2_000_000


@pytest.mark.usefixtures("no_pictures")
def test_the_page_names_result_planted_module_and_token(run: Path) -> None:
    _, elements = read(run)
    text = elements.text
    assert "Perplexity goes from 11.546 in float32 to 12.840 (+11.2 +/- 1.5 %) as w8a8+qfem+qfep." in text
    assert "27 of 28 linears (96.4 %) run in INT8 behind the prefix" in text
    assert PLANTED in text
    assert HOSTILE_TEXT in text
    assert "window 3, token 71: 3.25 nats before → behind" in " ".join(text.split())
    assert NOISE in text
    assert "MISSED: max-ppl-increase: the 95 % interval ends at 0.1271, limit 0.05" in text
    assert "3,145,728 (3.0 MiB)" in text
    assert "SM80, SM120" in text
    assert "past.7 and 52 more" in text
    assert "spike-export acme/tiny --out 'a b.plan'" in text
    assert f"torch{version('torch')}" in text


def test_texts_from_files_stay_text(drawn: Path) -> None:
    page, elements = seen(drawn)
    assert not any(tag in {"script", "b", "i"} for tag, _ in elements.tags)
    assert "<img src=x>" not in page
    assert "&lt;script&gt;" in page


def test_ids_are_unique_although_the_page_holds_several_figures(drawn: Path) -> None:
    _, elements = seen(drawn)
    assert [tag for tag, _ in elements.tags].count("svg") == 5
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {value for _, a in elements.tags for name, value in a.items() if name == "xlink:href" and value}
    assert {value[1:] for value in targets if value.startswith("#")} <= set(ids)


def test_writing_twice_gives_the_same_bytes(drawn: Path) -> None:
    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (drawn / "report.html", *(drawn / "pictures").iterdir())}

    first = written()
    assert set(first) == {
        "report.html",
        *(f"{name}.{kind}" for name in ("cost", "spikes", "ratios", "curve", "inputs") for kind in ("svg", "png")),
    }
    write_report(drawn)
    assert written() == first


def test_pictures_lie_beside_the_page(drawn: Path) -> None:
    for path in (drawn / "pictures").iterdir():
        if path.suffix == ".svg":
            assert ElementTree.fromstring(path.read_text(encoding="utf-8")).get("viewBox")
        else:
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.usefixtures("no_pictures")
def test_a_file_in_place_of_the_pictures_is_refused(run: Path) -> None:
    (run / "pictures").write_text("mine")
    with pytest.raises(ArtifactError, match=r"pictures: cannot be written .*move what is there away"):
        write_report(run)
    assert (run / "pictures").read_text() == "mine"


def test_marks_tell_their_values(drawn: Path) -> None:
    titles = {
        name: [
            element.text
            for element in ElementTree.fromstring((drawn / "pictures" / f"{name}.svg").read_text()).iter(f"{SVG}title")
        ]
        for name in ("cost", "spikes", "ratios", "curve", "inputs")
    }
    assert f"{PLANTED}: ratio 2.0, 4,998.0 without the prefix; float16" in [
        re.sub(r"4,99\d\.\d|5,0\d\d\.\d", "4,998.0", title or "") for title in titles["ratios"]
    ]
    assert "layer 2, position 0: 5000" in titles["spikes"]
    assert titles["curve"] == ["0 linears kept: perplexity 25", "1 linears kept: perplexity 12"]
    assert titles["cost"][0] == "[bold]topics[/bold]: 11.21 +/- 1.5 (perplexity's increase in %)"
    assert len(titles["inputs"]) == 4 * LAYERS


def test_tables_and_marks_can_be_reached_by_keyboard_and_have_names(drawn: Path) -> None:
    page, elements = seen(drawn)
    regions = [attributes for tag, attributes in elements.tags if attributes.get("role") in ("region", "img")]
    assert len(regions) > 10
    assert all(each.get("tabindex") == "0" and each.get("aria-label") for each in regions)
    ids = {attributes.get("id") for _, attributes in elements.tags}
    links = [attributes["href"] or "" for tag, attributes in elements.tags if tag == "a"]
    assert {link[1:] for link in links} <= ids
    assert len(links) == 7
    assert page.count("<details>") == 5


def test_figures_of_the_page_are_those_of_the_documents(drawn: Path) -> None:
    check = check_document()
    cost = check["variants"][1]["cost"]
    text = " ".join(seen(drawn)[1].text.split())
    assert "Perplexity, [bold]topics[/bold]+11.2 +/- 1.5 %" in text
    assert f"Same next token, [bold]topics[/bold]{100 * cost['top1_agreement']['mean']:.2f} %" in text
    assert "97.0% int8 (25% with a scale per token)" in text
    assert "Plan engine3.1 MB" in text
    assert "1 of 1 limits are missed: max-ppl-increase." in text
    assert "[bold]topics[/bold]+11.2 +/- 1.5 %0.0625 +/- 0.0150.010.53.287.5 +/- 1.5 %" in text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("gates", "sentence"),
    [
        (
            [],
            "No limit was set. On every text the 95 % interval of the perplexity's increase ends at +12.71 % or below.",
        ),
        ([{"name": "max-kl", "limit": 1, "value": 0.5, "passed": True}], "All limits are kept (1)."),
    ],
    ids=["no limit", "kept"],
)
def test_the_verdict_stands_on_the_first_screen(run: Path, gates: list[dict[str, Any]], sentence: str) -> None:
    (run / "check.json").write_text(json.dumps(check_document() | {"gates": gates}))
    assert sentence in read(run)[1].text


@pytest.mark.usefixtures("no_pictures")
def test_what_was_measured_of_the_inputs_is_preferred_and_damage_is_said(run: Path) -> None:
    caption = "From which inputs the {} comes."
    assert caption.format("estimated noise of INT8") in read(run)[1].text
    measured = {"recipe_sha256": recipe_sha256(recipe()), "windows": 1, "divergence": 0.5}
    inputs = {PLANTED: {"alone": 0.3, "without": 0.1}, "model.layers.0.mlp.down_proj": {"alone": 0.1, "without": 0.4}}
    (run / "attribution.json").write_text(json.dumps(measured | {"inputs": inputs}))
    text = read(run)[1].text
    assert caption.format("divergence measured alone") in text
    assert "75.0%" in text
    (run / "attribution.json").write_text("{")
    assert "attribution.json: cannot read what each input causes" in read(run)[1].text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_the_page_without_asking_anyone(drawn: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile", dark=True) as page:
        address = (drawn / "report.html").as_uri()
        page.open(address)
        assert [each for each in page.requested if not each.startswith("data:")] == [address]
        assert page.errors == []
        assert page.run("document.querySelectorAll('svg').length") == 5
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
        assert page.run("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (["check.json"], "The accuracy has not been checked yet."),
        (["engine.json"], "No engine has been built yet."),
        (["bundle/manifest.json"], "The model has not been exported yet."),
        (["spikes_prefixed.json"], "No prefix was measured."),
        (["spikes.json"], "No activations were measured."),
        (["recipe.json"], "There is no recipe."),
        (["recipe.json", "spikes.json", "spikes_prefixed.json"], "Exported in float16 without a recipe."),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_a_missing_part_is_said_in_one_sentence(run: Path, missing: list[str], sentence: str) -> None:
    for name in missing:
        (run / name).unlink()
    _, elements = read(run)
    assert sentence in elements.text


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_part_is_said_and_the_rest_is_shown(run: Path) -> None:
    (run / "check.json").write_text('{"reference": {}}')
    (run / "engine.json").write_text("[1]")
    _, elements = read(run)
    assert "reference.perplexity: Field required; run the check again" in elements.text
    assert "engine.json: cannot be read (expected an object)" in elements.text
    assert PLANTED in elements.text


@pytest.mark.usefixtures("no_pictures")
def test_statistics_of_another_prefix_are_left_out(run: Path) -> None:
    save_recipe(recipe(prefix=(7,)), run / "recipe.json")
    _, elements = read(run)
    assert "the recipe has another prefix, or none" in elements.text


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing to report; name the work directory of a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_pictures")
def test_without_a_tokenizer_ids_are_shown(run: Path) -> None:
    (run / "bundle" / "tokenizer.json").unlink()
    _, elements = read(run)
    assert f"token {HOSTILE_ID}" in elements.text


@pytest.mark.usefixtures("no_pictures")
def test_the_engine_sidecar_may_lie_elsewhere(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("plan") / "engine.json"
    elsewhere.write_text('{"backend": "tensorrt-11"}')
    assert "tensorrt-11" in Elements(write_report(run, engine=elsewhere).read_text(encoding="utf-8")).text


def test_the_planted_token_stands_out_most() -> None:
    first, second = spiking_tokens(statistics())[:2]
    assert (first.module, first.token_id, first.position) == (PLANTED, HOSTILE_ID, 0)
    assert first.amax == 5000.0
    assert first.ratio == pytest.approx(5000.0, rel=0.1)  # the other tokens lie within 0.9 and 1.1
    assert second.ratio < 1.3


def test_the_map_shows_each_first_position_alone_and_loses_no_peak() -> None:
    recorded = statistics(tokens=500)
    recorded.modules[PLANTED].token_amax[1, 321] = 77.0
    picture = spike_map(recorded)
    assert picture is not None
    row = picture.amax[picture.layers.index(2)]
    assert row[0] == 5000.0
    cell = int(np.searchsorted(picture.edges, 321, side="right")) - 1
    assert row[cell] == 77.0
    assert np.delete(row, [0, cell]).max() < 1.2


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 66, 511, 4096])
def test_cells_cover_all_positions_once(tokens: int) -> None:
    edges = position_edges(tokens)
    assert (edges[0], edges[-1]) == (0, tokens)
    assert (np.diff(edges) > 0).all()
    assert (np.diff(edges)[:64] == 1).all()


def test_pictures_are_well_formed_and_say_what_they_show() -> None:
    before, after = statistics(), statistics(spike=2.0, prefix=(1,))
    drawings = {
        "map": (spike_picture(before, after), ["With the prefix (1 token) in place", "decoder layer"]),
        "bars": (ratio_chart(after, recipe(), before), ["kept (float16)", "INT8", "alpha = 21.5"]),
        "curve": (qfem_curve(recipe().search.curve, 11.0, 1, "float16"), ["the recipe: 1 kept, 12"]),
        "inputs": (input_map({PLANTED: 0.75, "model.layers.0.self_attn.q_proj": 0.25}, "noise"), ["down  75%"]),
    }
    for name, (drawing, labels) in drawings.items():
        assert drawing is not None
        svg = svg_text(drawing, name)
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("viewBox")
        texts = {element.text for element in root.iter(f"{SVG}text")}
        assert set(labels) <= texts
        assert len(svg) < 200_000


def test_inputs_are_summed_by_what_reads_them() -> None:
    shares = {PLANTED: 0.5, "model.layers.0.mlp.down_proj": 0.2, "model.layers.1.self_attn.q_proj": 0.3, "head": 1.0}
    assert input_table(shares) == {"down": {2: 0.5, 0: 0.2}, "q, k, v": {1: 0.3}}
    assert input_map({}, "noise") is None
    assert cost_chart({}) is None


def test_a_mark_tells_markup_as_text() -> None:
    drawing = Drawing(Figure())
    (line,) = drawing.figure.subplots().plot([0.0], [1.0])
    drawing.tell(line, "<script>")
    titles = [element.text for element in ElementTree.fromstring(svg_text(drawing, "x")).iter(f"{SVG}title")]
    assert titles == ["<script>"]


def test_pictures_bear_names_that_look_like_formulas_or_markup() -> None:
    mild = statistics().modules[PLANTED]
    odd = SpikeStatistics({"a$x_{$b": mild, "<script>": mild}, statistics().token_ids)
    figure = ratio_chart(odd)
    assert figure is not None
    texts = {element.text for element in ElementTree.fromstring(svg_text(figure, "odd")).iter(f"{SVG}text")}
    assert {"a$x_{$b", "<script>"} <= texts
    assert spike_picture(odd) is None


def test_pictures_survive_degenerate_values() -> None:
    flat = SpikeStatistics(
        {PLANTED: ModuleSpikes(np.zeros((1, 3), np.float32), np.zeros((1, 4), np.float32), np.zeros(1, np.float32))},
        np.zeros((1, 3), np.int64),
    )
    figure = spike_picture(flat)
    assert figure is not None
    ElementTree.fromstring(svg_text(figure, "flat"))
    assert ratio_chart(flat) is None
    assert qfem_curve((CurvePoint(fp16_modules=0, alpha=1.0, perplexity=float("inf")),), 11.0, 0, "float16") is None


def test_png_is_written_whole(tmp_path: Path) -> None:
    figure = spike_picture(statistics())
    assert figure is not None
    save_png(figure, tmp_path / "spikes.png", dpi=50)
    assert (tmp_path / "spikes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["spikes.png"]


def printed(run: Path, terminal: bool) -> str:
    stream = StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, color_system="standard" if terminal else None)
    print_check(load_check(run / "check.json"), console)
    return stream.getvalue()


def test_the_check_on_a_terminal_is_a_table(run: Path) -> None:
    text = printed(run, terminal=True)
    assert "\x1b[" in text
    assert "w8a8+qfem+qfep (shipped)" in text
    assert "[bold]topics[/bold]" in text, "markup in names is shown, not obeyed"
    assert "MISSED" in text


def test_the_check_in_a_pipe_is_plain_aligned_text(run: Path) -> None:
    text = printed(run, terminal=False)
    assert re.fullmatch(r"[\n\x20-\x7e]*", text)
    cost, noise, _, header, reference, *rows = text.splitlines()
    assert noise.startswith(NOISE)
    assert cost.startswith("w8a8+qfem+qfep against the unquantized model: perplexity +11.2 +/- 1.5 % (95 % interval")
    assert header.index("perplexity") + len("perplexity") == reference.index("11.546") + len("11.546")
    assert rows[0].split() == ["w8a8", "25.650", "n/a", "n/a", "n/a", "n/a", "n/a"]
    assert rows[1].split()[-5:] == ["87.50", "%", "0.0625", "27", "1"]
    assert rows[2] == gate_sentence(load_check(run / "check.json").gates[0])


def test_an_escape_character_in_a_name_does_not_reach_the_terminal(run: Path) -> None:
    document = check_document()
    document["variants"][0]["name"] = "w8a8\x1b[2J"
    (run / "check.json").write_text(json.dumps(document))
    assert "w8a8\\x1b[2J" in "\n".join(plain_lines(load_check(run / "check.json")))
    assert "\x1b[2J" not in printed(run, terminal=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"reference": {"perplexity": "many"}}'])
def test_a_check_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "check.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=r"check\.json.*run the check again"):
        load_check(path)


@pytest.mark.usefixtures("no_pictures")
def test_speeds_are_shown_where_they_were_measured_and_damage_is_said(run: Path) -> None:
    assert "Speed" not in read(run)[1].text
    times = {"time_to_first_token": {"p50": 0.0125, "p90": 0.02, "p99": 0.05}}
    nothing = {"time_per_token": dict.fromkeys(("p50", "p90", "p99"))}
    loads = [{"concurrency": 1, "requests": 4, "tokens_per_second": 81.25, "errors": 0, **times, **nothing}]
    (run / "speed.json").write_text(json.dumps(loads))
    text = read(run)[1].text
    assert "Speed, 1 client81.25 tokens/s" in text
    assert "1481.2512.550n/an/a" in "".join(text.split())
    (run / "speed.json").write_text("[1]")
    text = read(run)[1].text
    assert "speed.json: 0: Input should be an object" in text
    assert "; write it anew with bench --json." in text


@pytest.mark.usefixtures("no_pictures")
def test_commands_are_kept_once_each_and_damage_is_said(run: Path) -> None:
    for name in ("one", "two", "one", *map(str, range(30))):
        record_command(run, ("spike-export", name))
    record_command(run, ())
    words = [command.words[1] for command in load_commands(run / COMMANDS_FILE).commands]
    assert words == [str(each) for each in range(10, 30)]
    record_command(run, ("spike-export", "15"))
    assert load_commands(run / COMMANDS_FILE).commands[-1].words[1] == "15"
    (run / COMMANDS_FILE).write_text("{")
    text = read(run)[1].text
    assert "commands.json: the document: Invalid JSON: EOF while parsing an object" in text
    assert "; delete the file." in text
    record_command(run, ("spike-export", "anew"))
    assert [command.words[1] for command in load_commands(run / COMMANDS_FILE).commands] == ["anew"]
    (run / COMMANDS_FILE).unlink()
    assert "No command line was recorded" in read(run)[1].text
