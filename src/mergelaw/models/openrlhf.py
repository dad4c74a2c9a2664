"""Fine-tuning an expert by OpenRLHF's command line, in an environment of its own.

OpenRLHF pins what others need newer. So this process stays in mergelaw's environment: it writes
the training documents as the texts that the chat template makes of them, asks the other interpreter
what it has, launches torchrun there (on every node of a SLURM job), and takes the checkpoint.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil, prod
from pathlib import Path
from typing import Any

from mergelaw.data import documents as corpus
from mergelaw.data import tokenize as tokens
from mergelaw.errors import MergelawError
from mergelaw.models import trainer
from mergelaw.models.checkpoint import COMPANIONS, FLOATS, INDEX, Tensors, read_config
from mergelaw.models.recipe import OpenRLHF, Training

VERSION = "0.11.2"
INTERPRETER = "MERGELAW_OPENRLHF_PYTHON"
INSTALL = f"install openrlhf=={VERSION} there, as envs/openrlhf.yaml does"

# Files of a run, in its folder of state. OpenRLHF splits a dataset's path at "," and "@", which
# ours have, so it runs in that folder and every path is relative.
MODEL, DATA, STATES, OUTPUT, MERGED, LOG = (
    "model",
    "data.jsonl",
    "states",
    "output",
    "merged",
    "log",
)
SAMPLE = 64  # documents on which both tokenizers are compared
STATES_SAVED = 10  # in a training; OpenRLHF counts steps, not seconds


@dataclass(frozen=True)
class Machine:
    """What a training runs on: as many processes on each node as it has GPUs."""

    nodes: int
    gpus: int  # of each node
    memory: int = 0  # bytes of the smallest GPU
    device: str = "cpu"

    @property
    def world(self) -> int:
        return self.nodes * self.gpus


# -- the command line: pure functions of the recipe --------------------------------------------


def micro_batch(recipe: Training, world: int) -> int:
    """Sequences per forward pass and GPU. Raises MergelawError where the batch cannot be shared."""
    ring = (recipe.openrlhf or OpenRLHF()).ring_attn_size
    if world % ring:
        raise MergelawError(
            f"training.openrlhf.ring_attn_size: {ring} does not divide the {world} GPUs of this "
            "job; change one"
        )
    groups = world // ring
    micro = recipe.micro_batch_size or recipe.batch_size // groups
    if not micro or recipe.batch_size % (micro * groups):
        shown = f"micro_batch_size {recipe.micro_batch_size} x " if recipe.micro_batch_size else ""
        raise MergelawError(
            f"training.batch_size: {recipe.batch_size} is no multiple of {shown}{groups} GPUs "
            "that read different documents; change one"
        )
    return micro


def steps(recipe: Training, rows: int, world: int) -> tuple[int, int, int]:
    """(optimiser steps, rows of the data file, passes over them) of ``rows`` documents.

    OpenRLHF counts whole passes over a file. Steps, and parts of a pass, become one pass over a
    file of just so many rows, in which documents repeat.
    """
    if recipe.epochs is not None and recipe.epochs == int(recipe.epochs):
        passes = int(recipe.epochs)
    elif recipe.epochs is not None:
        rows, passes = int(rows * recipe.epochs), 1
    else:
        rows, passes = (recipe.steps or 0) * recipe.batch_size, 1
    groups = world // (recipe.openrlhf or OpenRLHF()).ring_attn_size
    micro = micro_batch(recipe, world)
    made = rows // groups // micro * passes // (recipe.batch_size // (micro * groups))
    if not made:
        raise MergelawError(
            f"training: {rows} documents in {passes} passes do not fill one batch of "
            f"{recipe.batch_size}; lower batch_size or train longer"
        )
    return made, rows, passes


def arguments(
    recipe: Training, seed: int, world: int, documents: int, plain: bool
) -> tuple[list[str], int]:
    """(options of ``openrlhf.cli.train_sft``, optimiser steps); ``plain``: documents are text."""
    own = recipe.openrlhf or OpenRLHF()
    made, rows, passes = steps(recipe, documents, world)
    pairs: dict[str, Any] = {
        "model.model_name_or_path": MODEL,
        "data.dataset": DATA,
        "data.max_samples": rows,
        "data.max_len": recipe.max_tokens,
        "data.input_template": "",  # the texts are whole: the chat template has made them
        "data.input_key": "text" if plain else "prompt",
        **({} if plain else {"data.output_key": "response"}),
        "train.batch_size": recipe.batch_size,
        "train.micro_batch_size": micro_batch(recipe, world),
        "train.max_epochs": passes,
        "train.seed": seed,
        "adam.lr": recipe.learning_rate,
        "adam.betas": [recipe.adam_beta1, recipe.adam_beta2],
        "adam.weight_decay": recipe.weight_decay,
        "lr_scheduler": recipe.schedule,
        "lr_warmup_ratio": recipe.warmup,
        "max_norm": recipe.max_grad_norm,
        "ds.param_dtype": "bf16",
        "ds.zero_stage": own.zero_stage,
        "ds.ring_attn_size": own.ring_attn_size,
        "ds.attn_implementation": own.attn_implementation,
        "ckpt.output_dir": OUTPUT,
        "ckpt.path": STATES,
        "ckpt.save_steps": ceil(made / STATES_SAVED),
        "ckpt.max_num": 2,  # the last is whole while the next is written
        "logger.tensorboard_dir": LOG,
        "logger.wandb.run_name": "expert",
    }
    if own.lora:
        pairs["ds.lora.rank"], pairs["ds.lora.alpha"] = own.lora.rank, own.lora.alpha
        pairs["ds.lora.dropout"] = own.lora.dropout
        if own.lora.target_modules:
            pairs["ds.lora.target_modules"] = own.lora.target_modules
    flags = {
        "train.full_determinism_enable": True,
        "ckpt.load_enable": True,
        "model.pretrain_mode_enable": plain,
        "model.gradient_checkpointing_enable": recipe.gradient_checkpointing,
        "ds.packing_samples": recipe.packing,
        "ds.adam_offload": own.adam_offload,
    }
    words = []
    for name, value in pairs.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return [*words, *(f"--{name}" for name, on in flags.items() if on)], made


# torchrun gives each of its processes a session of its own, where a signal to its group does not
# reach them: one that is killed would leave them training. So Linux ends them with it (prctl's
# PR_SET_PDEATHSIG is 1).
WORKER = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def launcher(python: str, machine: Machine, job: str, host: str) -> list[str]:
    """torchrun, on this node or, by srun, on all nodes of the SLURM job ``job``.

    A module's name and its arguments are to follow. The processes meet on ``host``, one of the
    nodes, at a port of the job's own.
    """
    worker = ["--no-python", python, "-c", WORKER]
    torchrun = [python, "-m", "torch.distributed.run", f"--nproc-per-node={machine.gpus}"]
    if machine.nodes == 1:
        return [*torchrun, "--standalone", *worker]
    srun = ["srun", f"--nodes={machine.nodes}", f"--ntasks={machine.nodes}"]
    srun += ["--ntasks-per-node=1", "--overlap", "--cpu-bind=none", "--kill-on-bad-exit=1"]
    meet = [f"--nnodes={machine.nodes}", "--rdzv-backend=c10d", f"--rdzv-id={job}"]
    meet += [f"--rdzv-endpoint={host}:{20000 + int(job) % 20000}"]
    return [*srun, *torchrun, *meet, *worker]


def least_memory(recipe: Training, parameters: int, world: int) -> int:
    """Bytes that weights, gradients and Adam's state take on each GPU, without activations.

    Mixed precision: 2 + 2 + 12 bytes per parameter, shared as the ZeRO stage says (Rajbhandari et
    al. 2020, section 3); with offload the optimiser's 12 and its gradients are in host memory, and
    an adapter's own are not counted.
    """
    own = recipe.openrlhf or OpenRLHF()
    trained = 0 if own.lora else parameters
    weights, gradients, adam = 2 * parameters, 2 * trained, 12 * trained
    if own.adam_offload:
        gradients = adam = 0
    shared = [own.zero_stage >= stage for stage in (3, 2, 1)]
    parts = zip((weights, gradients, adam), shared, strict=True)
    return sum(size // world if share else size for size, share in parts)


# -- the other interpreter ---------------------------------------------------------------------


def interpreter(environ: Mapping[str, str] = os.environ) -> tuple[str, dict[str, str]]:
    """(path, package versions) of OpenRLHF's interpreter, which is there and has this version."""
    python = environ.get(INTERPRETER, "")
    if not python:
        raise MergelawError(
            f"{INTERPRETER} is not set; name the Python of the environment with openrlhf "
            f"{VERSION} (envs/openrlhf.yaml)"
        )
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise MergelawError(f"{INTERPRETER}: {python}: no such program; name a Python interpreter")
    python = str(Path(python).absolute())  # not resolved: a virtual environment's is a link
    versions = ask(python, "versions", {}, Path.cwd())
    found = versions.get("openrlhf")
    if found is None:
        raise MergelawError(f"{INTERPRETER}: {python} has no openrlhf; {INSTALL}")
    if found != VERSION:
        raise MergelawError(f"{INTERPRETER}: {python} has openrlhf {found}; {INSTALL}")
    return python, versions


