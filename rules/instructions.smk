# Instructions: conversations as instances for fine-tuning, with label masks of the answers.


ruleorder: instructions > tokens


rule instructions:
    """Ids and label masks of a batch's conversations."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents="data/{dataset}/documents/{batch}.tsv",
        tokenizer="data/{dataset}/tokenizer.json",
    output:
        "data/{dataset}/tokens/{batch}.tsv",
    log:
        "logs/tokens/{dataset}/{batch}.log",
    wildcard_constraints:
        dataset=match_any(plan.instruction_datasets()),
    params:
        eos=lambda w: plan.recipe(w.dataset).tokenizer.eos_token_id,
        pad=lambda w: plan.recipe(w.dataset).tokenizer.pad_token_id,
        recipe=lambda w: plan.section(w.dataset, "instructions"),
    shell:
        "olmo instructions --documents {input.documents:q} --tokenizer {input.tokenizer:q}"
        " --eos-token-id {params.eos} --pad-token-id {params.pad} {params.recipe}"
        " --listing {output:q} --log {log:q}"
