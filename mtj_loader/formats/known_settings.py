"""Which keys of config.json can change the logits.

transformers_settings.json lists the keys that transformers reads for each family; the script
tests/oracle/list_settings.py makes it. A key that is not in the list cannot change what
transformers computes. Many of the listed keys cannot either: they are named here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtj_loader.formats.typed_reader import shorten

_FILE = Path(__file__).with_name("transformers_settings.json")

# Keys of PretrainedConfig, of generation and of training that do not change the logits.
# `auto_map` and `custom_pipelines` name code to import; they are ignored, never followed.
_WITHOUT_EFFECT = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _experts_implementation_internal _name_or_path _output_attentions
    architectures attn_implementation auto_map custom_pipelines dtype experts_implementation
    finetuning_task model_type name_or_path num_steps output_attentions output_hidden_states
    output_past problem_type return_dict tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers_version transformers_weights use_bfloat16 use_cache
    activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout
    classifier_dropout_prob dropout embd_pdrop embed_dropout hidden_dropout hidden_dropout_prob
    layerdrop resid_dropout resid_pdrop summary_first_dropout
    attention_softmax_in_fp32 base_model_ep_plan base_model_fsdp_plan base_model_pp_plan
    base_model_tp_plan bias_dropout_fusion bias_gelu_fusion distributed_config
    gradient_checkpointing init_config init_std initializer_factor initializer_range
    masked_softmax_fusion offset_alibi
    scaled_upper_triang_masked_softmax_fusion skip_bias_add skip_bias_add_qkv
    chunk_size_feed_forward is_decoder pretraining_tp
    id2label label2id num_labels prefix summary_activation summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tokenizer_name
    begin_suppress_tokens bos_token_id cls_token_id decoder_start_token_id eos_token_id
    forced_bos_token_id forced_eos_token_id mask_token_id pad_token_id sep_token_id
    suppress_tokens unk_token_id
    bos_token cls_token eos_token mask_token pad_token sep_token unk_token
    bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate temperature top_k top_p
    typical_p
"""
KEYS_WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())

# Keys that would change the model, and the value at which they do not. transformers reads some of
# them no more; a file with another value still describes a model that is not supported.
SUPPORTED_AT: dict[str, object] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "per_layer_config": None,
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
}

# Keys that transformers no longer reads, and the loader does: they name another architecture.
_READ_HERE = {
    "fc_type", "ffn_config", "learned_embeddings", "n_inner", "rotary", "scale_attn_weights",
    "scale_embeddings", "seq_length", "verbose",
}  # fmt: skip
_MAX_NAMED = 30  # keys in a message
ROPE_SECTIONS = ("rope_parameters", "rope_scaling")


@functools.cache
def _lists() -> dict[str, Any]:
    return json.loads(_FILE.read_text())


def reads(model_type: object, key: str) -> bool:
    """Whether transformers reads a key of config.json in this family; a section's key has a path.

    Every key counts as read in a family that is not listed.
    """
    keys = _family_keys(model_type) if isinstance(model_type, str) else None
    return keys is None or key in keys


def reads_rope(rope_type: str, key: str) -> bool:
    """Whether transformers reads a key of the rope section for this type."""
    return key in _lists()["rope"][rope_type]


@functools.cache
def _family_keys(model_type: str) -> frozenset[str] | None:
    keys = _lists()["families"].get(model_type)
    return None if keys is None else frozenset(keys)


def ignored_settings(config: Mapping[str, object]) -> list[str]:
    """The keys that a load will let in although nothing reads them; for a known family.

    The reader of a family finds the same keys, and others in the sections that only it knows; this
    is for those who need no model.
    """
    known = KEYS_WITHOUT_EFFECT | _READ_HERE | SUPPORTED_AT.keys()
    given = {key: value for key, value in config.items() if value is not None}
    found = [k for k in given.keys() - known if not reads(config.get("model_type"), k)]
    for section in ROPE_SECTIONS:
        rope = given.get(section)
        if section not in found and isinstance(rope, Mapping):
            rope_type = rope.get("rope_type", rope.get("type", "default"))
            keys = _lists()["rope"].get(rope_type, rope) if isinstance(rope_type, str) else rope
            found += [f"rope_parameters.{key}" for key in rope if key not in keys]
    return sorted(set(found))


def remarks(
    config: Mapping[str, object], ignored: Sequence[str], asked_for: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """What to tell the user about ignored keys: notes, and warnings.

    Args:
      config: config.json, parsed.
      ignored: keys that nothing reads.
      asked_for: keys that were left out because the user asked for it.
    """
    notes: list[str] = []
    warnings: list[str] = []
    if asked_for:
        warnings.append(f"ignored settings, as asked for: {', '.join(asked_for)}")
    if ignored and (doubt := _explain_doubt(config)):
        warnings.append(f"{_describe_ignored(ignored)}; {doubt}")
    elif ignored:
        notes.append(_describe_ignored(ignored))
    return notes, warnings


def _describe_ignored(keys: Sequence[str]) -> str:
    names = [shorten(key) for key in keys[:_MAX_NAMED]]
    names += [f"and {len(keys) - _MAX_NAMED} more"] if len(keys) > _MAX_NAMED else []
    return f"ignored settings: {', '.join(names)}"


def _explain_doubt(config: Mapping[str, object]) -> str | None:
    """Why a key that is not listed may matter all the same; None if it cannot."""
    if config.get("auto_map"):
        return "the checkpoint brings code of its own (auto_map), which may read them"
    ours = _lists()["transformers_version"]
    version = config.get("transformers_version")
    if _numbers(version) > _numbers(ours):
        saved = shorten(str(version))
        return f"the checkpoint was saved by transformers {saved}, and {ours} is known here"
    return None


def _numbers(version: object) -> list[int]:
    """`"4.21.0.dev0"` as [4, 21, 0]; anything else as the oldest version."""
    found = re.match(r"\d{1,9}(\.\d{1,9})*", version) if isinstance(version, str) else None
    return [int(number) for number in found[0].split(".")] if found else []
