"""Our merges against mergekit's own, tensor by tensor, from the YAML that we export.

One process in mergekit's environment runs all merges of a study. The bounds are those of fp32 rounding: with
u = 2^-24 and D a bound on the merged difference's size (for a mean the largest |v_i|, for a sum the
sum of w_i |v_i|, times lambda), ours is within (k + 4) u D of the exact difference, mergekit's,
which rounds every product, within (2k + 4) u D; each rounds once more when it adds the base.
"""

import hashlib
import json
import os
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

import jobs
from mergelaw.artifacts import store
from mergelaw.cli.app import app
from mergelaw.merging.engine import Prepared
from mergelaw.merging.export import export
from mergelaw.merging.methods import method_of
from mergelaw.merging.methods.dare import keep_mask
from mergelaw.merging.methods.ties import kept
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models.checkpoint import Tensors
from models import bits, read_tensors, write_checkpoint, write_expert

U = 2.0**-24
WEIGHTS = {"equal": None, "weighted": [1.0, 0.5, 2.0, 0.7]}
CHECKPOINTS = {"tied-whole": (True, 1), "untied-sharded": (False, 3)}
EXPORTED = {
    "average": {"method": "average"},
    "task_arithmetic_mean": {"method": "task_arithmetic", "lambda": 0.8},
    "task_arithmetic_sum": {"method": "task_arithmetic", "lambda": 0.3, "normalize": False},
    "ties_sparse": {"method": "ties", "density": 0.05, "lambda": 0.5},
    "ties": {"method": "ties", "density": 0.2},
    "ties_half": {"method": "ties", "density": 0.5, "lambda": 1.3},
    "ties_dense": {"method": "ties", "density": 1.0},
}
MASKED = {
    "dare_linear": {"method": "dare_linear", "drop_rate": 0.2},
    "dare_linear_sum": {
        "method": "dare_linear",
        "drop_rate": 0.9,
        "lambda": 0.4,
        "normalize": False,
    },
    "dare_ties": {"method": "dare_ties", "drop_rate": 0.5, "lambda": 0.7},
}


class Study:
    """A base, its experts and their task vectors as artifacts, and the merges made of them."""

    def __init__(self, folder: Path, tied: bool, shards: int, dtype: str = "float32"):
        self.folder = folder
        plain = write_checkpoint(
            folder / "plain", tied=tied, shards=shards, dtype=dtype, initializer_range=0.02
        )
        self.base = self._artifact("base", "base", plain)
        self.vectors = {}
        for number in range(4):
            name = f"expert{number}"
            trained = write_expert(
                plain, folder / f"plain{number}", 0.002, number + 1, None, shards
            )
            expert = self._artifact(name, "expert", trained)
            self.vectors[name] = folder / f"vector{number}@1"
            inputs = {"base": self.base, "expert": expert}
            self._run("task-vector", "task_vector", self.vectors[name], {}, inputs)

    def _artifact(self, name: str, stage: str, source: Path) -> Path:
        def copy(folder: Path, state: Path) -> None:
            for path in source.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())

        store.make(self.folder / f"{name}@1", stage, {}, {}, copy)
        return self.folder / f"{name}@1"

    def _run(self, command: str, stage: str, output: Path, recipe: dict, inputs: dict) -> None:
        job = jobs.write(self.folder / f"{output.name}.json", stage, output, recipe, inputs=inputs)
        words = ["stage", command, str(job)]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output

    def merge(self, name: str, method: dict, weights: list[float] | None = None) -> Path:
        recipe = {"method": method, "experts": list(self.vectors), "weights": weights}
        output = self.folder / f"{name}@1"
        inputs = {"base": self.base, **self.vectors}

        def work(folder: Path, state: Path) -> dict:
            return export(recipe, self.base, self.vectors, folder, output)

        store.make(output, "merge", recipe, inputs, work)
        return output

    def config(self, name: str, rule: str, parameters: dict, weights: list[float] | None) -> Path:
        """A merge in mergekit's words, for rules that we do not export."""
        experts = {n: self.folder / f"{n}@1" for n in self.vectors}
        own = weights or [1.0] * len(experts)
        path = self.folder / f"{name}.yaml"
        models = [
            {"model": {"model": {"path": str(e)}}, "parameters": {"weight": w}}
            for e, w in zip(experts.values(), own, strict=True)
        ]
        base = {"model": {"path": str(self.base)}}
        text = {
            "merge_method": rule, "models": models, "parameters": parameters,
            "base_model": base, "dtype": "float32",
        }  # fmt: skip
        path.write_text(yaml.safe_dump(text))
        return path

    def masks(self, method: dict) -> Path:
        """Our masks for mergekit, by the digest of the difference that they are for."""
        path = self.folder / f"masks-{method['seed']}-{method['drop_rate']}.safetensors"
        found = {}
        for folder in self.vectors.values():
            vector = TaskVector(folder)
            for name, values in vector.tensors():
                key = hashlib.sha256(values.numpy().tobytes()).hexdigest()
                mask = keep_mask(
                    method["seed"], vector.digest, name, 0, len(values), method["drop_rate"]
                )
                found[key] = torch.from_numpy(mask)
        save_file(found, path)
        return path

    def differences(self, name: str, method: dict) -> list[torch.Tensor]:
        """The experts' prepared differences of one tensor, in float64."""
        rule, made = method_of(method), []
        for folder in self.vectors.values():
            vector = TaskVector(folder)
            made.append(Prepared(rule, vector).part(name, 0, vector.size(name)).double())
        return made


