rule get_base:
    input:
        needs("bases/{name}@{key}"),
    output:
        update("<results>/bases/{name}@{key}/lineage.json"),
    log:
        "<results>/logs/bases/{name}@{key}.log",
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        **asks("bases/{name}@{key}"),
    params:
        options=options("bases/{name}@{key}"),
    message:
        "base {wildcards.name}"
    shell:
        "mergelaw base {params.options} --threads {threads} &> {log:q}"
