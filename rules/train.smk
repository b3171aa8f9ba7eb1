# Training: torchrun, from the last checkpoint of an earlier attempt to the final one.


rule start:
    """The external checkpoint, a folder or a URL, that a run starts from."""
    input:
        lambda w: [] if "://" in plan.external_start(w.run) else plan.external_start(w.run),
    output:
        directory("checkpoints/{run}/start"),
    log:
        "logs/start/{run}.log",
    params:
        place=lambda w: plan.external_start(w.run),
        parts=lambda w: plan.start_flags(w.run),
    shell:
        "olmo start --place {params.place:q} --checkpoint {output:q} {params.parts} --log {log:q}"


rule train:
    """Train a run, or carry on: checkpoints/<run>/final."""
    input:
        lambda w: damage.update_journal(plan.dataset(w.run)),
        tokens=lambda w: listings(plan.dataset(w.run), "tokens"),
        order=lambda w: parts.order_until(plan, w.run, w.get("step")),
        tokenizer=lambda w: f"data/{plan.dataset(w.run)}/tokenizer.json",
        config=lambda w: plan.run(w.run).train,
        start=lambda w: plan.start_checkpoint(w.run),
        after=lambda w: parts.previous_link(plan, w.run, w.get("step")),
        holes=lambda w: parts.holes_path(plan, w.run, w.get("step")),
        checked=lambda w: parts.skip_outputs(plan, w.run),
    output:
        report(
            directory("checkpoints/{run}/final"),
            patterns=["{picture}.svg"],
            caption="captions/loss.rst",
            category="Training",
            labels={"run": "{run}"},
        ),
    log:
        "logs/train/{run}.log",
    threads: workflow.cores
    resources:  # not params, since a change of the number of nodes must not rerun the training
        geometry=lambda w: plan.geometry_flags(w.run),
        nodes=lambda w, attempt: plan.scheduler_resource(w.run, "nodes", attempt),
        tasks=lambda w, attempt: plan.scheduler_resource(w.run, "tasks", attempt),
        mpi=lambda w, attempt: plan.scheduler_resource(w.run, "mpi", attempt),
        gres=lambda w: plan.scheduler_resource(w.run, "gres"),
        tasks_per_gpu=lambda w: plan.scheduler_resource(w.run, "tasks_per_gpu"),
    params:
        overrides=lambda w: parts.override_flags(plan, w.run, w.get("step")),
        start=lambda w, input: f"--start {input.start}" if input.start else "",
        piece=lambda w: parts.link_flags(plan, w.run, w.get("step")),
        holes=lambda w, input: f"--holes {input.holes}" if input.holes else "",
    shell:  # exec, since a scheduler's SIGTERM would end a shell, and the trainer with it
        "exec olmo train --config {input.config:q} --tokens {input.tokens:q} --order {input.order:q}"
        " --tokenizer {input.tokenizer:q} --final {output:q} {resources.geometry}"
        " {params.start} {params.piece} {params.holes} {params.overrides} --log {log:q}"


# A run that is cut into links: the same command, up to one of its steps.
use rule train as link with:
    output:
        directory("checkpoints/{run}/step-{step}"),
    log:
        "logs/train/{run}-step-{step}.log",
