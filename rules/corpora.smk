corpora = pipeline.paths("corpora/{name}/{split}@{key}")
overlap = pipeline.paths("checks/{name}@{key}")


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
        "write the {wildcards.split} documents of {wildcards.name}"
    shell:
        "mergelaw stage corpus {params.job:q} &> {log:q}"


rule check_overlap:
    input:
        train=overlap.input("train"),
        eval=overlap.input("eval"),
        calibration=overlap.input("calibration"),
        confirm=overlap.input("confirm"),
    output:
        update(overlap.output),
    log:
        overlap.log,
    conda:
        "../envs/main.yaml"
    params:
        job=overlap.job,
    message:
        "check {wildcards.name}: no document may be in two splits"
    shell:
        "mergelaw stage overlap {params.job:q} &> {log:q}"
