"""Ladders as runs: their names, links and budgets, what is refused, and what a report reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from olmo.config import list_runs
from olmo.pipeline.ladder_report import (
    Piece,
    Rung,
    count_saving,
    format_check,
    read_prediction,
    read_rung,
)
from olmo.pipeline.parts import ladder_flags, previous_link
from olmo.pipeline.plan import Plan
from olmo.report.scaling import Interval

LADDER = {
    "train": "config/train/a.yaml",
    "dataset": "d",
    "sizes": {
        "s": ["model.d_model=16"],
        "m": ["model.d_model=32"],
        "n": ["model.d_model=48"],
        "l": ["model.d_model=64", "optimizer.learning_rate=0.001"],
    },
    "budgets": ["20x", "2e6T"],
    "held_out": "l",
    "overrides": ["scheduler.alpha_f=0.0"],
}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train = {
        "model": {"n_heads": 2, "n_layers": 2, "mlp_ratio": 4, "max_sequence_length": 64},
        "scheduler": {"t_warmup": 4},
        "global_train_batch_size": 8,
    }
    Path("config/train").mkdir(parents=True)
    Path("config/train/a.yaml").write_text(yaml.safe_dump(train))
    return tmp_path


def plan(**changes: Any) -> Plan:
    return Plan({"runs": {}, "ladders": {"x": LADDER | changes}})


def test_a_ladder_is_runs_that_share_trunks() -> None:
    made = plan()
    assert list(made.pipeline.runs) == [f"x-{s}-{b}" for s in "smnl" for b in ("20x", "2e6T")]
    short, long = made.branches("x")[:2]
    assert short.parameters == 2 * 10 * 16**2 and long.tokens == 3906 * 512
    assert short.steps == round(20 * short.parameters / 512) and short.trunk_steps == 160
    run = made.run(long.name)
    assert run.links == [short.trunk_steps, long.trunk_steps]
    assert run.overrides == [
        *("scheduler.alpha_f=0.0", "model.d_model=16", "max_duration=3906"),
        *("scheduler.name=warmup_stable_decay", f"scheduler.t_decay={3906 - long.trunk_steps}"),
    ]
    heads = 50304 * 16  # vocab_size's default
    assert long.flops == 6.0 * (long.parameters + heads) * long.tokens
    Path("config/config.yaml").write_text(
        yaml.safe_dump({"runs": {}, "ladders": {"x": LADDER}}, sort_keys=False)
    )
    assert list_runs() == list(made.pipeline.runs)


def test_a_schedule_in_tokens_decays_for_tokens() -> None:
    made = plan(overrides=["scheduler.units=tokens", "scheduler.t_warmup=2048"])
    short = made.branches("x")[0]
    decay = (short.steps - short.trunk_steps) * 512
    assert f"scheduler.t_decay={decay}" in made.run(short.name).overrides


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sizes": {"l": []}},
            "sizes: expected at least two and the one that is held out",
        ),
        ({"held_out": "xl"}, "held_out: expected one of the sizes s, m, n, l, found xl"),
        ({"budgets": []}, "budgets: expected lengths, each once, found none"),
        ({"budgets": ["20x", "20x"]}, "budgets: expected lengths, each once, found 20x, 20x"),
        ({"budgets": ["20"]}, r"as 20x, or tokens, as 4e6T, up to 1e\+18; found '20'"),
        ({"budgets": ["20x", "1e999x"]}, "found '1e999x'"),
        ({"budgets": ["٢٠x"]}, "found '٢٠x'"),
        ({"overrides": ["global_train_batch_size=0"]}, "batch_size: expected at least 1, found 0"),
        (
            {
                "sizes": {
                    "s": LADDER["sizes"]["s"],
                    "m": ["model.d_model=32"],
                    "l": LADDER["sizes"]["l"],
                }
            },
            "expected more runs to predict from than the law has numbers, 4; found 4; add a size",
        ),
        ({"budgets": ["20x"]}, "the law has numbers, 3; found 3; add a size, or a budget"),
        (
            {"sizes": LADDER["sizes"] | {"n": ["model.d_model=32", "seed=7"]}},
            "expected another number of parameters of each size, found 20,480 .* of m and of n",
        ),
        ({"budgets": ["0x"]}, "found '0x'"),
        ({"budgets": ["../x"]}, r"found '\.\./x'"),
        ({"sizes": LADDER["sizes"] | {"../s": []}}, "expected names of letters, digits"),
        ({"train": "none.yaml"}, r"ladders\.x\.train: no config file at none.yaml"),
        (
            {"sizes": LADDER["sizes"] | {"m": ["model.d_modl=8"]}},
            r"ladders\.x\.sizes\.m: .*model\.d_modl: no such key",
        ),
        ({"decay_share": 1.0}, "decay_share: expected a number between 0 and 1, found 1.0"),
        ({"confidence": 90}, "confidence: expected a number between 0 and 1, found 90"),
        ({"budget": ["20x"]}, "no such key in LadderConfig; the nearest is 'budgets'"),
        ({"overrides": ["max_duration=9"]}, "none of max_duration, which budgets and decay_share"),
        ({"budgets": ["2500T"]}, "expected x-s-2500T to decay after its warm-up of 4 steps, found"),
        (
            {"budgets": ["2e6T", "20x"]},
            r"ladders\.x\.budgets: expected rising ones, found that x-s-20x with 200 steps leaves "
            "the trunk no later than x-s-2e6T with 3,906; put the shortest first",
        ),
    ],
)
def test_what_a_ladder_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        plan(**changes).branches("x")
    assert "config/config.yaml: ladders.x" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["..", "a b", "a/b", "-x", "", "check", "{run}"])
def test_what_a_ladder_cannot_be_called(name: str) -> None:
    with pytest.raises(ValueError, match=r"ladders: expected names of letters, .*; rename it"):
        Plan({"runs": {}, "ladders": {name: LADDER}})


@pytest.mark.parametrize(
    ("place", "key"), [({}, "stop_at"), ({"scheduler": {}}, "scheduler.t_max")]
)
def test_the_training_config_does_not_end_a_branch(place: dict[str, Any], key: str) -> None:
    path = Path("config/train/a.yaml")
    train = yaml.safe_load(path.read_text())
    inner = train["scheduler"] if place else train
    inner[key.rpartition(".")[2]] = 9
    path.write_text(yaml.safe_dump(train))
    with pytest.raises(ValueError, match=f"{key}: expected none in the training config of a lad"):
        plan().branches("x")


def test_names_are_taken_once() -> None:
    run = {"train": "config/train/a.yaml", "dataset": "d"}
    with pytest.raises(ValueError, match="found x-m-20x, which a run or a soup has, too"):
        Plan({"runs": {"x-m-20x": run}, "ladders": {"x": LADDER}})
    sizes = {"y-s": [], "m": [], "l": []}
    with pytest.raises(ValueError, match=r"ladders\.x-y.*x-y-s-20x, which the ladder x has"):
        Plan(
            {
                "runs": {},
                "ladders": {"x": LADDER | {"sizes": sizes, "budgets": ["20x"]}, "x-y": LADDER},
            }
        )
    with pytest.raises(ValueError, match="expected one of the ladders x, found y"):
        plan().ladder("y")


def test_a_ladder_with_a_mistake_is_none_of_the_other_runs_business() -> None:
    run = {"train": "config/train/a.yaml", "dataset": "d"}
    made = Plan({"runs": {"a": run}, "ladders": {"x": LADDER | {"train": "none.yaml"}}})
    assert made.run("a").dataset == made.dataset("a") == made.dataset("x-s-20x") == "d"


def test_all_runs_need_what_the_longest_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(budgets=["20x", "40x"])
    monkeypatch.setattr(made, "train_config", load(made))
    longest = max(branch.steps for branch in made.branches("x"))
    assert ladder_flags(made, "x-s-20x") == f"--one-epoch {longest}"
    made.ladder_of.clear()
    assert ladder_flags(made, "x-s-20x") == ""


def load(made: Plan) -> Any:
    from olmo.config import TrainConfig

    return lambda run: TrainConfig.load(
        made.run(run).train, made.run(run).overrides, validate_paths=False
    )


def test_each_branch_continues_the_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan()
    monkeypatch.setattr(made, "train_config", load(made))
    short, long = made.run("x-s-20x").links, made.run("x-s-2e6T").links
    assert previous_link(made, "x-s-20x") == [f"checkpoints/x-s-20x/step-{short[0]}"]
    assert previous_link(made, "x-s-2e6T", str(long[1])) == [f"checkpoints/x-s-2e6T/step-{long[0]}"]


# --- what a report reads --------------------------------------------------------------------


def write_run(name: str, steps: dict[str, int], loss: Any = 3.5) -> None:
    for place, reached in steps.items():
        path = Path("checkpoints", name, place, "record.json")
        path.parent.mkdir(parents=True)
        heldout = {"heldout": {"first": 9.0, "last": loss}} if loss is not None else {}
        path.write_text(
            json.dumps(
                {
                    "key": f"{name}-{place}" if place == "final" else f"trunk-{reached}",
                    "facts": {"steps": reached, "heldout_loss": heldout},
                    "run": {"wall_s": 2.0},
                    "action": {"params": {"settings": {"max_duration": reached}}},
                }
            )
        )


@pytest.fixture
def unsealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "olmo.pipeline.ladder_report.parse_record", lambda text, path: json.loads(text)
    )


@pytest.mark.usefixtures("unsealed")
def test_tokens_that_trunks_saved_are_counted_by_actions() -> None:
    made = plan()
    rungs = []
    for branch in made.branches("x")[:2]:
        links = made.run(branch.name).links
        places = {f"step-{step}": step for step in links} | {"final": branch.steps}
        write_run(branch.name, places)
        rungs.append(read_rung("x", branch, links, {"max_duration": branch.steps}))
    short, long = (rung.branch for rung in rungs)
    assert rungs[1].pieces[f"trunk-{short.trunk_steps}"] == Piece(short.trunk_steps, 2.0, 0.0)
    scratch, trained = count_saving(rungs)
    assert scratch == short.tokens + long.tokens
    assert scratch - trained == short.trunk_steps * 512


@pytest.mark.usefixtures("unsealed")
def test_a_run_that_is_missing_or_diverged_is_named() -> None:
    made = plan()
    branch = made.branches("x")[0]
    with pytest.raises(ValueError, match=r"x-s-20x in .*/final, found none; train it: uv run"):
        read_rung("x", branch, [], {"max_duration": branch.steps})
    write_run(branch.name, {"final": branch.steps}, loss="nan")
    with pytest.raises(ValueError, match="held-out loss of x-s-20x, found nan: it diverged"):
        read_rung("x", branch, [], {"max_duration": branch.steps})
    write_run("short", {"final": branch.steps - 1})
    Path("checkpoints/x-s-20x").rename("old")
    Path("checkpoints/short").rename("checkpoints/x-s-20x")
    with pytest.raises(ValueError, match=r"since it was trained \(max_duration: 199 → 200\)"):
        read_rung("x", branch, [], {"max_duration": branch.steps})
    write_run("none", {"final": branch.steps}, loss=None)
    Path("checkpoints/x-s-20x").rename("older")
    Path("checkpoints/none").rename("checkpoints/x-s-20x")
    with pytest.raises(ValueError, match=r"set documents\.heldout_share"):
        read_rung("x", branch, [], {"max_duration": branch.steps})


def test_what_is_checked_is_what_was_said() -> None:
    made = plan()
    config = made.ladder("x")
    wanted = [b for b in made.branches("x") if b.size == "l"]
    path = Path("prediction.json")
    with pytest.raises(ValueError, match="found none; predict it: uv run snakemake"):
        read_prediction(path, "x", config, wanted)
    said = [
        {"run": b.name, "parameters": b.parameters, "tokens": b.tokens}
        | {"low": 1.0, "loss": 2.0, "high": 3.0}
        for b in wanted
    ]
    path.write_text(json.dumps({"confidence": 0.9, "predicted": said}))
    found = read_prediction(path, "x", config, wanted)
    assert found == [Interval(1.0, 2.0, 3.0)] * 2
    path.write_text(json.dumps({"confidence": 0.9, "predicted": said[:1]}))
    with pytest.raises(ValueError, match=r"the runs that ladders\.x has now, found others"):
        read_prediction(path, "x", config, wanted)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected the JSON of olmo ladder"):
        read_prediction(path, "x", config, wanted)
    rungs = [Rung(branch, loss, {}) for branch, loss in zip(wanted, (2.5, 3.01), strict=True)]
    text = format_check(rungs, found, 0.9)
    assert "| 2.5000 | +0.5000 | held |" in text and "| 3.0100 | +1.0100 | failed |" in text
    assert "1 of 2 predictions held." in text
