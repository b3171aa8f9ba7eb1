# Order: the order in which a run trains on its instances, bit for bit OLMo's.


rule order:
    """The order in which a run sees its instances."""
    input:
        lambda w: damage.update_journal(plan.dataset(w.run)),
        tokens=lambda w: listings(plan.dataset(w.run), "tokens"),
        before=lambda w: parts.order_before(plan, w.run, w.get("step")),
    output:
        "checkpoints/{run}/global_indices.npy",
    log:
        "logs/order/{run}.log",
    resources:  # not params, since a longer run of a ladder must not rerun the others
        ladder=lambda w: parts.ladder_flags(plan, w.run),
    params:
        recipe=lambda w: parts.order_flags(plan, w.run, w.get("step")),
        before=lambda w, input: f"--before {input.before}" if input.before else "",
    shell:
        "olmo order --tokens {input.tokens:q} --order {output:q} {params.recipe} {params.before}"
        " {resources.ladder} --log {log:q}"


# The order up to the end of a part of the run's mixture.
use rule order as order_until with:
    output:
        "checkpoints/{run}/global_indices-until-{step}.npy",
    log:
        "logs/order/{run}-until-{step}.log",


rule skip:
    """The order without what a run leaves out, and the tokens whose labels are masked."""
    input:
        lambda w: damage.update_journal(plan.dataset(w.run)),
        tokens=lambda w: listings(plan.dataset(w.run), "tokens"),
        order=lambda w: parts.order_path(w.run),
    output:
        remaining="checkpoints/{run}/global_indices-remaining.npy",
        holes="checkpoints/{run}/holes.npy",
    log:
        "logs/skip/{run}.log",
    params:
        recipe=lambda w: parts.skip_flags(plan, w.run),
        left_out=lambda w: parts.left_out(plan, w.run),
    shell:  # what is left out is no argument, since many ids are longer than one may be
        "olmo skip --tokens {input.tokens:q} --order {input.order:q} {params.recipe} --config -"
        " --remaining {output.remaining:q} --holes {output.holes:q} --log {log:q}"
        " <<< {params.left_out:q}"


rule positions:
    """The inverse: the position of each instance in the order."""
    input:
        "checkpoints/{run}/global_indices.npy",
    output:
        "checkpoints/{run}/positions.npy",
    log:
        "logs/positions/{run}.log",
    shell:
        "olmo positions --order {input:q} --positions {output:q} --log {log:q}"
