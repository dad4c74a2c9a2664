rule fit_laws:
    input:
        needs("laws/{name}@{key}"),
    output:
        update("<results>/laws/{name}@{key}/lineage.json"),
    log:
        "<results>/logs/laws/{name}@{key}.log",
    conda:
        "../envs/main.yaml"
    params:
        options=options("laws/{name}@{key}"),
    message:
        "law fits"
    shell:
        "mergelaw fit {params.options} &> {log:q}"
