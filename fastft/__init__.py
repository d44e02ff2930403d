"""fastft: fast fine-tuning and decoding of Hugging Face models on the hardware you have."""

from typing import TYPE_CHECKING, Any

# The function `fastft.patch` has the name of the folder it lives in. Importing a subpackage binds
# its name here once, when it is first imported, so importing the function now settles it for good.
from fastft import losses
from fastft.patch import load, patch, patched, unpatch, verify

if TYPE_CHECKING:
    from fastft.decode.generate import generate, stream

__all__ = ["generate", "load", "losses", "patch", "patched", "stream", "unpatch", "verify"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Decoding needs transformers, which importing fastft does not.
    if name in ("generate", "stream"):
        from fastft.decode import generate as decoding

        return getattr(decoding, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
