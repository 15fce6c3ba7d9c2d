"""A checkpoint's foreign names → our parameters and config: tables, `read_dialect`, `find_config`."""

from gpt2lite.dialects.configs import UNSAYABLE, find_config, size_of
from gpt2lite.dialects.peft import base_of, with_peft
from gpt2lite.dialects.reading import Adapter, Reading, expand_rows, read_dialect, read_names, with_lora_alpha
from gpt2lite.dialects.tables import DIALECTS, Dialect, Placement

__all__ = [
    "DIALECTS",
    "UNSAYABLE",
    "Adapter",
    "Dialect",
    "Placement",
    "Reading",
    "base_of",
    "expand_rows",
    "find_config",
    "read_dialect",
    "read_names",
    "size_of",
    "with_lora_alpha",
    "with_peft",
]