def environment(python: str) -> dict[str, str]:
    """Of the other interpreter: nothing of this one's packages, its own programs first."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "HF_HUB_OFFLINE": "1",  # all that it needs is here
        "HF_DATASETS_CACHE": "datasets",  # in the folder of state
        "PYTHONUNBUFFERED": "1",
    }


def ask(python: str, what: str, question: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An answer of ``openrlhf_inside``, run by the other interpreter in ``folder``."""
    program = Path(__file__).with_name("openrlhf_inside.py").read_text(encoding="utf-8")
    try:
        run = subprocess.run(
            [python, "-c", program, what],
            input=json.dumps(question),  # sampled documents have no room on a command line
            cwd=folder,
            env=environment(python),
            stdout=subprocess.PIPE,
            text=True,
        )
        return json.loads(run.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        raise MergelawError(
            f"{INTERPRETER}: {python} does not answer as a Python interpreter; name another"
        ) from None


def slurm_nodes(environ: Mapping[str, str]) -> tuple[int, str, str]:
    """(nodes, job id, this node) of the SLURM job that this runs in; one node outside of any."""
    job, host = environ.get("SLURM_JOB_ID", ""), os.uname().nodename
    if not job:
        return 1, "0", host
    found = environ.get("SLURM_JOB_NUM_NODES", "1")
    if shutil.which(
        "squeue"
    ):  # in a job step the variable may tell the step's nodes, which are fewer
        words = ["squeue", "--noheader", "--jobs", job, "--format=%D"]
        told = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        found = told if told.isdigit() else found
    return int(found), job, environ.get("SLURMD_NODENAME", host)


def slurm_clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what an outer job step would hand down to srun; the job itself stays."""
    step = ("SLURM_", "SRUN_", "SBATCH_")
    return {k: v for k, v in environ.items() if not k.startswith(step) or k == "SLURM_JOB_ID"}


# -- documents and model as OpenRLHF reads them ------------------------------------------------


@dataclass
class Texts:
    """Training documents as texts, in the folder of state, and what happened to the long ones."""

    rows: list[dict[str, str]]
    plain: bool
    end: str | None  # the special token that ends every response
    ids: list[tuple[list[int], list[int]]]  # (prompt's, response's) of the first SAMPLE rows
    long_documents: int = 0
    dropped_documents: int = 0
    dropped_tokens: int = 0


def texts(
    tokenizer: Any, documents: Sequence[corpus.Document], recipe: Training, where: str
) -> Texts:
    """The documents through the chat template, as training with TRL and evaluation see them.

    A response ends with its end-of-turn token, for OpenRLHF would add one of its own. It replaces
    the last token of what it cuts by that, and leaves out a document whose prompt fills the window.
    """
    if not documents:
        raise MergelawError(f"{where}: there are none; give their domains some")
    kinds = {document.messages is None for document in documents}
    if len(kinds) > 1:
        raise MergelawError(
            f"{where}: some are instructions, some plain text; OpenRLHF trains on one kind at a "
            "time, so give them to experts of their own or use 'trainer: trl'"
        )
    made = Texts([], kinds.pop(), None, [])
    ends, special = set(), set(tokenizer.all_special_ids)
    for document, pair, (prompt, rest, scored) in encoded(tokenizer, documents):
        size = len(prompt) + len(rest)
        if size > recipe.max_tokens:
            made.long_documents += 1
            if recipe.long_documents == "refuse":
                raise tokens.too_long(where, document, size, recipe.max_tokens)
        lost = len(prompt) + scored - recipe.max_tokens
        if made.plain:
            made.rows.append({"text": pair[0] + pair[1]})
        elif len(prompt) >= recipe.max_tokens - 2:
            made.dropped_documents += 1
            made.dropped_tokens += scored
            continue
        else:
            end = tokenizer.convert_ids_to_tokens(rest[scored - 1])
            if rest[scored - 1] not in special or end not in pair[1]:
                raise MergelawError(
                    f"{where}: the chat template ends a response with no special token, and "
                    "OpenRLHF adds one; mend the template or use 'trainer: trl'"
                )
            ends.add(end)
            response = pair[1][: pair[1].rindex(end) + len(end)]
            made.rows.append({"prompt": pair[0], "response": response})
            rest = rest[:scored]
        made.dropped_tokens += max(lost, 0)
        if len(made.ids) < SAMPLE:
            made.ids.append((prompt, rest))
    if not made.rows:
        raise MergelawError(
            f"{where}: no document is left to train on, prompts take all of max_tokens "
            f"{recipe.max_tokens}; raise it"
        )
    if len(ends) > 1:
        raise MergelawError(
            f"{where}: the chat template ends responses with {', '.join(sorted(ends))}; OpenRLHF "
            "knows one end, so mend the template or use 'trainer: trl'"
        )
    made.end = ends.pop() if ends else None
    return made


def encoded(tokenizer: Any, documents: Sequence[corpus.Document]) -> Iterator[Any]:
    """(document, its texts, its ids), some at a time: ids take far more room than text."""
    remaining = iter(documents)
    while some := list(islice(remaining, 1000)):
        pairs = [tokens.texts(tokenizer, document) for document in some]
        yield from zip(some, pairs, tokens.parts(tokenizer, some), strict=True)


def write_data(path: Path, rows: list[dict[str, str]], count: int, seed: int) -> None:
    """``count`` rows: each once, in their order, or as often as it takes, in orders by lot."""
    order, rng = list(range(len(rows))), random.Random(seed)
    if count != len(rows):
        passes = [rng.sample(order, len(order)) for _ in range(ceil(count / len(rows)))]
        order = [place for one in passes for place in one][:count]
    with path.open("w", encoding="utf-8") as file:
        for place in order:
            file.write(json.dumps(rows[place]) + "\n")


def stage_model(base: Path, folder: Path, end: str | None) -> None:
    """The base by links, but without code to run, and with ``end`` as the tokenizer's own end.

    OpenRLHF adds the tokenizer's end to a text that does not have it; bases often name another
    one than their chat template.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for source in base.iterdir():
        if source.name in COMPANIONS or source.suffix == ".safetensors" or source.name == INDEX:
            (folder / source.name).symlink_to(source.resolve())
    changes: dict[str, dict[str, Any]] = {
        "config.json": {},
        "tokenizer_config.json": {"eos_token": end} if end else {},
        "special_tokens_map.json": {"eos_token": end} if end else {},
    }
    for name, change in changes.items():
        path = folder / name
        if path.exists() or name == "tokenizer_config.json":
            held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            held.pop("auto_map", None)
            path.unlink(missing_ok=True)
            path.write_text(json.dumps(held | change, indent=1), encoding="utf-8")


def compare_tokens(made: Texts, theirs: list[list[int]], where: str) -> int:
    """How many of the sampled documents are cut into other tokens where prompt meets response.

    Raises MergelawError where a prompt alone is: the two transformers read the tokenizer apart.
    """
    different = 0
    for place, (prompt, response) in enumerate(made.ids):
        alone, whole = theirs[2 * place : 2 * place + 2]
        if not made.plain and alone != prompt:
            raise MergelawError(
                f"{where}: transformers in OpenRLHF's environment cuts the same text into other "
                "tokens (it reads this tokenizer as another class); save the base's tokenizer with "
                "the class of its model_type, or use 'trainer: trl'"
            )
        different += whole != prompt + response
    if different:
        print(
            f"mergelaw: warning: {different} of {len(made.ids)} documents are cut otherwise where "
            "the response begins; there the loss begins a token early or late",
            file=sys.stderr,
        )
    return different


# -- training ----------------------------------------------------------------------------------


def fine_tune(
    recipe: Training,
    seed: int,
    base: Path,
    corpora: Mapping[str, Path],
    folder: Path,
    state: Path,
    save_every: float,
) -> dict[str, Any]:
    """Fine-tune ``base`` on the corpora's training documents by OpenRLHF; write it to ``folder``.

    ``save_every`` does not count: OpenRLHF saves its state by steps, ten times in a training.
    """
    from transformers import AutoTokenizer

    python, versions = interpreter()
    state = state.absolute()
    tokenizer = AutoTokenizer.from_pretrained(base)
    documents = [d for path in corpora.values() for d in corpus.read(path / "train.parquet")]
    where = f"training documents of {', '.join(corpora)}"
    made = texts(tokenizer, documents, recipe, where)
    stage_model(base, state / MODEL, made.end)

    machine, ids = look(python, recipe, made, state)
    check_memory(recipe, base, machine)
    different = compare_tokens(made, ids, str(base))
    words, count = arguments(recipe, seed, machine.world, len(made.rows), made.plain)
    _, rows, _ = steps(recipe, len(made.rows), machine.world)
    write_data(state / DATA, made.rows, rows, seed)
    resumed = restore(state, words, machine.world)
    launch(python, machine, ["openrlhf.cli.train_sft", *words], state)
    output = state / OUTPUT
    if recipe.openrlhf and recipe.openrlhf.lora:
        output = merge_adapter(python, state)
    collect(base, output, folder)
    losses = ask(python, "losses", {"log": LOG}, state)["losses"]
    return {
        "steps": count,
        "resumed_at_step": resumed,
        "device": machine.device,
        "nodes": machine.nodes,
        "gpus": machine.gpus,
        **trainer.summarise_losses(losses),
        "documents": len(made.rows),
        "long_documents": made.long_documents,
        "dropped_documents": made.dropped_documents,
        "dropped_tokens": made.dropped_tokens,
        "other_tokens": different,
        "command": shlex.join(words),
        "trainer_versions": versions,
    }


def look(
    python: str, recipe: Training, made: Texts, state: Path
) -> tuple[Machine, list[list[int]]]:
    """What the training will run on, and the sample's ids as OpenRLHF's tokenizer makes them."""
    samples = made.rows[: len(made.ids)]
    question = {
        "modules": ["openrlhf.cli.train_sft"],
        "model": MODEL,
        "texts": [
            text
            for row in samples
            for text in (row.get("prompt", ""), row.get("text") or row["prompt"] + row["response"])
        ],
    }
    if recipe.openrlhf and recipe.openrlhf.ring_attn_size > 1:
        question["modules"] = ["ring_flash_attn", *question["modules"]]
    answer = ask(python, "machine", question, state)
    if "broken" in answer:
        raise MergelawError(f"{INTERPRETER}: {python} cannot import {answer['broken']}; {INSTALL}")
    if not answer["gpus"]:
        raise MergelawError(
            "OpenRLHF sees no GPU here; ask for one in the profile, or use 'trainer: trl'"
        )
    nodes, _, _ = slurm_nodes(os.environ)
    return Machine(nodes, answer["gpus"], answer["memory"], answer["device"]), answer["ids"]


def check_memory(recipe: Training, base: Path, machine: Machine) -> None:
    """Raises MergelawError where a model cannot fit, whatever its activations take."""
    with Tensors(base) as stored:
        parameters = sum(
            prod(stored.shape(name)) for name in stored.names() if stored.dtype(name) in FLOATS
        )
    needed = least_memory(recipe, parameters, machine.world)
    if needed > machine.memory:
        raise MergelawError(
            f"{base}: training needs at least {needed / 1e9:.1f} GB on each of {machine.world} "
            f"GPUs, they have {machine.memory / 1e9:.1f}; ask for more GPUs, or raise "
            "openrlhf.zero_stage or set its adam_offload"
        )


def restore(state: Path, words: list[str], world: int) -> int | None:
    """Leave in the folder of state what training can go on from; the step that it goes on at.

    OpenRLHF writes a state's metric.json last: the state before it is whole. A state is of one
    command on one number of GPUs; for another one training begins anew.
    """
    states, mark = state / STATES, state / "run.json"
    run = json.dumps({"command": words, "world": world})
    if mark.exists() and mark.read_text(encoding="utf-8") != run:
        shutil.rmtree(states, ignore_errors=True)
        shutil.rmtree(state / LOG, ignore_errors=True)
    mark.write_text(run, encoding="utf-8")
    for name in (OUTPUT, MERGED):
        shutil.rmtree(state / name, ignore_errors=True)
    whole = []
    for path in states.glob("global_step*"):
        try:
            json.loads((path / "metric.json").read_text(encoding="utf-8"))
            whole.append(int(path.name.removeprefix("global_step")))
        except (OSError, ValueError):
            shutil.rmtree(path)
    (states / "latest").unlink(missing_ok=True)
    if not whole:
        return None
    (states / "latest").write_text(f"global_step{max(whole)}", encoding="utf-8")
    return max(whole)


def launch(python: str, machine: Machine, words: list[str], state: Path) -> None:
    """Run OpenRLHF to its end. It ends with this process, however that ends."""
    _, job, host = slurm_nodes(os.environ)
    command = [*launcher(python, machine, job, host), *words]
    env = environment(python)
    if machine.nodes > 1:
        env = slurm_clean(env)
    print(f"mergelaw: {shlex.join(command)}", file=sys.stderr, flush=True)
    with subprocess.Popen(command, cwd=state, env=env, preexec_fn=ends_with_parent()) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
    if status:
        raise MergelawError(
            f"OpenRLHF ended with status {status}, its own words are above; mend it and run again "
            "(training goes on from its last state)"
        )


def ends_with_parent() -> Callable[[], None]:
    """For a child between fork and exec: Linux ends it with its parent, for the training of a
    killed job must not go on."""
    if sys.platform != "linux":
        return lambda: None
    import ctypes

    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def merge_adapter(python: str, state: Path) -> Path:
    """Full weights of base and adapter, by OpenRLHF's own combiner."""
    words = ["openrlhf.cli.lora_combiner", "--model_path", MODEL, "--lora_path", OUTPUT]
    words += ["--output_path", MERGED, "--ds.param_dtype", "bf16"]
    run = subprocess.run([python, "-m", *words], cwd=state, env=environment(python))
    if run.returncode:
        raise MergelawError(
            f"OpenRLHF's lora_combiner ended with status {run.returncode}, its own words are "
            "above; mend it and run again"
        )
    return state / MERGED


def collect(base: Path, output: Path, folder: Path) -> None:
    """Move the trained weights into ``folder``; all else of the checkpoint is the base's."""
    import torch

    with Tensors(output) as stored:
        kinds = {stored.dtype(name) for name in stored.names()} & FLOATS.keys()
        for name in stored.names():
            if not torch.isfinite(stored[name]).all():
                raise MergelawError(
                    f"training diverged: parameter {name!r} holds NaN or Inf; lower the learning "
                    "rate"
                )
    for path in sorted(output.iterdir()):
        if path.suffix == ".safetensors" or path.name == INDEX:
            path.rename(folder / path.name)
    for name in COMPANIONS:
        if (base / name).exists():
            (folder / name).write_bytes((base / name).read_bytes())
    config = read_config(base)
    config["dtype" if "torch_dtype" not in config else "torch_dtype"] = FLOATS[kinds.pop()]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
