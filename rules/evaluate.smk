# Evaluation: a finished checkpoint on the documents that its data set held out.


rule evaluate:
    input:
        final="checkpoints/{run}/final",
        tokens=lambda w: listings(plan.dataset(w.run), "tokens"),
    output:
        "eval/{run}/heldout.json",
    log:
        "logs/evaluate/{run}.log",
    threads: workflow.cores
    shell:
        "olmo evaluate --checkpoint {input.final:q} --tokens {input.tokens:q} --results {output:q}"
        " --log {log:q}"
