# Ladders: runs of several sizes and lengths predict the loss of a larger size, whose own runs check it.


rule ladder:
    """The loss that a ladder predicts of its held-out size, with its interval, and what it will cost."""
    input:
        finals=lambda w: [
            f"checkpoints/{run}/final" for run in parts.ladder_runs(plan, w.ladder, False)
        ],
    output:
        "ladder/{ladder}/prediction.json",
        table=report(
            "ladder/{ladder}/prediction.md",
            caption="captions/ladder.rst",
            category="Ladder",
            labels={"ladder": "{ladder}"},
        ),
        picture=report(
            "ladder/{ladder}/prediction.svg",
            caption="captions/ladder.rst",
            category="Ladder",
            labels={"ladder": "{ladder}"},
        ),
    log:
        "logs/ladder/{ladder}.log",
    params:
        confidence=lambda w: plan.ladder(w.ladder).confidence,
    shell:
        "olmo ladder {wildcards.ladder:q} --log {log:q}"


rule ladder_check:
    """Whether the prediction of a ladder held: its held-out size, trained."""
    input:
        "ladder/{ladder}/prediction.json",
        finals=lambda w: [
            f"checkpoints/{run}/final" for run in parts.ladder_runs(plan, w.ladder, True)
        ],
    output:
        table=report(
            "ladder/{ladder}/check.md",
            caption="captions/ladder.rst",
            category="Ladder",
            labels={"ladder": "{ladder}, checked"},
        ),
        picture=report(
            "ladder/{ladder}/check.svg",
            caption="captions/ladder.rst",
            category="Ladder",
            labels={"ladder": "{ladder}, checked"},
        ),
    log:
        "logs/ladder/{ladder}-check.log",
    shell:
        "olmo ladder check {wildcards.ladder:q} --log {log:q}"
