"""Hugging Face's config.json: one spelling for all its versions, and strict reading of its values.

transformers 5 writes `rope_parameters` and `dtype`; older files write `rotary_pct`,
`rotary_emb_base`, `rope_theta`, `rope_scaling` and `torch_dtype`. `normalize` returns a config with
both, so that weight maps can look up either. `canonicalize` gives every setting of a family its
standard name (`hidden_size`, not `n_embd`). `Reader` returns typed values and finally refuses every
key that was not read, unless it is known not to change what the model computes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from mtj_loader.errors import ConfigError
from mtj_loader.formats.typed_reader import TypedReader, format_value

# Rotary settings, as `rope_parameters` names them, that older configs keep at the top level, and
# their names there.
_TOP_LEVEL_ROPE = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}
_ROPE_SECTIONS = ("rope_parameters", "rope_scaling")
_ROPE_KEYS = {*_ROPE_SECTIONS, *(name for names in _TOP_LEVEL_ROPE.values() for name in names)}
_DTYPE_NAMES = ("dtype", "torch_dtype")

# Keys of PretrainedConfig, of generation and of training that do not change the logits.
# `auto_map` and `custom_pipelines` name code to import; they are ignored, never followed.
_IGNORED_WORDS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    auto_map custom_pipelines dtype finetuning_task model_type name_or_path num_steps
    output_attentions output_hidden_states output_past problem_type return_dict tf_legacy_loss
    tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache
    attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout
    classifier_dropout_prob dropout embd_pdrop embed_dropout hidden_dropout hidden_dropout_prob
    layerdrop resid_pdrop summary_first_dropout
    bias_dropout_fusion bias_gelu_fusion gradient_checkpointing init_std initializer_range
    masked_softmax_fusion pretraining_tp scaled_upper_triang_masked_softmax_fusion
    chunk_size_feed_forward is_decoder
    id2label label2id num_labels prefix task_specific_params
    begin_suppress_tokens bos_token_id cls_token_id decoder_start_token_id eos_token_id
    forced_bos_token_id forced_eos_token_id mask_token_id pad_token_id sep_token_id
    suppress_tokens unk_token_id
    bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate temperature top_k top_p
    typical_p
"""
IGNORED_KEYS = frozenset(_IGNORED_WORDS.split())

# Keys that would change the model, and the value (transformers' default) at which they do not.
_IGNORED_AT: dict[str, object] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "per_layer_config": None,
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
}

# Settings whose null differs from their absence. Mistral's `sliding_window` is 4096 if absent, and
# null is no window; null `num_key_value_heads` are one per query head; null `head_dim` is derived.
NULLABLE = frozenset({"head_dim", "num_key_value_heads", "sliding_window"})


def normalize(config: Mapping[str, object], *, file: str) -> dict[str, object]:
    """Returns the config with the dtype and the rotary settings under both old and new names.

    Args:
      config: config.json as parsed.
      file: its name, for messages.

    Raises:
      ConfigError: two spellings of one setting disagree; both are named.
    """
    result = dict(config)
    dtypes = [(name, config[name]) for name in _DTYPE_NAMES if config.get(name) is not None]
    if dtypes:
        result.update(dict.fromkeys(_DTYPE_NAMES, _agreed_value(dtypes, file)))
    result.update(_both_rope_spellings(config, file))
    return result


def _both_rope_spellings(config: Mapping[str, object], file: str) -> dict[str, object]:
    """The new spelling (`rope_parameters`) and the old ones; empty for a config without rope."""
    rope = _rope_settings(config, file)
    if not rope:
        return {}
    rope.setdefault("rope_type", "default")
    plain = rope["rope_type"] == "default"
    result: dict[str, object] = {"rope_parameters": rope}
    result["rope_scaling"] = None if plain else {**rope, "type": rope["rope_type"]}
    for setting, names in _TOP_LEVEL_ROPE.items():
        if setting in rope:
            result.update(dict.fromkeys(names, rope[setting]))
    return result


def _rope_settings(config: Mapping[str, object], file: str) -> dict[str, object]:
    """The rotary settings under their new names; null counts as absent."""
    found: dict[str, list[tuple[str, object]]] = {}
    for section in _ROPE_SECTIONS:
        for key, value in _section(config, section, file).items():
            setting = "rope_type" if key == "type" else key
            found.setdefault(setting, []).append((f"{section}.{key}", value))
    for setting, names in _TOP_LEVEL_ROPE.items():
        found.setdefault(setting, []).extend((name, config.get(name)) for name in names)
    given = {key: [s for s in spellings if s[1] is not None] for key, spellings in found.items()}
    return {key: _agreed_value(spellings, file) for key, spellings in given.items() if spellings}


