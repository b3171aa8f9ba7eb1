# Reports: a page for each run, and one that compares all.


rule report:
    """A page about a run: what trained it, how it went, what it cost, how good it is."""
    input:
        final="checkpoints/{run}/final",
        evaluation=lambda w: workspace.evaluation_folder(plan, w.run),
    output:
        report(
            "report/{run}.html",
            caption="captions/run.rst",
            category="Runs",
            labels={"run": "{run}"},
        ),
    log:
        "logs/report/{run}.log",
    wildcard_constraints:
        run=r"(?!index\.html$)[\w.-]+",
    shell:
        "olmo report {wildcards.run:q} --folder report --log {log:q}"


rule report_index:
    """A page with all runs so far: a table, their curves, and where any two differ."""
    output:
        report(
            "report/index.html",
            caption="captions/index.rst",
            category="Runs",
            labels={"run": "all"},
        ),
    log:
        "logs/report/index.log",
    params:
        runs=lambda w: workspace.finished_checkpoints(plan),  # made again where one more has finished
    shell:
        "olmo report --folder report --log {log:q}"
