# Documents: one line in N of each source is kept and checked, and some are held out.


rule documents:
    """Keep one line in N of a batch's sources, check each, hold some out."""
    input:
        lambda w: damage.update_journal(w.dataset),
        sources="data/{dataset}/sources/{batch}.tsv",
    output:
        "data/{dataset}/documents/{batch}.tsv",
    log:
        "logs/documents/{dataset}/{batch}.log",
    params:
        kind=lambda w: plan.line_kind_flags(w.dataset),
        recipe=lambda w: plan.section(w.dataset, "documents"),
    shell:
        "olmo documents --sources {input.sources:q} --listing {output:q} {params.recipe} {params.kind}"
        " --log {log:q}"
