"""Hugging Face's config.json: one spelling for all its versions.

transformers 5 writes `rope_parameters` and `dtype`; older files write `rotary_pct`,
`rotary_emb_base`, `rope_theta`, `rope_scaling` and `torch_dtype`. `normalize` returns a config with
both, so that weight maps can look up either. `canonicalize` gives every setting of a family its
standard name (`hidden_size`, not `n_embd`).

Everything here adds its errors to a list of `problems`, or raises the first one without a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtj_loader.errors import ConfigError
from mtj_loader.formats.known_settings import ROPE_SECTIONS, reads
from mtj_loader.formats.typed_reader import format_value, shorten

Problems = list[ConfigError] | None  # None raises the first

# Rotary settings, as `rope_parameters` names them, that older configs keep at the top level, and
# their names there. transformers reads only some of the names, depending on the family.
_TOP_LEVEL_ROPE = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}
# Families with a rotary embedding for each type of layer: the old name of each one's theta.
_ROPE_BY_LAYER_TYPE = {
    "gemma3_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
}
_DTYPE_NAMES = ("dtype", "torch_dtype")

# Settings whose null differs from their absence. Mistral's `sliding_window` is 4096 if absent, and
# null is no window; null `num_key_value_heads` are one per query head; null `head_dim` is derived;
# Gemma 2's soft caps have defaults, and null is no cap.
NULLABLE = frozenset({
    "attn_logit_softcapping", "final_logit_softcapping", "head_dim", "num_key_value_heads",
    "sliding_window",
})  # fmt: skip


def normalize(
    config: Mapping[str, object], *, file: str, problems: Problems = None
) -> dict[str, object]:
    """Returns the config with the dtype and the rotary settings under both old and new names.

    Args:
      config: config.json as parsed. Its `model_type` decides which rotary settings count.
      file: its name, for messages.
      problems: collects errors.

    Raises:
      ConfigError: two spellings of one setting disagree; both are named.
    """
    result = dict(config)
    dtypes = [(name, config[name]) for name in _DTYPE_NAMES if config.get(name) is not None]
    if dtypes:
        result.update(dict.fromkeys(_DTYPE_NAMES, _agreed_value(dtypes, file, problems)))
    result.update(_both_rope_spellings(config, file, problems))
    return result


def _both_rope_spellings(
    config: Mapping[str, object], file: str, problems: Problems
) -> dict[str, object]:
    """The new spelling (`rope_parameters`) and the old ones; empty for a config without rope."""
    if thetas := _ROPE_BY_LAYER_TYPE.get(str(config.get("model_type"))):
        return _rope_by_layer_type(config, thetas, file, problems)
    rope = _rope_settings(config, file, problems)
    if not rope:
        return {}
    rope.setdefault("rope_type", "default")
    plain = rope["rope_type"] == "default"
    result: dict[str, object] = {"rope_parameters": rope}
    result["rope_scaling"] = None if plain else {**rope, "type": rope["rope_type"]}
    for setting, names in _top_level_rope(config).items():
        if setting in rope and setting != "original_max_position_embeddings":  # see Phi-3
            result.update(dict.fromkeys(names, rope[setting]))
    return result


def _rope_by_layer_type(
    config: Mapping[str, object], thetas: Mapping[str, str], file: str, problems: Problems
) -> dict[str, object]:
    """The new spelling: a section for each type of layer. rope_scaling is of full attention."""
    given = _section(config, "rope_parameters", file, problems)
    scaling = _rope_section(config, "rope_scaling", file, problems)
    if config.get("rope_parameters") is None and scaling.get("type", "default") != "default":
        what, found = "transformers does not read this name here", format_value(scaling["type"])
        error = ConfigError(
            what, file=file, key="rope_scaling.type", expected="rope_type", found=found
        )
        _report(error, problems)
    result = dict(given)
    for layer_type, theta in thetas.items():
        rope = _rope_section(given, layer_type, file, problems, prefix="rope_parameters.")
        sections = {f"rope_parameters.{layer_type}": rope}
        if layer_type == "full_attention":
            sections["rope_scaling"] = scaling
        merged = _merge_rope(config, sections, {"rope_theta": [theta]}, file, problems)
        result[layer_type] = {"rope_type": "default", **merged}
    return {"rope_parameters": result}


def _rope_settings(
    config: Mapping[str, object], file: str, problems: Problems
) -> dict[str, object]:
    """The rotary settings under their new names; null counts as absent."""
    sections = _rope_sections(config, file, problems)
    return _merge_rope(config, sections, _top_level_rope(config), file, problems)


def _merge_rope(
    config: Mapping[str, object],
    sections: Mapping[str, Mapping[str, object]],
    top_level: Mapping[str, list[str]],
    file: str,
    problems: Problems,
) -> dict[str, object]:
    """The settings of sections, by path, and of names at the top level, under their new names."""
    found: dict[str, list[tuple[str, object]]] = {}
    for section, settings in sections.items():
        for key, value in settings.items():
            setting = "rope_type" if key == "type" else key
            found.setdefault(setting, []).append((f"{section}.{key}", value))
    for setting, names in top_level.items():
        found.setdefault(setting, []).extend((name, config.get(name)) for name in names)
    given = {key: [s for s in spellings if s[1] is not None] for key, spellings in found.items()}
    return {key: _agreed_value(values, file, problems) for key, values in given.items() if values}


def _rope_section(
    config: Mapping[str, object], name: str, file: str, problems: Problems, prefix: str = ""
) -> dict[str, object]:
    """The settings of a section, without nulls."""
    given = _section(config, name, file, problems, prefix)
    settings = {key: value for key, value in given.items() if value is not None}
    if "rope_type" in settings:  # transformers keeps the old name beside it
        settings.pop("type", None)
    return settings


def _rope_sections(
    config: Mapping[str, object], file: str, problems: Problems
) -> dict[str, dict[str, object]]:
    """The settings of each section that the file has."""
    names = ROPE_SECTIONS if reads(config.get("model_type"), "rope_parameters") else ()
    given = {name: _rope_section(config, name, file, problems) for name in names}
    result = {name: settings for name, settings in given.items() if settings}
    keys = [{"rope_type" if key == "type" else key for key in each} for each in result.values()]
    if len(keys) == 2 and keys[0] != keys[1]:  # transformers would take one of the sections
        only = ", ".join(map(shorten, sorted(keys[0] ^ keys[1])))
        _report_disagreement(list(result), f"{only} only in one of them", file, problems)
    return result


def rope_keys(config: Mapping[str, object]) -> set[str]:
    """The top-level keys that hold settings of the rotary embedding."""
    return {
        *ROPE_SECTIONS,
        *(name for names in _top_level_rope(config).values() for name in names),
    }


def rope_spellings(config: Mapping[str, object], key: str) -> list[str]:
    """All paths and names of a rotary setting, given as one of them; empty for another setting."""
    places: list[tuple[tuple[str, ...], dict[str, list[str]]]]
    if thetas := _ROPE_BY_LAYER_TYPE.get(str(config.get("model_type"))):
        full, sliding = (f"rope_parameters.{layer_type}" for layer_type in thetas)
        names = [{"rope_theta": [theta]} for theta in thetas.values()]
        places = [((full, "rope_scaling"), names[0]), ((sliding,), names[1])]
    else:
        places = [(ROPE_SECTIONS, _top_level_rope(config))]
    for sections, top_level in places:
        settings = [key.removeprefix(f"{name}.") for name in sections if key.startswith(f"{name}.")]
        settings += [setting for setting, names in top_level.items() if key in names]
        if settings:
            types = ("rope_type", "type")
            inner = types if settings[0] in types else settings[:1]
            paths = [f"{section}.{name}" for section in sections for name in inner]
            return [*paths, *top_level.get(settings[0], ())]
    return []


def _top_level_rope(config: Mapping[str, object]) -> dict[str, list[str]]:
    """The names in _TOP_LEVEL_ROPE that transformers reads in this family."""
    model_type = config.get("model_type")
    if thetas := _ROPE_BY_LAYER_TYPE.get(str(model_type)):
        return {"rope_theta": list(thetas.values())}
    return {
        setting: [name for name in names if reads(model_type, name)]
        for setting, names in _TOP_LEVEL_ROPE.items()
    }


@dataclass(frozen=True)
class CanonicalConfig:
    """A config under Hugging Face's standard names.

    Attributes:
      settings: every setting under its standard name, absent ones at the family's default.
      spellings: the standard names whose name in the file differs, and that name.
      others: standard names in the file that the family spells differently; transformers does not
        read them.
    """

    settings: dict[str, object]
    spellings: dict[str, str]
    others: tuple[str, ...] = ()


def canonicalize(
    config: Mapping[str, object],
    *,
    spellings: Mapping[str, tuple[str, ...]],
    defaults: Mapping[str, object],
    file: str,
    problems: Problems = None,
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
      problems: collects errors.

    Raises:
      ConfigError: two spellings of one setting disagree; both are named.
    """
    standard = {spelling: name for name, names in spellings.items() for spelling in names}
    found: dict[str, list[tuple[str, object]]] = {}
    others: list[str] = []
    for key, value in config.items():
        name = standard.get(key, key)
        if value is None and name not in NULLABLE:
            continue
        if name in spellings and key not in standard:
            others.append(key)
        else:
            found.setdefault(name, []).append((key, value))
    settings = {name: _agreed_value(values, file, problems) for name, values in found.items()}
    given = {name: values[0][0] for name, values in found.items()}
    own = {name: names[0] for name, names in spellings.items() if names}
    return CanonicalConfig({**defaults, **settings}, own | given, tuple(others))


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


def _section(
    config: Mapping[str, object], name: str, file: str, problems: Problems, prefix: str = ""
) -> Mapping[str, object]:
    section = config.get(name)
    if section is None or isinstance(section, Mapping):
        return section or {}
    key, found = prefix + name, format_value(section)
    _report(ConfigError("not an object", file=file, key=key, expected="{…}", found=found), problems)
    return {}


def _agreed_value(spellings: list[tuple[str, object]], file: str, problems: Problems) -> object:
    """The one value of a setting, given as (name, value) pairs."""
    name, value = spellings[0]
    for other_name, other in spellings[1:]:
        if other != value or isinstance(other, bool) != isinstance(value, bool):
            found = f"{format_value(value)} and {format_value(other)}"
            _report_disagreement([name, other_name], found, file, problems)
    return value


def _report_disagreement(keys: list[str], found: str, file: str, problems: Problems) -> None:
    what, key = "two spellings of one setting disagree", " and ".join(keys)
    _report(ConfigError(what, file=file, key=key, found=found), problems)


def _report(error: ConfigError, problems: Problems) -> None:
    if problems is None:
        raise error
    problems.append(error)
