"""From data to packed steps: sources, mixing, packing; which sample comes when is a function of the seed and of its place."""

from multimodal.data.account import Account, LeftOut
from multimodal.data.adapters import Fields
from multimodal.data.balanced import Balanced, class_weights
from multimodal.data.batches import Batches
from multimodal.data.fetching import Bad, Batch, StuckError, seed_generators
from multimodal.data.folders import read_folder
from multimodal.data.frames import as_samples
from multimodal.data.packs import Packs
from multimodal.data.shard_writer import index_archives, write_shards
from multimodal.data.shards import Shards
from multimodal.data.sources import (
    Blanked,
    MissingCells,
    Mixed,
    Samples,
    Source,
    Wrapped,
    check_samples,
    declared_sources,
    is_indexed,
)
from multimodal.data.tables import Table, open_table
from multimodal.process_state import preserved_rng

__all__ = [
    "Account",
    "Bad",
    "Balanced",
    "Batch",
    "Batches",
    "Blanked",
    "Fields",
    "LeftOut",
    "MissingCells",
    "Mixed",
    "Packs",
    "Samples",
    "Shards",
    "Source",
    "StuckError",
    "Table",
    "Wrapped",
    "as_samples",
    "check_samples",
    "class_weights",
    "declared_sources",
    "index_archives",
    "is_indexed",
    "open_table",
    "preserved_rng",
    "read_folder",
    "seed_generators",
    "write_shards",
]
