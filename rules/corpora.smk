corpora = pipeline.paths("corpora/{name}@{key}")
overlap = pipeline.paths("checks/overlap@{key}")


rule build_corpus:
    output:
        update(corpora.output),
    log:
        corpora.log,
    conda:
        "../envs/main.yaml"
    params:
        job=corpora.job,
    message:
        "corpus {wildcards.name}"
    shell:
        "mergelaw stage corpus {params.job:q} &> {log:q}"


rule check_overlap:
    input:
        corpora=overlap.input("corpora"),
    output:
        update(overlap.output),
    log:
        overlap.log,
    conda:
        "../envs/main.yaml"
    params:
        job=overlap.job,
    message:
        "no document trained on here and evaluated there"
    shell:
        "mergelaw stage check-overlap {params.job:q} &> {log:q}"
