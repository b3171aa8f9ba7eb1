"""What others make accepts our certificates: validators of each format, as they come."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from certified import carry_away, make_certified
from project import Project

pytestmark = pytest.mark.slow
GROUP = "uv run --group validators pytest"
for package in ("mlcroissant", "cyclonedx", "rocrate_validator", "model_signing"):
    pytest.importorskip(package, reason=GROUP)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_certified(tmp_path_factory.mktemp("validated"), ("small",))
    project.change("config/config.yaml", certificate__export=True)
    project.run("certificate/small")
    return project


def document(made: Project, name: str) -> Path:
    return made.root / "certificate/small" / name


def model_signing(folder: Path, signature: Path, key: Path) -> str:
    """What model-signing's own command says; "" if it verified."""
    command = Path(sys.executable).parent / "model_signing"
    words = ["verify", "key", folder, "--signature", signature, "--public_key", key]
    done = subprocess.run([command, *words], capture_output=True, text=True)
    assert (done.returncode == 0) == ("Verification succeeded" in done.stdout)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_model_signing(made: Project, tmp_path: Path) -> None:
    certificate, checkpoint = carry_away(made, tmp_path)
    key = made.root.parent / "key.pub"
    export = tmp_path / "hf"
    shutil.copytree(made.root / "hf/small", export)
    places = {"model.sig": checkpoint, "hf.sig": export, "certificate.sig": certificate}
    for name, folder in places.items():
        assert not model_signing(folder, certificate / name, key)
    for name, folder in places.items():
        signed = (p for p in sorted(folder.iterdir()) if p.suffix == ".json")
        file = next(path for path in signed if path.name != "record.json")
        file.chmod(0o644)
        content = file.read_bytes()
        file.write_bytes(content.replace(b"a", b"b", 1))
        said = model_signing(folder, certificate / name, key)
        assert f"Hash mismatch for '{file.name}'" in said.replace("\\", "")
        file.write_bytes(content)


def test_in_toto(made: Project) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    found = json.loads(document(made, "provenance.json").read_text())
    Statement.copy_from_pb(json_format.ParseDict(found, statement_pb2.Statement())).validate()
    # An unknown field would be an error.
    provenance = json_format.ParseDict(found["predicate"], provenance_pb2.Provenance())
    assert len(provenance.build_definition.resolved_dependencies) >= 3


def test_croissant(made: Project, caplog: pytest.LogCaptureFixture) -> None:
    import mlcroissant

    found = mlcroissant.Dataset(jsonld=str(document(made, "croissant-small.json")))
    assert not found.metadata.ctx.issues.errors and not found.metadata.ctx.issues.warnings
    assert not caplog.records
    assert len(found.metadata.distribution) == 3
    broken = json.loads(document(made, "croissant-small.json").read_text())
    del broken["distribution"][0]["contentUrl"]
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(jsonld=broken)


def test_cyclonedx(made: Project) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    text = document(made, "bom.cdx.json").read_text()
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"SHA-256"', '"SHA-257"')) is not None


@pytest.fixture
def context() -> Any:
    """The JSON-LD context of crates, which the validator gets from w3id.org, from a package."""
    import responses
    import rocrate

    content = (Path(rocrate.__file__).parent / "data/ro-crate.jsonld").read_text()
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        place = "https://w3id.org/ro/crate/1.1/context"
        for method in ("GET", "HEAD"):
            mock.add(method, place, body=content, content_type="application/ld+json")
        yield mock


def test_ro_crate(made: Project, context: Any, tmp_path: Path) -> None:
    from rocrate_validator import models, services

    def issues(folder: Path, severity: str) -> list[str]:
        settings = services.ValidationSettings(
            rocrate_uri=str(folder),
            profile_identifier="process-run-crate-0.5",
            requirement_severity=models.Severity[severity],
            skip_availability_check=True,  # of its sources' URLs
            cache_path=tmp_path / "cache",
        )
        result = services.validate(settings)
        assert len(result.executed_checks) > 40
        return [f"{issue.check.identifier}: {issue.message}" for issue in result.get_issues()]

    folder = made.root / "certificate/small"
    # We have no URL of our own, neither as an address nor as an identifier, and the server of the
    # sources is gone.
    assert {one.partition(":")[0] for one in issues(folder, "RECOMMENDED")} <= {
        "process-run-crate-0.5_3.2",
        "process-run-crate-0.5_5.1",
        "ro-crate-1.1_28.1",
    }
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    crate = json.loads((broken / "ro-crate-metadata.json").read_text())
    for entity in crate["@graph"]:
        entity.pop("instrument", None)
    (broken / "ro-crate-metadata.json").write_text(json.dumps(crate))
    assert any("instrument" in one for one in issues(broken, "REQUIRED"))
