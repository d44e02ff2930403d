"""fastft as it lies in this source tree, built or about to be, without installing anything."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_kernels() -> None:
    """Binds fastft.kernels to kernels/triton, which an installation would have mapped."""
    if "fastft.kernels" in sys.modules or importlib.util.find_spec("triton") is None:
        return
    folder = ROOT / "kernels" / "triton"
    spec = importlib.util.spec_from_file_location(
        "fastft.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastft.kernels"] = module
    spec.loader.exec_module(module)
