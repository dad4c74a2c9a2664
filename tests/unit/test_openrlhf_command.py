"""OpenRLHF's command line as a function of the recipe, and what is said before it is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from mergelaw import config
from mergelaw.config.partial import override
from mergelaw.data import tokenize
from mergelaw.data.documents import Document
from mergelaw.errors import MergelawError
from mergelaw.models import openrlhf
from mergelaw.models.recipe import Training

BASIC = {
    "trainer": "openrlhf",
    "epochs": 2,
    "batch_size": 16,
    "max_tokens": 16384,
    "learning_rate": 1e-5,
    "dtype": "bfloat16",
}


def recipe(**settings) -> Training:
    data = override(BASIC, settings)
    return Training.model_validate({k: v for k, v in data.items() if v is not None})


def options(words: list[str]) -> dict[str, list[str]]:
    """Values by option."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            assert word not in found, f"{word} is given twice"
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


# The command line


def test_the_recipe_becomes_options():
    settings = recipe(
        micro_batch_size=2,
        weight_decay=0.1,
        adam_beta2=0.95,
        warmup=0.03,
        gradient_checkpointing=True,
        openrlhf={"zero_stage": 3, "adam_offload": True},
    )
    batches = openrlhf.batches(settings, documents=1000, world=4)
    assert batches.steps == 1000 // 4 // 2 * 2 // 2 == 125
    words = openrlhf.arguments(settings, 7, batches, plain=False)
    found = options(words)
    assert found["--train.batch_size"] == ["16"] and found["--train.micro_batch_size"] == ["2"]
    assert found["--train.max_epochs"] == ["2"] and found["--train.seed"] == ["7"]
    assert found["--adam.lr"] == ["1e-05"] and found["--adam.betas"] == ["0.9", "0.95"]
    assert found["--adam.weight_decay"] == ["0.1"] and found["--lr_warmup_ratio"] == ["0.03"]
    assert found["--lr_scheduler"] == ["cosine"] and found["--max_norm"] == ["1.0"]
    assert found["--data.max_len"] == ["16384"] and found["--data.max_samples"] == ["1000"]
    assert found["--ds.zero_stage"] == ["3"] and found["--ckpt.save_steps"] == ["13"]
    assert found["--data.input_key"] == ["prompt"] and found["--data.output_key"] == ["response"]
    assert found["--data.input_template"] == [""]
    for flag in (
        "--ds.adam_offload",
        "--model.gradient_checkpointing_enable",
        "--ckpt.load_enable",
    ):
        assert found[flag] == []
    for flag in ("--ds.packing_samples", "--model.pretrain_mode_enable", "--ds.lora.rank"):
        assert flag not in found
    assert not any("@" in word or "," in word for word in words), "OpenRLHF splits paths there"


