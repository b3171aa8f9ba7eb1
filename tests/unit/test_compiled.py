"""A compiled run is the run: one graph, and the losses of the eager one."""

import contextlib
from pathlib import Path

import pytest
import small_run
import torch

from olmo.eval.evaluators import run_evaluators


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"fp8": {"backend": "native"}}], ids=["fp32", "fp8"])
def test_compiled_equals_eager_in_one_graph(tmp_path: Path, changes: dict):
    losses = {}
    for name, compiled in {"eager": None, "compiled": {"fullgraph": True}}.items():
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        ran = small_run.run(
            tmp_path,
            save_folder=str(tmp_path / name),
            compile=compiled,
            max_duration=20,
            save_interval_unsharded=20,
            eval_interval=20,
            **changes,
        )
        assert ran == 0
        rows = small_run.metrics(tmp_path / name)
        key = "train/CrossEntropyLoss"
        losses[name] = [row[key] for row in rows if key in row]
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    assert len(losses["eager"]) == 20
    # In 8 bits a rounding that falls the other way is a larger step.
    tolerance = 1e-2 if changes else 1e-4
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=tolerance)


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_is_not_compiled(fails: bool):
    """Its mode, its last batch and the length of each prompt would be compilations."""
    torch.compiler.reset()
    model, compiled = Twice(), 0

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        nonlocal compiled
        compiled += 1
        return graph.forward

    def evaluator(model: torch.nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        for rows in (3, 2, 5):
            model(torch.zeros(rows, 2))
        if fails:
            raise RuntimeError("no data")
        return {"eval/loss": 1.0}

    model.compile(backend=count)
    model(torch.zeros(4, 2))
    assert compiled == 1
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        assert run_evaluators([evaluator], model) == {"eval/loss": 1.0}
    model(torch.zeros(4, 2))
    assert compiled == 1 and model.training
    model(torch.zeros(6, 2))
    assert compiled == 2, "and what trains is compiled as before"
