"""What the tests of the data half share: the toolkit, in the environment that the pipeline uses."""

from pathlib import Path

import pytest

from olmo.data.dolma import Dolma, toolkit
from olmo.environments import environment, interpreter

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "envs" / "dolma.txt"


@pytest.fixture(scope="session")
def python():
    """The toolkit's environment, the one that the pipeline uses: built once, then found."""
    path = ROOT / "environments" / "dolma.json"
    path.parent.mkdir(exist_ok=True)
    environment(requirements=REQUIREMENTS, environment=path)
    return interpreter(path)


@pytest.fixture(scope="session")
def dolma(python):
    with Dolma(python, toolkit(REQUIREMENTS)) as dolma:
        yield dolma
