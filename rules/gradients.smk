gradient_paths = pipeline.paths("gradients/{base}/{name}@{key}")


rule compute_gradients:
    input:
        base=gradient_paths.input("base"),
        task_vectors=gradient_paths.input("task_vectors"),
        corpora=gradient_paths.input("corpora"),
        overlap=gradient_paths.input("overlap"),
    output:
        update(gradient_paths.output),
    log:
        gradient_paths.log,
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        **gradient_paths.resources,
    params:
        job=gradient_paths.job,
    message:
        "compute gradients of the evaluation loss on {wildcards.base}"
    shell:
        "mergelaw stage gradients {params.job:q} --threads {threads} &> {log:q}"


# On request only: `snakemake gradients ...`.
rule gradients:
    input:
        pipeline.gradients(),
