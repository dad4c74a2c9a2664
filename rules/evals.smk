evals = pipeline.paths("evals/{base}/{method}/{name}@{key}")


rule evaluate_merges:
    input:
        base=evals.input("base"),
        task_vectors=evals.input("task_vectors"),
        corpora=evals.input("corpora"),
        overlap=evals.input("overlap"),
        coefficients=evals.input("coefficients"),
    output:
        update(evals.output),
    log:
        evals.log,
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        **evals.resources,
    params:
        job=evals.job,
    message:
        "evaluate merges by {wildcards.method} on {wildcards.base}, shard {wildcards.name}"
    shell:
        "mergelaw stage evaluate {params.job:q} --threads {threads} &> {log:q}"
