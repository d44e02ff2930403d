"""Shared by the tests of decoding."""

import pytest
from decoders import EveryDraft


@pytest.fixture
def every_draft(monkeypatch):
    """Whether drafts pay is measured, and these models are too small to tell."""
    monkeypatch.setattr("fastft.decode.loop.DraftLength", EveryDraft)
