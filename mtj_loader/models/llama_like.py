"""What Llama and its relatives share: their settings and their decoder.

RMS norms, rotary embedding of halves, grouped queries, and a gated feed-forward (Touvron et al.,
2023, arXiv:2302.13971). A family states its defaults and replaces the parts that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import ConfigReader, ModelConfig
from mtj_loader.models.decoder import CausalTransformer, FeedForward, Norm
from mtj_loader.models.layers.attention import Attention
from mtj_loader.models.layers.feed_forward import GatedMLP
from mtj_loader.models.layers.norms import RMSNorm
from mtj_loader.models.layers.positions import rotate_halves
from mtj_loader.models.parameter_table import ParameterBuilder

Windows = tuple[int | None, ...]

FULL, SLIDING = "full_attention", "sliding_attention"  # types of layers


@dataclass(frozen=True, kw_only=True)
class LlamaLikeConfig(ModelConfig):
    """Settings of Llama and its relatives; a family has those that are in its `defaults`.

    Attributes:
      attention_bias: whether the four linear layers of the attention have biases.
      mlp_bias: whether the three of the feed-forward have.
      windows: how many positions back each layer sees, the token's own included; None for all.
    """

    spellings: ClassVar = {"norm_eps": ("rms_norm_eps",)}
    rotary: ClassVar = {"fraction": 1.0, "whole_heads": True}

    attention_bias: bool
    mlp_bias: bool
    windows: Windows

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attributes above."""
        flags = ("attention_bias", "mlp_bias")
        own = {name: name in cls.defaults and reader.flag(name) for name in flags}
        return {**own, "windows": cls.read_windows(reader, shared["layers"])}

    @classmethod
    def read_windows(cls, reader: ConfigReader, layers: int) -> Windows:
        """Reads every layer's window; all have the same."""
        return (cls.read_window(reader),) * layers

    @classmethod
    def read_window(cls, reader: ConfigReader) -> int | None:
        """Reads `sliding_window`."""
        windowed = "sliding_window" in cls.defaults and reader.has("sliding_window")
        return reader.integer("sliding_window") if windowed else None

    def rope_index(self, layer: int) -> int:
        """Which of the model's rotary embeddings a layer has."""
        return 0


def windows_by_layer(
    reader: ConfigReader, layers: int, window: int | None, slides: Callable[[int], bool]
) -> Windows:
    """Reads which layers have a sliding window.

    Args:
      reader: of the family's config.
      layers: the number of layers.
      window: of the layers that have one; None if the config has no window.
      slides: whether the layer with this index has one, in a config without `layer_types`.

    Refuses a malformed `layer_types`, and a layer with a window if the config has none.
    """
    default = [SLIDING if slides(layer) else FULL for layer in range(layers)]
    types = reader.names("layer_types") if reader.has("layer_types") else default
    if len(types) != layers or not set(types) <= {FULL, SLIDING}:
        expected = f"{layers} of {FULL}, {SLIDING}"
        reader.refuse("not a legal value", "layer_types", expected, given=["num_hidden_layers"])
    elif window is None and SLIDING in types:
        what = "a layer has a sliding window, and the config gives no width"
        reader.refuse(what, "layer_types", "a config with sliding_window")
    return tuple(window if kind == SLIDING else None for kind in types)


def make_llama_like(
    config: LlamaLikeConfig,
    params: ParameterBuilder,
    *,
    norm: Callable[..., Norm] | None = None,
    feed_forward: Callable[[], FeedForward] | None = None,
    attention: Mapping[str, Any] | None = None,
    **parts: Any,  # noqa: ANN401
) -> CausalTransformer:
    """The decoder.

    Args:
      config: of the family.
      params: where parameters are declared.
      norm: creates a norm, instead of `RMSNorm`.
      feed_forward: creates a feed-forward, instead of `GatedMLP`.
      attention: options of `Attention` that differ.
      **parts: other arguments of `CausalTransformer`.
    """

    def make_attention(layer: int) -> Attention:
        options: dict[str, Any] = {
            "bias": config.attention_bias,
            "out_bias": config.attention_bias,
            "kv_heads": "g",
            "window": config.windows[layer],
            "rotate": rotate_halves,
            "rope": config.rope_index(layer),
        }
        return Attention(params, **options | dict(attention or {}))

    gated = partial(GatedMLP, params, config.activation, bias=config.mlp_bias)
    return CausalTransformer(
        config,
        params,
        norm=norm or partial(RMSNorm, params, config.norm_eps),
        attention=make_attention,
        feed_forward=feed_forward or gated,
        **parts,
    )
