"""How much memory the statistics of a calibration will take, asked before the first window."""

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.process.host_memory import require_available
from spike_export.checkpoint.decoder_config import DecoderConfig, linear_shapes
from spike_export.checkpoint.modules import input_sites

_FLOAT = 4

_COPIES = 3
"""The parts, what they are joined to, and what is written."""


def require_statistics_room(config: DecoderConfig, samples: int, length: int) -> None:
    """Refuse a calibration whose statistics do not fit into the memory that is left.

    Args:
        config: The decoder.
        samples: Calibration windows.
        length: Tokens per window, BOS included.

    Raises:
        RecipeError: Names the estimate and what is available.
    """
    shapes = linear_shapes(config)
    widths = [shapes[site.representative][1] for site in input_sites(config)]
    floats = config.num_hidden_layers * sum(length + width + 1 for width in widths)
    require_available(
        _COPIES * _FLOAT * samples * floats,
        f"--samples {samples} --length {length}: the statistics of so many tokens",
        "give fewer samples or a smaller length",
        RecipeError,
    )
