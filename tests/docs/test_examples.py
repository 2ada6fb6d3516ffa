"""Every command and every Python block that README and the documentation show works, or says why it is not run.

Examples of a page run one after another in a folder of their own, which holds the model, the corpora and the finished
run that all pages speak of. They run as they are written, but for `SMALLER`, `SMALLER_CODE` and `ADDED`: the test's
model is small.
"""

import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import cyclopts
import pytest

from spike_export.cli.main import app
from spike_export.engines.plan.backend import TENSORRT_RTX
from tests.support.documentation import ROOT, Example, code_spans, examples, page_text, pages
from tests.support.tiny.cli_models import SMALL, call, corpus_text, write_model

RUN, SHOWN = ("sh", "python"), ("text", "json", "toml")
"""Languages of blocks that run, and of blocks that are only shown."""

SMALLER: Mapping[str, str] = {
    "2048": "64",
    "4096": "64",
    "1024": "32",
    "60": "4",
    "11.mlp.down_proj": "1.mlp.down_proj",
}
"""Word of a documented command → what the small model has in its place."""

SMALLER_CODE: Mapping[str, str] = {"samples=32": "samples=4", "length=512": "length=32", "layers.11.": "layers.1."}
"""Part of documented Python → what the small model has in its place."""

_WINDOWS, _TARGET, _CORPUS = SMALL, ("--target", "SM86"), ("--corpus", "my_domain.jsonl")
ADDED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "": (_WINDOWS, _CORPUS, _TARGET),
    "calibrate": (_WINDOWS, _CORPUS),
    "check": (_WINDOWS, _CORPUS),
    "revalidate": (_WINDOWS, _CORPUS),
    "build": (_TARGET,),
    "generate": (("--max-new-tokens", "4"),),
}
"""Command, empty for the main job → options added where the documented line does not give them."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }}\n{% endfor %}"

EXAMPLES = [example for page in pages() for example in examples(page)]
RUNNABLE_PAGES = sorted({each.page for each in EXAMPLES if each.language in RUN and each.reason is None})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `path/to/model`, corpora, and what the main job leaves."""
    if importlib.util.find_spec(TENSORRT_RTX.module) is None:
        pytest.skip(f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}")
    folder = tmp_path_factory.mktemp("documentation")
    model = write_model(folder / "path" / "to" / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    records = [{"text": corpus_text()}]
    chats = [{"messages": [{"role": "user", "content": line}]} for line in corpus_text().splitlines()]
    (folder / "other_domain.txt").write_text(corpus_text(seed=1), encoding="utf-8")
    for name, lines in {"my_domain.jsonl": records, "chats.jsonl": chats}.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_command(["spike-export", "path/to/model", "--out", "engine.plan"], "fixture")
    return folder


def smaller(code: str) -> str:
    """Return documented Python, scaled to the small model."""
    for documented, small in SMALLER_CODE.items():
        code = code.replace(documented, small)
    return code


def run_command(words: list[str], place: str) -> None:
    """Run a documented command line, scaled to the small model; fail where its exit code is not 0."""
    if words[0] == "polygraphy":
        assert polygraphy(words[1:]) == 0, f"{place}: {' '.join(words)}"
        return
    assert words[0] == "spike-export", f"{place}: {words[0]}: say why the tests do not run it: <!-- not run: ... -->"
    arguments = [SMALLER.get(word, word) for word in words[1:]]
    command = arguments[0] if arguments[0] in app else ""
    if "--lint" not in arguments and "--help" not in arguments:
        for option, *values in ADDED.get(command, ()):
            arguments += [option, *values] if option not in arguments else []
    done = call(*arguments)
    assert done.code == 0, f"{place}: {' '.join(arguments)}\n{done.err}"


def polygraphy(arguments: list[str]) -> int:
    """Run Polygraphy in this process."""
    tools = pytest.importorskip("polygraphy.tools", reason="Polygraphy is not installed: pip install polygraphy")
    return int(tools.main(arguments))


@pytest.mark.usefixtures("one_thread", "denormals_as_before", "blank_pictures")
@pytest.mark.parametrize("page", RUNNABLE_PAGES)
def test_examples_work(page: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in examples(page):
        if example.reason is not None:
            continue
        if example.language == "python":
            exec(compile(smaller(example.text), example.place, "exec"), names)
        elif example.language == "sh":
            for words in example.commands:
                run_command(words, example.place)


@pytest.mark.parametrize("example", EXAMPLES, ids=[each.place for each in EXAMPLES])
def test_a_block_runs_or_is_only_shown(example: Example) -> None:
    """A language that no test knows would let a block go unnoticed."""
    assert example.language in RUN + SHOWN, f"{example.place}: language {example.language!r}"


@pytest.mark.parametrize("page", pages())
def test_every_fence_belongs_to_a_block(page: str) -> None:
    fences = sum(line.lstrip().startswith("```") for line in page_text(page).splitlines())
    assert fences == 2 * len(examples(page)), f"{page}: a fence that is indented or not closed"


@pytest.mark.parametrize("example", [each for each in EXAMPLES if each.language == "sh"], ids=lambda each: each.place)
def test_command_lines_are_understood(example: Example) -> None:
    """Also those that are not run: by the command's own parser, or by the benchmark's file."""
    for words in example.commands:
        match words:
            case ["spike-export", *arguments]:
                app.parse_args(arguments, exit_on_error=False, print_error=False)
            case ["python", "-m", module, *options]:
                require_benchmark(module, options, example.place)


def require_benchmark(module: str, options: list[str], place: str) -> None:
    """Fail where a benchmark, or one of its options, does not exist; those behind `--` are the main command's."""
    if "--" in options:
        end = options.index("--")
        options, passed_on = options[:end], options[end + 1 :]
        app.parse_args(["model", "--out", "engine.plan", *passed_on], exit_on_error=False, print_error=False)
    file = program(module)
    assert module == "pytest" or file.is_file(), f"{place}: {module} does not exist"
    source = file.read_text(encoding="utf-8") if file.is_file() else ""
    # Benchmarks of one kind share some of their options.
    for shared in re.findall(r"^from (benchmarks\.\S+) import", source, re.MULTILINE):
        source += program(shared).read_text(encoding="utf-8")
    for option in options:
        assert not option.startswith("--") or module == "pytest" or takes(source, option), f"{place}: {option}"


def takes(source: str, option: str) -> bool:
    """Return whether a benchmark's source names an option, or makes one of a dataclass's field of that name."""
    field = rf"^    {option.removeprefix('--').replace('-', '_')}: "
    made = "__dataclass_fields__" in source and re.search(field, source, re.MULTILINE) is not None
    return f'"{option}"' in source or made


def program(module: str) -> Path:
    """Return the file of a module; of a folder, the file that its `__main__.py` takes `main` from."""
    path = ROOT / module.replace(".", "/")
    if not (path / "__main__.py").is_file():
        return path.with_suffix(".py")
    found = re.search(r"^from (\S+) import main$", (path / "__main__.py").read_text(encoding="utf-8"), re.MULTILINE)
    return program(found[1]) if found else path / "__main__.py"


@pytest.mark.parametrize("example", [each for each in EXAMPLES if each.language == "json"], ids=lambda each: each.place)
def test_json_is_json(example: Example) -> None:
    for line in example.text.splitlines():
        json.loads(line)


@pytest.mark.parametrize("example", [each for each in EXAMPLES if each.language == "toml"], ids=lambda each: each.place)
def test_configuration_files_name_real_options(example: Example) -> None:
    tables = {"": tomllib.loads(example.text)}
    tables |= {name: tables[""].pop(name) for name in list(tables[""]) if isinstance(tables[""][name], dict)}
    for command, options in tables.items():
        known = option_names(command)
        assert [name for name in options if f"--{name}" not in known] == [], example.place


@cache
def option_names(command: str = "") -> frozenset[str]:
    """Return the options of a command; of the main job for an empty name."""
    parsed = app[command] if command else app
    return frozenset(name for argument in parsed.assemble_argument_collection() for name in argument.names)


COMMANDS = ("", *(name for name in app if not name.startswith("-")))
ALL_OPTIONS = frozenset({"--help", "--version"}).union(*map(option_names, COMMANDS))

OTHERS: Mapping[str, str] = {
    "--slow": "pytest",
    "--model": "lm_eval",
    "--getPlanVersionOnly": "trtexec",
    "--prefix-and-smoothing": "benchmarks.large.export",
    "--count": "tests.mutants",
    "--test-seconds": "tests.mutants",
}
"""Option of another program → the program."""

BARE_CALLS = (
    ("MODEL", "--out", "PLAN"),
    ("calibrate", "MODEL", "--work-dir", "RUN"),
    ("inspect", "RUN"),
    ("export", "MODEL", "--out", "B"),
    ("check", "B"),
    ("build", "B", "--out", "PLAN"),
    ("generate", "B"),
    ("serve", "B"),
    ("triton", "B", "--out", "REPOSITORY"),
    ("bench", "B"),
)
"""Calls with nothing but what each command requires."""


def mentions(page: str) -> Iterator[list[str]]:
    """Yield the words of every inline code of a page that is a command line or an option."""
    for span in code_spans(page):
        if span.startswith(("spike-export ", "python -m ", "--")):
            yield shlex.split(span)


@pytest.mark.parametrize("page", pages())
def test_options_in_the_text_exist(page: str) -> None:
    for words in mentions(page):
        if words[:2] == ["python", "-m"]:
            require_benchmark(words[2], words[3:], page)
            continue
        command = words[1] if words[0] == "spike-export" else ""
        known = option_names(command) if command in COMMANDS[1:] else ALL_OPTIONS | OTHERS.keys()
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert sorted(options - known) == [], f"{page}: {' '.join(words)}"


@pytest.mark.parametrize("page", pages())
def test_values_of_options_in_the_text_are_accepted(page: str) -> None:
    """An option that is shown with a value is parsed by some command that has the option."""
    for words in mentions(page):
        for shown in with_values(words):
            having = [bare for bare in BARE_CALLS if shown[0] in option_names(bare[0] if bare[0] in COMMANDS else "")]
            assert any(parses(*bare, *shown) for bare in having), f"{page}: {' '.join(shown)}"


def with_values(words: list[str]) -> list[list[str]]:
    """Return options that are shown with values, once for each of `a|b|c`; nothing for an option's bare name."""
    if words[0] not in ALL_OPTIONS or len(words) == 1:
        return []
    numbers = ["1" if word in ("N", "K") else word for word in words[:-1]]
    return [[*numbers, "1" if value in ("N", "K") else value] for value in words[-1].split("|")]


@cache  # pages repeat each other, and the parser takes a hundredth of a second
def parses(*arguments: str) -> bool:
    """Return whether the command's parser takes a command line."""
    try:
        app.parse_args(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError:
        return False
    return True


def test_a_renamed_option_and_a_wrong_value_are_noticed() -> None:
    assert not parses("MODEL", "--out", "PLAN", "--kv-cash", "static")
    assert not parses("MODEL", "--out", "PLAN", "--kv-cache", "elastic")
    with pytest.raises(AssertionError, match="--layer"):
        require_benchmark("benchmarks.large.export", ["--layer", "32"], "here")
    with pytest.raises(AssertionError, match="--peer"):
        require_benchmark("benchmarks.speed", ["--peer"], "here")
    with pytest.raises(AssertionError, match=r"large\.exports does not exist"):
        require_benchmark("benchmarks.large.exports", [], "here")


def test_a_block_without_language_or_with_a_reason_is_seen() -> None:
    text = "a\n\n```\nx\n```\n\n<!-- not run: why -->\n```sh\nspike-export \\\n  b  # c\n```\n"
    bare, reasoned = examples("page.md", text)
    assert (bare.language, bare.line, bare.reason) == ("", 3, None)
    assert (reasoned.reason, reasoned.line, reasoned.commands) == ("why", 8, [["spike-export", "b"]])
