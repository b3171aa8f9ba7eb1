"""What `olmo plan` knows before anything runs: what the store has, sizes, times, money."""

import json
from pathlib import Path
from typing import Any

import pytest

from olmo.config import ModelConfig, TrainConfig
from olmo.config.model_size import count_parameters
from olmo.pipeline.forecast import Forecast, Job
from olmo.pipeline.forecast_text import format_forecast
from olmo.pipeline.plan import Plan
from olmo.pipeline.rates import History, Range, Rates, trained_run, trained_tokens
from olmo.store.action import Action
from olmo.store.lookup import FOUND, NEW, REBUILT, LookupStore
from olmo.store.stage import Facts, Input, Output, current_store, looking_up, stage

REPOSITORY = Path(__file__).parents[2]


@stage(version=1)
def doubled(text: Input, twice: Output, keep_one_in: int = 1) -> Facts:
    """A file twice."""
    twice.write_bytes(2 * text.read_bytes())
    return {"documents": 10}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"a" * 100)


def look(folder: Path) -> LookupStore:
    folder.mkdir()
    real = current_store()
    return LookupStore(real, folder / "", Rates(real).predict)


def test_a_chain_is_looked_up_and_what_it_lacks_is_predicted(tmp_path: Path):
    doubled(text=Path("a"), twice=Path("b"))
    doubled(text=Path("b"), twice=Path("b2"))
    Path("c").write_bytes(b"c" * 300)
    before = sorted(tmp_path.rglob("*"))
    plan = tmp_path.parent / f"{tmp_path.name}-plan"
    plan.mkdir()
    store = look(plan / "store")
    with looking_up(store):
        doubled(text=Path("a"), twice=plan / "b")
        doubled(text=Path("c"), twice=plan / "d")
        doubled(text=plan / "d", twice=plan / "e")
        doubled(text=Path("c"), twice=plan / "f", keep_one_in=3)
    assert [call.state for call in store.lookups] == [FOUND, NEW, NEW, NEW]
    sizes = [call.record["outputs"]["twice"]["size"] for call in store.lookups]
    assert sizes == [200, 600, 1200, 200]
    assert [call.record["facts"]["documents"] for call in store.lookups] == [10, 15, 30, 5]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lost_object_is_rebuilt_and_what_follows_is_found(tmp_path: Path):
    doubled(text=Path("a"), twice=Path("b"))
    doubled(text=Path("b"), twice=Path("c"))
    Path("b").resolve().unlink()
    plan = tmp_path.parent / f"{tmp_path.name}-plan"
    plan.mkdir()
    store = look(plan / "store")
    with looking_up(store):
        doubled(text=Path("a"), twice=plan / "b")
        doubled(text=plan / "b", twice=plan / "c")
    assert [call.state for call in store.lookups] == [REBUILT, FOUND]


def test_a_plan_writes_below_its_own_folder_only(tmp_path: Path):
    plan = tmp_path.parent / f"{tmp_path.name}-plan"
    plan.mkdir()
    with looking_up(look(plan / "store")), pytest.raises(ValueError, match="folder of the plan"):
        doubled(text=Path("a"), twice=Path("b"))
    assert not Path("b").exists()


def test_times_follow_the_records(tmp_path: Path):
    doubled(text=Path("a"), twice=Path("b"))
    doubled(text=Path("b"), twice=Path("c"))
    rates = Rates(current_store())
    rates.histories["doubled"].seconds = 5.0
    action = Action("doubled", 1, {}, {"text": "x"})
    assert rates.seconds(action, 1000, 0) == Range.around(25.0, 1.5)
    assert rates.seconds(Action("unknown", 1), 1000, 0) is None
    rates.histories["documents"] = History(actions=1, read=10**6, seconds=10.0)
    documents = rates.seconds(Action("documents", 1), 10**9, 0)  # a thousand times as much
    assert documents and documents.high > 4 * documents.low
    assert documents.middle < 100


@pytest.mark.parametrize("name", ["olmo-tiny", "olmo-20m", "olmo-250m", "olmo-1b", "olmo-7b"])
def test_parameters_are_those_of_the_model(name: str):
    import torch

    from olmo.model import OLMo

    path = REPOSITORY / f"config/train/{name}.yaml"
    model = TrainConfig.load(path, validate_paths=False).model
    with torch.device("meta"):
        exact = OLMo(model, init_params=False).num_params()
    assert count_parameters(model) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("duration", "tokens"), [(10, 10 * 4 * 8), ("1e6T", 10**6), ("2ep", 2 * 500)]
)
def test_a_duration_in_tokens(duration: int | str, tokens: int):
    cfg = TrainConfig(
        max_duration=duration,
        global_train_batch_size=4,
        model=ModelConfig(max_sequence_length=8),
    )
    assert trained_tokens(cfg, token_bytes=1000) == tokens


