from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import command_line, neox


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tiny random GPT-NeoX."""
    return neox.write(tmp_path / "model")


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    command_line.kill_started()
