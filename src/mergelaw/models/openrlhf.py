"""Fine-tune an expert on several GPUs with OpenRLHF's command line.

OpenRLHF pins other versions, so it has its own environment. This process writes the training
documents as text, starts OpenRLHF in that environment by torchrun, and collects the weights.
"""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from mergelaw.data import tokenize
from mergelaw.data.documents import Document
from mergelaw.errors import MergelawError
from mergelaw.models import causal_lm, trainer
from mergelaw.models.checkpoint import COMPANIONS, INDEX, Tensors, read_config, vocabulary_size
from mergelaw.models.parameters import build
from mergelaw.models.recipe import OpenRLHF, Training

VERSION = "0.11.2"
INTERPRETER = "MERGELAW_OPENRLHF_PYTHON"
INSTALL = f"install openrlhf=={VERSION} there, as envs/openrlhf.yaml does"
TRL = "use 'trainer: trl'"

# Files of a run, relative to its folder of state, where OpenRLHF runs: it splits the path of a
# dataset at "," and "@", which paths of artifacts contain.
MODEL, DATA, STATES = "model", "data.jsonl", "states"
OUTPUT, MERGED, LOG = "output", "merged", "log"
SAMPLE = 64  # documents on which both environments' tokenizers are compared
STATES_SAVED = 10  # per training; OpenRLHF saves by steps, not by seconds

# Linux (prctl's PR_SET_PDEATHSIG, 1) sends the signal argv[1] when the parent ends. A killed job
# must also end its training, and torchrun's workers have their own sessions.
ENDS_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]))
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Batches(NamedTuple):
    """Batches of a training with OpenRLHF, and its data file."""

    steps: int  # of the optimiser
    rows: int  # of the data file
    passes: int  # over the data file
    micro_batch: int  # sequences per forward pass and GPU


def batches(recipe: Training, documents: int, world: int) -> Batches:
    """The batches of ``documents`` documents on ``world`` GPUs.

    OpenRLHF only makes whole passes. A number of steps, or a fraction of a pass, becomes one pass
    over a file with that many rows, in which documents repeat. Raises MergelawError if the GPUs
    cannot share a batch, or if the rows do not fill one.
    """
    ring = (recipe.openrlhf or OpenRLHF()).ring_attn_size
    readers, left = divmod(world, ring)  # groups of GPUs that read different documents
    if left:
        raise MergelawError(
            f"training.openrlhf.ring_attn_size: {ring} does not divide the job's {world} GPUs; "
            "change one"
        )
    size, micro = recipe.batch_size, recipe.micro_batch_size or recipe.batch_size // readers
    if not micro or size % (micro * readers):
        shown = f"micro_batch_size {micro} x " if recipe.micro_batch_size else ""
        raise MergelawError(
            f"training.batch_size: {size} is no multiple of {shown}{readers} GPUs that read "
            "different documents; change one"
        )
    epochs = recipe.epochs
    if epochs is None:
        rows, passes = (recipe.steps or 0) * size, 1
    elif epochs == int(epochs):
        rows, passes = documents, int(epochs)
    else:
        rows, passes = int(documents * epochs), 1
    steps = rows // readers // micro * passes // (size // (micro * readers))
    if not steps:
        raise MergelawError(
            f"training: {rows} documents in {passes} passes do not fill one batch of {size}; "
            "lower batch_size or train longer"
        )
    return Batches(steps, rows, passes, micro)


def arguments(recipe: Training, seed: int, batches: Batches, plain: bool) -> list[str]:
    """Options of ``openrlhf.cli.train_sft``; ``plain`` trains on plain text, all of it."""
    options = (recipe.openrlhf or OpenRLHF()).model_dump()
    lora = options.pop("lora") or {}
    values: dict[str, Any] = {
        "model.model_name_or_path": MODEL,
        "model.pretrain_mode_enable": plain,
        "model.gradient_checkpointing_enable": recipe.gradient_checkpointing,
        "data.dataset": DATA,
        "data.max_samples": batches.rows,
        "data.max_len": recipe.max_tokens,
        "data.input_template": "",  # the texts are in the chat format already
        "data.input_key": "text" if plain else "prompt",
        "data.output_key": None if plain else "response",
        "train.batch_size": recipe.batch_size,
        "train.micro_batch_size": batches.micro_batch,
        "train.max_epochs": batches.passes,
        "train.seed": seed,
        "train.full_determinism_enable": True,
        "adam.lr": recipe.learning_rate,
        "adam.betas": [recipe.adam_beta1, recipe.adam_beta2],
        "adam.weight_decay": recipe.weight_decay,
        "lr_scheduler": recipe.schedule,
        "lr_warmup_ratio": recipe.warmup,
        "max_norm": recipe.max_grad_norm,
        "ds.param_dtype": "bf16",
        "ds.packing_samples": recipe.packing,
        **{f"ds.{name}": value for name, value in options.items()},
        **{f"ds.lora.{name}": value for name, value in lora.items()},
        "ckpt.output_dir": OUTPUT,
        "ckpt.path": STATES,
        "ckpt.save_steps": ceil(batches.steps / STATES_SAVED),
        "ckpt.max_num": 2,  # the last one is whole while the next is written
        "ckpt.load_enable": True,
        "logger.tensorboard_dir": LOG,
        "logger.wandb.run_name": "expert",
    }
    words = []
    for name, value in values.items():
        if value is not None and value is not False:
            listed = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, listed)]
    return words


