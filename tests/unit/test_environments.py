"""The environment of another program, built once whoever asks for it."""

import json
import subprocess
import sys
from pathlib import Path


def test_two_concurrent_builds_make_one_environment(tmp_path: Path):
    """As two projects do that share the folder."""
    requirements = tmp_path / "tool.txt"
    requirements.write_text("# nothing\n")
    asked = (
        "import sys; from pathlib import Path; from olmo.corpus.environments import environment;"
    )
    asked += "environment(Path(sys.argv[1]), Path(sys.argv[2]))"
    made = tmp_path / "environments/tool.json"
    words = [sys.executable, "-c", asked, str(requirements), str(made)]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in both] == ["", ""]
    assert [process.returncode for process in both] == [0, 0]
    python = made.parent / json.loads(made.read_text())["python"]
    assert subprocess.run([python, "-c", ""]).returncode == 0
    folder = python.parents[1]
    assert "relocatable = true" in (folder / "pyvenv.cfg").read_text()
    assert {path.name for path in made.parent.iterdir()} == {made.name, folder.name, "leases"}
    assert list((made.parent / "leases").iterdir()) == []
