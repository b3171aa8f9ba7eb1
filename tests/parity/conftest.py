"""Running OLMo's own code, in its environment, on cases of ours."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PEER = os.environ.get("OLMO_PEER_PYTHON")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, np.ndarray]]:
    """theirs(script, cases): what `script CASES.json RESULTS.npz` computes there."""
    folder = tmp_path_factory.mktemp("parity")

    def compute(script: str, cases: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        assert PEER is not None
        (folder / "cases.json").write_text(json.dumps(cases))
        subprocess.run(
            [PEER, "-W", "ignore", HERE / script, folder / "cases.json", folder / "results.npz"],
            check=True,
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        return dict(np.load(folder / "results.npz"))

    return compute
