"""The command line: what it prints and where, and the exit code of every kind of failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from typer.testing import CliRunner, Result

import mtj_loader
from mtj_loader.cli.app import app
from mtj_loader.loading.stream import Streamer
from tests.support import neox
from tests.support.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests/data/shakespeare-neox"
COMMANDS = ["inspect", "plan", "load", "generate"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments: object, script: str | None = None) -> subprocess.Popen[str]:
    """A process of its own: `mtj-loader …`, or a script that is given these arguments."""
    program = ["-m", "mtj_loader.cli"] if script is None else ["-c", script]
    return subprocess.Popen(
        [sys.executable, "-W", "error", *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return neox.write(tmp_path / "model")


# Help and version.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: mtj-loader {command}" in result.stdout
    assert "--debug" in result.stdout


def test_help_shows_brackets():
    assert "[out, in]" in re.sub(r"[│\s]+", " ", run("load", "--help").stdout)


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"mtj-loader {mtj_loader.__version__}\n")


def test_help_and_inspect_do_without_jax_and_the_hub():
    script = (
        "import sys; from mtj_loader.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False); "
        "sys.exit(' '.join({'jax', 'huggingface_hub'} & set(sys.modules)) or 0)"
    )
    for arguments in (["--help"], ["inspect", str(FIXTURE)]):
        process = start(*arguments, script=script)
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (0, "")


# inspect.


def test_inspect_folds_layers():
    result = run("inspect", FIXTURE)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[:3] == [
        f"checkpoint  {FIXTURE}",
        "model       gpt_neox",
        "tensors     76 with 3,822,720 weights, 7.65 MB in 2 files",
    ]
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[6:]]
    file = "model-00001-of-00002.safetensors"
    assert rows[0] == ["gpt_neox.embed_in.weight", "BF16", "[3003, 192]", file, "1.15 MB"]
    dense = "gpt_neox.layers.{0...5}.attention.dense.weight"
    assert [dense, "BF16", "[192, 192]", "2 files", "442.37 kB"] in rows
    assert rows[-1][0] == "embed_out.weight"


def test_inspect_cuts_no_name_and_has_no_color(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stdout = run("inspect", FIXTURE).stdout
    assert "gpt_neox.layers.{0...5}.post_attention_layernorm.weight  " in stdout
    assert "\x1b" not in stdout


def test_topology_follows_the_model(tmp_path: Path):
    arrays = neox.tensors()
    alphabetical = {name: arrays[name] for name in sorted(arrays)}  # as files have them
    result = run("inspect", neox.write(tmp_path, alphabetical), "--topology")
    blocks = result.stdout.split("\n\n")
    assert len(blocks) == 4
    assert blocks[0] == "gpt_neox.embed_in.weight torch.Size([29, 24])"
    assert blocks[2].splitlines() == [
        "gpt_neox.layers.1.input_layernorm.weight torch.Size([24])",
        "gpt_neox.layers.1.input_layernorm.bias torch.Size([24])",
        "gpt_neox.layers.1.post_attention_layernorm.weight torch.Size([24])",
        "gpt_neox.layers.1.post_attention_layernorm.bias torch.Size([24])",
        "gpt_neox.layers.1.attention.query_key_value.weight torch.Size([72, 24])",
        "gpt_neox.layers.1.attention.query_key_value.bias torch.Size([72])",
        "gpt_neox.layers.1.attention.dense.weight torch.Size([24, 24])",
        "gpt_neox.layers.1.attention.dense.bias torch.Size([24])",
        "gpt_neox.layers.1.mlp.dense_h_to_4h.weight torch.Size([40, 24])",
        "gpt_neox.layers.1.mlp.dense_h_to_4h.bias torch.Size([40])",
        "gpt_neox.layers.1.mlp.dense_4h_to_h.weight torch.Size([24, 40])",
        "gpt_neox.layers.1.mlp.dense_4h_to_h.bias torch.Size([24])",
    ]
    assert blocks[3].splitlines() == [
        "gpt_neox.final_layer_norm.weight torch.Size([24])",
        "gpt_neox.final_layer_norm.bias torch.Size([24])",
        "embed_out.weight torch.Size([29, 24])",
    ]


def test_topology_without_base_prefix_and_with_unknown_tensors(tmp_path: Path):
    arrays = {name.removeprefix("gpt_neox."): array for name, array in neox.tensors().items()}
    arrays |= {"layers.0.extra": np.zeros(()), "extra": np.zeros((0, 2))}
    arrays = {name: array.astype(np.float32) for name, array in sorted(arrays.items())}
    blocks = run("inspect", neox.write(tmp_path, arrays), "--topology").stdout.split("\n\n")
    assert blocks[0] == "embed_in.weight torch.Size([29, 24])"
    assert blocks[1].endswith("\nlayers.0.extra torch.Size([])")
    assert blocks[3].endswith("\nextra torch.Size([0, 2])\n")


@pytest.mark.parametrize("model_type", ["no_such_family", "../gpt_neox", 7, None])
def test_topology_of_an_unknown_family_counts(tmp_path: Path, model_type: object):
    names = ["h.10.w", "h.2.w", "h.2.b", "a.weight"]
    tensors = {name: np.zeros((2,), np.float32) for name in names}
    folder = write_checkpoint(tmp_path, {"m.safetensors": tensors}, {"model_type": model_type})
    result = run("inspect", folder, "--topology")
    wanted = ["a.weight", "", "h.2.b", "h.2.w", "", "h.10.w"]
    assert result.stdout.splitlines() == [n and f"{n} torch.Size([2])" for n in wanted]


def test_inspect_warns_on_stderr(model: Path):
    (model / "other.safetensors").write_bytes(b"")
    result = run("inspect", model)
    assert result.stderr == (
        "warning: not read: other.safetensors; the weights are model.safetensors\n"
    )
    assert "other" not in result.stdout


def test_json_and_topology_exclude_each_other(model: Path):
    result = run("inspect", model, "--json", "--topology")
    assert result.exit_code == 2
    assert result.stderr == "error: --json and --topology exclude each other\n"


# plan.


def test_plan_prints_the_summary():
    result = run("plan", FIXTURE, "--mesh", "dp=2,mp=4", "--hosts", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    topology = mtj_loader.make_abstract_mesh("dp=2,mp=4", hosts=2)
    assert result.stdout == mtj_loader.plan(FIXTURE, topology).summary() + "\n"


def test_plan_needs_no_devices():
    result = run("plan", FIXTURE, "--mesh", "dp=64,mp=8", "--hosts", "128", "--transposed-linear")
    assert result.exit_code == 0
    assert "dp=64, mp=8: 512 devices on 128 hosts" in result.stdout
    assert "linear weights [out, in]" in result.stdout


def test_plan_without_a_mesh_takes_the_devices():
    assert "dp=1, mp=8: 8 devices on 1 host" in run("plan", FIXTURE).stdout


# load.


def test_load_reports_and_verifies(model: Path):
    result = run("load", model, "--mesh", "dp=2,mp=4", "--verify")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"gpt_neox from {model} on dp=2, mp=4 (8 cpu devices)"
    assert lines[1].startswith("28 parameters, ")
    assert re.fullmatch(
        r"verified: all [0-9.]+ kB on the devices are as the files have it", lines[2]
    )
    assert result.stderr == "verifying: reading everything again\n"


def test_verify_finds_a_wrong_byte(model: Path, monkeypatch: pytest.MonkeyPatch):
    original = Streamer.run

    def spoiled(self: Streamer) -> object:
        params = original(self)
        module = params["causal_transformer_shard/~/layer_0/~/linear_4"]
        module["b"] = module["b"].at[1, 3].add(1)
        return params

    monkeypatch.setattr(Streamer, "run", spoiled)
    result = run("load", model, "--mesh", "mp=2", "--verify")
    assert result.exit_code == 3
    assert "causal_transformer_shard/~/layer_0/~/linear_4 b" in result.stderr
    assert "cpu:1" in result.stderr


def test_report_file_is_what_json_prints(model: Path, tmp_path: Path):
    result = run("load", model, "--report", tmp_path / "report.json", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "report.json").read_text())


@pytest.mark.parametrize("option", ["--report", "--digests"])
def test_files_that_cannot_be_written(model: Path, tmp_path: Path, option: str):
    result = run("load", model, "--mesh", "mp=1", option, "/dev/full")
    assert result.exit_code == 4
    assert result.stderr.startswith("error: cannot write the file\n  file: /dev/full\n")
    result = run(
        "load", tmp_path / "no-model", option, tmp_path / "no/file.json"
    )  # before all else
    assert result.exit_code == 4
    assert result.stderr.startswith(
        f"error: cannot write the file\n  file: {tmp_path}/no/file.json"
    )


def test_warnings_of_a_load_go_to_stderr(tmp_path: Path):
    folder = neox.write(tmp_path, neox.tensors() | {"extra": np.zeros((3,), np.float32)})
    result = run("load", folder, "--mesh", "mp=1", "--allow-unmapped")
    assert result.exit_code == 0
    assert result.stderr == "warning: skipped extra: it is not in the weight map\n"


# generate.


def test_generate_prints_the_continuation_alone():
    greedy = json.loads((ROOT / "tests/data/shakespeare-greedy.json").read_text())[0]
    arguments = ["--prompt", greedy["prompt"], "--max-new-tokens", "6", "--temperature", "0"]
    result = run("generate", FIXTURE, *arguments, "--dtype", "float32", "--mesh", "mp=2")
    assert result.exit_code == 0
    tokenizer = tokenizers.Tokenizer.from_file(str(FIXTURE / "tokenizer.json"))
    assert result.stdout == tokenizer.decode(greedy["new_ids"][:6]) + "\n"
    assert result.stderr.startswith(f"gpt_neox from {FIXTURE} on dp=1, mp=2 (2 cpu devices)\n")


def test_generate_reads_prompts_from_everywhere(tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("JULIET.\n")
    arguments = ["--ids", "5, 6 7", "--prompt-file", tmp_path / "prompt.txt", "--prompt", "ROMEO."]
    sampling = ["--max-new-tokens", "3", "--temperature", "0", "--mesh", "mp=1"]
    result = run("generate", FIXTURE, *arguments, *sampling, "--json")
    assert result.exit_code == 0
    completions = json.loads(result.stdout)["completions"]
    assert [c["prompt"] for c in completions] == ["ROMEO.", "JULIET.\n", [5, 6, 7]]
    assert [type(c["completion"]) for c in completions] == [str, str, list]


def test_generate_several(model: Path):
    sampling = ["--max-new-tokens", "2", "--temperature", "0", "--mesh", "mp=1"]
    result = run("generate", model, "--ids", "1 2 3", "--ids", "4", *sampling)
    assert re.fullmatch(r"\[1\] 1 2 3 \d+ \d+\n\n\[2\] 4 \d+ \d+\n\n", result.stdout)


def test_generate_streams_ids(model: Path):
    arguments = ["--ids", "1 2 3", "--max-new-tokens", "3", "--temperature", "0", "--mesh", "mp=1"]
    result = run("generate", model, *arguments)
    assert re.fullmatch(r"(\d+ ){3}\n", result.stdout)


# The documented keys.


def documented() -> dict[str, set[str]]:
    """The keys that docs/json.md names, by command."""
    keys: dict[str, set[str]] = {}
    for section in (ROOT / "docs/json.md").read_text().split("\n## ")[1:]:
        cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
        keys[section.split()[0]] = {k for cell in cells for k in re.findall(r"`([^`]+)`", cell)}
    shared = {key for key in keys["inspect"] if key.startswith("tensors[].")}
    keys["plan"] = keys["plan"] - {"parameters[].tensors[]"} | {f"parameters[].{k}" for k in shared}
    return {command: {key.rstrip("[]") for key in named} for command, named in keys.items()}


def paths(value: object, path: str = "") -> Iterator[str]:
    """Every leaf of a document, in the notation of docs/json.md."""
    if isinstance(value, dict):
        is_data = path.endswith(("host_read_bytes", "host_received_bytes", "dtype_changes"))
        for key, item in value.items():
            yield from paths(item, f"{path}.{'*' if is_data else key}".removeprefix("."))
    elif isinstance(value, list) and value:
        for item in value:
            yield from paths(item, path + "[]")
    else:
        yield path.rstrip("[]")


@pytest.mark.parametrize("command", COMMANDS)
def test_json_has_the_documented_keys(tmp_path: Path, command: str):
    arrays = neox.tensors()
    arrays["embed_out.weight"] = arrays["gpt_neox.embed_in.weight"]
    arrays |= {"gpt_neox.layers.0.attention.masked_bias": np.zeros((1,), np.float32)}
    arrays |= {"extra": np.zeros((1,), np.float32)}
    folder = neox.write(tmp_path, arrays, tie_word_embeddings=True)
    loading = [] if command == "inspect" else ["--mesh", "mp=1", "--allow-unmapped"]
    prompt = ["--ids", "1", "--max-new-tokens", "1"] if command == "generate" else []
    result = run(command, folder, "--json", *loading, *prompt)
    assert result.exit_code == 0
    found = {path.rstrip("[]") for path in paths(json.loads(result.stdout))}
    assert found == documented()[command]


# Failures.


def cases() -> dict[str, tuple[int, str, list[str]]]:
    """What is wrong: the exit code, how the message begins, the arguments after the fixture."""
    return {
        "wrong mesh": (2, "cannot read the mesh", ["--mesh", "8"]),
        "shards": (2, "5 shards do not divide the model: heads (8)", ["--mesh", "mp=5"]),
        "devices": (4, "the mesh dp=2, mp=8 needs more devices", ["--mesh", "dp=2,mp=8"]),
        "host memory": (2, "host_memory is too small", ["--host-memory", "1MiB"]),
        "size": (2, "cannot read a size", ["--host-memory", "much"]),
        "map": (3, "cannot read the weight map", ["--map", "/no/such/map.json"]),
        "revision": (2, "only a Hugging Face id has revisions", ["--revision", "main"]),
    }


@pytest.mark.parametrize(("code", "message", "arguments"), cases().values(), ids=cases())
def test_failures_of_options(code: int, message: str, arguments: list[str]):
    result = run("load", FIXTURE, *arguments)
    assert result.exit_code == code
    assert result.stderr.startswith(f"error: {message}")
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_path(command: str):
    prompt = ["--prompt", "x"] if command == "generate" else []
    result = run(command, "/no/such/checkpoint", *prompt)
    assert result.exit_code == 2
    assert result.stderr == "error: no such file or folder\n  file: /no/such/checkpoint\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["load"],
        ["load", "x", "--nonsense"],
        ["load", "x", "--dtype", "int4"],
        ["load", "x", "--cpu-devices", "0"],
        ["generate", "x", "--prompt-file", "/no/such/file"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2(arguments: list[str]):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["--ids", "one two"], "cannot read token ids"),
        (["--ids", "1", "--max-new-tokens", "100"], "the prompt and the new tokens exceed"),
        (["--ids", "29"], "not a token id of this model"),
        (["--prompt", "text"], "the prompt is text, but the checkpoint has no tokenizer"),
        (["--ids", "1", "--temperature", "-1"], ""),
    ],
)
def test_prompts_that_cannot_be(model: Path, arguments: list[str], message: str):
    result = run("generate", model, "--mesh", "mp=1", *arguments)
    assert result.exit_code == 2
    assert f"error: {message}" in result.stderr


def test_hosts_without_a_mesh():
    result = run("plan", FIXTURE, "--hosts", "2")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --hosts needs --mesh\n  hint: such as --mesh mp=8\n",
    )


def test_unknown_family(tmp_path: Path):
    result = run("load", neox.write(tmp_path, model_type="gpt_neo_y"))
    assert result.exit_code == 3
    assert result.stderr.startswith("error: unknown model family")
    assert "found: gpt_neo_y" in result.stderr


def test_map_of_another_family(tmp_path: Path, model: Path):
    text = (ROOT / "configs/gpt_neox.json").read_text()
    (tmp_path / "map.json").write_text(text.replace('"neox"', '"bloom"'))
    result = run("load", model, "--map", tmp_path / "map.json")
    assert result.exit_code == 3
    assert "bloom" in result.stderr


def test_unmapped_tensor(tmp_path: Path):
    folder = neox.write(tmp_path, neox.tensors() | {"extra": np.zeros((3,), np.float32)})
    result = run("plan", folder, "--mesh", "mp=1")
    assert result.exit_code == 3
    assert result.stderr == (
        "error: 1 problem between checkpoint, map and model\n"
        "- the map has no entry for this tensor: "
        "file model.safetensors, tensor extra, found F32 [3]\n"
    )


def test_truncated_file(model: Path):
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    result = run("load", model)
    assert result.exit_code == 3
    assert "file: model.safetensors" in result.stderr


def test_unexpected_error_names_itself(model: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Streamer) -> None:
        raise RuntimeError("the sky fell")

    monkeypatch.setattr(Streamer, "run", fail)
    result = run("load", model, "--mesh", "mp=1")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: unexpected RuntimeError: the sky fell\n  hint: --debug shows the traceback\n"
    )
    assert "in fail\n" in run("load", model, "--mesh", "mp=1", "--debug").stderr


def test_a_pipe_that_breaks_elsewhere_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Streamer) -> None:
        raise BrokenPipeError("a server hung up")

    monkeypatch.setattr(Streamer, "run", fail)
    result = run("load", model, "--mesh", "mp=1")
    assert result.exit_code == 1
    assert "BrokenPipeError: a server hung up" in result.stderr


def test_out_of_memory_is_the_machine(model: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Streamer) -> None:
        raise MemoryError

    monkeypatch.setattr(Streamer, "run", fail)
    result = run("load", model, "--mesh", "mp=1")
    assert result.exit_code == 4
    assert result.stderr.startswith("error: out of memory on the host\n  found: ")


def test_debug_shows_the_traceback():
    result = run("load", "/no/such/checkpoint", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr


# Processes.


def test_load_in_a_process_keeps_stdout_clean(model: Path):
    process = start(
        "load", model, "--mesh", "dp=2,mp=2", "--cpu-devices", "4", "--json", "--verify"
    )
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(stdout)["mesh"] == {"dp": 2, "mp": 2}
    assert stderr == "verifying: reading everything again\n"


def test_cpu_devices_are_the_devices_that_there_are(model: Path):
    process = start("load", model, "--mesh", "mp=4", "--cpu-devices", "2")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (4, "")
    assert "expected: 4\n  found: 2 (cpu)\n" in stderr


SLOW_READS = """
import os, sys, threading, time
from mtj_loader.storage.local import LocalStorage
from mtj_loader.cli import main

read = LocalStorage.read_into

def slowly(self, *arguments):
    if threading.current_thread() is not threading.main_thread():
        os.write(2, b"reading\\n")  # at once, from any thread
        time.sleep(1)
    read(self, *arguments)

LocalStorage.read_into = slowly
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")],
)
def test_signals_end_a_load(number: signal.Signals, code: int, message: str):
    process = start("load", FIXTURE, "--mesh", "mp=8", script=SLOW_READS)
    assert process.stderr is not None
    assert process.stderr.readline() == "reading\n"
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert stdout == ""
    assert stderr.replace("reading\n", "") == message
    assert stderr.count("reading\n") < 10  # of about 40


def test_reader_that_goes_away_is_no_error(tmp_path: Path):
    names = [f"h.{i}.{'x' * 100}" for i in range(5000)]  # more than a pipe holds
    tensors = {name: np.zeros((1,), np.float32) for name in names}
    folder = write_checkpoint(tmp_path, {"m.safetensors": tensors}, {"model_type": "none"})
    process = start("inspect", folder, "--topology")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0
