from pathlib import Path

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.process.host_memory import available_memory
from spike_export.engines.build.host_memory import estimate_build_memory, require_memory

GB = 10**9


@pytest.mark.parametrize(
    ("weights", "profiles", "measured"),
    [
        (0.222, 2, 1.40),  # 30 layers of 576, four targets
        (1.58, 1, 6.5),  # 24 layers of 2048: decode only, not streamed
        (1.58, 2, 9.3),
        (2.27, 1, 7.1),  # 8 layers of 4096
        (2.27, 2, 11.2),
    ],
)
def test_the_estimate_covers_what_was_measured_and_not_much_more(
    weights: float, profiles: int, measured: float
) -> None:
    estimate = estimate_build_memory(int(weights * GB), profiles) / GB
    assert measured <= estimate <= 1.5 * measured


def test_a_build_that_does_not_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(EngineError) as caught:
        require_memory(8 << 30, 2, 16 << 30)
    message = str(caught.value)
    assert "about 48.5 GiB" in message
    assert "16.0 GiB are available" in message
    assert "--profiles split" in message
    assert "--ignore-memory" in message


def test_a_build_that_fits_or_cannot_be_judged_goes_on() -> None:
    for size, profiles, available in ((1 << 30, 1, 5 << 30), (1 << 40, 2, None)):
        assert require_memory(size, profiles, available) is None


def test_available_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:    40 kB\n", encoding="ascii")
    assert available_memory(meminfo) == 40 * 1024
    assert available_memory(tmp_path / "none") is None
