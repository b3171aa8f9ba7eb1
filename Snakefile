# From a list of text files to the checkpoint of a language model:
#
#   sources → documents (→ tags → digests → duplicates → mixed) → tokenizer → tokens, or instructions → order → train
#     → export, evaluate
#
#   snakemake --cores 2 checkpoints/olmo-tiny/final
#
# Each rule names inputs, parameters, resources and the log, and calls one `olmo` command. The outputs
# of commands are in the store (config: store), named by their digests; the paths are links.

from snakemake.utils import min_version

min_version("9.27")

from olmo.cluster.slurm_plugin import become_array_task, patch_plugin
from olmo.pipeline import certify, parts, sampling, screen, workspace
from olmo.pipeline.damage import DamageScanner
from olmo.pipeline.plan import Plan
from olmo.pipeline.targets import match_any
from olmo.pipeline.terminal import print_at_exit

become_array_task()
workspace.check_project()


configfile: "config/config.yaml"


plan = Plan(config)
# A job on another machine reads this file again; it runs one rule and does not look for damage.
damage = DamageScanner(plan, dry_run=lambda: workflow.dryrun, enabled=workflow.is_main_process)
workspace.set_job_environment(plan.store)
if workflow.is_main_process:
    patch_plugin()
    workspace.forecast_at_exit(workflow)


wildcard_constraints:
    dataset=r"[\w.-]+",
    run=r"[\w.-]+",
    ladder=r"[\w.-]+",
    batch=r"\d+",
    step=r"\d+",


localrules:
    all,
    environment,  # downloads packages; compute nodes may have no network
    source_list,
    certificate,  # the key need not be on compute nodes


rule all:
    """The checkpoint of the smallest run."""
    input:
        "checkpoints/olmo-tiny/final",


include: "rules/environments.smk"
include: "rules/sources.smk"
include: "rules/documents.smk"
include: "rules/quality.smk"
include: "rules/dedupe.smk"
include: "rules/tokens.smk"
include: "rules/instructions.smk"
include: "rules/statistics.smk"
include: "rules/order.smk"
include: "rules/train.smk"
include: "rules/soup.smk"
include: "rules/export.smk"
include: "rules/evaluate.smk"
include: "rules/bench.smk"
include: "rules/ladder.smk"
include: "rules/report.smk"
include: "rules/certificate.smk"


onstart:
    workspace.lock_folder(plan.store)
    workspace.warn_of_download(plan, workflow)
    screen.count_jobs(workflow.dag)


onsuccess:
    print_at_exit(workspace.describe_finished_runs(plan), sys.stdout)


onerror:
    workspace.report_failures()
