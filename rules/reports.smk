rule write_report:
    input:
        needs("reports/{name}@{key}"),
    output:
        update("<results>/reports/{name}@{key}/lineage.json"),
    log:
        "<results>/logs/reports/{name}@{key}.log",
    conda:
        "../envs/main.yaml"
    params:
        options=options("reports/{name}@{key}"),
    message:
        "report"
    shell:
        "mergelaw report {params.options} &> {log:q}"
