"""Where the real test data lies, and skipping with the reason where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest


def shared_data() -> Path:
    """Return ``../shared/data`` beside the checkout."""
    return Path(__file__).resolve().parents[2].parent / "shared" / "data"


def needs(folder: str) -> pytest.MarkDecorator:
    """Skip a test where a folder of the shared data is absent."""
    path = shared_data() / folder
    return pytest.mark.skipif(not path.is_dir(), reason=f"needs ../shared/data/{folder} beside the checkout")