def launcher(python: str, nodes: int, gpus: int, job: str, host: str) -> list[str]:
    """Torchrun with ``gpus`` workers on this node or, by srun, on each node of the SLURM job.

    Append a module and its arguments. Workers of several nodes connect to node ``host``.
    """
    torchrun = [python, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}"]
    worker = ["--no-python", python, "-c", ENDS_WITH_PARENT, "9", python, "-m"]
    guard = [python, "-c", ENDS_WITH_PARENT, "15"]
    if nodes == 1:
        return [*guard, *torchrun, "--standalone", *worker]
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap"]
    srun += ["--cpu-bind=none", "--kill-on-bad-exit=1"]
    meet = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-id={job}"]
    meet += [f"--rdzv-endpoint={host}:{20000 + int(job) % 20000}"]
    return [*guard, *srun, *torchrun, *meet, *worker]


def slurm_job(environ: Mapping[str, str] = os.environ) -> tuple[int, str, str]:
    """(nodes, job id, this node) of the surrounding SLURM job; one node without SLURM."""
    job, host = environ.get("SLURM_JOB_ID", ""), os.uname().nodename
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1") if job else "1"
    if job and shutil.which("squeue"):  # within a job step, the variable may count the step's nodes
        words = ["squeue", "--noheader", "--jobs", job, "--format=%D"]
        answer = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        nodes = answer if answer.isdigit() else nodes
    return int(nodes), job or "0", environ.get("SLURMD_NODENAME", host)


def interpreter(environ: Mapping[str, str] = os.environ) -> tuple[str, dict[str, str]]:
    """OpenRLHF's Python and its package versions. Raises MergelawError if its version differs."""
    if not environ.get(INTERPRETER):
        raise MergelawError(
            f"{INTERPRETER} is not set; name the Python of the environment with openrlhf "
            f"{VERSION} (envs/openrlhf.yaml)"
        )
    python = str(Path(environ[INTERPRETER]).absolute())  # not resolved: a venv's Python is a link
    versions = ask(python, "versions", {}, Path.cwd())
    if versions.get("openrlhf") != VERSION:
        installed = f"openrlhf {versions['openrlhf']}" if "openrlhf" in versions else "no openrlhf"
        raise MergelawError(f"{INTERPRETER}: {python} has {installed}; {INSTALL}")
    return python, versions


