reports = pipeline.paths("reports/{name}@{key}")


rule write_report:
    input:
        laws=reports.input("laws"),
        evals=reports.input("evals"),
        coefficients=reports.input("coefficients"),
    output:
        update(reports.output),
    log:
        reports.log,
    conda:
        "../envs/main.yaml"
    params:
        job=reports.job,
    message:
        "write the report"
    shell:
        "mergelaw stage report {params.job:q} &> {log:q}"
