"""The command `spike-export`: the main job, and each stage alone.

Imports that take long (torch, transformers, onnx) stay inside the commands, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import cyclopts
from cyclopts import App

from spike_export.artifacts.errors import SpikeExportError
from spike_export.artifacts.visible_text import visible
from spike_export.cli.commands.bench import bench
from spike_export.cli.commands.build import build
from spike_export.cli.commands.calibrate import calibrate
from spike_export.cli.commands.check import check
from spike_export.cli.commands.diff import diff
from spike_export.cli.commands.export import export
from spike_export.cli.commands.generate import generate
from spike_export.cli.commands.inspect import inspect
from spike_export.cli.commands.job import job
from spike_export.cli.commands.merge import merge
from spike_export.cli.commands.report import report
from spike_export.cli.commands.revalidate import revalidate
from spike_export.cli.commands.serve import serve
from spike_export.cli.commands.triton import triton
from spike_export.cli.config_file import config_path, require_config, require_text
from spike_export.cli.crash import report_crash
from spike_export.cli.exit_codes import BAD_INPUT, DONE, INTERRUPTED, PROGRAM_FAULT
from spike_export.cli.invocation import COMMAND
from spike_export.cli.repeatable import multiply_repeatably
from spike_export.cli.terminal.messages import say
from spike_export.cli.waiting import wait_asleep

app = App(
    name="spike-export",
    help="From a GLU language model to an INT8 engine that keeps its accuracy.",
    version=lambda: version("spike-export"),
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` says what is kept
)
app.default(job)
for command in (
    calibrate,
    merge,
    inspect,
    diff,
    revalidate,
    export,
    check,
    build,
    generate,
    serve,
    triton,
    bench,
    report,
):
    app.command(command)


def main() -> None:
    """Run the command line and leave with its exit code."""
    wait_asleep(os.environ)
    multiply_repeatably(os.environ)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code.

    The code is 0 when done, 1 when a limit was missed, 2 for bad input, 3 for a fault of the program, and 130 when
    interrupted.
    """
    try:
        require_text(arguments, "the command line")
        COMMAND.set((app.name[0], *arguments))
        path = config_path(arguments)
        if path:
            require_config(path, app)
        app.config = [cyclopts.config.Toml(path, must_exist=True)] if path else []
        code = app(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        return _fail(str(error))
    except SpikeExportError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        say("interrupted; finished stages are kept, and the same command continues from there")
        return INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:  # tokenizers, for one, panics with an exception that is no Exception
        given = _given(arguments)
        debug = "--debug" in arguments or getattr(given.get("run_options"), "debug", False)
        report_crash(error, given.get("work_dir") or given.get("run_directory"), debug=debug)
        return PROGRAM_FAULT
    return code if isinstance(code, int) else DONE


def _given(arguments: Sequence[str]) -> Mapping[str, Any]:
    """Return what a command was given, by parameter, with the main job's work directory; nothing if that fails too."""
    try:
        command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        from spike_export.engines.plan.paths import run_folder

        work_dir = {"work_dir": run_folder(bound.arguments["out"])} if command is job else {}
        return work_dir | bound.arguments
    except Exception:
        return {}


def _fail(message: str) -> int:
    say(f"error: {visible(' '.join(message.split()))}")
    return BAD_INPUT
