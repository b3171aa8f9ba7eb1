# Sources: gz files of JSON lines in Dolma's schema, checked completely.


checkpoint source_list:
    """A table of the files in a published list of URLs, with their sizes."""
    output:
        "data/{dataset}/sources.tsv",
    log:
        "logs/source-list/{dataset}.log",
    params:
        url=lambda w: plan.recipe(w.dataset).sources.url_list,
    shell:
        "olmo source-list --url {params.url:q} --table {output:q} --log {log:q}"


rule sources:
    """Download, copy or generate a batch of source files."""
    input:
        lambda w: damage.update_journal(w.dataset),
        lambda w: plan.local_files(w.dataset, w.batch),
    output:
        "data/{dataset}/sources/{batch}.tsv",
    log:
        "logs/sources/{dataset}/{batch}.log",
    params:
        sources=lambda w: plan.source_flags(w.dataset, w.batch),
    shell:
        "olmo sources --listing {output:q} {params.sources} --log {log:q}"


def listings(dataset, stage):
    """The listings of a stage's batches, after the list of URLs has been downloaded."""
    if plan.needs_source_list(dataset):
        if damage.find_listings(dataset):
            # They are of other sources. Snakemake looks for no change behind a checkpoint that has
            # not run, and would find nothing to do.
            workflow.dag.forcefiles.add(f"data/{dataset}/sources.tsv")
        checkpoints.source_list.get(dataset=dataset)
    return plan.listings(dataset, stage)
