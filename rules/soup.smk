# Soups: checkpoints whose weights are the mean of those of several runs.


ruleorder: soup > train


rule soup:
    """The mean of several runs' checkpoints."""
    input:
        lambda w: damage.update_journal(plan.dataset(w.run)),
        finals=lambda w: [f"checkpoints/{run}/final" for run in plan.pipeline.soups[w.run]],
    output:
        directory("checkpoints/{run}/final"),
    log:
        "logs/soup/{run}.log",
    wildcard_constraints:
        run=match_any(plan.pipeline.soups),
    shell:
        "olmo soup --checkpoints {input.finals:q} --final {output:q} --log {log:q}"
