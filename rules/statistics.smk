# Statistics: the documents and tokens of a data set by source and shard, as parquet and as text.


rule statistics:
    """Documents and tokens of a data set, by source: data/<dataset>/statistics.txt."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents=lambda w: listings(w.dataset, plan.documents_stage(w.dataset)),
        tokens=lambda w: listings(w.dataset, "tokens"),
    output:
        summary="data/{dataset}/statistics.parquet",
        text=report(
            "data/{dataset}/statistics.txt",
            caption="captions/statistics.rst",
            category="Data",
            labels={"data set": "{dataset}"},
        ),
    log:
        "logs/statistics/{dataset}.log",
    shell:
        "olmo statistics --documents {input.documents:q} --tokens {input.tokens:q}"
        " --summary {output.summary:q} --text {output.text:q} --log {log:q}"


rule sample:
    """Expected documents and tokens, by the beginnings of some sources: data/<dataset>/sample.txt."""
    input:
        lambda w: sampling.sample_inputs(plan, w.dataset),
        lambda w: sampling.given_tokenizer(plan, w.dataset),
    output:
        estimates="data/{dataset}/sample.json",
        text="data/{dataset}/sample.txt",
    log:
        "logs/sample/{dataset}.log",
    params:
        recipe=lambda w: sampling.sample_flags(plan, w.dataset),
    shell:
        "olmo sample --estimates {output.estimates:q} --text {output.text:q} {params.recipe} --log {log:q}"


rule text_index:
    """Which of a batch's documents can contain a text, for `olmo seen --text`."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents=lambda w: f"data/{w.dataset}/{plan.documents_stage(w.dataset)}/{w.batch}.tsv",
    output:
        "data/{dataset}/text_index/{batch}.tsv",
    log:
        "logs/text_index/{dataset}/{batch}.log",
    shell:
        "olmo text-index --documents {input.documents:q} --listing {output:q} --log {log:q}"


rule text_indexes:
    """The text indexes of all batches of a data set."""
    input:
        lambda w: listings(w.dataset, "text_index"),
    output:
        touch("data/{dataset}/text_index/ready"),
