"""`spike-export merge`: the statistics of shards brought together."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from spike_export.cli.arguments import RunArguments
from spike_export.cli.exit_codes import DONE


def merge(
    shards: Annotated[tuple[Path, ...], Parameter(help="Work directories of all shards, in any order.")],
    /,
    *,
    work_dir: Annotated[Path, Parameter(help="Folder for the merged statistics; `calibrate` continues there.")],
    run_options: RunArguments = RunArguments(),
) -> int:
    """Merge the statistics of `calibrate --shard`; `calibrate` without --shard continues with them."""
    from spike_export.pipeline.shard_merge import merge_shards

    samples = merge_shards(shards, work_dir)
    if not run_options.quiet:
        Console().print(Text(f"{samples} windows of {len(shards)} shards: {work_dir / 'spikes.json'}"), soft_wrap=True)
    return DONE
