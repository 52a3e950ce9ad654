"""What every family's config has in common, read from Hugging Face's config.json."""

from __future__ import annotations

from dataclasses import dataclass

from mtj_loader.formats.hf_config import Reader
from mtj_loader.models.layers.rope import Rope

# Sizes beyond these are refused before anything is allocated; each is ten times and more what
# any published model has.
MAX_WIDTH = 2**20
MAX_LAYERS = 2**12
MAX_VOCABULARY = 2**24


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and settings that all families share; each family adds its own.

    Attributes:
      model_type: as in config.json; the name of the family's module.
      d_model: width of the residual stream, d.
      layers: number of layers.
      n_heads: query heads, h.
      n_kv_heads: heads of keys and values; `n_heads` without grouped queries.
      head_dim: size of a head, k.
      d_embed: width of the token embedding, e.
      d_ff: width of the feed-forward layer, f.
      vocab_size: tokens, without the padding that sharding adds.
      max_positions: the longest context that the config promises.
      norm_eps: epsilon of the norms.
      activation: a key of `activations.ACTIVATIONS`.
      tie_word_embeddings: whether the projection is the embedding's table.
      rope: the rotary embedding, None where positions enter in another way.
    """

    model_type: str
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

    def padded_vocabulary(self, shards: int) -> int:
        """V: the vocabulary, rounded up to a multiple of the shard count."""
        return -(-self.vocab_size // shards) * shards

    def axis_sizes(self, shards: int) -> dict[str, int]:
        """Full sizes of the axes that declarations name (see `parameters`)."""
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


def head_dim(config: Reader, width_key: str, heads_key: str) -> int:
    """The width of the model divided by the number of heads.

    Raises:
      ConfigError: it does not divide.
    """
    width, heads = config.integer(width_key, high=MAX_WIDTH), config.integer(heads_key)
    if width % heads:
        what = f"{width_key} is not a multiple of {heads_key}"
        raise config.error(what, width_key, f"a multiple of {heads}")
    return width // heads
