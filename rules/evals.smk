rule evaluate_merges:
    input:
        needs("evals/{base}/{method}/{name}@{key}"),
    output:
        update("<results>/evals/{base}/{method}/{name}@{key}/lineage.json"),
    log:
        "<results>/logs/evals/{base}/{method}/{name}@{key}.log",
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        **asks("evals/{base}/{method}/{name}@{key}"),
    params:
        options=options("evals/{base}/{method}/{name}@{key}"),
        cells=f"{study.results}/cells/{{base}}",
    message:
        "cross-entropy of {wildcards.method} on {wildcards.base}, shard {wildcards.name}"
    shell:
        "mergelaw evaluate {params.options} --threads {threads} --cells {params.cells:q} &> {log:q}"
