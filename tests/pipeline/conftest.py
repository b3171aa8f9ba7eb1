from pathlib import Path

import pytest
from project import Project, documents, write_source


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A small project that has not run yet."""
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 512 entries for recipes that are given one."""
    from olmo.corpus.tokenizer import trained_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_source(folder / "documents.gz", documents(0))
    trained_tokenizer.build(
        documents=[folder / "documents.gz"], tokenizer=folder / "tokenizer.json", vocab_size=512
    )
    return folder / "tokenizer.json"