def environment(python: str) -> dict[str, str]:
    """Environment variables for ``python``, without our packages or an outer SLURM step's."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "SLURM_", "SRUN_", "SBATCH_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_JOB_ID" or not name.startswith(dropped)
    }
    return kept | {
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": "datasets",  # in the folder of state
        "PYTHONUNBUFFERED": "1",
    }


def ask(python: str, question: str, data: Any, folder: Path) -> Any:
    """The answer of ``openrlhf_inside.py``, run by ``python`` in ``folder``."""
    program = Path(__file__).with_name("openrlhf_inside.py").read_text(encoding="utf-8")
    try:
        process = subprocess.run(
            [python, "-c", program, question],
            input=json.dumps(data).encode(),
            cwd=folder,
            env=environment(python),
            stdout=subprocess.PIPE,
        )
        return json.loads(process.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError):
        raise MergelawError(
            f"{INTERPRETER}: {python} does not answer, its messages are above; name the Python of "
            f"another environment, or {INSTALL}"
        ) from None


def run(words: list[str], python: str, state: Path) -> None:
    """Run a command of OpenRLHF in the folder of state. Raises MergelawError if it fails."""
    print(f"mergelaw: {shlex.join(words)}", file=sys.stderr, flush=True)
    status = subprocess.run(words, cwd=state, env=environment(python)).returncode
    if status:
        raise MergelawError(
            f"OpenRLHF: ended with status {status}, its messages are above; fix the cause and "
            "rerun (training resumes from its last state)"
        )


def render(
    tokenizer: Any,
    documents: Sequence[Document],
    recipe: Training,
    where: str,
    embedding_rows: int | None = None,
) -> tuple[list[dict[str, str]], str | None, dict[str, int]]:
    """Rows of OpenRLHF's data file, the token that ends every response, and facts for lineage.

    Chats are rendered up to their end-of-turn token; plain text has none. OpenRLHF drops a document
    whose prompt fills the window, so this function drops and counts it. Raises MergelawError for
    documents that OpenRLHF would tokenise or score otherwise than evaluation does.
    """
    settings = recipe.max_tokens, recipe.long_documents
    encoded = tokenize.encode(tokenizer, documents, *settings, where, rows=embedding_rows)
    plain = documents[0].messages is None
    if any((document.messages is None) != plain for document in documents):
        raise MergelawError(
            f"{where}: some are instructions, some plain text, OpenRLHF trains on one kind at a "
            f"time; give them to different experts or {TRL}"
        )
    windows = [w for w in encoded.windows if plain or w.start < recipe.max_tokens - 2]
    parts, _ = tokenize.parts(tokenizer, [documents[window.document] for window in windows])
    end = None if plain else end_of_turn(tokenizer, parts, where)
    begin = tokenizer.bos_token or ""
    rows = [
        {"text": begin + part.answer}
        if end is None
        else {"prompt": part.prompt, "response": part.answer + part.end}
        for part in parts
    ]
    facts = {
        "documents": len(rows),
        "long_documents": encoded.long_documents,
        "dropped_documents": len(documents) - len(rows),
        "dropped_tokens": encoded.dropped_tokens,
    }
    return rows, end, facts


def end_of_turn(tokenizer: Any, parts: Sequence[tokenize.Parts], where: str) -> str:
    """The special token that ends every response of these chats.

    Raises MergelawError if they have none, or if OpenRLHF, which tokenises prompts apart, would
    score other tokens.
    """
    ends = {part.ids[part.stop - 1] for part in parts if part.end}
    if len(ends) != 1 or not all(part.end for part in parts):
        raise MergelawError(
            f"{where}: the chat template does not end every response with the same special token, "
            f"as OpenRLHF needs it; change the template or {TRL}"
        )
    prompts = [part.prompt for part in parts]
    apart = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    if any(len(ids) != part.start for ids, part in zip(apart, parts, strict=True)):
        raise MergelawError(
            f"{where}: OpenRLHF tokenises prompts apart, which gives other tokens with this"
            f" tokenizer and template; {TRL}"
        )
    end: str = tokenizer.convert_ids_to_tokens(ends.pop())
    return end


def write_data(path: Path, rows: list[dict[str, str]], count: int, seed: int) -> None:
    """Write ``count`` rows: each once, in order, or repeatedly, each time in a random order."""
    if count != len(rows):
        rng = random.Random(seed)
        passes = (rng.sample(rows, len(rows)) for _ in range(ceil(count / len(rows))))
        rows = list(chain.from_iterable(passes))[:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def stage_model(base: Path, folder: Path, end: str | None) -> None:
    """Link the base into ``folder`` without code, with ``end`` as the tokenizer's end token.

    Many bases have another end token than their chat template, and OpenRLHF would append it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for source in base.iterdir():
        if source.name in COMPANIONS or source.suffix == ".safetensors" or source.name == INDEX:
            (folder / source.name).symlink_to(source.resolve())
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.exists() or name == "tokenizer_config.json":
            settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            settings.pop("auto_map", None)
            if end and name != "config.json":
                settings["eos_token"] = end
            path.unlink(missing_ok=True)
            path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def fine_tune(
    recipe: Training,
    seed: int,
    base: Path,
    corpora: Mapping[str, Path],
    folder: Path,
    state: Path,
    save_every: float,
) -> dict[str, Any]:
    """Fine-tune ``base`` on the corpora; write the expert into ``folder``. Returns lineage facts.

    ``save_every`` has no effect: OpenRLHF saves its state :data:`STATES_SAVED` times.
    """
    python, versions = interpreter()
    state = state.absolute()
    where = f"training documents of {', '.join(corpora)}"
    trainer.check_base(base)
    if recipe.packing:
        causal_lm.check_packing(build(base), base)
    tokenizer = causal_lm.load_tokenizer(base)
    documents = trainer.training_documents(corpora)
    size = vocabulary_size(read_config(base))
    rows, end, facts = render(tokenizer, documents, recipe, where, size)
    stage_model(base, state / MODEL, end)
    machine = examine(python, recipe, tokenizer, rows, state)
    nodes, job, host = slurm_job()
    world = nodes * machine["gpus"]
    plan = batches(recipe, len(rows), world)
    words = arguments(recipe, seed, plan, plain=end is None)
    write_data(state / DATA, rows, plan.rows, seed)
    resumed = restore(state, words, world)
    torchrun = launcher(python, nodes, machine["gpus"], job, host)
    run([*torchrun, "openrlhf.cli.train_sft", *words], python, state)
    output = OUTPUT
    if recipe.openrlhf and recipe.openrlhf.lora:
        combine = f"-m openrlhf.cli.lora_combiner --model_path {MODEL} --lora_path {OUTPUT}"
        combine += f" --output_path {MERGED} --ds.param_dtype bf16"
        run([python, *combine.split()], python, state)
        output = MERGED
    collect(base, state / output, folder)
    return {
        "steps": plan.steps,
        "resumed_at_step": resumed,
        "device": machine["device"],
        "nodes": nodes,
        "gpus": machine["gpus"],
        **trainer.summarise_losses(ask(python, "losses", LOG, state)),
        **facts,
        "command": shlex.join(words),
        "trainer_versions": versions,
    }


