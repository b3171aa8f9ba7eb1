# Training: torchrun, from whatever checkpoint an earlier attempt left, to the final one.


rule train:
    input:
        lambda w: plan.journal(plan.dataset(w.run)),
        tokens=lambda w: listings(plan.dataset(w.run), "tokens"),
        order="checkpoints/{run}/global_indices.npy",
        tokenizer=lambda w: f"data/{plan.dataset(w.run)}/tokenizer.json",
        config=lambda w: plan.run(w.run).train,
    output:
        directory("checkpoints/{run}/final"),
    log:
        "logs/train/{run}.log",
    threads: workflow.cores
    params:
        processes=lambda w: plan.run(w.run).processes,
        overrides=lambda w: plan.override_flags(w.run),
    shell:
        "olmo train --config {input.config:q} --tokens {input.tokens:q} --order {input.order:q}"
        " --tokenizer {input.tokenizer:q} --final {output:q} --processes {params.processes}"
        " {params.overrides} --log {log:q}"
