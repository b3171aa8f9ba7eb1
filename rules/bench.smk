# Benchmarks: which settings train fastest on this machine. A cell with a record is not timed again.


rule bench_tps:
    """Tokens per second of the cells of config/bench/tps.yaml, on this machine."""
    input:
        matrix="config/bench/tps.yaml",
    log:
        "logs/bench/tps.log",
    threads: workflow.cores
    params:
        out="bench-results/tps",
    shell:
        "olmo bench --matrix {input.matrix:q} --out {params.out:q} --log {log:q}"


rule bench_loss:
    """The tokens that other settings need to reach the last loss of the first run."""
    input:
        lambda w: [f"checkpoints/{run}/final" for run in plan.pipeline.bench_loss],
    output:
        table="bench-results/loss/table.md",
        picture=report(
            "bench-results/loss/loss.svg",
            caption="captions/tokens_to_loss.rst",
            category="Comparison",
        ),
    log:
        "logs/bench/loss.log",
    shell:
        "olmo compare --runs {input:q} --table {output.table:q} --picture {output.picture:q}"
        " --log {log:q}"
