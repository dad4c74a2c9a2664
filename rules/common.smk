# The study of the configuration. What rules take from it is in mergelaw.workflow.snakemake.
import os
from pathlib import Path

from mergelaw.workflow.snakemake import Pipeline

# For envs/main.yaml, which Snakemake copies before pip reads it.
os.environ.update(MERGELAW_ROOT=str(Path(workflow.basedir).parent))

pipeline = Pipeline(workflow)
study = pipeline.study


pathvars:
    results=str(study.results),


wildcard_constraints:
    key="[0-9a-f]{8}",
    base="[^/@]+",
    method="[^/@]+",
    name="[^/@]+",


# These take seconds, or download models: nodes of a cluster may have no network.
localrules:
    all,
    build_corpus,
    check_overlap,
    fetch_base,
    fetch_expert,
    gradients,
    sample_design,
    write_report,
