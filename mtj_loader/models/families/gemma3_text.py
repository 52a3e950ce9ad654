"""The text models of Gemma 3 (Gemma Team, 2025, arXiv:2503.19786): Gemma 2 with normed q and k.

Layers with a window have a rotary embedding of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mtj_loader.models.config import ConfigReader
from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.families import gemma2
from mtj_loader.models.layers.norms import RMSNorm
from mtj_loader.models.layers.rope import Rope
from mtj_loader.models.layers.rope_config import read_rope
from mtj_loader.models.llama_like import FULL, SLIDING, Windows, windows_by_layer
from mtj_loader.models.parameter_table import ParameterBuilder


@dataclass(frozen=True, kw_only=True)
class Config(gemma2.Config):
    """What Gemma 3 adds.

    Attributes:
      local_rope: the rotary embedding of layers with a window.
    """

    model_type = "gemma3_text"
    defaults: ClassVar = {  # of transformers' Gemma3TextConfig
        **gemma2.Config.defaults,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
    }
    rotary: ClassVar = {
        "fraction": 1.0, "layer_type": FULL, "theta": 1e6, "whole_heads": True,
    }  # fmt: skip
    ignored_keys = ("_sliding_window_pattern",)  # transformers writes layer_types beside it

    local_rope: Rope

    @classmethod
    def read_own(cls, reader: ConfigReader, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the attribute above; transformers has the soft cap of scores, but ignores it."""
        own = super().read_own(reader, shared)
        if own["score_cap"] is not None:
            reader.refuse("a setting that is not supported", "attn_logit_softcapping", "null")
        sections = reader.rope()
        for key in (FULL, SLIDING):
            sections.has(key)
        sections.refuse_unsupported(lambda key: False)  # it ignores settings beside the sections
        reader.has("rope_local_base_freq")  # now in the section
        local = read_rope(
            reader,
            head_dim=shared["head_dim"],
            max_positions=reader.integer("max_position_embeddings"),
            fraction=1.0,
            whole_heads=True,
            layer_type=SLIDING,
        )
        return {**own, "local_rope": local}

    @classmethod
    def read_windows(cls, reader: ConfigReader, layers: int) -> Windows:
        """Reads the windows; without `layer_types`, every sixth layer has none, or as it says."""
        pattern = reader.integer("sliding_window_pattern")
        window = cls.read_window(reader)
        return windows_by_layer(reader, layers, window, lambda layer: (layer + 1) % pattern != 0)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """That of layers without a window, and that of the others."""
        assert self.rope is not None
        return self.rope, self.local_rope

    def rope_index(self, layer: int) -> int:
        """Which of them a layer has."""
        return 0 if self.windows[layer] is None else 1


def make_model(config: Config, params: ParameterBuilder) -> CausalTransformer:
    """Gemma 3."""
    norm = partial(RMSNorm, params, config.norm_eps, axis="k", unit_offset=True)
    return gemma2.make_model(config, params, q_norm=norm, k_norm=norm)
