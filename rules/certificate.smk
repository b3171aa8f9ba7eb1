# Certificates: what a run was made from, in formats that others check, signed.


rule certificate:
    """The certificate of a run, signed: certificate/<run>."""
    input:
        lambda w: certify.certificate_inputs(plan, w.run),
    output:
        directory("certificate/{run}"),
    log:
        "logs/certificate/{run}.log",
    params:
        terms=lambda w: certify.certificate_terms(plan),  # made again where they change
    shell:
        "olmo certificate make {wildcards.run:q} --folder {output:q} --log {log:q}"
