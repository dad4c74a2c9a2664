experts = pipeline.paths("experts/{base}/{name}@{key}")


rule train_expert:
    input:
        base=experts.input("base"),
        corpora=experts.input("corpora"),
        overlap=experts.input("overlap"),
    output:
        update(experts.output),
    log:
        experts.log,
    wildcard_constraints:
        name=pipeline.names(*(a for a in study.experts.values() if a.trains)),
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        **experts.resources,
    params:
        job=experts.job,
    message:
        "train expert {wildcards.name} on {wildcards.base}"
    shell:
        "mergelaw stage expert {params.job:q} --threads {threads} &> {log:q}"


rule fetch_expert:
    output:
        update(experts.output),
    log:
        experts.log,
    wildcard_constraints:
        name=pipeline.names(*(a for a in study.experts.values() if not a.trains)),
    conda:
        "../envs/main.yaml"
    params:
        job=experts.job,
    message:
        "fetch expert {wildcards.name} on {wildcards.base}"
    shell:
        "mergelaw stage expert {params.job:q} &> {log:q}"
