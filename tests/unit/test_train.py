"""The trainer does what its config says, stops where it says, and goes on with the same bits."""

import copy
import gzip
import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import forked
from small_run import LENGTH, config, metrics, read_until, run, same, settings, start, state

from olmo.checkpoint import layout
from olmo.config import TrainConfig
from olmo.data import order
from olmo.io import sealed
from olmo.model import OLMo
from olmo.runtime.process import EXIT_PAUSED
from olmo.train.__main__ import main, overrides
from olmo.train.metrics_buffer import NotFinite
from olmo.train.unused import HARMLESS


def test_a_run_from_beginning_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(tmp_path)
    before = copy.deepcopy(cfg)
    assert run(tmp_path) == 0
    assert cfg == before

    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(11))
    first, last = lines[0], lines[-1]
    assert first["eval/heldout/CrossEntropyLoss"] == pytest.approx(math.log(128), abs=0.5)
    assert last["eval/heldout/CrossEntropyLoss"] < first["eval/heldout/CrossEntropyLoss"] - 0.3
    assert [line["step"] for line in lines if "eval/heldout/Perplexity" in line] == [0, 5, 10]
    assert last["train/Perplexity"] == pytest.approx(math.exp(last["train/CrossEntropyLoss"]))
    assert {
        "optim/total_grad_norm",
        "optim/learning_rate_group0",
        "throughput/total_tokens",
    } <= set(last)
    names = [path.name for path in layout.list_checkpoints(tmp_path / "run")]
    assert names == ["step0-unsharded", "step4-unsharded", "step8-unsharded", "step10-unsharded"]
    assert sealed.load_file(tmp_path / "run/finished.json") == {
        "step": 10,
        "checkpoint": "step10-unsharded",
    }
    assert TrainConfig.load(tmp_path / "run/config.yaml") == cfg

    said = capsys.readouterr().out
    for part in ("device: cpu", "attention: ", "precision: fp32", "CPU threads of each: 1"):
        assert part in said
    assert "step 10/10  loss " in said and "tokens/s" in said and "ETA" in said


def test_speed_is_named_as_it_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repeats = {"repetition_max_period": 3, "repetition_min_period": 1, "repetition_max_count": 2}
    changes: dict[str, Any] = {
        "speed_monitor": {"gpu_flops_available": 1e12},
        "data": {"instance_filter": repeats},
        "gen1_gc_interval": None,
        "evaluators": [],
        "max_duration": 4,
    }
    assert run(tmp_path, **changes) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    rate = last["throughput/device/tokens_per_second"]
    model = OLMo(config(tmp_path).model)
    for name, causal in (("palm", False), ("causal", True)):
        expected = rate * model.flops_per_token(causal) / 1e12
        assert last[f"throughput/device/mfu_{name}"] == pytest.approx(expected)
    assert "(PaLM)" in capsys.readouterr().out
    assert last["throughput/total_tokens"] == 4 * 8 * LENGTH
    gflops = (model.num_fwd_flops + model.num_bck_flops) * 4 * 8 * LENGTH / 1e9
    assert last["throughput/total_training_Gflops"] == pytest.approx(gflops)
    assert last["throughput/total_training_log_Gflops"] == pytest.approx(math.log(gflops))
    assert 0 <= last["train/masked_instances_local_rank"] <= 8


def test_evaluation_on_load(tmp_path: Path) -> None:
    assert run(tmp_path, stop_after=4) == EXIT_PAUSED
    again = {"save_folder": str(tmp_path / "again"), "load_path": str(tmp_path / "run/latest")}
    for asked in (True, False):
        assert run(tmp_path, eval_on_load=asked, save_overwrite=True, **again) == 0
        steps = [m["step"] for m in metrics(tmp_path / "again") if "eval/heldout/Perplexity" in m]
        assert steps == ([4, 5, 10] if asked else [5, 10])


