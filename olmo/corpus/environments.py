"""Virtual environments for programs whose dependencies conflict with ours, built once by uv."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from olmo.io import sealed
from olmo.store.lease import lease


def environment(requirements: Path, environment: Path) -> None:
    """Build the virtual environment that `requirements` pins, for the running Python's version.

    `environment` is a JSON file, written last: "python" (the interpreter's path, relative to this
    file) and what the environment was built from. The environment is in a folder next to it, named
    by a hash of that, so that a complete one is reused and a half-built one is not.

    Args:
        environment: JSON file to write

    Raises ValueError when uv cannot install the requirements.
    """
    environment = Path(os.path.abspath(environment))
    # Two projects may share the folder through a link.
    with lease(environment.parent / "leases", requirements.stem):
        build_environment(requirements, environment)


def build_environment(requirements: Path, environment: Path) -> None:
    content = requirements.read_text()
    made_from = {
        "requirements": hashlib.sha256(content.encode()).hexdigest(),
        "python_version": platform.python_version(),
        "platform": sysconfig.get_platform(),
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    folder = environment.parent / f"{requirements.stem}-{key}"
    marker, interpreter = folder / "made-from.json", folder / "bin" / "python"
    if not (marker.exists() and interpreter.exists()):
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted attempt
        # Relocatable: its commands work in a project that is moved, or behind a link that goes.
        options = ("--quiet", "--no-project", "--relocatable", "--python", sys.executable)
        run_uv("venv", *options, str(folder))
        target = ("--python", str(folder), "-r", os.path.abspath(requirements))
        run_uv("pip", "install", "--quiet", "--compile-bytecode", *target)
        sealed.write_atomic(marker, json.dumps(made_from, indent=1), alone=True)
    python = os.path.relpath(interpreter, environment.parent)
    text = json.dumps({"python": python, **made_from}, indent=1, sort_keys=True) + "\n"
    sealed.write_atomic(environment, text, alone=True)


def run_uv(*arguments: str) -> None:
    """Run uv (one of our dependencies) from `/`, where this project's settings do not apply.

    Raises ValueError with its messages when it fails.
    """
    from uv import find_uv_bin

    hidden = ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "PYTHONPATH")  # ours, not the new one's
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [find_uv_bin(), *arguments], cwd=os.sep, env=variables, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(
            f"uv {' '.join(arguments)} failed:\n{done.stderr.strip()}\nCheck the "
            "network and the free space, then run the same command again"
        )


def interpreter_path(environment: Path) -> Path:
    """The Python of an environment, from its JSON file."""
    try:
        path = environment.parent / json.loads(environment.read_text())["python"]
    except (ValueError, KeyError, TypeError):
        path = None
    if path is None or not path.exists():
        raise ValueError(
            f"{environment}: expected the path of an existing Python, found {path or 'none'}. "
            f"Build the environment again: rm {environment}, then run the same command"
        )
    return path


def pinned_version(requirements: Path, package: str) -> str:
    """The version of a package that a requirements file pins."""
    for line in requirements.read_text().splitlines():
        name, _, rest = line.partition("==")
        if name == package:
            return rest.split(";")[0].strip()
    raise ValueError(f"{requirements}: expected a line {package}==…, found none")
