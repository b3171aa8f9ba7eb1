"""A step of the trainer and of a bench cell, as a GPU would see it: nothing waits for anything."""

import json
from typing import Any

import pytest
from harness import Run

GRAPH = {"fullgraph": True}
FP8: dict[str, Any] = {"backend": "native"}
# What is otherwise than in olmo-250m.yaml, and the most launches that a step of two microbatches
# with one layer may take: CUDA's and Triton's, of torch 2.11 or 2.13, whichever takes more.
LOOPS: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": ({"precision": "fp32"}, 296),
    "bf16": ({}, 344),
    "bf16, without pin_memory": ({"data": {"pin_memory": False}}, 344),
    "fp8": ({"fp8": FP8}, 452),
    "masters": ({"master_weights": True}, 345),
    "checkpointing": ({"activation_checkpointing": "whole_layer"}, 398),
    "z-loss, padding": (
        {"softmax_auxiliary_loss": True, "data": {"generate_attention_mask": True}},
        379,
    ),
    "muon": ({"optimizer": {"name": "muon"}}, 569),
    "lionw": ({"optimizer": {"name": "lionw"}}, 396),
    "fp32, compiled": ({"precision": "fp32", "compile": GRAPH}, 150),
    "bf16, compiled": ({"compile": GRAPH}, 158),
    # Nothing has run the model before it is compiled.
    "compiled, never evaluated": ({"compile": GRAPH, "evaluators": []}, 158),
    "fp8, compiled": ({"fp8": FP8, "compile": GRAPH}, 188),
    "fp8 delayed, compiled": ({"fp8": FP8 | {"scaling": "delayed"}, "compile": GRAPH}, 214),
    "masters, fp8, compiled": ({"master_weights": True, "fp8": FP8, "compile": GRAPH}, 181),
    "checkpointing, compiled": (
        {"activation_checkpointing": "whole_layer", "compile": GRAPH},
        184,
    ),
    "dropout, compiled": ({"model": {"residual_dropout": 0.1}, "compile": GRAPH}, 160),
    "padding, compiled": ({"data": {"generate_attention_mask": True}, "compile": GRAPH}, 166),
    "alibi, compiled": ({"model": {"alibi": True, "rope": False}, "compile": GRAPH}, 160),
    # With dropout, since flex, which would be chosen without, has a compilation of its own.
    "documents, compiled": (
        {
            "data": {"generate_doc_lengths": True},
            "model": {"attention_dropout": 0.1},
            "compile": GRAPH,
        },
        170,
    ),
    "graphs": ({"compile": GRAPH | {"mode": "reduce-overhead"}}, 171),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_the_trainers_loop(run: Run, name: str):
    changes, most = LOOPS[name]
    found = run("loop", steps=5, **changes)
    # The third is evaluated; buffers for that, and for the steps, are there then.
    for step in (found["steps"][3], found["steps"][4]):
        assert (step["sync"], step["pageable"], step["malloc"]) == (0, 0, 0), step
        assert step["d2h"] == 1, "the step's numbers, in one copy"
        assert step["launch"] + step["triton"] <= most, step
    compiled = "compile" in changes
    assert found["graphs"] == compiled, "compiled once, for evaluation nothing"
    assert not found["again"] and not found["breaks"]
    assert found["gradients_in_graphs"] == 0


@pytest.mark.slow
def test_a_device_far_behind(run: Run):
    """Numbers come some steps late; those of a step that is evaluated have been waited for."""
    found = run("loop", steps=5, lag=1000)
    assert [step["sync"] for step in found["steps"]][:2] == [0, 0]
    assert found["steps"][2]["sync"] > 0
    assert found["rows"] == [1, 2, 3], "4 and 5 have not arrived"


@pytest.mark.slow
def test_a_last_microbatch_that_is_smaller_is_compiled_once(run: Run):
    found = run("loop", steps=5, device_train_microbatch_size=3, compile=GRAPH)
    assert found["graphs"] == 2 and len(found["again"]) == 1
    assert all(step["sync"] == 0 for step in found["steps"][3:])


@pytest.mark.slow
def test_flex_between_documents(run: Run):
    """The model is one graph; flex in evaluation, which is not compiled, is a kernel of its own."""
    changes = {"data": {"generate_doc_lengths": True}, "compile": GRAPH}
    found = run("loop", steps=5, **changes)
    assert found["graphs"] <= 3
    assert all(step["sync"] == 0 for step in found["steps"][3:])


CELLS: dict[str, tuple[dict[str, Any], int]] = {
    "eager": ({}, 192),
    "fp8": ({"fp8": "native"}, 246),
    "masters": ({"switch": "master_weights"}, 195),
    "wide, masters, fp8": ({"shape": "d1536", "fp8": "native", "switch": "master_weights"}, 262),
    "compiled": ({"compile": "default"}, 99),
    "compiled fp8": ({"compile": "default", "fp8": "native"}, 114),
    "graphs": ({"compile": "reduce-overhead"}, 110),
    "flash": ({"attention": "flash", "compile": "default"}, 101),
    "math": ({"attention": "math"}, 229),
    "fp32": ({"precision": "fp32"}, 168),
}


@pytest.mark.slow
def test_a_bench_cell(run: Run):
    cells = [{"shape": "olmo-250m"} | cell for cell, _ in CELLS.values()]
    every = run("cell", cells=cells, layers=1, steps=5)
    for (name, (cell, most)), found in zip(CELLS.items(), every, strict=True):
        for step in found["steps"][3:]:
            assert (step["sync"], step["pageable"], step["malloc"]) == (0, 0, 0), (name, step)
            assert step["h2d"] == 1, "the ids, pinned"
            assert step["launch"] + step["triton"] <= most, (name, step)
        assert found["graphs"] == ("compile" in cell), (name, found["again"])
        assert found["attention_used"] == cell.get(
            "attention", "efficient" if cell.get("precision") == "fp32" else "cudnn"
        )


@pytest.mark.slow
def test_the_loss(run: Run):
    """Chunks that fill the GPU, and one kernel from a chunk's logits to their gradient."""
    found = run("loss", rows=20_480)
    events = found["events"]
    products = [event for event in events if event.startswith("PRODUCT")]
    heads = [event for event in products if "m=50304" in event and "k=1024" in event]
    assert ["n=6912" in head for head in heads] == [True, True, False], heads
    assert len(products) == 3 * len(heads)
    passes = [e for e in events if "red_fused" in e and "grid=1," not in e]
    assert len(passes) == 3, json.dumps(events, indent=1)
    assert sum("gather" in e or "scatter" in e for e in events) == 0
    logits = 6912 * 50304 * 2
    # A chunk's logits and their gradient; d(x), and d(head) of each chunk.
    rest = 20_480 * 1024 * 8 + 3 * 50304 * 1024 * 2 + 2 * 50304 * 1024 * 4
    assert found["counts"]["peak_bytes"] < 2 * logits + rest