def test_the_data_seen_is_the_order(tmp_path: Path) -> None:
    run(tmp_path)
    ids = order.global_indices(203, 6198).tolist()
    expected = [f"{s + 1}\t" + "\t".join(map(str, ids[s * 8 : s * 8 + 8])) for s in range(10)]
    assert state(tmp_path / "run")["indices"][0].decode().splitlines() == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "amp_bf16", "model": {"residual_dropout": 0.1}, "console_log_interval": 3},
        {"max_grad_norm_ratio": 1.1, "scheduler": {"grad_clip_warmup_steps": 7,
         "grad_clip_warmup_factor": 3.0}, "optimizer": {"name": "lionw", "learning_rate": 1e-3}},
        {"softmax_auxiliary_loss": True, "data": {"generate_doc_lengths": True}},
    ],
    ids=["plain", "bf16-dropout", "lion-clipping", "z-loss-documents"],
)  # fmt: skip
def test_resumed_equals_straight(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert run(tmp_path, save_folder=str(tmp_path / "straight"), **changes) == 0
    resumed: dict[str, Any] = {"save_folder": str(tmp_path / "resumed"), **changes}
    assert run(tmp_path, stop_after=3, **resumed) == EXIT_PAUSED
    assert run(tmp_path, stop_after=4, try_load_latest_save=True, **resumed) == EXIT_PAUSED
    assert run(tmp_path, try_load_latest_save=True, **resumed) == 0
    straight, resumed_state = state(tmp_path / "straight"), state(tmp_path / "resumed")
    for part in straight:
        assert same(straight[part], resumed_state[part]), part


def test_a_run_that_goes_on_may_pass_over_batches_or_to_another_epoch(tmp_path: Path) -> None:
    def first_line(folder: str, **changes: Any) -> str:
        place = str(tmp_path / folder)
        assert run(tmp_path, save_folder=place, stop_after=3, epoch=1, evaluators=[]) == EXIT_PAUSED
        again: dict[str, Any] = {"save_folder": place, "stop_after": 1, "evaluators": []} | changes
        assert run(tmp_path, try_load_latest_save=True, **again) == EXIT_PAUSED
        indices = Path(place, "data-indices/rank0.tsv.gz").read_bytes()
        return gzip.decompress(indices).decode().splitlines()[3]

    def line(epoch: int, start: int) -> str:
        ids = order.global_indices(203, 6198, epoch).tolist()[8 * start : 8 * (start + 1)]
        return "\t".join(map(str, [4, *ids]))

    assert first_line("on") == line(epoch=1, start=3)
    assert first_line("over", fast_forward_batches=2) == line(epoch=1, start=5)
    assert first_line("epoch", epoch=2, fast_forward_batches=1) == line(epoch=2, start=1)
    assert first_line("not-back", epoch=0) == line(epoch=1, start=3)


def test_a_finished_run_asked_again_trains_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = state(tmp_path / "run")
    stamp = (tmp_path / "run/step10-unsharded/model.pt").stat().st_mtime_ns
    assert run(tmp_path, try_load_latest_save=True) == 0
    assert same(before, state(tmp_path / "run"))
    assert (tmp_path / "run/step10-unsharded/model.pt").stat().st_mtime_ns == stamp


def test_epochs_go_on_in_new_orders(tmp_path: Path) -> None:
    # 203 instances are 25 steps of 8; the third epoch begins after step 50.
    changes: dict[str, Any] = {"max_duration": "2ep", "evaluators": []}
    assert run(tmp_path, **changes) == 0
    lines = state(tmp_path / "run")["indices"][0].decode().splitlines()
    assert len(lines) == 50
    second = order.global_indices(203, 6198, epoch=1).tolist()
    assert lines[25].split("\t") == ["26", *map(str, second[:8])]
    # Resumed at the very end of the first.
    again = {**changes, "save_folder": str(tmp_path / "again")}
    assert run(tmp_path, stop_after=25, **again) == EXIT_PAUSED
    assert run(tmp_path, try_load_latest_save=True, **again) == 0
    assert same(state(tmp_path / "run"), state(tmp_path / "again"))


@pytest.mark.parametrize(
    "duration, steps", [("6", 6), (6, 6), (f"{6 * 8 * LENGTH}T", 6), (f"{5 * 8 * LENGTH + 1}T", 6)]
)
def test_it_stops_exactly_there(tmp_path: Path, duration: Any, steps: int) -> None:
    assert run(tmp_path, max_duration=duration, evaluators=[]) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == steps


def test_stop_at_is_an_end(tmp_path: Path) -> None:
    assert run(tmp_path, stop_at=3) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_microbatches_change_the_rounding_only(tmp_path: Path) -> None:
    losses = []
    for size in (8, 3, 1):
        folder = str(tmp_path / f"run{size}")
        run(tmp_path, device_train_microbatch_size=size, save_folder=folder, evaluators=[])
        losses.append([m["train/CrossEntropyLoss"] for m in metrics(Path(folder))[1:]])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_bf16_is_bf16(tmp_path: Path) -> None:
    for precision in ("fp32", "amp_bf16"):
        run(tmp_path, precision=precision, save_folder=str(tmp_path / precision))
    fp32, bf16 = metrics(tmp_path / "fp32"), metrics(tmp_path / "amp_bf16")
    difference = abs(fp32[1]["train/CrossEntropyLoss"] - bf16[1]["train/CrossEntropyLoss"])
    assert 1e-6 < difference < 0.05
    weights = torch.load(tmp_path / "amp_bf16/latest/model.pt", weights_only=True)
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize("interval", [1, 4])
def test_not_finite_leaves_everything_as_it_was(tmp_path: Path, interval: int) -> None:
    """A huge learning rate from the third step on: the fourth's loss is not finite."""
    changes: dict[str, Any] = {
        "console_log_interval": interval,
        "optimizer": {"learning_rate": 1e30},
        "scheduler": {"name": "constant"},
        "max_grad_norm": None,
        "evaluators": [],
    }
    with pytest.raises(NotFinite, match=r"step 2: the gradient is not finite") as caught:
        run(tmp_path, **changes)
    ids = order.global_indices(203, 6198).tolist()
    assert str(ids[8:16]) in str(caught.value), "the instances are named"
    saved = layout.list_checkpoints(tmp_path / "run")
    assert [path.name for path in saved] == ["step0-unsharded"]
    weights = torch.load(saved[0] / "model.pt", weights_only=True)
    assert all(w.isfinite().all() for w in weights.values())
    assert not (tmp_path / "run/finished.json").exists()


def test_going_on_past_what_was_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the message tells: step 6 failed, the newest checkpoint is step 4's."""
    bad = {"optimizer": {"learning_rate": 1e30}, "max_grad_norm": None, "evaluators": []}
    with pytest.raises(NotFinite) as caught:
        run(tmp_path, scheduler={"name": "constant"}, save_folder=str(tmp_path / "bad"), **bad)
    flags = "--try_load_latest_save --fast_forward_batches=N, once: N is 2 less the newest checkp"
    assert flags in str(caught.value)
    monkeypatch.setenv("OLMO_LAUNCHED", "1")
    with pytest.raises(NotFinite) as caught:
        run(tmp_path, scheduler={"name": "constant"}, save_folder=str(tmp_path / "again"), **bad)
    assert "fast_forward" not in str(caught.value), "which a run of the pipeline may not have"
    assert run(tmp_path, stop_after=5, save_interval_unsharded=4, evaluators=[]) == EXIT_PAUSED
    shutil.rmtree(tmp_path / "run/step5-unsharded")
    ids = order.global_indices(203, 6198).tolist()
    again = {"try_load_latest_save": True, "fast_forward_batches": 6 - 4, "stop_after": 1}
    assert run(tmp_path, evaluators=[], **again) == EXIT_PAUSED
    lines = gzip.decompress((tmp_path / "run/data-indices/rank0.tsv.gz").read_bytes()).decode()
    assert lines.splitlines()[-1].split("\t") == ["5", *map(str, ids[6 * 8 : 7 * 8])], "the 7th"


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_its_own_code(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_duration": 100_000, "save_interval_unsharded": 50_000}
    process = start(tmp_path, **changes)
    read_until(process, lambda line: line.startswith("step") and " 20/" in line)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PAUSED and "paused at step" in said
    at = metrics(tmp_path / "run")[-1]["step"]
    assert layout.list_checkpoints(tmp_path / "run")[-1].name == f"step{at:.0f}-unsharded"


def test_time_limit(tmp_path: Path) -> None:
    assert run(tmp_path, max_duration=100_000, time_limit=0.5, evaluators=[]) == EXIT_PAUSED
    assert layout.list_checkpoints(tmp_path / "run")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_killed_and_resumed_equals_straight(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_duration": 60, "save_interval_unsharded": 7}
    assert run(tmp_path, save_folder=str(tmp_path / "straight"), **changes) == 0
    process = forked(run, tmp_path, save_folder=str(tmp_path / "killed"), **changes)
    while len(lines(tmp_path / "killed/metrics.jsonl")) < 34:
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    # What a kill in the middle of a line, and of a save, leaves.
    with open(tmp_path / "killed/metrics.jsonl", "a") as file:
        file.write('{"step": 34, "train/Cro')
    (tmp_path / "killed/step35-unsharded.partial").mkdir(exist_ok=True)
    again = str(tmp_path / "killed")
    assert run(tmp_path, save_folder=again, try_load_latest_save=True, **changes) == 0
    assert same(state(tmp_path / "straight"), state(tmp_path / "killed"))
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"already contains a run.*try_load_latest_save"):
        run(tmp_path)
    assert run(tmp_path, save_overwrite=True) == 0


def test_starting_from_weights_alone(tmp_path: Path) -> None:
    run(tmp_path, save_folder=str(tmp_path / "first"))
    begin = {"load_path": str(tmp_path / "first/latest"), "reset_trainer_state": True}
    assert run(tmp_path, reset_optimizer_state=True, **begin) == 0
    lines = metrics(tmp_path / "run")
    loss = metrics(tmp_path / "first")[-1]["eval/heldout/CrossEntropyLoss"]
    assert lines[0]["eval/heldout/CrossEntropyLoss"] == loss and lines[-1]["step"] == 10


def test_a_fresh_optimizer_warms_up_again(tmp_path: Path) -> None:
    run(tmp_path, save_folder=str(tmp_path / "first"), stop_after=6)
    load = {"load_path": str(tmp_path / "first/latest"), "reset_optimizer_state": True}
    assert run(tmp_path, **load) == 0
    rates = [m["optim/learning_rate_group0"] for m in metrics(tmp_path / "run")]
    assert len(rates) == 4 and rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data": {"paths": ["nowhere.npy"]}}, "no token file at nowhere.npy"),
        ({"model": {"vocab_size": 50, "embedding_size": 50}}, "has 50 embeddings"),
        ({"model": {"eos_token_id": 60}, "data": {"generate_doc_lengths": True}},
         "model.eos_token_id=60 is not below .*=60, and generate_doc_lengths needs it"),
        ({"max_duration": "many"}, 'max_duration: expected steps .*"2e9T".*many'),
        ({"global_train_batch_size": 512}, "less than one step"),
        ({"evaluators": [{"label": "piqb", "type": "downstream"}]}, "no downstream task 'piqb'"),
        ({"load_path": "nowhere"}, "no checkpoint folder at nowhere"),
        ({"save_folder": "http://x/y"}, "save_folder: expected a local folder, found http://x/y"),
        ({"precision": "fp8"}, "precision: expected one of amp_bf16"),
        ({"global_train_batch_size": -8}, "global_train_batch_size: expected at least 1, found -8"),
        ({"model": {"n_heads": 0}}, "model.n_heads: expected at least 1, found 0"),
        ({"model": {"residual_dropout": 1.5}}, "residual_dropout: expected from 0 to 1, found 1.5"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected at least 0, found -1.0"),
        ({"scheduler": {"t_max": float("inf")}}, "scheduler.t_max: expected from 0 .* found inf"),
        ({"evaluators": [{"label": "x", "device_eval_batch_size": 0}]}, "evaluators.x.device_eval"),
        ({"use_msamp": True}, "the package msamp .* needs torch 2.1 .*--use_msamp=false"),
        ({"use_msamp": True, "optimizer": {"name": "lionw"}}, "MS-AMP has AdamW only, not lionw"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_training(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run(tmp_path, **changes)
    assert not layout.list_checkpoints(tmp_path / "run")


def test_early_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, early_stopping_factor=0.9, scheduler={"t_warmup": 5}) == EXIT_PAUSED
    assert "paused at step 6 by early_stopping_factor" in capsys.readouterr().out


def test_profilers_look_at_a_few_steps(tmp_path: Path) -> None:
    run(tmp_path, python_profiling=True, torch_profiling=True, evaluators=[])
    folder = tmp_path / "run/profiler"
    assert "aten::" in (folder / "torch.txt").read_text()
    assert "forward_backward" in (folder / "python.txt").read_text()
    assert (folder / "trace.json.gz").stat().st_size > 1000


def test_between_log_lines_nobody_waits_for_the_device(tmp_path: Path) -> None:
    """With LionW, since AdamW's fused kernel asks for its own step count."""
    changes: dict[str, Any] = {"optimizer": {"name": "lionw"}, "save_interval_unsharded": None}
    run(tmp_path, torch_profiling=True, console_log_interval=20, evaluators=[], **changes)
    trace = gzip.decompress((tmp_path / "run/profiler/trace.json.gz").read_bytes()).decode()
    assert "aten::mm" in trace and "aten::_local_scalar_dense" not in trace


def test_harmless_keys_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, dry_run=True, data={"num_workers": 3}, fused_loss=True)
    said = capsys.readouterr().out
    assert "ignored keys: fused_loss (the loss is always fused), data.num_workers" in said
    assert said.count("num_workers") == 1


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_not_acted_on_exist(key: str) -> None:
    config: Any = TrainConfig.new(wandb={}, ddp={})
    for name in key.split("."):
        config = getattr(config, name)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overrides(["--a.b=1", "--flag", "--load_path", "x", "--other"]) == [
        "--a.b=1",
        "--flag",
        "--load_path=x",
        "--other",
    ]
    as_olmo = ["run_name=q", "-seed=7", "--save_overwrite", "model.n_layers=3", "--x", "-5"]
    assert overrides(as_olmo) == [*as_olmo[:4], "--x=-5"]
    with pytest.raises(ValueError, match="expected --key=value, found 'word'"):
        overrides(["seed=7", "word"])
    assert main([]) == 2 and main(["--help"]) == 0
    assert main(["nowhere.yaml"]) == 2
    assert "error: no config file at nowhere.yaml" in capsys.readouterr().err


def test_dry_run_trains_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, dry_run=True, no_pre_train_checkpoint=True) == 0
    assert not metrics(tmp_path / "run") and not layout.list_checkpoints(tmp_path / "run")
    assert settings(tmp_path)["max_duration"] == 10


class Sequences:
    """A data set of somebody's own: other field names, and sequences of two lengths."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": [2 + (index + i) % 50 for i in range(LENGTH - index % 2)]}


def test_a_data_set_of_ones_own(tmp_path: Path) -> None:
    custom = {"name": "test_train.Sequences", "args": {"n": 100}, "token_field": "tokens"}
    data = {"paths": None, "custom_dataset": custom}
    assert run(tmp_path, data=data, evaluators=[]) == 0
    assert metrics(tmp_path / "run")[-1]["train/CrossEntropyLoss"] < 5
    custom["name"] = "test_train.Nothing"
    with pytest.raises(ValueError, match=r"data\.custom_dataset: no Nothing in test_train"):
        run(tmp_path, data=data, save_overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [None, {"backend": "eager"}])
def test_what_modules_were_given_and_gave(tmp_path: Path, compiler: dict[str, str] | None) -> None:
    steps = {"module_outputs_save_steps": [2], "compile": compiler}
    run(tmp_path, max_duration=3, evaluators=[], save_interval_unsharded=1, **steps)
    assert [path.name for path in (tmp_path / "run/traces").iterdir()] == ["step2"]
    folder = tmp_path / "run/traces/step2"
    names = {path.name for path in folder.iterdir()}
    assert "model.transformer.blocks.0.dropout_1_input.pt" in names, "called twice in a block"
    assert "model.transformer.wte_1_input.pt" not in names, "the first microbatch only"
    wte = torch.load(tmp_path / "run/step1-unsharded/model.pt")["transformer.wte.weight"]
    ids = torch.load(folder / "model.transformer.wte_0_input.pt")
    assert torch.equal(torch.load(folder / "model.transformer.wte_0_output.pt"), wte[ids])
    x, cache = torch.load(folder / "model.transformer.blocks.1_0_output.pt")
    assert torch.equal(torch.load(folder / "model.transformer.ln_f_0_input.pt"), x)
    assert cache is None and "model_0_output.pt" in names