def test_ring_attention_packing_and_adapters():
    settings = recipe(
        packing=True,
        openrlhf={
            "ring_attn_size": 4,
            "attn_implementation": "flash_attention_3",
            "lora": {"rank": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        },
    )
    batches = openrlhf.batches(settings, documents=64, world=8)
    found = options(openrlhf.arguments(settings, 0, batches, plain=False))
    assert found["--ds.ring_attn_size"] == ["4"] and found["--ds.packing_samples"] == []
    assert found["--train.micro_batch_size"] == ["8"], "two groups of four GPUs share the batch"
    assert found["--ds.attn_implementation"] == ["flash_attention_3"]
    assert found["--ds.lora.rank"] == ["8"] and found["--ds.lora.alpha"] == ["32"]
    assert found["--ds.lora.target_modules"] == ["q_proj", "v_proj"]
    assert found["--ds.lora.dropout"] == ["0.0"]


def test_plain_text_is_trained_on_as_a_whole():
    batches = openrlhf.batches(recipe(), documents=64, world=1)
    found = options(openrlhf.arguments(recipe(), 0, batches, plain=True))
    assert found["--model.pretrain_mode_enable"] == [] and found["--data.input_key"] == ["text"]
    assert "--data.output_key" not in found


@pytest.mark.parametrize(
    ("settings", "documents", "expected"),
    [
        ({"epochs": 3}, 100, (18, 100, 3)),  # 300 sequences, 18 whole batches
        ({"steps": 5}, 100, (5, 80, 1)),
        ({"steps": 20}, 100, (20, 320, 1)),
        ({"epochs": 0.5}, 100, (3, 50, 1)),
        ({"epochs": 1.5, "micro_batch_size": 8}, 100, (9, 150, 1)),
    ],
)
def test_steps_and_passes(settings, documents, expected):
    assert openrlhf.batches(recipe(**settings), documents, world=1)[:3] == expected


def test_the_rows_of_whole_passes_are_the_documents_in_their_order(tmp_path):
    rows = [{"text": str(i)} for i in range(7)]
    openrlhf.write_data(tmp_path / "data", rows, 7, seed=0)
    assert [json.loads(line) for line in (tmp_path / "data").open()] == rows
    openrlhf.write_data(tmp_path / "data", rows, 17, seed=0)
    made = [json.loads(line)["text"] for line in (tmp_path / "data").open()]
    assert sorted(made[:7]) == sorted(made[7:14]) == [row["text"] for row in rows]
    assert len(set(made[14:])) == 3 and made[:7] != made[7:14]


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(MergelawError, match=r"^training.batch_size: 16 is no multiple of 5 GPUs"):
        openrlhf.batches(recipe(), 100, 5)
    with pytest.raises(MergelawError, match="16 is no multiple of micro_batch_size 8 x 4 GPUs"):
        openrlhf.batches(recipe(micro_batch_size=8), 100, 4)
    ring = recipe(packing=True, openrlhf={"ring_attn_size": 3})
    with pytest.raises(MergelawError, match="ring_attn_size: 3 does not divide the job's 4 GPUs"):
        openrlhf.batches(ring, 100, 4)
    with pytest.raises(MergelawError, match="5 documents in 2 passes do not fill one batch of 16"):
        openrlhf.batches(recipe(), 5, 1)


def test_one_node_or_all_of_a_slurm_job():
    python = "/env/bin/python"
    one = openrlhf.launcher(python, 1, 4, "77", "node1")
    assert one[:4] == [python, "-c", openrlhf.ENDS_WITH_PARENT, "15"]
    assert one[4:7] == [python, "-m", "torch.distributed.run"]
    assert "--nproc-per-node=4" in one and "--standalone" in one
    worker = ["--no-python", python, "-c", openrlhf.ENDS_WITH_PARENT, "9", python, "-m"]
    assert one[-7:] == worker
    many = openrlhf.launcher(python, 3, 8, "40077", "node1")[4:]
    srun, torchrun = many[: many.index(python)], many[many.index(python) :]
    assert srun[0] == "srun" and {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1"} <= set(srun)
    assert {"--nnodes=3", "--nproc-per-node=8", "--rdzv-id=40077"} <= set(torchrun)
    assert "--rdzv-endpoint=node1:20077" in torchrun and torchrun[-7:] == worker


def test_srun_inherits_the_job_and_nothing_of_the_step(monkeypatch):
    outer = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1"}
    for name, value in {**outer, "SRUN_CPUS_PER_TASK": "1", "PYTHONPATH": "/here"}.items():
        monkeypatch.setenv(name, value)
    kept = openrlhf.environment("/env/bin/python")
    assert {name for name in kept if name.startswith(("SLURM", "SRUN"))} == {"SLURM_JOB_ID"}
    assert "PYTHONPATH" not in kept and kept["PATH"].startswith("/env/bin:")
    assert openrlhf.slurm_job({}) == (1, "0", os.uname().nodename)


# Documents


def chat(response: str, prompt: str = "What is it?") -> Document:
    return Document("d", [{"role": "user", "content": prompt}], response)


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [
        (None, "<|end|>", "<|end|>"),
        # As Qwen's bases have it: the turn ends with a token that is not the tokenizer's end.
        (
            "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|system|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "<|end|>",
            "<|system|>",
        ),
    ],
)
def test_a_response_ends_with_its_end_of_turn_token(tmp_path, template, eos, end):
    """What OpenRLHF appends otherwise would be scored here and not in an evaluation."""
    base = models.write_checkpoint(tmp_path / "base")
    tokenizer = models.tokenizer()
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = template or kept
        rows, found, _ = openrlhf.render(tokenizer, [chat("It is 42.\n")] * 3, recipe(), "here")
        (part,), _ = tokenize.parts(tokenizer, [chat("It is 42.\n")])
    finally:
        tokenizer.chat_template = kept
    assert found == end and tokenizer.eos_token == eos
    assert all(row["response"].startswith("It is 42.") for row in rows)
    assert all(row["response"].endswith(end) for row in rows)
    for row in rows:
        assert tokenizer(row["prompt"])["input_ids"] == part.ids[: part.start]
        assert len(tokenizer(row["response"])["input_ids"]) == part.stop - part.start
    openrlhf.stage_model(base, tmp_path / "staged", end)
    from transformers import AutoTokenizer

    staged = AutoTokenizer.from_pretrained(tmp_path / "staged")
    assert staged.eos_token == end
    text = rows[0]["prompt"] + rows[0]["response"]
    assert staged(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_long_documents():
    tokenizer = models.tokenizer()
    long = [chat("ok"), chat("word " * 200), chat("ok", prompt="word " * 200)]
    with pytest.raises(MergelawError, match=r"^here: document d has \d+ tokens, max_tokens is 64"):
        openrlhf.render(tokenizer, long, recipe(max_tokens=64), "here")
    cut = recipe(max_tokens=64, long_documents="truncate")
    rows, _, facts = openrlhf.render(tokenizer, long, cut, "here")
    assert len(rows) == facts["documents"] == 2
    assert (facts["long_documents"], facts["dropped_documents"]) == (2, 1)
    whole = len(tokenizer(rows[1]["prompt"] + rows[1]["response"])["input_ids"])
    lost_with_the_prompt = len(tokenizer("ok<|end|>")["input_ids"])
    assert facts["dropped_tokens"] == whole - 64 + lost_with_the_prompt
    for nothing in (long[2:], []):
        with pytest.raises(MergelawError, match=r"^here: no token to score"):
            openrlhf.render(tokenizer, nothing, cut, "here")


def test_plain_text_and_instructions_do_not_mix():
    tokenizer = models.tokenizer()
    plain = Document("d", None, "A plain text.")
    rows, end, _ = openrlhf.render(tokenizer, [plain], recipe(), "here")
    assert rows == [{"text": "A plain text."}] and end is None
    with pytest.raises(MergelawError, match=r"^here: some are instructions, some plain text"):
        openrlhf.render(tokenizer, [plain, chat("ok")], recipe(), "here")


def test_a_template_without_an_end_is_refused():
    tokenizer = models.tokenizer()
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        with pytest.raises(MergelawError, match=r"^here: the chat template does not end every"):
            openrlhf.render(tokenizer, [chat("ok")], recipe(), "here")
    finally:
        tokenizer.chat_template = kept


def test_no_code_of_a_checkpoint_is_staged(tmp_path):
    base = models.write_checkpoint(tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
    (base / "config.json").write_text(json.dumps(settings))
    (base / "modeling.py").write_text("raise SystemExit")
    openrlhf.stage_model(base, tmp_path / "staged", None)
    assert not (tmp_path / "staged" / "modeling.py").exists()
    assert "auto_map" not in (tmp_path / "staged" / "config.json").read_text()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"broken": "openrlhf: ImportError: no"}, "cannot import openrlhf"),
        ({"gpus": 0, "ids": [[1, 2]]}, "no GPU"),
        ({"gpus": 1, "ids": [[1, 3]]}, "other tokens"),
    ],
)
def test_what_openrlhf_lacks_is_found_before_training(monkeypatch, tmp_path, answer, problem):
    def tokenizer(texts, **_):
        return {"input_ids": [[1, 2] for _ in texts]}

    rows = [{"prompt": "a", "response": "b"}]
    monkeypatch.setattr(openrlhf, "ask", lambda *_: answer)
    with pytest.raises(MergelawError, match=problem):
        openrlhf.examine("python", recipe(), tokenizer, rows, tmp_path)
    monkeypatch.setattr(openrlhf, "ask", lambda *_: {"gpus": 1, "ids": [[1, 2]]})
    assert openrlhf.examine("python", recipe(), tokenizer, rows, tmp_path)["gpus"] == 1


