task_vectors = pipeline.paths("task_vectors/{base}/{name}@{key}")


rule make_task_vector:
    input:
        base=task_vectors.input("base"),
        expert=task_vectors.input("expert"),
    output:
        update(task_vectors.output),
    log:
        task_vectors.log,
    conda:
        "../envs/main.yaml"
    resources:
        **task_vectors.resources,
    params:
        job=task_vectors.job,
    message:
        "subtract base {wildcards.base} from expert {wildcards.name}"
    shell:
        "mergelaw stage task-vector {params.job:q} &> {log:q}"
