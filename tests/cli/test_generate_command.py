"""`mtj-loader generate`: prompts from options and files, what it prints, and wrong prompts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import tokenizers

from mtj_loader import dtypes
from mtj_loader.cli import setting_options
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


@pytest.mark.parametrize(("echo", "shown"), [([], ""), (["--echo"], "1 2 3 ")])
def test_generate_streams_ids(model: Path, echo: list[str], shown: str):
    arguments = ["--ids", "1 2 3", "--max-new-tokens", "3", "--temperature", "0", "--mesh", "mp=1"]
    result = run("generate", model, *arguments, *echo)
    assert re.fullmatch(rf"{shown}(\d+ ){{3}}\n", result.stdout)


def test_generate_reports_tokens_and_reasons():
    """Greedy, so every chosen token is the most likely one."""
    arguments = ["--ids", "5 6 7", "--prompt", "ROMEO.", "--n", "2", "--echo", "--stop", "\n"]
    settings = ["--max-new-tokens", "3", "--temperature", "0", "--logprobs", "2"]
    more = ["--prompt-logprobs", "--slots", "2", "--context-length", "32", "--mesh", "mp=1"]
    result = run("generate", FIXTURE, *arguments, *settings, *more, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["sampling"]["n"] == 2
    assert document["sampling"]["stop"] == ["\n"]
    first, second, third, _ = document["completions"]
    assert first == second  # greedy, whatever the seed
    assert first["completion"] == "ROMEO."  # a line break follows
    assert (first["finish_reason"], first["completion_tokens"], first["logprobs"]) == (
        "stop",
        0,
        [],
    )
    assert third["prompt_tokens"] == 3
    assert third["completion"][:3] == [5, 6, 7]
    ids = [token["id"] for token in third["logprobs"]]
    assert (third["completion"][3:], third["completion_tokens"]) == (ids, len(ids))
    assert ids
    for token in third["logprobs"]:
        best, other = token["top"]
        assert {**token, "top": None} == {**best, "top": None}
        assert other["logprob"] <= best["logprob"] < 0
    prompt = third["prompt_logprobs"]
    assert [token["id"] for token in prompt] == [5, 6, 7]
    assert (prompt[0]["logprob"], prompt[0]["top"]) == (None, [])
    assert all(token["logprob"] < 0 and len(token["top"]) == 2 for token in prompt[1:])
    tokenizer = tokenizers.Tokenizer.from_file(str(FIXTURE / "tokenizer.json"))
    assert [token["text"] for token in prompt] == [tokenizer.decode([i]) for i in (5, 6, 7)]


def test_generate_only_scores_a_prompt(model: Path):
    arguments = ["--ids", "1 2 3", "--max-new-tokens", "0", "--prompt-logprobs", "--mesh", "mp=1"]
    result = run("generate", model, *arguments, "--json")
    assert result.exit_code == 0
    (completion,) = json.loads(result.stdout)["completions"]
    assert (completion["completion"], completion["logprobs"]) == ([], None)
    assert len(completion["prompt_logprobs"]) == 3


def test_generate_follows_a_grammar_in_a_file(tmp_path: Path):
    (tmp_path / "grammar").write_text('root ::= "Ay" | "No"\n')
    arguments = ["--prompt", "ROMEO.", "--grammar-file", tmp_path / "grammar", "--mesh", "mp=1"]
    result = run("generate", FIXTURE, *arguments)
    assert result.exit_code == 0
    assert result.stdout in ("Ay\n", "No\n")


@pytest.mark.parametrize(
    ("given", "dtype"), [([], "float32"), (["--dtype", "bfloat16"], "bfloat16")]
)
def test_generate_uses_float32_without_bfloat16_arithmetic(
    model: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], dtype: str
):
    monkeypatch.setattr(dtypes, "_CPU_INFO", Path("/no/such/file"))
    dtypes.has_bfloat16_arithmetic.cache_clear()
    arguments = ["--ids", "1", "--max-new-tokens", "1", "--mesh", "mp=1", "--json", *given]
    result = run("generate", model, *arguments)
    dtypes.has_bfloat16_arithmetic.cache_clear()
    assert json.loads(result.stdout)["dtype"] == dtype
    assert ("--dtype bfloat16 takes half the memory" in result.stderr) == (not given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt"),
        (["--ids", "one two"], "cannot read token ids"),
        (["--ids", "1", "--max-new-tokens", "100"], "the prompt and the new tokens exceed"),
        (["--ids", "29"], "not a token id of this model"),
        (["--prompt", "text"], "the prompt is text, but the checkpoint has no tokenizer"),
        (["--ids", "1", "--temperature", "-1"], "temperature is out of range"),
        (["--ids", "1", "--mirostat", "1"], "mirostat is out of range"),
        (["--ids", "1", "--max-new-tokens", "0"], "max_new_tokens is out of range"),
        (
            ["--ids", "1", "--max-new-tokens", "9", "--context-length", "8"],
            "the prompt and the new",
        ),
        (["--ids", "1", "--logprobs", "1"], "--logprobs needs --json"),
        (["--ids", "1", "--prompt-logprobs"], "--prompt-logprobs needs --json"),
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
    monkeypatch.setattr(setting_options, "_MAX_FILE_BYTES", 10)
    with pytest.raises(UsageError) as caught:
        Prompts(prompt_file=[Path("/dev/zero")]).read()
    assert str(caught.value) == (
        "the prompt is too large\n  file: /dev/zero\n  expected: at most 10 bytes\n  found: more"
    )