# The checkpoint


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [(("bfloat16", "bfloat16"), "bfloat16"), (("bfloat16", "float32"), "float32")],
)
def test_the_checkpoint_names_the_dtype_of_its_weights(tmp_path, dtypes, expected):
    """Of mixed ones always the same, whatever the order of a set."""
    base, output, folder = (tmp_path / name for name in ("base", "output", "expert"))
    models.write_checkpoint(base)
    output.mkdir()
    (output / "config.json").write_bytes((base / "config.json").read_bytes())
    folder.mkdir()
    weights = {f"{i}": torch.ones(2, dtype=getattr(torch, d)) for i, d in enumerate(dtypes)}
    save_file(weights, output / "model.safetensors")
    openrlhf.collect(base, output, folder)
    settings = json.loads((folder / "config.json").read_text())
    assert settings.get("dtype", settings.get("torch_dtype")) == expected
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    save_file({"w": torch.tensor([1.0, float("nan")])}, output / "model.safetensors")
    with pytest.raises(MergelawError, match=r"^training: .*'w'"):
        openrlhf.collect(base, output, folder)


# State


def saved(states: Path, step: int, whole: bool = True) -> Path:
    folder = states / f"global_step{step}"
    folder.mkdir(parents=True)
    (folder / "metric.json").write_text("{}" if whole else "")
    return folder


