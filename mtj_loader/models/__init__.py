"""The model families in Haiku: their configs, parameters and forward pass."""

from mtj_loader.models.registry import FAMILIES, Family, family, parameters
from mtj_loader.models.shard_counts import check_shards, usable_shards

__all__ = [
    "FAMILIES",
    "Family",
    "check_shards",
    "family",
    "parameters",
    "usable_shards",
]
