"""JAX's compilation cache on disk: which folder is used, and which settings win."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import mtj_loader
from mtj_loader.engine.compilation_cache import (
    compilation_cache_folder,
    default_cache_folder,
    enable_compilation_cache,
)
from tests.support import neox

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)
FOLDER, _, SECONDS = OPTIONS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """JAX with default settings and an empty user cache folder; both are restored afterwards."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, default in zip(OPTIONS, (None, True, 1.0), strict=True):
        jax.config.update(name, default)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache/mtj_loader/xla"
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_folder() == Path("/caches/mtj_loader/xla")
    for nothing in ("", "relative"):  # both are ignored, as the specification says
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert default_cache_folder() == Path("/home/somebody/.cache/mtj_loader/xla")


def test_programs_are_stored_by_default(cache: Path):
    assert enable_compilation_cache() == ()
    assert jax.config.jax_compilation_cache_dir == str(cache)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
    assert cache.stat().st_mode & 0o777 == 0o700
    assert enable_compilation_cache() == ()


def test_existing_jax_settings_are_kept(cache: Path, tmp_path: Path):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    assert enable_compilation_cache() == ()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0
    for folder in (str(tmp_path), ""):  # an empty name turns the cache off
        jax.config.update("jax_compilation_cache_dir", folder)
        assert enable_compilation_cache() == ()
        assert jax.config.jax_compilation_cache_dir == folder
        assert compilation_cache_folder() == (folder or None)


def test_the_default_in_the_environment_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    assert enable_compilation_cache() == ()
    assert compilation_cache_folder() == str(cache)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0


def test_the_cache_can_be_disabled(cache: Path, tmp_path: Path):
    folder = neox.write(tmp_path / "model")
    mtj_loader.load(folder, "mp=1", compilation_cache=False)
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_enable_compilation_cache", False)
    mtj_loader.load(folder, "mp=1")
    assert jax.config.jax_compilation_cache_dir is None
    assert not cache.exists()


def test_a_folder_that_cannot_be_created_is_a_warning(cache: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("a file is in the way")
    model = mtj_loader.load(neox.write(tmp_path / "model"), "mp=1")
    (warning,) = model.report.warnings
    assert warning.startswith("compiled programs are not kept for the next start: ")
    assert str(tmp_path / "cache") in warning
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_written_is_a_warning(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert enable_compilation_cache() == (
        f"compiled programs are not kept for the next start: {cache} is not writable",
    )
    assert jax.config.jax_compilation_cache_dir is None


SETTINGS = """
import json, os, sys
import jax
import mtj_loader
for name, value in json.loads(sys.argv[2]).items():
    jax.config.update(name, value)
before, environment = dict(jax.config.values), dict(os.environ)
model = mtj_loader.load(sys.argv[1], "mp=1")
after = jax.config.values
assert os.environ == environment
print(json.dumps([
    {name: value for name, value in after.items() if value != before[name]},
    model.report.compilation_cache,
    model.report.to_dict()["compilation_cache"],
    "compiled programs in" in str(model.report),
]))
"""


@pytest.mark.parametrize(
    ("environment", "settings", "changed", "folder"),
    [
        ({}, {}, {FOLDER: "OURS", SECONDS: 0.1}, "OURS"),
        ({}, {FOLDER: "/mine", SECONDS: 5.0}, {}, "/mine"),
        ({FOLDER: ""}, {}, {}, None),
    ],
    ids=["nothing", "after the import", "environment"],
)
def test_settings_of_a_program_are_kept(
    tmp_path: Path, environment: dict, settings: dict, changed: dict, folder: str | None
):
    """Those in the environment, and those made after the import; only two are ever changed."""
    ours = str(tmp_path / "cache/mtj_loader/xla")
    theirs = str(tmp_path / "mine")
    paths = json.dumps([environment, settings, changed, folder])
    paths = paths.replace("OURS", ours).replace("/mine", theirs)
    environment, settings, changed, folder = json.loads(paths)
    (found,) = run_script(SETTINGS, tmp_path, json.dumps(settings), **environment)
    assert found == [changed, folder, folder, folder is not None]


def run_script(
    script: str, tmp_path: Path, *arguments: str, times: int = 1, **settings: str
) -> list:
    """Runs a program of a user with an empty cache folder; returns what it prints each time."""
    model = neox.write(tmp_path / "model")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_COMPILATION_CACHE"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {name.upper(): value for name, value in settings.items()}
    command = [sys.executable, "-W", "error", "-c", script, str(model), *arguments]
    return [
        json.loads(subprocess.check_output(command, env=environment, timeout=300))
        for _ in range(times)
    ]


SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event.split("/")[-1]))
jax.jit(jnp.sin)(1.0)  # the cache is enabled after the first compilation
import mtj_loader
mtj_loader.load(sys.argv[1], "mp=1")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
model = mtj_loader.load(sys.argv[1], "mp=1", warm_up=[(1, 5)])
text = model.generate([5, 6], max_new_tokens=4, temperature=0.0)
print(json.dumps([found.count("cache_hits"), text]))
"""


def test_the_next_process_reads_what_this_one_compiled(tmp_path: Path):
    (_, text), (hits, again) = run_script(SCRIPT, tmp_path, times=2)
    assert hits >= 4  # prefill, step, greedy and sampled choice
    assert text == again
    assert list((tmp_path / "cache/mtj_loader/xla").iterdir())