def test_only_whole_states_are_gone_on_from(tmp_path):
    states = tmp_path / "states"
    assert openrlhf.restore(tmp_path, ["--a"], 2) is None
    saved(states, 9)
    saved(states, 10)
    torn = saved(states, 11, whole=False)
    (states / "latest").write_text("")  # torn as well
    assert openrlhf.restore(tmp_path, ["--a"], 2) == 10
    assert not torn.exists() and (states / "latest").read_text() == "global_step10"
    assert openrlhf.restore(tmp_path, ["--a"], 4) is None, "states of other GPUs cannot be read"
    assert not states.exists() or not list(states.iterdir())


# The other interpreter


def fake(folder: Path, version: str | None) -> str:
    """An environment whose Python believes that it has this version of openrlhf."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    if version:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / f"openrlhf-{version}.dist-info").mkdir()
        about = f"Metadata-Version: 2.1\nName: openrlhf\nVersion: {version}\n"
        (site / f"openrlhf-{version}.dist-info" / "METADATA").write_text(about)
    return str(python)


def test_the_interpreter_is_checked_before_anything_starts(tmp_path):
    def said(value: str | None) -> str:
        with pytest.raises(MergelawError) as error:
            openrlhf.interpreter({} if value is None else {openrlhf.INTERPRETER: value})
        message = str(error.value)
        assert "\n" not in message and openrlhf.INTERPRETER in message
        return message

    assert "is not set" in said(None) and "is not set" in said("")
    for no_python in (str(tmp_path / "nowhere"), str(tmp_path), "/bin/true"):
        assert f"{no_python} does not answer" in said(no_python)
    assert "has no openrlhf; install openrlhf==0.11.2" in said(fake(tmp_path / "none", None))
    old = fake(tmp_path / "old", "0.9.4")
    assert f"{old} has openrlhf 0.9.4; install openrlhf==0.11.2" in said(old)
    same = fake(tmp_path / "same", openrlhf.VERSION)
    assert openrlhf.interpreter({openrlhf.INTERPRETER: same})[0] == same


# The configuration


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"dtype": "float32"}, "trains in bfloat16"),
        ({"long_documents": "split"}, "cannot split"),
        ({"openrlhf": {"ring_attn_size": 2}}, "needs 'packing: true'"),
        (
            {"packing": True, "openrlhf": {"attn_implementation": "sdpa"}},
            "'packing' needs a flash attention",
        ),
        ({"trainer": "trl", "openrlhf": {}}, "goes with 'trainer: openrlhf' only"),
        ({"openrlhf": {"zero_stage": 4}}, "zero_stage"),
        ({"openrlhf": {"zero_stge": 3}}, "zero_stge"),
    ],
)
def test_options_are_checked_with_the_configuration(settings, problem):
    with pytest.raises(ValueError, match=problem):
        recipe(**settings)


def test_an_unknown_option_is_named_with_the_nearest_one():
    study = {
        "name": "s",
        "corpus": {"train_documents": 9},
        "domains": {"code": {"source": {"synthetic": "code"}}},
        "bases": {"small": {"path": "small", "training": {"openrlhf": {"zero_stge": 3}}}},
        "training": BASIC,
        "methods": {"average": {}},
    }
    expected = "training.openrlhf: unknown key 'zero_stge'; did you mean 'zero_stage'"
    with pytest.raises(MergelawError, match=expected):
        config.parse(study)


def test_options_are_laid_over_one_another():
    study = {"openrlhf": {"zero_stage": 2, "adam_offload": True}, "trainer": "openrlhf"}
    base = {"openrlhf": {"zero_stage": 3}}
    expert = {"openrlhf": {"lora": {"rank": 4}}}
    assert override(study, base, expert)["openrlhf"] == {
        "zero_stage": 3,
        "adam_offload": True,
        "lora": {"rank": 4},
    }
    assert override(study, {"openrlhf": None})["openrlhf"] is None


def test_a_recipe_for_trl_keeps_its_key():
    """What is new for another trainer must not train every expert again."""
    from mergelaw.workflow.study import Study

    study = {
        "name": "s",
        "corpus": {"train_documents": 9},
        "domains": {"code": {"source": {"synthetic": "code"}}},
        "pretraining": {"domains": ["code"], "steps": 1, "learning_rate": 1e-3,
                        "architecture": {"model_type": "llama"}},
        "bases": {"small": {"pretraining": {}}},
        "training": {"steps": 1, "learning_rate": 1e-3},
        "methods": {"average": {}},
    }  # fmt: skip
    (expert,) = Study(config.parse(study)).experts.values()
    assert "openrlhf" not in expert.recipe["training"]
