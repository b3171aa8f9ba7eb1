from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from project import Project, documents, write_source
from warm_commands import served


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    """The folder with commands that are forks. A socket's path must be short."""
    with TemporaryDirectory() as folder, served(Path(folder)):
        yield Path(folder)


@pytest.fixture(scope="module", autouse=True)
def forks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Commands of projects are forks: most of their time would be that of imports.

    In files that say IN_PROCESSES they are what a user starts.
    """
    if not hasattr(request.module, "IN_PROCESSES"):
        Project.warm = request.getfixturevalue("commands")
    yield
    Project.warm = None


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
