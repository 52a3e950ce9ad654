"""Compiles well-known models for Cloud TPU slices and prints the table of docs/tpus.md.

    python -m benchmarks.tpus [--search] [MODEL …]

Needs the extra `tpu`, no TPU and no weights: a model is a folder with nothing but config.json.
Answers are kept in benchmarks/results/tpus.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import mtj_loader
from mtj_loader.planning.compiled_fit import CompiledFit

RESULTS = Path(__file__).parent / "results" / "tpus.json"
SLICES = ("v2-8", "v3-8", "v4-8", "v5e-8", "v6e-8")
CONFIGS = {
    "GPT-NeoX-20B": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu_fast",
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "max_position_embeddings": 2048,
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "rotary_pct": 0.25,
        "vocab_size": 50432,
    },
    "GPT-J-6B": {
        "model_type": "gptj",
        "n_embd": 4096,
        "n_head": 16,
        "n_layer": 28,
        "n_positions": 2048,
        "rotary_dim": 64,
        "vocab_size": 50400,
    },
    "Llama-3-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "vocab_size": 32000,
    },
}
HEADERS = (
    "model",
    "slice",
    "mesh",
    "fits",
    "parameters",
    "cache",
    "temporaries",
    "code",
    "of",
    "step at least",
    "XLA's cycles",
    "collectives",
)


def main() -> None:
    """Compiles what is not kept yet, and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(CONFIGS), metavar="MODEL")
    parser.add_argument("--search", action="store_true", help="also the largest sizes that fit")
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in arguments.models:
        for name in SLICES:
            answers = kept.setdefault(model, {})
            if name not in answers:
                answers[name] = compile_model(model, name, search=arguments.search).to_dict()
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(kept))


def compile_model(model: str, name: str, *, search: bool) -> CompiledFit:
    """Compiles a model from its config alone: one sequence of 2,048 tokens, in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[model]))
        plan = mtj_loader.plan(folder, "mp=1")
        (fit,) = plan.compile_for(name, context=2048, search=search)
        return fit


def table(kept: dict[str, dict[str, dict]]) -> str:
    """All answers as a table in Markdown."""
    rows = [HEADERS, ("---",) * len(HEADERS)]
    for model, answers in kept.items():
        rows += [
            row(model, CompiledFit.from_dict(answers[name])) for name in SLICES if name in answers
        ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(model: str, fit: CompiledFit) -> tuple[str, ...]:
    """One line of the table."""
    mesh, available = f"dp={fit.dp}, mp={fit.mp}", f"{fit.available_bytes:,}"
    if fit.memory is None:
        verdict = fit.failure or f"no, {fit.shortfall_bytes:,} bytes too large"
        return model, fit.name, mesh, verdict, "", "", "", "", available, "", "", ""
    decode = fit.programs["decode"]
    counts = ", ".join(f"{one.count} {one.kind}" for one in decode.collectives)
    sizes = (f"{size:,}" for size in vars(fit.memory).values())
    times = (f"{seconds * 1000:.2f} ms" for seconds in (fit.limit_seconds, decode.schedule_seconds))
    return model, fit.name, mesh, "yes", *sizes, available, *times, counts


if __name__ == "__main__":
    main()
