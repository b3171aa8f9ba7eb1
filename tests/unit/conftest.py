"""What tests share: the toolkit, in the environment that the pipeline uses; a small tokenizer."""

from pathlib import Path

import pytest
from project import documents, write_source

from olmo.corpus.dolma import Dolma, pinned_toolkit
from olmo.corpus.environments import environment, interpreter_path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "envs" / "dolma.txt"


@pytest.fixture(scope="session")
def python():
    """The toolkit's environment, the one that the pipeline uses: built once, then found."""
    path = ROOT / "environments" / "dolma.json"
    path.parent.mkdir(exist_ok=True)
    environment(requirements=REQUIREMENTS, environment=path)
    return interpreter_path(path)


@pytest.fixture(scope="session")
def dolma(python):
    with Dolma(python, pinned_toolkit(REQUIREMENTS)) as dolma:
        yield dolma


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 300 entries."""
    from olmo.corpus.tokenizer import trained_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_source(folder / "documents.gz", documents(0))
    path = folder / "tokenizer.json"
    trained_tokenizer.build(documents=[folder / "documents.gz"], tokenizer=path, vocab_size=300)
    return path
