"""Reports without their pictures, for tests of what surrounds a report: drawing takes a second."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def pictures_left_blank() -> Iterator[None]:
    """Within the block, this process draws none of the pictures of a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spike_export.report.page.svg_text", lambda *_: "<svg></svg>")
        patch.setattr("spike_export.report.page.save_png", lambda *_: None)
        yield
