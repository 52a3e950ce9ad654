"""What every family's config has in common, read from Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np

from mtj_loader.errors import ConfigError, raise_all
from mtj_loader.formats.config_reader import Reader
from mtj_loader.formats.hf_config import Problems, canonicalize
from mtj_loader.formats.known_settings import reads
from mtj_loader.models.layers.feed_forward import ACTIVATIONS
from mtj_loader.models.layers.rope import Rope
from mtj_loader.models.layers.rope_config import read_rope
from mtj_loader.parameters import round_up

# Larger sizes are refused before anything is allocated; each limit is at least ten times what any
# published model has.
MAX_WIDTH = 2**20
MAX_LAYERS = 2**12
MAX_HEADS = 2**12
MAX_VOCABULARY = 2**24


class ConfigReader(Reader):
    """Reads settings by their standard names; errors name a setting as the file spells it."""

    def __init__(
        self,
        config: Mapping[str, object],
        file: str,
        prefix: str = "",
        problems: Problems = None,
        spellings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(config, file, prefix, problems)
        self._spellings = spellings or {}

    def spelling(self, key: str) -> str:
        """The name that the file uses for a setting, or the family's name if it is absent."""
        return self._spellings.get(key, key)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and settings that all families share.

    A family's subclass sets the class attributes, and adds its own attributes with `read_own`.

    Attributes:
      model_type: as in config.json; the name of the family's module.
      spellings: the names of standard settings in this family's files; see `canonicalize`.
      defaults: what absent settings are in transformers' config class, by standard name. None
        means derived: `head_dim` is hidden_size / num_attention_heads, `num_key_value_heads` is
        num_attention_heads, `intermediate_size` is 4 · hidden_size. A standard setting that is
        missing here is required; `head_dim` and `num_key_value_heads` are not read then.
      rotary: options of `rope_config.read_rope`; None for a family without rotary embedding.
      ignored_keys: settings that transformers reads for this family and that never change the
        logits.
      d_model: width of the residual stream, d.
      layers: number of layers.
      n_heads: query heads, h.
      n_kv_heads: heads of keys and values; `n_heads` without grouped queries.
      head_dim: size of a head, k.
      d_embed: width of the token embedding, e.
      d_ff: width of the feed-forward layer, f.
      vocab_size: tokens, without the padding that sharding adds.
      max_positions: the longest context, with the stretching of the rotary embedding.
      norm_eps: epsilon of the norms.
      activation: a key of `feed_forward.ACTIVATIONS`.
      tie_word_embeddings: whether the projection uses the embedding's table.
      rope: the rotary embedding; None without one.
      ignored_settings: keys of config.json that neither transformers nor this package reads.
    """

    model_type: ClassVar[str]
    spellings: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    defaults: ClassVar[Mapping[str, object]] = {}
    rotary: ClassVar[Mapping[str, Any] | None] = None
    ignored_keys: ClassVar[Collection[str]] = ()

    d_model: int
    layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_embed: int
    d_ff: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    activation: str
    tie_word_embeddings: bool
    rope: Rope | None
    ignored_settings: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def read(
        cls, hf: Mapping[str, object], *, file: str, problems: Sequence[ConfigError] = ()
    ) -> Self:
        """Reads a normalized config.json.

        Args:
          hf: normalized.
          file: its name, for messages.
          problems: errors that were found in it before.

        Raises:
          ConfigError: settings that are malformed, contradictory or not supported; lists all.
        """
        found = list(problems)
        canonical = canonicalize(
            hf, spellings=cls.spellings, defaults=cls.defaults, file=file, problems=found
        )
        spellings = canonical.spellings
        reader = ConfigReader(canonical.settings, file, problems=found, spellings=spellings)
        shared = cls._read_shared(reader)
        config = cls(**{**shared, **cls.read_own(reader, shared)})
        supported = {"head_dim": config.head_dim, **config.supported_values()}
        reader.refuse_unsupported(partial(reads, cls.model_type), cls.ignored_keys, supported)
        raise_all(found)
        ignored = sorted([*reader.ignored, *canonical.others])
        return replace(config, ignored_settings=tuple(ignored))

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads what a family adds to the `shared` attributes, or has instead of them."""
        return {}

    @classmethod
    def read_rope(cls, reader: ConfigReader, *, head_dim: int, max_positions: int) -> Rope | None:
        """Reads the rotary embedding."""
        if cls.rotary is None:
            return None
        return read_rope(reader, head_dim=head_dim, max_positions=max_positions, **cls.rotary)

    @classmethod
    def _read_shared(cls, reader: ConfigReader) -> dict[str, Any]:
        heads, kv_heads, head_dim = _read_heads(reader, cls.defaults)
        width = reader.integer("hidden_size", high=MAX_WIDTH)
        derived_ff = 4 * width if "intermediate_size" in cls.defaults else None
        positions = reader.integer("max_position_embeddings")
        rope = cls.read_rope(reader, head_dim=head_dim, max_positions=positions)
        return {
            "d_model": width,
            "layers": reader.integer("num_hidden_layers", high=MAX_LAYERS),
            "n_heads": heads,
            "n_kv_heads": kv_heads,
            "head_dim": head_dim,
            "d_embed": width,
            "d_ff": reader.integer("intermediate_size", derived_ff, high=MAX_WIDTH),
            "vocab_size": reader.integer("vocab_size", high=MAX_VOCABULARY),
            "max_positions": rope.longest_context(positions) if rope else positions,
            "norm_eps": reader.number("norm_eps"),
            "activation": reader.choice("hidden_act", ACTIVATIONS),
            "tie_word_embeddings": reader.flag("tie_word_embeddings"),
            "rope": rope,
        }

    def supported_values(self) -> Mapping[str, object]:
        """Settings that would change the model, and the only values that are supported."""
        return {}

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary embeddings; `Attention` has the index of its own."""
        return () if self.rope is None else (self.rope,)

    def padded_vocabulary(self, shards: int) -> int:
        """V: the vocabulary, rounded up to a multiple of the shard count."""
        return round_up(self.vocab_size, shards)

    def cache_bytes_per_token(self, shards: int, dtype: np.dtype) -> int:
        """Bytes of KV cache per token of a row on each device.

        One key and one value for every head of the shard, in every layer (Pope et al., 2022,
        arXiv:2211.05102). KV heads are repeated if there are fewer of them than shards.
        """
        heads = max(1, self.n_kv_heads // shards)
        return 2 * self.layers * heads * self.head_dim * dtype.itemsize

    def axis_sizes(self, shards: int) -> dict[str, int]:
        """Full sizes of the axes that parameters name (see `mtj_loader.parameters`)."""
        return {
            "V": self.padded_vocabulary(shards),
            "d": self.d_model,
            "e": self.d_embed,
            "f": self.d_ff,
            "g": self.n_kv_heads,
            "h": self.n_heads,
            "k": self.head_dim,
            "p": self.max_positions,
        }


def _read_heads(reader: ConfigReader, defaults: Mapping[str, object]) -> tuple[int, int, int]:
    """Query heads, key-value heads and the size of a head."""
    heads = kv_heads = reader.integer("num_attention_heads", high=MAX_HEADS)
    if "num_key_value_heads" in defaults:
        kv_heads = reader.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        what = "query heads cannot share key-value heads evenly"
        expected = f"a divisor of {heads}"
        reader.refuse(what, "num_key_value_heads", expected, given=["num_attention_heads"])
    if "head_dim" in defaults and reader.has("head_dim"):
        return heads, kv_heads, reader.integer("head_dim", high=MAX_WIDTH)
    width = reader.integer("hidden_size", high=MAX_WIDTH)
    if width % heads:
        width_key, heads_key = map(reader.spelling, ("hidden_size", "num_attention_heads"))
        what = f"{width_key} is not a multiple of {heads_key}"
        expected = f"a multiple of {heads}"
        reader.refuse(what, "hidden_size", expected, given=["num_attention_heads"])
    if reader.has_problems:  # any size that makes no other setting wrong
        return heads, kv_heads, MAX_WIDTH
    return heads, kv_heads, width // heads
