"""OpenRLHF's command line as a function of the recipe, and what is said before it is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import models
from mergelaw import config
from mergelaw.config.partial import override
from mergelaw.data.documents import Document
from mergelaw.errors import MergelawError
from mergelaw.models import openrlhf
from mergelaw.models.recipe import OpenRLHF, Training

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
    words, steps = openrlhf.arguments(
        recipe(
            micro_batch_size=2,
            weight_decay=0.1,
            adam_beta2=0.95,
            warmup=0.03,
            gradient_checkpointing=True,
            openrlhf={"zero_stage": 3, "adam_offload": True},
        ),
        seed=7,
        world=4,
        documents=1000,
        plain=False,
    )
    found = options(words)
    assert steps == 1000 // 4 // 2 * 2 // 2 == 125
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
    words, _ = openrlhf.arguments(
        recipe(
            packing=True,
            openrlhf={
                "ring_attn_size": 4,
                "attn_implementation": "flash_attention_3",
                "lora": {"rank": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
            },
        ),
        seed=0,
        world=8,
        documents=64,
        plain=False,
    )
    found = options(words)
    assert found["--ds.ring_attn_size"] == ["4"] and found["--ds.packing_samples"] == []
    assert found["--train.micro_batch_size"] == ["8"], "two groups of four GPUs share the batch"
    assert found["--ds.attn_implementation"] == ["flash_attention_3"]
    assert found["--ds.lora.rank"] == ["8"] and found["--ds.lora.alpha"] == ["32"]
    assert found["--ds.lora.target_modules"] == ["q_proj", "v_proj"]


def test_plain_text_is_trained_on_as_a_whole():
    found = options(openrlhf.arguments(recipe(), 0, 1, 64, plain=True)[0])
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
    assert openrlhf.steps(recipe(**settings), documents, world=1) == expected


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
        openrlhf.micro_batch(recipe(), 5)
    with pytest.raises(MergelawError, match="16 is no multiple of micro_batch_size 8 x 4 GPUs"):
        openrlhf.micro_batch(recipe(micro_batch_size=8), 4)
    ring = recipe(packing=True, openrlhf={"ring_attn_size": 3})
    with pytest.raises(MergelawError, match="ring_attn_size: 3 does not divide the 4 GPUs"):
        openrlhf.micro_batch(ring, 4)
    with pytest.raises(MergelawError, match="5 documents in 2 passes do not fill one batch of 16"):
        openrlhf.steps(recipe(), 5, 1)


def test_one_node_or_all_of_a_slurm_job():
    one = openrlhf.launcher("/env/bin/python", openrlhf.Machine(1, 4), "77", "node1")
    assert one[:3] == ["/env/bin/python", "-m", "torch.distributed.run"]
    assert (
        "--nproc-per-node=4" in one
        and "--standalone" in one
        and one[-4:-1] == ["--no-python", "/env/bin/python", "-c"]
    )
    many = openrlhf.launcher("/env/bin/python", openrlhf.Machine(3, 8), "40077", "node1")
    srun, torchrun = many[: many.index("/env/bin/python")], many[many.index("/env/bin/python") :]
    assert srun[0] == "srun" and {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1"} <= set(srun)
    assert {"--nnodes=3", "--nproc-per-node=8", "--rdzv-id=40077"} <= set(torchrun)
    assert "--rdzv-endpoint=node1:20077" in torchrun


def test_srun_inherits_the_job_and_nothing_of_the_step():
    outer = {
        "PATH": "/bin",
        "SLURM_JOB_ID": "5",
        "SLURM_NTASKS": "1",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SRUN_CPUS_PER_TASK": "1",
    }
    assert openrlhf.slurm_clean(outer) == {"PATH": "/bin", "SLURM_JOB_ID": "5"}
    assert openrlhf.slurm_nodes({}) == (1, "0", os.uname().nodename)


def test_least_memory_follows_the_zero_stage():
    def bytes_each(stage: int, world: int = 8, **more) -> int:
        own = OpenRLHF(zero_stage=stage, **more)
        return openrlhf.least_memory(recipe(openrlhf=own.model_dump()), 1000, world)

    assert [bytes_each(stage) for stage in (0, 1, 2, 3)] == [16000, 5500, 3750, 2000]
    assert [bytes_each(stage, adam_offload=True) for stage in (2, 3)] == [2000, 250]
    assert [bytes_each(stage, lora={"rank": 8}) for stage in (2, 3)] == [2000, 250]


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
        made = openrlhf.texts(tokenizer, [chat("It is 42.\n")] * 3, recipe(), "here")
    finally:
        tokenizer.chat_template = kept
    assert made.end == end and tokenizer.eos_token == eos
    assert all(row["response"].startswith("It is 42.") for row in made.rows)
    assert all(row["response"].endswith(end) for row in made.rows)
    for row, (prompt, response) in zip(made.rows, made.ids, strict=True):
        assert tokenizer(row["prompt"])["input_ids"] == prompt
        assert tokenizer(row["response"])["input_ids"] == response
    openrlhf.stage_model(base, tmp_path / "staged", made.end)
    from transformers import AutoTokenizer

    staged = AutoTokenizer.from_pretrained(tmp_path / "staged")
    assert staged.eos_token == end
    text = made.rows[0]["prompt"] + made.rows[0]["response"]
    assert staged(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_long_documents():
    tokenizer = models.tokenizer()
    long = [chat("ok"), chat("word " * 200), chat("ok", prompt="word " * 200)]
    with pytest.raises(MergelawError, match=r"^here: document d has \d+ tokens, max_tokens is 64"):
        openrlhf.texts(tokenizer, long, recipe(max_tokens=64), "here")
    cut = recipe(max_tokens=64, long_documents="truncate")
    made = openrlhf.texts(tokenizer, long, cut, "here")
    assert (made.long_documents, made.dropped_documents, len(made.rows)) == (2, 1, 2)
    prompt, response = made.ids[1]
    lost_with_the_prompt = len(tokenizer("ok<|end|>")["input_ids"])
    assert made.dropped_tokens == len(prompt) + len(response) - 64 + lost_with_the_prompt
    with pytest.raises(MergelawError, match="no document is left to train on"):
        openrlhf.texts(tokenizer, long[2:], cut, "here")


def test_plain_text_and_instructions_do_not_mix():
    tokenizer = models.tokenizer()
    plain = Document("d", None, "A plain text.")
    made = openrlhf.texts(tokenizer, [plain], recipe(), "here")
    assert made.rows == [{"text": "A plain text."}] and made.plain and made.end is None
    with pytest.raises(MergelawError, match=r"^here: some are instructions, some plain text"):
        openrlhf.texts(tokenizer, [plain, chat("ok")], recipe(), "here")


def test_a_template_without_an_end_is_refused():
    tokenizer = models.tokenizer()
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        with pytest.raises(MergelawError, match="ends a response with no special token"):
            openrlhf.texts(tokenizer, [chat("ok")], recipe(), "here")
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


def test_other_tokens_are_found(capsys):
    made = openrlhf.Texts([], False, "<|end|>", [([1, 2], [3, 4])])
    assert openrlhf.compare_tokens(made, [[1, 2], [1, 2, 3, 4]], "base") == 0
    assert openrlhf.compare_tokens(made, [[1, 2], [1, 9, 4]], "base") == 1
    assert "1 of 1 documents are cut otherwise" in capsys.readouterr().err
    with pytest.raises(MergelawError, match=r"^base: transformers in OpenRLHF's environment"):
        openrlhf.compare_tokens(made, [[1, 5], [1, 5, 3, 4]], "base")


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
    assert "no such program" in said(str(tmp_path / "nowhere"))
    assert "no such program" in said(str(tmp_path))
    assert "does not answer as a Python interpreter" in said("/bin/true")
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
    expected = r"bases.small.training.openrlhf.zero_stge: unknown key; did you mean 'zero_stage'\?"
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
