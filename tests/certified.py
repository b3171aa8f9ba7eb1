"""A project of two runs with certificates, made by the real Snakefile."""

import shutil
from pathlib import Path

from project import Project
from servers import guarded_web_server

WORD, SIGNATURE = "hunter-two", "5ecre7519na7ure"  # in the URLs of its sources
RUNS = ("small", "other")


def write_key(path: Path, curve: str = "SECP256R1", password: bytes | None = None) -> Path:
    """Write a private key, and its public half beside it as key.pub."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    lock = serialization.BestAvailableEncryption(password) if password else None
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            lock or serialization.NoEncryption(),
        )
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path.with_suffix(".pub").write_bytes(public)
    return path


def make_certified(folder: Path, runs: tuple[str, ...] = RUNS) -> Project:
    """A project in `folder` whose sources are a table of URLs, and a local file of another set."""
    project = Project(folder / "project")
    key = write_key(folder / "key.pem")
    signed = f"X-Amz-Credential=c%2Fd&X-Amz-Date=1&X-Amz-Signature={SIGNATURE}"
    shutil.move(project.root / "sources", folder / "elsewhere")
    for name in runs:
        project.change(
            "config/config.yaml",
            **{f"runs__{name}": {"train": f"config/train/{name}.yaml", "dataset": "small"}},
        )
        project.write(f"config/train/{name}.yaml", project.read("config/train/small.yaml"))
        if name != "small":
            project.change(f"config/train/{name}.yaml", seed=1)
    project.change(
        "config/config.yaml",
        certificate={
            "key": str(key),
            "licence": "Apache-2.0",
            "licences": {"small": "PSF-2.0 OR MIT"},
            "publisher": "https://example.org/us",
        },
    )
    with guarded_web_server(folder / "elsewhere", f"me:{WORD}", SIGNATURE) as place:
        rows = [
            f"http://me:{WORD}@{place}/part-0.json.gz\t\t\tODC-By-1.0",
            f"http://{place}/part-1.json.gz?{signed}\t\t\todc by, by mail",
            f"http://{place}/part-2.json.gz?{signed}\t\t\t",  # its licence is the config's
        ]
        table = project.root / "table.tsv"
        table.write_text("\n".join(["url\tbytes\tsha256\tlicence", *rows, ""]))
        project.change("config/data/small.yaml", sources={"table": "table.tsv"})
        project.run(*(f"certificate/{name}" for name in runs))
    return project


def carry_away(project: Project, folder: Path) -> tuple[Path, Path]:
    """The certificate and the checkpoint of `small` as files of another machine, without links."""
    certificate, checkpoint = folder / "certificate", folder / "final"
    shutil.copytree(project.root / "certificate/small", certificate)
    shutil.copytree(project.final, checkpoint)  # follows links
    for path in checkpoint.iterdir():
        path.chmod(0o644)
    return certificate, checkpoint
