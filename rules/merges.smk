designs = pipeline.paths("designs/{name}@{key}")
merges = pipeline.paths("merges/{base}/{method}/{name}@{key}")


rule sample_design:
    output:
        update(designs.output),
    log:
        designs.log,
    conda:
        "../envs/main.yaml"
    params:
        job=designs.job,
    message:
        "choose which subsets are merged on {wildcards.name}"
    shell:
        "mergelaw stage design {params.job:q} &> {log:q}"


rule write_merge:
    input:
        base=merges.input("base"),
        task_vectors=merges.input("task_vectors"),
        evaluation=merges.input("evaluation"),
        confirmation=merges.input("confirmation"),
        coefficients=merges.input("coefficients"),
    output:
        update(merges.output),
    log:
        merges.log,
    conda:
        "../envs/main.yaml"
    resources:
        **merges.resources,
    params:
        job=merges.job,
    message:
        "write merge {wildcards.name} as a checkpoint"
    shell:
        "mergelaw stage merge {params.job:q} &> {log:q}"
