rule build_corpus:
    input:
        needs("corpora/{name}@{key}"),
    output:
        update("<results>/corpora/{name}@{key}/lineage.json"),
    log:
        "<results>/logs/corpora/{name}@{key}.log",
    conda:
        "../envs/main.yaml"
    params:
        options=options("corpora/{name}@{key}"),
    message:
        "corpus {wildcards.name}"
    shell:
        "mergelaw corpus {params.options} &> {log:q}"


rule check_overlap:
    input:
        needs("checks/overlap@{key}"),
    output:
        update("<results>/checks/overlap@{key}/lineage.json"),
    log:
        "<results>/logs/checks/overlap@{key}.log",
    conda:
        "../envs/main.yaml"
    params:
        options=options("checks/overlap@{key}"),
    message:
        "no document trained on here and evaluated there"
    shell:
        "mergelaw check-overlap {params.options} &> {log:q}"
