laws = pipeline.paths("laws/{name}@{key}")


rule fit_laws:
    input:
        evals=laws.input("evals"),
    output:
        update(laws.output),
    log:
        laws.log,
    conda:
        "../envs/main.yaml"
    params:
        job=laws.job,
    message:
        "fit the laws"
    shell:
        "mergelaw stage fit {params.job:q} &> {log:q}"
