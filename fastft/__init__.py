"""fastft: fast fine-tuning and decoding of Hugging Face models on the hardware you have."""

# The function `fastft.patch` has the name of the folder it lives in. Importing a subpackage binds
# its name here once, when it is first imported, so importing the function now settles it for good.
from fastft import losses
from fastft.patch import patch, patched, unpatch, verify

__all__ = ["losses", "patch", "patched", "unpatch", "verify"]
__version__ = "0.1.0"
