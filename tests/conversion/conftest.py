from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import conversions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a small checkpoint."""
    return conversions.write(tmp_path / "tiny")
