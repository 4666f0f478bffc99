import sysconfig
from pathlib import Path

import pytest

from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def documents() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"))[:12]
    return [path.read_text("utf-8") for path in files]


@pytest.fixture(scope="session")
def tokenizer(documents, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(documents, folder, 512)
    return load_tokenizer(folder)
