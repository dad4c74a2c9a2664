rule make_task_vector:
    input:
        needs("task_vectors/{base}/{name}@{key}"),
    output:
        update("<results>/task_vectors/{base}/{name}@{key}/lineage.json"),
    log:
        "<results>/logs/task_vectors/{base}/{name}@{key}.log",
    conda:
        "../envs/main.yaml"
    resources:
        **asks("task_vectors/{base}/{name}@{key}"),
    params:
        options=options("task_vectors/{base}/{name}@{key}"),
    message:
        "task vector {wildcards.name} on {wildcards.base}"
    shell:
        "mergelaw task-vector {params.options} &> {log:q}"
