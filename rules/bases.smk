bases = pipeline.paths("bases/{name}@{key}")


rule pretrain_base:
    input:
        corpora=bases.input("corpora"),
        overlap=bases.input("overlap"),
    output:
        update(bases.output),
    log:
        bases.log,
    wildcard_constraints:
        name=pipeline.names(*(a for a in study.bases.values() if a.trains)),
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        **bases.resources,
    params:
        job=bases.job,
    message:
        "pre-train base {wildcards.name}"
    shell:
        "mergelaw stage base {params.job:q} --threads {threads} &> {log:q}"


rule fetch_base:
    output:
        update(bases.output),
    log:
        bases.log,
    wildcard_constraints:
        name=pipeline.names(*(a for a in study.bases.values() if not a.trains)),
    conda:
        "../envs/main.yaml"
    params:
        job=bases.job,
    message:
        "fetch base {wildcards.name}"
    shell:
        "mergelaw stage base {params.job:q} &> {log:q}"
