"""From a step to its documents and from a document to its steps: each undoes the other."""

import random
from pathlib import Path

import pytest
from project import Project, documents, when_seen, write_source

from olmo.inspect.commands import find_sightings
from olmo.inspect.run import TrainedRun
from olmo.store.stage import current_store


def test_inspect_and_seen_are_inverse_on_a_thousand_random_documents(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
):
    project = Project(tmp_path / "project")
    project.use_given_tokenizer(tokenizer)
    for number in range(3):
        write_source(project.root / f"sources/part-{number}.json.gz", documents(number, 700))
    project.change("config/data/small.yaml", documents={}, tokens={"engine": "fast"})
    project.change("config/train/small.yaml", global_train_batch_size=32, max_duration=30)
    project.run()
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("OLMO_STORE", str(project.store))

    run = TrainedRun("small")
    saw = when_seen(run)

    everything = {}
    for source in ("part-0", "part-1", "part-2"):
        digest = current_store().digest(project.root / f"data/small/sources/{source}.json.gz")
        for document, times in find_sightings(run, sha256=digest):
            everything[document.source, document.line] = set(times)
    assert len(everything) >= 1000, "documents of the data set"
    chosen = random.Random(6198).sample(sorted(everything), 1000)
    found = [everything[one] for one in chosen]
    assert found == [saw.get(one, set()) for one in chosen]
    assert 100 < sum(map(bool, found)) < 1000, "some were trained on, some were not"
    assert saw.keys() <= everything.keys()
