rule get_expert:
    input:
        needs("experts/{base}/{name}@{key}"),
    output:
        update("<results>/experts/{base}/{name}@{key}/lineage.json"),
    log:
        "<results>/logs/experts/{base}/{name}@{key}.log",
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        **asks("experts/{base}/{name}@{key}"),
    params:
        options=options("experts/{base}/{name}@{key}"),
    message:
        "expert {wildcards.name} on {wildcards.base}"
    shell:
        "mergelaw expert {params.options} --threads {threads} &> {log:q}"
