# Benchmarks: which settings train fastest here. What has a record is not timed again.


rule bench_tps:
    input:
        matrix="config/bench/tps.yaml",
    params:
        out="bench-results/tps",
    log:
        "logs/bench/tps.log",
    threads: workflow.cores
    shell:
        "olmo bench --matrix {input.matrix:q} --out {params.out:q} --log {log:q}"
