"""Checkpoints as they are in the world, through whole runs: the hub's, adapters, other vocabularies."""

import json
import resource
import shutil
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from studies import ROOT, Place, ready_config, same_measurements
from studies import mergelaw as command

import jobs
import models
from mergelaw.artifacts import files, lineage

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def into_the_cache(home: Path, hub: str, source: Path) -> None:
    """A model as `huggingface_hub` keeps it: blobs, a snapshot of links to them, a branch."""
    repository = home / "hub" / f"models--{hub.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for path in (snapshot, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True)
    for file in source.iterdir():
        blob = repository / "blobs" / files.file_digest(file)
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs" / "main").write_text(COMMIT)


def grown(base: Path, folder: Path, tokens: int) -> Path:
    """A fine-tune of the base that has so many tokens more."""
    expert = models.write_expert(base, folder, 0.05, seed=7)
    described = json.loads((expert / "config.json").read_text())
    tensors = models.read_tensors(expert)
    rows = described["vocab_size"]
    for name, tensor in tensors.items():
        if tensor.shape[0] == rows:
            tensors[name] = torch.cat([tensor, torch.randn(tokens, *tensor.shape[1:])])
    described["vocab_size"] = rows + tokens
    return models.write_tensors(expert, tensors, described)


@pytest.fixture(scope="module")
def world(ready, tmp_path_factory) -> Place:
    """A base and an expert of the hub by branch, an adapter of the hub, and a grown expert."""
    folder = tmp_path_factory.mktemp("world")
    base = ready.folder / "models" / "base"
    adapter = models.write_adapter(
        base, folder / "adapter", r=2, target_modules=["q_proj", "down_proj"]
    )
    into_the_cache(folder / "home", "ours/base", base)
    into_the_cache(folder / "home", "ours/amber", ready.folder / "models" / "amber")
    into_the_cache(folder / "home", "ours/adapter", adapter)
    (adapter / "optimizer.pt").write_bytes(b"left over")
    config = ready_config(ready.folder, ())
    config |= {
        "name": "world",
        "vocabulary": "common_rows",
        "bases": {"tiny": {"hub": "ours/base", "revision": "main"}},
        "experts": {
            "amber": {"checkpoints": {"tiny": {"hub": "ours/amber", "revision": COMMIT}}},
            "adapter": {"checkpoints": {"tiny": {"hub": "ours/adapter", "revision": "main"}}},
            "grown": {"checkpoints": {"tiny": {"path": str(grown(base, folder / "grown", 3))}}},
        },
        "methods": {"average": {}, "dare": {"method": "dare_linear"}},
        "merges": {
            "all": {"base": "tiny", "method": "average", "experts": ["amber", "adapter", "grown"]}
        },
    }
    place = Place(folder, config)
    place.finish(**OFFLINE, HF_HOME=str(folder / "home"))
    return place


def test_they_come_to_measured_merges(world):
    rows = world.rows()
    assert len(rows) == 2 * 8 * 3 and rows["finite"].all()
    assert rows.groupby("merge")["ce"].first().nunique() == rows["merge"].nunique()
    for name in ("bases/tiny", "experts/tiny/adapter"):
        (artifact,) = (a for a in world.study().by_path.values() if a.folder == name)
        (source,) = lineage.read(world.results / artifact.path)["facts"]["sources"]
        assert json.loads(source)["commit"] == COMMIT and json.loads(source)["revision"] == "main"
    (folder,) = world.artifacts("merges").values()
    recipe = (folder / "mergekit.yaml").read_text()
    assert "lora:" in recipe and recipe.count("lora:") == 1


def test_the_adapter_alone_is_what_peft_makes_of_it(world, ready):
    """The cross-entropy of k = 1 is that of the model that peft merges."""
    from peft import PeftModel
    from test_own_models import loss
    from transformers import AutoTokenizer

    base = ready.folder / "models" / "base"
    whole = PeftModel.from_pretrained(
        models.load(base), world.folder / "adapter"
    ).merge_and_unload()
    whole.save_pretrained(world.folder / "whole")
    AutoTokenizer.from_pretrained(base).save_pretrained(world.folder / "whole")
    rows = world.rows()
    alone = rows["experts"].map(list).map(lambda experts: experts == ["adapter"])
    for domain in world.config["domains"]:
        row = rows[alone & (rows["method"] == "average") & (rows["domain"] == domain)].iloc[0]
        assert row["ce"] == pytest.approx(loss(world, world.folder / "whole", domain), rel=2e-6)