def examine(
    python: str, recipe: Training, tokenizer: Any, rows: list[dict[str, str]], state: Path
) -> dict[str, Any]:
    """The GPUs that OpenRLHF sees. Raises MergelawError if it cannot run or reads other ids."""
    modules = ["openrlhf.cli.train_sft"]
    if recipe.openrlhf and recipe.openrlhf.ring_attn_size > 1:
        modules.insert(0, "ring_flash_attn")
    texts = ["".join(row.values()) for row in rows[:SAMPLE]]
    question = {"modules": modules, "model": MODEL, "texts": texts}
    machine: dict[str, Any] = ask(python, "machine", question, state)
    if "broken" in machine:
        raise MergelawError(f"{INTERPRETER}: {python} cannot import {machine['broken']}; {INSTALL}")
    if not machine["gpus"]:
        raise MergelawError(f"OpenRLHF: sees no GPU; ask for one in the profile, or {TRL}")
    if machine["ids"] != tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        raise MergelawError(
            "OpenRLHF: transformers in its environment gives other tokens, as it reads the base's "
            f"tokenizer as another class; save it with its model_type's class or {TRL}"
        )
    return machine


def restore(state: Path, words: list[str], world: int) -> int | None:
    """Delete states that the training cannot resume from. Returns the step to resume at, or None.

    A state belongs to one command and number of GPUs. OpenRLHF writes its metric.json last.
    """
    states, mark = state / STATES, state / "run.json"
    command = json.dumps({"command": words, "world": world})
    if mark.exists() and mark.read_text(encoding="utf-8") != command:
        shutil.rmtree(states, ignore_errors=True)
        shutil.rmtree(state / LOG, ignore_errors=True)
    mark.write_text(command, encoding="utf-8")
    for name in (OUTPUT, MERGED):
        shutil.rmtree(state / name, ignore_errors=True)
    steps = []
    for path in states.glob("global_step*"):
        try:
            json.loads((path / "metric.json").read_text(encoding="utf-8"))
            steps.append(int(path.name.removeprefix("global_step")))
        except (OSError, ValueError):
            shutil.rmtree(path)
    (states / "latest").unlink(missing_ok=True)
    if not steps:
        return None
    (states / "latest").write_text(f"global_step{max(steps)}", encoding="utf-8")
    return max(steps)


def collect(base: Path, output: Path, folder: Path) -> None:
    """Move the trained weights into ``folder``; copy the other checkpoint files from the base."""
    with Tensors(output) as stored:
        dtype = stored.float_dtype()
        trainer.check_finite((name, stored[name]) for name in stored.names())
    for path in sorted(output.iterdir()):
        if path.suffix == ".safetensors" or path.name == INDEX:
            path.rename(folder / path.name)
    config = read_config(base)
    config["dtype" if "torch_dtype" not in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    causal_lm.copy_companions(base, folder)