def in_one_process(peers: Path, folder: Path, jobs: list[dict]) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run = subprocess.run(
        [peers / "python", Path(__file__).with_name("run_mergekit.py"), folder / "jobs.json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert run.returncode == 0, run.stderr[-3000:]


def job(config: Path, output: Path, masks: Path | None = None) -> dict:
    return {"config": str(config), "output": str(output), "masks": str(masks) if masks else None}


@pytest.fixture(scope="session")
def merged(peers, tmp_path_factory):
    """(ours, mergekit's) folder of every merge; mergekit's again with its own rescaling."""
    folder = tmp_path_factory.mktemp("conformance")
    studies = {
        name: Study(folder / name, tied, shards) for name, (tied, shards) in CHECKPOINTS.items()
    }
    pairs = {}
    jobs: dict[str, list] = {name: [] for name in studies}
    for (kind, study), (which, weights) in product(studies.items(), WEIGHTS.items()):
        for name, method in EXPORTED.items():
            ours = study.merge(f"{name}-{which}", method, weights)
            theirs = study.folder / f"mergekit-{name}-{which}"
            jobs[kind].append(job(ours / "mergekit.yaml", theirs))
            pairs[kind, which, name] = ours, theirs
        for name, method in MASKED.items():
            method = {"seed": 0, "lambda": 1.0, "normalize": True, **method}
            ours = study.merge(
                f"{name}-{which}",
                {k: v for k, v in method.items() if name != "dare_ties" or k != "normalize"},
                weights,
            )
            masks, keep = study.masks(method), 1 - method["drop_rate"]
            parameters = {"density": keep, "normalize": method["normalize"]}
            plain = {"rescale": False, "lambda": method["lambda"] / keep}
            for kind_of, more in (("", plain), ("-rescaled", {"lambda": method["lambda"]})):
                label = f"{name}-{which}{kind_of}"
                config = study.config(label, method["method"], {**parameters, **more}, weights)
                theirs = study.folder / f"mergekit-{label}"
                jobs[kind].append(job(config, theirs, masks))
                pairs[kind, which, name + kind_of] = ours, theirs
    for kind, study in studies.items():
        in_one_process(peers, study.folder, jobs[kind])
    return studies, pairs


def exact_signs(vectors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Where no rounding in fp32 can turn the sign of the weighted sum."""
    votes = [v * w for v, w in zip(vectors, weights, strict=True)]
    doubt = 4 * len(votes) * U * sum(v.abs() for v in votes)
    return (sum(votes).abs() > doubt) | (doubt == 0)


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("which", WEIGHTS)
@pytest.mark.parametrize("name", [*EXPORTED, *MASKED])
def test_mergekit_gives_our_merge(merged, kind, which, name):
    studies, pairs = merged
    study, (ours, theirs) = studies[kind], pairs[kind, which, name]
    method = {**EXPORTED, **MASKED}[name]
    weights = WEIGHTS[which] or [1.0] * 4
    k, scale = len(weights), method.get("lambda", 1.0)
    left, right = read_tensors(ours), read_tensors(theirs)
    assert left.keys() == right.keys()
    assert ("lm_head.weight" in left) == (kind == "untied-sharded")
    with Tensors(study.base) as base:
        for tensor, value in left.items():
            start = base[tensor].double().view(-1)
            ours, theirs = (t[tensor].double().view(-1) for t in (left, right))
            vectors = study.differences(tensor, method)
            if method.get("normalize", True):
                size = scale * torch.stack(vectors).abs().amax(0)
            else:
                size = scale * sum(v.abs() * w for v, w in zip(vectors, weights, strict=True))
            bound = (3 * k + 8) * U * size + 2 * U * torch.maximum(ours.abs(), start.abs())
            if name == "average":
                # mergekit averages the experts themselves, so it rounds at their size.
                bound += (2 * k + 4) * U * (start.abs() + size)
            sure = torch.ones_like(start, dtype=torch.bool)
            if "ties" in method["method"]:
                sure = exact_signs(vectors, weights)
                assert (~sure).double().mean() < 1e-4
            assert value.dtype == right[tensor].dtype == torch.float32
            off = ((ours - theirs).abs() > bound) & sure
            assert not off.any(), f"{tensor}: {int(off.sum())} of {len(off)}"
            assert (ours != start).any()


def test_what_is_exported_and_what_is_not(merged):
    _, pairs = merged
    for (_, _, name), (ours, _) in pairs.items():
        assert (ours / "mergekit.yaml").exists() == (name in EXPORTED)


def test_the_program_itself_takes_the_exported_file(merged, peers, tmp_path):
    _, pairs = merged
    ours, theirs = pairs["untied-sharded", "weighted", "ties"]
    run = subprocess.run(
        [peers / "mergekit-yaml", "mergekit.yaml", tmp_path / "out"],
        cwd=ours,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found, wanted = read_tensors(tmp_path / "out"), read_tensors(theirs)
    assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in wanted.items()}


# Where we differ on purpose


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_dare_rescales_by_the_drop_rate_and_mergekit_to_the_norm(merged, kind):
    """mergekit's own DARE: each masked tensor gets the L1 norm that it had before."""
    studies, pairs = merged
    study, (ours, theirs) = studies[kind], pairs[kind, "equal", "dare_linear-rescaled"]
    method = {"method": "dare_linear", "drop_rate": 0.2}
    left, right = read_tensors(ours), read_tensors(theirs)
    with Tensors(study.base) as base:
        for tensor in left:
            start = base[tensor].double().view(-1)
            total = torch.zeros_like(start)
            masked = study.differences(tensor, method)
            for folder, values in zip(study.vectors.values(), masked, strict=True):
                norm = TaskVector(folder)[tensor].double().abs().sum()
                total += values * (norm / values.abs().sum()) / 4
            found = right[tensor].double().view(-1)
            # The norms, sums of n fp32 values, take part in rounding too.
            error = (len(start) + 20) * U * torch.stack(masked).abs().amax(0)
            assert ((found - start - total).abs() <= error + 2 * U * found.abs()).all()
            gap = (left[tensor].double().view(-1) - found).norm() / (found - start).norm()
            assert gap > 1e-4, "the difference is gone: change what the README says"


def test_equal_magnitudes_at_the_threshold_are_all_kept_and_in_part_by_mergekit(
    peers, tmp_path_factory
):
    """bf16 differences are coarse: several have exactly the threshold's magnitude."""
    folder = tmp_path_factory.mktemp("bf16")
    study = Study(folder, True, 1, "bfloat16")
    method = {"method": "ties", "density": 0.2}
    ours, theirs = study.merge("ties", method), folder / "mergekit"
    in_one_process(peers, folder, [job(ours / "mergekit.yaml", theirs)])
    left, right = read_tensors(ours), read_tensors(theirs)
    several = other = 0
    for tensor in left:
        at_threshold = torch.zeros(left[tensor].numel(), dtype=torch.bool)
        for path in study.vectors.values():
            size = TaskVector(path)[tensor].abs()
            threshold = size.sort(descending=True).values[kept(len(size), 0.2) - 1]
            several += int((size >= threshold).sum()) - kept(len(size), 0.2)
            at_threshold |= size == threshold
        ours, theirs = (t[tensor].float().view(-1) for t in (left, right))
        # Elsewhere the fp32 merges agree; rounding to bf16 parts them by one place at most.
        far = (ours - theirs).abs() > 2.0**-7 * torch.maximum(ours.abs(), theirs.abs())
        assert not (far & ~at_threshold).any()
        other += int((ours != theirs).sum())
    assert several and other