@dataclass(frozen=True)
class CanonicalConfig:
    """A config under Hugging Face's standard names.

    Attributes:
      settings: every setting under its standard name, absent ones at the family's default.
      spellings: the standard names whose name in the file differs, and that name.
    """

    settings: dict[str, object]
    spellings: dict[str, str]


def canonicalize(
    config: Mapping[str, object],
    *,
    spellings: Mapping[str, tuple[str, ...]],
    defaults: Mapping[str, object],
    file: str,
) -> CanonicalConfig:
    """Renames one family's settings to Hugging Face's standard names and fills in defaults.

    A null setting counts as absent, except for the settings in NULLABLE.

    Args:
      config: normalized.
      spellings: for every standard name that the family spells differently, the names that it
        accepts, its own first; none for a setting that the family does not have. A standard name
        that is not listed here is accepted as it is.
      defaults: the values of absent settings, by standard name.
      file: its name, for messages.

    Raises:
      ConfigError: two spellings of one setting disagree (both are named), or the file uses a
        standard name that the family does not accept.
    """
    standard = {spelling: name for name, names in spellings.items() for spelling in names}
    found: dict[str, list[tuple[str, object]]] = {}
    for key, value in config.items():
        name = standard.get(key, key)
        if value is None and name not in NULLABLE:
            continue
        if name in spellings and key not in standard:
            what = "an unknown setting, which this family spells differently"
            raise ConfigError(what, file=file, key=key, found=format_value(value))
        found.setdefault(name, []).append((key, value))
    settings = {name: _agreed_value(values, file) for name, values in found.items()}
    given = {name: values[0][0] for name, values in found.items()}
    own = {name: names[0] for name, names in spellings.items() if names}
    return CanonicalConfig({**defaults, **settings}, own | given)


def add_spellings(
    config: Mapping[str, object], spellings: Mapping[str, tuple[str, ...]]
) -> dict[str, object]:
    """Returns the config with every setting under all its names, for weight maps to look up.

    Args:
      config: normalized.
      spellings: as in `canonicalize`.
    """
    result = dict(config)
    for standard, others in spellings.items():
        names = (standard, *others)
        given = [config[name] for name in others if config.get(name) is not None]
        result.update(dict.fromkeys(names, given[0]) if given else {})
    return result


def _section(config: Mapping[str, object], name: str, file: str) -> Mapping[str, object]:
    section = config.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(
            "not an object", file=file, key=name, expected="{…}", found=format_value(section)
        )
    return section


def _agreed_value(spellings: list[tuple[str, object]], file: str) -> object:
    """The one value of a setting, given as (name, value) pairs."""
    name, value = spellings[0]
    for other_name, other in spellings[1:]:
        if other != value or isinstance(other, bool) != isinstance(value, bool):
            raise ConfigError(
                "two spellings of one setting disagree",
                file=file,
                key=f"{name} and {other_name}",
                found=f"{format_value(value)} and {format_value(other)}",
            )
    return value


class Reader(TypedReader):
    """Typed access to a normalized config.json; null means absent. Raises ConfigError."""

    error_class = ConfigError

    def rope(self) -> Self:
        """The settings of the rotary embedding under their new names; empty if there are none."""
        self._read |= _ROPE_KEYS
        return self.section("rope_parameters")

    def refuse_rest(
        self, harmless: Collection[str] = (), harmless_at: Mapping[str, object] | None = None
    ) -> None:
        """Refuses the keys that were not read, except those that cannot change the logits.

        Args:
          harmless: keys of this family that never change them.
          harmless_at: keys of this family that do, and the value at which they do not.
        """
        supported = {**_IGNORED_AT, **(harmless_at or {})}
        for key in sorted(self._values.keys() - self._read - IGNORED_KEYS - set(harmless)):
            if key not in supported:
                what = "an unknown setting, which may change what the model computes"
                raise self.error(what, key, hint="if it does not, remove it from the file")
            if self._values[key] not in (None, supported[key]):
                what = "a setting that is not supported"
                raise self.error(what, key, json.dumps(supported[key]))
