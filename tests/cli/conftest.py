from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import neox


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tiny random GPT-NeoX."""
    return neox.write(tmp_path / "model")
