"""A checkpoint's foreign names → our parameters and config: tables, `read_dialect`, `find_fields`."""

from gpt2lite.dialects.configs import UNSAYABLE, Found, check_model_type, complete, find_fields, size_of
from gpt2lite.dialects.masks import check_masks
from gpt2lite.dialects.reading import Adapter, Reading, expand_rows, read_dialect, read_names, with_lora_alpha
from gpt2lite.dialects.tables import DIALECTS, Dialect, Placement

__all__ = [
    "DIALECTS",
    "UNSAYABLE",
    "Adapter",
    "Dialect",
    "Found",
    "Placement",
    "Reading",
    "check_masks",
    "check_model_type",
    "complete",
    "expand_rows",
    "find_fields",
    "read_dialect",
    "read_names",
    "size_of",
    "with_lora_alpha",
]
