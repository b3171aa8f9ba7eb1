# Order: the order in which a run trains on its instances, bit for bit OLMo's.


rule order:
    """The order in which a run sees its instances."""
    input:
        lambda w: damage.update_journal(plan.dataset(w.run)),
        tokens=lambda w: listings(plan.dataset(w.run), "tokens"),
    output:
        "checkpoints/{run}/global_indices.npy",
    log:
        "logs/order/{run}.log",
    params:
        recipe=lambda w: plan.order_flags(w.run),
    shell:
        "olmo order --tokens {input.tokens:q} --order {output:q} {params.recipe} --log {log:q}"


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
