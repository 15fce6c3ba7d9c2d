"""A checkpoint's foreign names → our parameters and config: tables, `read_dialect`, `find_fields`."""

from gpt2lite.dialects.configs import UNSAYABLE
from gpt2lite.dialects.reading import Adapter, Reading, expand_rows, read_dialect, read_names
from gpt2lite.dialects.tables import DIALECTS, Placement

__all__ = ["DIALECTS", "UNSAYABLE", "Adapter", "Placement", "Reading"]
__all__ += ["expand_rows", "read_dialect", "read_names"]
