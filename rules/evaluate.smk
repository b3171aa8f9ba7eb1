# Evaluation of a final checkpoint on held-out documents, and on the tasks of its run.


rule heldout:
    """A run's loss on the documents that its data set held out."""
    input:
        final="checkpoints/{run}/final",
        tokens=lambda w: listings(plan.dataset(w.run), "tokens"),
    output:
        results="checkpoints/{run}/heldout.json",
        documents="checkpoints/{run}/heldout.parquet",
    log:
        "logs/heldout/{run}.log",
    threads: workflow.cores
    shell:
        "olmo heldout --checkpoint {input.final:q} --tokens {input.tokens:q}"
        " --results {output.results:q} --documents {output.documents:q} --log {log:q}"


rule heldout_of:
    """A run's loss on what another data set held out, of the same tokenizer."""
    input:
        final="checkpoints/{run}/final",
        tokens=lambda w: listings(w.dataset, "tokens"),
        tokenizers=lambda w: [
            f"data/{dataset}/tokenizer.json" for dataset in (plan.dataset(w.run), w.dataset)
        ],
    output:
        results="checkpoints/{run}/heldout/{dataset}.json",
        documents="checkpoints/{run}/heldout/{dataset}.parquet",
    log:
        "logs/heldout/{run}-{dataset}.log",
    threads: workflow.cores
    shell:
        "olmo heldout --checkpoint {input.final:q} --tokens {input.tokens:q}"
        " --results {output.results:q} --documents {output.documents:q}"
        " --tokenizers {input.tokenizers:q} --log {log:q}"


rule docstrings:
    """A choice task that needs no network."""
    output:
        directory("data/docstrings"),
    log:
        "logs/docstrings.log",
    shell:
        "olmo docstrings --folder {output:q} --log {log:q}"


rule evaluate:
    """Everything that is measured of a run: eval/<run>."""
    input:
        final="checkpoints/{run}/final",
        hf="hf/{run}",
        heldout=lambda w: plan.heldout_results(w.run),
        tokenizer=lambda w: f"data/{plan.dataset(w.run)}/tokenizer.json",
        docstrings="data/docstrings",
        config=lambda w: plan.run(w.run).evaluation or [],
        further=lambda w: plan.further_heldout_results(w.run),
        losses=lambda w: parts.document_losses(plan, w.run),
    output:
        report(
            directory("eval/{run}"),
            patterns=["{table}.md"],
            caption="captions/evaluation.rst",
            category="Evaluation",
            labels={"run": "{run}"},
        ),
    log:
        "logs/evaluate/{run}.log",
    threads: workflow.cores
    params:
        heldout=lambda w, input: f"--heldout {input.heldout}" if input.heldout else "",
        tasks=lambda w: plan.evaluation_flags(w.run),
        answers="checkpoints/{run}/answers",
    shell:
        "olmo evaluate --checkpoint {input.final:q} --hf {input.hf:q} {params.heldout}"
        " --tokenizer {input.tokenizer:q} --docstrings {input.docstrings:q}"
        " --answers {params.answers:q} --results {output:q} {params.tasks}"
        " --further {input.further:q} --losses {input.losses:q} --log {log:q}"


rule eval:
    """A table that compares several runs."""
    input:
        lambda w: [f"eval/{run}" for run in plan.pipeline.eval],
    output:
        table=report(
            "bench-results/eval/table.md",
            caption="captions/comparison.rst",
            category="Evaluation",
            labels={"run": "all"},
        ),
        parquet="bench-results/eval/results.parquet",
    log:
        "logs/eval.log",
    shell:
        "olmo scores --runs {input:q} --table {output.table:q} --parquet {output.parquet:q}"
        " --log {log:q}"
