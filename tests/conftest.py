"""Fixtures that many tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, corpora and trained models that are not part of the project."""
    folder = Path(os.environ.get("JAXDRAFT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test material is not here ({folder}); set JAXDRAFT_SHARED_DATA to its folder")
    return folder
