"""`ignore_settings`, and what a plan, a report and the commands say about ignored settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mtj_loader
from mtj_loader.errors import ConfigError, UsageError
from tests.support import neox
from tests.support.command_line import run

NOTE = "ignored settings: unsloth_fixed, welcome"


@pytest.fixture
def greeting(tmp_path: Path) -> Path:
    """A checkpoint with two keys that nothing reads."""
    return neox.write(tmp_path / "model", welcome="hello", unsloth_fixed=True)


def test_a_plan_and_a_report_list_ignored_settings_once(greeting: Path) -> None:
    plan = mtj_loader.plan(greeting, "mp=1")
    assert plan.notes == (NOTE,)
    assert plan.warnings == ()
    assert plan.summary().count("ignored settings") == 1
    assert plan.to_dict()["ignored_settings"] == ["unsloth_fixed", "welcome"]
    report = mtj_loader.load(plan=plan, progress=False).report
    assert report.to_dict()["ignored_settings"] == ["unsloth_fixed", "welcome"]


def test_commands_mention_them(greeting: Path) -> None:
    for command in (["inspect"], ["load", "--mesh", "mp=1"]):
        result = run(*command, greeting)
        assert (result.exit_code, result.stderr) == (0, f"note: {NOTE}\n")
    assert f"\n{NOTE}\n" in run("plan", "--mesh", "mp=1", greeting).stdout + "\n"
    listed = json.loads(run("inspect", "--json", greeting).stdout)
    assert (listed["ignored_settings"], listed["warnings"]) == (["unsloth_fixed", "welcome"], [])


def test_they_are_a_warning_where_the_checkpoint_brings_code(tmp_path: Path) -> None:
    folder = neox.write(tmp_path, welcome="hello", auto_map={"AutoModel": "modeling.Model"})
    plan = mtj_loader.plan(folder, "mp=1")
    assert plan.notes == ()
    (warning,) = plan.warnings
    assert warning.startswith("ignored settings: welcome; the checkpoint brings code of its own")
    assert run("inspect", folder).stderr == f"warning: {warning}\n"


def test_a_refused_setting_can_be_ignored(tmp_path: Path) -> None:
    folder = neox.write(tmp_path, sliding_window=8, eos_token_id="</s>")
    with pytest.raises(ConfigError, match="2 settings cannot be used"):
        mtj_loader.plan(folder, "mp=1")
    plan = mtj_loader.plan(folder, "mp=1", ignore_settings=["sliding_window", "eos_token_id"])
    assert plan.config == mtj_loader.plan(neox.write(tmp_path / "same"), "mp=1").config
    assert plan.warnings == ("ignored settings, as asked for: sliding_window, eos_token_id",)
    assert plan.options.to_dict()["ignore_settings"] == ["sliding_window", "eos_token_id"]


def test_a_refused_setting_can_be_ignored_on_the_command_line(tmp_path: Path) -> None:
    folder = neox.write(tmp_path, sliding_window=8, rope_scaling={"type": "su", "factor": 2.0})
    options = ["--ignore-setting", "sliding_window", "--ignore-setting", "rope_parameters.type"]
    result = run("load", folder, "--mesh", "mp=1", *options)
    warning = "warning: ignored settings, as asked for: sliding_window, rope_parameters.type\n"
    assert result.exit_code == 0
    assert warning in result.stderr


def test_an_unknown_name_is_a_usage_error(greeting: Path) -> None:
    with pytest.raises(UsageError, match="does not have") as caught:
        mtj_loader.plan(greeting, "mp=1", ignore_settings=["sliding_windw"])
    assert caught.value.key == "sliding_windw"
    assert run("plan", greeting, "--ignore-setting", "sliding_windw").exit_code == 2


@pytest.mark.parametrize("value", ["welcome", [1], None, {"welcome": 1}])
def test_ignore_settings_is_a_list_of_keys(greeting: Path, value: object) -> None:
    with pytest.raises(UsageError, match="not a list of keys"):
        mtj_loader.plan(greeting, "mp=1", ignore_settings=value)  # pyright: ignore[reportArgumentType]


def test_messages_about_configs_name_the_file(tmp_path: Path) -> None:
    folder = neox.write(tmp_path, model_type="x" * 3_000_000)
    with pytest.raises(ConfigError, match="unknown model family") as caught:
        mtj_loader.plan(folder, "mp=1")
    assert caught.value.file == f"{folder}/config.json"
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", ["eos_token_id", "hidden_size", "x" * 10_000])
def test_no_message_about_a_config_prints_megabytes(tmp_path: Path, key: str) -> None:
    folder = neox.write(tmp_path, **{key: ["long"] * 500_000}, layer_types="y" * 1_000_000)
    with pytest.raises(ConfigError) as caught:
        mtj_loader.plan(folder, "mp=1")
    assert len(str(caught.value)) < 2000
