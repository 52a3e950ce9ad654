"""`mtj-loader generate`: prompts from options and files, what it prints, and wrong prompts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import tokenizers

from mtj_loader.cli import generate_command
from mtj_loader.cli.generate_command import Prompts
from mtj_loader.errors import UsageError
from tests.support.command_line import FIXTURE, ROOT, run


def test_generate_prints_only_the_continuation():
    greedy = json.loads((ROOT / "tests/data/shakespeare-greedy.json").read_text())[0]
    arguments = ["--prompt", greedy["prompt"], "--max-new-tokens", "6", "--temperature", "0"]
    result = run("generate", FIXTURE, *arguments, "--dtype", "float32", "--mesh", "mp=2")
    assert result.exit_code == 0
    tokenizer = tokenizers.Tokenizer.from_file(str(FIXTURE / "tokenizer.json"))
    assert result.stdout == tokenizer.decode(greedy["new_ids"][:6]) + "\n"
    assert result.stderr.startswith(f"gpt_neox from {FIXTURE} on dp=1, mp=2 (2 cpu devices)\n")


def test_generate_combines_prompts_files_and_ids(tmp_path: Path):
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt"),
        (["--ids", "one two"], "cannot read token ids"),
        (["--ids", "1", "--max-new-tokens", "100"], "the prompt and the new tokens exceed"),
        (["--ids", "29"], "not a token id of this model"),
        (["--prompt", "text"], "the prompt is text, but the checkpoint has no tokenizer"),
        (["--ids", "1", "--temperature", "-1"], ""),
    ],
)
def test_wrong_prompts(model: Path, arguments: list[str], message: str):
    result = run("generate", model, "--mesh", "mp=1", *arguments)
    assert result.exit_code == 2
    assert f"error: {message}" in result.stderr


def test_a_prompt_from_a_pipe(model: Path):
    reader, writer = os.pipe()
    os.write(writer, b"\xff")
    os.close(writer)
    path = f"/dev/fd/{reader}"
    result = run("generate", model, "--prompt-file", path)
    os.close(reader)
    assert result.exit_code == 2
    start = f"error: cannot read the prompt\n  file: {path}\n  found: 'utf-8' codec"
    assert result.stderr.startswith(start)


def test_line_ends_of_a_prompt_become_newlines(tmp_path: Path):
    (tmp_path / "prompt").write_bytes(b"a\r\nb\rc\n\n")
    assert Prompts(prompt_file=[tmp_path / "prompt"]).read() == ["a\nb\nc\n\n"]


def test_a_prompt_that_does_not_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate_command, "_MAX_PROMPT_BYTES", 10)
    with pytest.raises(UsageError) as caught:
        Prompts(prompt_file=[Path("/dev/zero")]).read()
    assert str(caught.value) == (
        "the prompt is too large\n  file: /dev/zero\n  expected: at most 10 bytes\n  found: more"
    )
