learned = pipeline.paths("learned/{base}/{name}@{key}")


rule learn_coefficients:
    input:
        base=learned.input("base"),
        task_vectors=learned.input("task_vectors"),
        corpora=learned.input("corpora"),
        overlap=learned.input("overlap"),
    output:
        update(learned.output),
    log:
        learned.log,
    conda:
        "../envs/main.yaml"
    threads: 1
    resources:
        **learned.resources,
    params:
        job=learned.job,
    message:
        "learn merging coefficients on {wildcards.base}"
    shell:
        "mergelaw stage learn {params.job:q} --threads {threads} &> {log:q}"
