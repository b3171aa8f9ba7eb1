"""A site's settings over the profile's: what they change, and what there is no setting for."""

import re
from pathlib import Path

import pytest
import yte

from olmo.cluster.site import load_settings

PROFILE = Path(__file__).parents[2] / "profiles/slurm/config.yaml"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLMO_SITE", str(tmp_path / "site.yaml"))
    return tmp_path / "site.yaml"


def profile() -> dict:
    """The profile as snakemake fills it in."""
    return yte.process_yaml(PROFILE.open(), require_use_yte=True)


def test_a_site_changes_what_it_names_and_leaves_the_rest(site: Path):
    own = "stages: {train: {minutes: 90}}, other_stages: {minutes: 30}"
    site.write_text(f"{{account: lab, accounting: false, {own}}}")
    filled = profile()
    assert filled["slurm-status-command"] == "squeue"
    assert filled["default-resources"]["slurm_account"] == "'lab'"
    assert filled["default-resources"]["runtime"] == "min(attempt * 30, 1440)"
    assert filled["set-resources"]["train"]["runtime"] == "min(attempt * 90, 1440)"
    assert filled["set-resources"]["train"]["mem_mb"] == "min(attempt * 64000, 256000)"


def test_without_a_site_nothing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("OLMO_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    filled = profile()
    assert "slurm_account" not in filled["default-resources"]
    assert "slurm-array-jobs" not in filled
    assert filled["slurm-status-command"] == "sacct"


def test_stages_that_share_a_job_share_its_minutes(site: Path):
    site.write_text("{together: [[sources, documents]], most_minutes: 300}")
    filled = profile()
    assert filled["groups"] == dict.fromkeys(["sources", "documents"], "sources-documents")
    assert filled["set-resources"]["sources"]["runtime"] == "min(attempt * 240, 150)"
    assert filled["set-resources"]["order"]["runtime"] == "min(attempt * 60, 300)"


def test_stages_ask_for_what_is_theirs(site: Path):
    site.write_text("{partition: cpu, gpu_partition: gpu, gpu: 'gpu:a100', extra: --nice}")
    stages = profile()["set-resources"]
    assert stages["order"]["slurm_partition"] == "'cpu'"
    assert stages["order"]["slurm_extra"] == "'--nice'"
    assert "gres" not in stages["order"] and "tasks_per_gpu" not in stages["order"]
    assert stages["train"]["slurm_partition"] == stages["heldout"]["slurm_partition"] == "'gpu'"
    assert stages["train"]["slurm_extra"] == "'--no-kill --nice --signal=USR1@120'"
    assert "gres" not in stages["train"]  # the rule's: each run has its own
    assert stages["heldout"]["gres"] == "'gpu:a100:1'"
    assert stages["heldout"]["tasks_per_gpu"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "together: [[order, train]]",
        "{together: [[sources, documents], [hf, heldout]], gpu_partition: gpu, gpu: null}",
        "together: [[hf, heldout]]",
    ],
)
def test_stages_that_share_a_job_ask_for_the_same(site: Path, text: str):
    site.write_text(text)
    with pytest.raises(Exception, match="expected stages with the same SLURM resources") as raised:
        profile()
    assert str(site) in str(raised.value)


def test_a_gpu_partition_of_the_same_name_is_no_other(site: Path):
    site.write_text("{together: [[hf, heldout]], partition: a, gpu_partition: a, gpu: null}")
    assert profile()["groups"] == dict.fromkeys(["hf", "heldout"], "hf-heldout")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arrays: [token]", "found token"),
        ("together: [[sources, document]]", "found document"),
        ("{arrays: [sources], together: [[sources, documents]]}", "found it twice"),
    ],
)
def test_a_job_of_stages_that_there_are_not(site: Path, text: str, words: str):
    site.write_text(text)
    with pytest.raises(Exception, match=words) as raised:
        profile()
    assert str(site) in str(raised.value)


def test_the_stages_of_the_profile_are_rules_that_become_jobs_and_all_jobs_grow():
    root = PROFILE.parents[2]
    text = "".join(path.read_text() for path in [root / "Snakefile", *root.glob("rules/*.smk")])
    named = re.findall(r"^(?:rule|checkpoint) (\w+):|^use rule \w+ as (\w+) with:", text, re.M)
    rules = {name for pair in named for name in pair if name}
    [local] = re.findall(r"^localrules:\n((?:    .+\n)+)", text, re.M)
    filled = profile()
    jobs = rules - set(re.findall(r"^    (\w+),", local, re.M))
    assert set(filled["set-resources"]) == set(filled["set-threads"]) <= jobs
    for needs in (filled["default-resources"], *filled["set-resources"].values()):
        assert all("attempt *" in needs[name] for name in ("mem_mb", "runtime")), needs
    bodies = re.findall(r"^(?:rule|checkpoint) (\w+):\n((?:(?:    .*)?\n)+)", text, re.M)
    threaded = {name for name, body in bodies if "    threads:" in body}
    assert threaded <= set(filled["set-threads"]), "else they would ask for the profile's `cores`"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acount: lab", "acount"),
        ("stages: {train: {memory: 1}}", "memory"),
        ("- account", "found a list"),
        ("stages: 3", "stages"),
    ],
)
def test_a_setting_that_there_is_not(site: Path, text: str, words: str):
    site.write_text(text)
    with pytest.raises(ValueError, match=words) as raised:
        load_settings({"account": None, "stages": {"train": {"memory_mb": 1}}})
    assert str(site) in str(raised.value)


def test_a_site_that_is_not_there(site: Path):
    with pytest.raises(ValueError, match="found no"):
        load_settings({})