def plan_of_the_list(dataset: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The plan of a data set of which only the list's address is known."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("olmo.pipeline.new.measure_machine", lambda: MACHINE)
    run = {"dolma-v1_6": "olmo-250m", "dolma-v1_6-sample": "olmo-250m-sample"}[dataset]
    price = {"gpu_hour": 2.5, "kwh": 0.3, "currency": "EUR"}
    gpu = {"train": "config/train/olmo-250m.yaml", "dataset": dataset, "gpus_per_node": 8}
    sample = {"train": "config/train/olmo-250m.yaml", "dataset": "dolma-v1_6-sample"}
    runs = {"olmo-250m-sample": sample, run: gpu}
    jobs = [
        Job(
            "source_list",
            f"olmo source-list --url https://x.org/y --table data/{dataset}/sources.tsv",
            [f"data/{dataset}/sources.tsv"],
        ),
        Job("train", None, [f"checkpoints/{run}/final"]),
    ]
    return format_forecast(Forecast(Plan({"runs": runs, "price": price}), jobs, 8))


class MACHINE:
    device, flops = "cuda", 400e12


def test_the_size_of_dolma_is_known_before_its_list_is_here(monkeypatch: pytest.MonkeyPatch):
    whole = plan_of_the_list("dolma-v1_6", monkeypatch)
    assert "5.4 TB to download" in whole
    assert whole.splitlines()[-1] == "WARNING: this is large; olmo-250m-sample is the small one"
    assert "GPU-hours" in whole and " EUR" in whole and "242B tokens to train on" in whole
    sample = plan_of_the_list("dolma-v1_6-sample", monkeypatch)
    assert "16.4 GB to download" in sample


def test_an_error_that_no_prediction_explains_is_told():
    words = "olmo order --tokens nothing.tsv --order checkpoints/a/order.npy --sequence-length 8"
    job = Job("order", f"{words} --seed 1", ["checkpoints/a/order.npy"])
    with pytest.raises(FileNotFoundError, match=r"nothing\.tsv"):
        Forecast(Plan({"runs": {}}), [job], 1)


AMOUNTS = {
    "documents": (9e3, 10e3, 12e3),
    "text_bytes": (2e6, 4e6, 5e6),
    "tokens": (0.5e6, 1e6, 1.5e6),
    "source_bytes": (2e6, 2e6, 2e6),
    "documents_bytes": (0.8e6, 1e6, 1.2e6),
}


def plan_of_a_table() -> str:
    """The plan of a data set whose two sources, of 1 MB each, are not here."""
    Path("config/data").mkdir(parents=True, exist_ok=True)
    rows = "".join(f"http://127.0.0.1:9/{name}.json.gz\t1000000\t\n" for name in "ab")
    Path("config/t.tsv").write_text(f"url\tbytes\tsha256\n{rows}")
    Path("config/data/mine.yaml").write_text(
        "sources: {table: config/t.tsv}\ndocuments: {keep_one_in: 4}\n"
        "tokenizer: {file: tokenizer.json}\n"
    )
    sources = " ".join(f"{name}=http://127.0.0.1:9/{name}.json.gz" for name in "ab")
    listing = "data/mine/{}/000.tsv"
    commands = {
        "sources": f"--sources {sources} --table config/t.tsv",
        "documents": f"--sources {listing.format('sources')} --config '{{\"keep_one_in\": 4}}'",
        "tokens": f"--documents {listing.format('documents')} --tokenizer tokenizer.json "
        f"--requirements {REPOSITORY}/envs/dolma.txt --eos-token-id 0 --pad-token-id 1 "
        "--config '{}'",
    }
    Path("tokenizer.json").write_text("{}")
    jobs = [
        Job(name, f"olmo {name} {words} --listing {listing.format(name)}", [listing.format(name)])
        for name, words in commands.items()
    ]
    return format_forecast(Forecast(Plan({"runs": {}}), jobs, 2))


def write_sample(keep_one_in: int) -> None:
    total: dict[str, object] = {"bytes": 2_000_000}
    for name, (low, expected, high) in AMOUNTS.items():
        total[name] = {"low": low, "expected": expected, "high": high}
    Path("data/mine").mkdir(parents=True, exist_ok=True)
    content = {"total": total, "documents": {"keep_one_in": keep_one_in}}
    Path("data/mine/sample.json").write_text(json.dumps(content))


def test_a_sample_replaces_the_fixed_rates():
    hint = "uv run snakemake --cores 2 data/mine/sample.txt"
    before = plan_of_a_table()
    assert hint in before and "325k tokens" in before
    write_sample(keep_one_in=4)
    after = plan_of_a_table()
    assert hint not in after
    assert "data: about 10k (9k to 12k) documents, 1M (500k to 1.5M) tokens" in after
    # 2 MB of sources, 1 MB of documents and the table, 2 bytes a token and the index
    assert "5.04 MB (3.82 MB to 6.26 MB) to write" in after
    write_sample(keep_one_in=5)  # of the recipe as it was
    assert plan_of_a_table() == before


def test_the_time_of_a_link_is_that_of_its_own_steps():
    record: Any = {
        "run": {"wall_s": 10.0},
        "facts": {"segments": [{"after": 50}], "tokens": 1000, "steps": 100},
        "outputs": {"final": {"files": {"model.safetensors": {"size": 40}}}},
        "conditions": {},
    }
    found = trained_run(record, True)
    assert found and found.flops_per_s == 6 * 10 * 500 / 10
