rule sample_merges:
    input:
        needs("plans/{name}@{key}"),
    output:
        update("<results>/plans/{name}@{key}/lineage.json"),
    log:
        "<results>/logs/plans/{name}@{key}.log",
    conda:
        "../envs/main.yaml"
    params:
        options=options("plans/{name}@{key}"),
    message:
        "plan of the merges on {wildcards.name}"
    shell:
        "mergelaw sample {params.options} &> {log:q}"


rule write_merge:
    input:
        needs("merges/{base}/{method}/{name}@{key}"),
    output:
        update("<results>/merges/{base}/{method}/{name}@{key}/lineage.json"),
    log:
        "<results>/logs/merges/{base}/{method}/{name}@{key}.log",
    conda:
        "../envs/main.yaml"
    resources:
        **asks("merges/{base}/{method}/{name}@{key}"),
    params:
        options=options("merges/{base}/{method}/{name}@{key}"),
    message:
        "merge {wildcards.name} as a checkpoint"
    shell:
        "mergelaw merge {params.options} &> {log:q}"
