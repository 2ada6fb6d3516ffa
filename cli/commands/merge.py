"""`spike-export merge`: the statistics of shards brought together."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spike_export.cli.arguments import AsJson, RunArguments
from spike_export.cli.exit_codes import DONE
from spike_export.cli.invocation import record
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.output import Output


def merge(
    shards: Annotated[tuple[Path, ...], Parameter(help="Work directories of all shards, in any order.")],
    /,
    *,
    work_dir: Annotated[Path, Parameter(help="Folder for the merged statistics; `calibrate` continues there.")],
    as_json: AsJson = False,
    run_options: RunArguments = RunArguments(),
) -> int:
    """Merge the statistics of `calibrate --shard`; `calibrate` without --shard continues with them."""
    from spike_export.pipeline.cluster.shard_merge import merge_shards

    samples = merge_shards(shards, work_dir)
    record(work_dir)
    path = work_dir / "spikes.json"
    line = f"{samples} windows of {len(shards)} shards: {path}"
    document = {"statistics": str(path), "windows": samples, "shards": len(shards)}
    Output(run_options.quiet, as_json).result(document, lambda console: print_lines(console, line))
    return DONE
