"""Swaps fused operators into a model the user holds, reversibly, with a report and a proof.

load, patch, unpatch, patched and verify are the whole interface; one file per kind of module.
"""

from fastft.patch.loading import load
from fastft.patch.model import patch, patched, unpatch
from fastft.patch.report import Entry, Report
from fastft.patch.verify import Verification, verify

__all__ = ["Entry", "Report", "Verification", "load", "patch", "patched", "unpatch", "verify"]
