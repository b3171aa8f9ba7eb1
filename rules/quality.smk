# Quality: the toolkit's taggers, and the recipe's conditions on their tags; `mixed` drops what fails.


rule tags:
    """Tags of a batch's documents by `dolma tag`, and marks on those that a condition drops."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents="data/{dataset}/documents/{batch}.tsv",
        models=lambda w: plan.recipe(w.dataset).quality_models(w.dataset),
        environment=dolma_environment,
        requirements="envs/dolma.txt",
    output:
        "data/{dataset}/tags/{batch}.tsv",
    log:
        "logs/tags/{dataset}/{batch}.log",
    conda:
        "../envs/dolma.yaml"
    params:
        environment=environment_flag,
        section=lambda w: plan.recipe(w.dataset).quality_flag(w.dataset),
    shell:
        "olmo tags --documents {input.documents:q} --requirements {input.requirements:q}"
        " {params.environment} {params.section} --listing {output:q} --log {log:q}"


rule quality_page:
    """A page with a histogram of each tag, and documents on either side of a condition."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents=lambda w: listings(w.dataset, "documents"),
        tags=lambda w: listings(w.dataset, "tags"),
    output:
        report(
            "data/{dataset}/quality.html",
            caption="captions/quality.rst",
            category="Data",
            labels={"data set": "{dataset}"},
        ),
    log:
        "logs/quality/{dataset}.log",
    params:
        section=lambda w: plan.recipe(w.dataset).quality_flag(w.dataset),
    shell:
        "olmo quality --documents {input.documents:q} --tags {input.tags:q} {params.section}"
        " --page {output:q} --log {log:q}"
