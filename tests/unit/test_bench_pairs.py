"""Other trainers: how they are found, timed in turns with ours, and reported when missing."""

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
from test_bench import matrix

from olmo.bench import __main__ as runner
from olmo.bench import pairs, table
from olmo.bench.matrix import Section, load_section
from olmo.bench.pairs import Peer, find_peers, locate_peer, time_pair

PEER = os.environ.get(pairs.PYTHON)
BOTH = {"shape": ["small"], "microbatch": [2]}
with_peer = pytest.mark.skipif(
    not PEER, reason="OLMO_PEER_PYTHON is not set; see tests/parity/README.md"
)
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def section_of(folder: Path, *groups: dict, **changes: object) -> Section:
    peers = [{**BOTH, **group} for group in groups]
    return load_section(matrix(folder, peers=peers, rounds=5, steps=20, **changes), "cpu")


def test_ranges_of_a_matrixs_numbers(tmp_path: Path):
    for name, least in (("steps", 1), ("rounds", 1), ("warmup", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected at least {least}, found -1"):
            load_section(matrix(tmp_path, **{name: -1}), "cpu")


def test_pairs_share_shape_and_microbatch(tmp_path: Path):
    ours = {"compile": "default", "precision": "amp_bf16"}
    section = section_of(tmp_path, {"compile": ["eager", "default"], "ours": ours}, {})
    found = section.pairs()
    assert len(found) == 6, "expected two peers, eager and compiled, and both beside ours eager"
    assert all(pair.ours.microbatch == pair.theirs.microbatch == 2 for pair in found)
    assert {pair.ours.compile for pair in found[:4]} == {"default"}
    assert {pair.theirs.precision for pair in found} == {"fp32"}
    for wrong, message in (
        ({"ours": {"microbatch": "3"}}, "those of the peer"),
        ({"peer": ["nanogpt"]}, "peer: expected one of ours, ai2-olmo"),
        ({"peer": ["ai2-olmo"], "attention": ["cudnn"]}, "attention: expected one of sdpa"),
        ({"ours": {"fp8": "fastest"}}, "fp8: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            section_of(tmp_path, wrong)


def test_a_missing_peer_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(pairs.PYTHON, raising=False)
    assert "--peer ai2-olmo=PYTHON" in str(find_peers([])["ai2-olmo"])
    assert isinstance(find_peers([])["transformers"], Peer if HAS_TRANSFORMERS else str)
    for wrong, message in (
        ("ai2-olmo", "NAME=WHERE"),
        ("nanogpt=python", "NAME=WHERE"),
        (f"ai2-olmo={sys.executable}", "has no ai2-olmo"),
        (f"ai2-olmo={tmp_path}", r"no olmo/version\.py of AI2's"),
        ("ai2-olmo=/no/such/python", "expected a Python at"),
    ):
        with pytest.raises(ValueError, match=message):
            find_peers([wrong])
    sources = tmp_path / "sources"
    (sources / "olmo").mkdir(parents=True)
    (sources / "olmo/version.py").write_text('VERSION = "0.6.0"\n')
    wheel = tmp_path / "ai2_olmo-0.6.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("olmo/version.py", '_MINOR = "6"\nVERSION = "0." + _MINOR + ".1"\n')
    for where, version in ((sources, "0.6.0"), (wheel, "0.6.1")):
        found = locate_peer("ai2-olmo", str(where))
        assert found.versions["ai2-olmo"] == version and found.python == sys.executable
        assert "torch" in found.versions


@pytest.mark.slow
@pytest.mark.skipif(not (PEER or HAS_TRANSFORMERS), reason="no transformers, OLMO_PEER_PYTHON")
def test_transformers_trains_the_same_model_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    section = section_of(tmp_path, {"peer": ["transformers"], "attention": ["math", "flash-attn"]})
    peer = find_peers([])["transformers"]
    one, flash = (time_pair(section, pair, peer, "cpu", 600) for pair in section.pairs())
    check_pair(one, section)
    assert (
        flash["status"] == "unavailable" and "flash-attn is computed by the package" in flash["why"]
    )

    # Sides whose first losses differ have no ratio.
    monkeypatch.setitem(pairs.SAME_LOSS, "fp32", 1e-9)
    other = section_of(tmp_path, {"peer": ["transformers"], "ours": {"precision": "amp_bf16"}})
    unequal = time_pair(other, other.pairs()[0], peer, "cpu", 600)
    assert unequal["status"] == "failed" and "not the same model" in unequal["why"]


@pytest.mark.slow
@with_peer
def test_ai2_olmo_trains_the_same_model_in_turns(tmp_path: Path):
    """Its package, and its sources alone in our Python, which lacks some of their imports."""
    path = matrix(tmp_path, peers=[BOTH | {"peer": ["ai2-olmo"]}], rounds=5, steps=20)
    (record,), section = runner.run_matrix(path, tmp_path / "out", kind="cpu")
    check_pair(record, section)
    assert (
        record["peer"]["ai2-olmo"] and "beside ai2-olmo" in (tmp_path / "out/table.md").read_text()
    )
    program = "import olmo, pathlib; print(pathlib.Path(olmo.__file__).parent)"
    command = [PEER, "-W", "ignore", "-c", program]
    installed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources/olmo").symlink_to(installed.stdout.strip())
    sources = locate_peer("ai2-olmo", str(tmp_path / "sources"))
    again = time_pair(section, section.pairs()[0], sources, "cpu", 600)
    check_pair(again, section)
    assert again["last_loss"] == pytest.approx(record["last_loss"], rel=1e-5)


def check_pair(record: dict, section: Section) -> None:
    """Equal losses, and ratios of the seconds of each turn."""
    assert record["status"] == "ok", record
    ours = record["ours"]
    assert record["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-5)
    assert record["last_loss"] == pytest.approx(ours["last_loss"], rel=1e-2)
    assert record["last_loss"] != record["first_loss"]
    assert len(record["seconds"]) == len(ours["seconds"]) == 20
    by_hand = [
        sum(record["seconds"][i : i + 4]) / sum(ours["seconds"][i : i + 4]) for i in range(0, 20, 4)
    ]
    assert record["ratios"] == pytest.approx(by_hand)
    assert record["ratio"] == statistics.median(by_hand)
    assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"]
    assert math.isfinite(record["ratio_cpu"]) and record["peak_memory_bytes"] > 0


def test_the_table_has_theirs_ours_and_the_ratio(tmp_path: Path):
    section = section_of(tmp_path, {"peer": ["ai2-olmo"], "compile": ["eager", "default"]})
    speeds = {"tokens_per_second_p10": 9.0, "tokens_per_second_p90": 11.0, "mfu_palm": None,
              "mfu_causal": None, "peak_memory_bytes": 2**21, "last_loss": 3.0,
              "seconds": []}  # fmt: skip
    here = {"device": "a card", "kind": "cpu", "torch": "2", "python": "3", "threads": 1}
    here |= {"started": "2026-01-02T00:00:00Z", "peer": {"ai2-olmo": "0.6.0", "torch": "1"}}
    ours = speeds | {"tokens_per_second": 40.0, "attention_used": "sdpa"}
    records = []
    for pair, speed in zip(section.pairs(), (10.0, 20.0), strict=True):
        ratios = {"ratio": 40 / speed, "ratio_low": 1.5, "ratio_high": 4.5, "ratio_cpu": 3.0}
        rates = {"tokens_per_second": speed, "tokens_per_cpu_second": speed / 2, "ours": ours}
        cells = {"cell": asdict(pair.theirs), "beside": asdict(pair.ours)}
        records.append(cells | here | speeds | rates | ratios | {"status": "ok"})
    text = table.markdown(records, section, "the command")
    assert "`OMP_NUM_THREADS=1 the command --peer ai2-olmo=PYTHON`" in text
    assert "beside ai2-olmo 0.6.0; with torch 1 for them; 2026-01-02." in text
    rows = [line for line in text.splitlines() if line.startswith("| ai2-olmo")]
    assert rows[0] == (
        "| ai2-olmo | sdpa | default | 2 | fp32 | 20 ± 1 | 40 ± 1 | 2.00 (1.50–4.50) | 3.00 "
        "| 2 | 2 | 3.000 | 3.000 |"
    )
    assert (
        "- ours is 2.00 (1.50–4.50) times as fast as ai2-olmo, fastest of 2 timed "
        "(sdpa, default, microbatch 2, fp32), 3.00 times in CPU time" in text
    )
    row = table.record_row(records[0], section)
    assert (row["whose"], row["ratio"], row["ours_tokens_per_second"]) == ("ai2-olmo", 4.0, 40.0)
    assert json.dumps(row)
