# Instructions: conversations as instances for fine-tuning, with the labels of their answers.


ruleorder: instructions > tokens


rule instructions:
    input:
        lambda w: damage.journal(w.dataset),
        documents="data/{dataset}/documents/{batch}.tsv",
        tokenizer="data/{dataset}/tokenizer.json",
    output:
        "data/{dataset}/tokens/{batch}.tsv",
    log:
        "logs/tokens/{dataset}/{batch}.log",
    wildcard_constraints:
        dataset="|".join(map(re.escape, plan.instruction_datasets())) or "(?!)",  # else none
    params:
        eos=lambda w: plan.recipe(w.dataset).tokenizer.eos_token_id,
        pad=lambda w: plan.recipe(w.dataset).tokenizer.pad_token_id,
        recipe=lambda w: plan.section(w.dataset, "instructions"),
    shell:
        "olmo instructions --documents {input.documents:q} --tokenizer {input.tokenizer:q}"
        " --eos-token-id {params.eos} --pad-token-id {params.pad} {params.recipe}"
        " --listing {output:q} --log {log:q}"
