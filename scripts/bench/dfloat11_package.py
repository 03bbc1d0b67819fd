"""The parts of the package dfloat11 that a measurement needs, without what its __init__ imports."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.find_spec("dfloat11")
if _spec is None or not _spec.submodule_search_locations:
    raise ModuleNotFoundError("dfloat11 is not installed: pip install --no-deps dfloat11 dahuffman", name="dfloat11")
_folder = Path(_spec.submodule_search_locations[0])

# Its kernel, as PTX.
ptx = _folder / "decode.ptx"

_utils = importlib.util.spec_from_file_location("dfloat11_utils", _folder / "dfloat11_utils.py")
assert _utils is not None
assert _utils.loader is not None
utils = importlib.util.module_from_spec(_utils)
_utils.loader.exec_module(utils)