def test_derived_task_vectors_measure_the_same_bits(world, tmp_path):
    other = Place(tmp_path, world.config | {"storage": "derived"})
    other.finish(**OFFLINE, HF_HOME=str(world.folder / "home"))
    same_measurements(world.rows(), other.rows())
    vectors = other.artifacts("task_vectors")
    kept = {name for name, path in vectors.items() if list(path.glob("vector.*"))}
    assert len(vectors) == 3 and len(kept) == 1 and "adapter" in kept.pop()
    (left,), (right,) = (place.artifacts("merges").values() for place in (world, other))
    assert files.file_digest(left / "model.safetensors") == files.file_digest(
        right / "model.safetensors"
    )
    # The other way of keeping them asks for nothing new: it is no part of what they are.
    world_again = world.copy(tmp_path / "again")
    world_again.configure(world.config | {"storage": "derived"})
    assert world_again.planned(**OFFLINE, HF_HOME=str(world.folder / "home")) == {}


def test_a_grown_vocabulary_is_refused_unless_asked_for(world, tmp_path):
    place = Place(tmp_path, {k: v for k, v in world.config.items() if k != "vocabulary"})
    failed = place.snakemake(
        "--until", "make_task_vector", **OFFLINE, HF_HOME=str(world.folder / "home")
    )
    (line,) = failed.errors()
    size = json.loads((world.folder / "grown" / "config.json").read_text())["vocab_size"]
    assert f"vocab_size is {size}, the base's is {size - 3}" in line and "common_rows" in line


def test_what_it_took_tells_what_it_costs(world):
    home = str(world.folder / "home")  # where the base's size is known from
    rates = world.mergelaw("rates", "study.yaml", HF_HOME=home)
    assert rates.status == 0, rates.output
    (world.folder / "rates.yaml").write_text(rates.output)
    told = world.mergelaw("estimate", "study.yaml", "--rates", "rates.yaml", HF_HOME=home)
    assert told.status == 0, told.output
    count = len(world.study().by_path)
    assert f"{count} of {count} results are there already" in told.output
    (line,) = (line for line in told.output.splitlines() if line.startswith("in all"))
    assert int(line.split()[2]) == count
    failed = world.mergelaw("estimate", "study.yaml", HF_HOME=str(world.folder / "empty"))
    assert failed.errors() == [
        "bases.tiny: its size is not known before it is fetched; give its 'N' in billions"
    ]


# What a hub answers


ANSWERS = {
    "gated": (403, "GatedRepo"),
    "absent": (404, "RepoNotFound"),
    "other": (404, "RevisionNotFound"),
    "broken": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, code = ANSWERS[self.path.split("/")[4]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(tmp_path, name: str, endpoint: str):
    source = {"hub": f"ours/{name}", "revision": COMMIT}
    output = tmp_path / "out" / "e@00000000"
    job = jobs.write(
        tmp_path / "job.json", "expert", output, {"checkpoint": source}, sources=source
    )
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    run = partial(command, cwd=tmp_path, **online)
    return run("stage", "expert", str(job))


@pytest.mark.parametrize(
    "name, words",
    [
        ("gated", "ours/gated: is gated; accept its licence on its page and log in"),
        ("absent", "ours/absent: no such model on the hub, or a private one; check the id"),
        ("other", f"ours/other: has no revision '{COMMIT}'; name a commit of it"),
        ("broken", "ours/broken at"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(tmp_path, hub, name, words):
    failed = fetch(tmp_path, name, hub)
    (line,) = failed.errors()
    assert failed.status == 1 and words in line and "Traceback" not in failed.output
    assert not (tmp_path / "out" / "e@00000000").exists()


def test_without_a_network_it_is_said_at_once(tmp_path):
    failed = fetch(tmp_path, "model", "http://127.0.0.1:9")
    (line,) = failed.errors()
    assert "ours/model at" in line and "check id, revision and network" in line


# What ships


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_dry_runs_offline(path, tmp_path):
    """Without a model or a document on disk, in less than half a minute of the processor."""
    place = Place(tmp_path, {"results": str(tmp_path / "results")})
    shutil.copyfile(path, tmp_path / "study.yaml")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    planned = place.planned(**OFFLINE, HF_HOME=str(tmp_path / "home"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    study = place.study()
    assert sum(planned.values()) == len(study.by_path) < 2000
    assert planned.get("fetch_base", 0) + planned.get("pretrain_base", 0) == len(study.config.bases)
