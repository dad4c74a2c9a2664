"""A checkpoint that brings code is loaded without it, or refused: nothing of it ever runs."""

import json

import pytest

from mergelaw.errors import MergelawError
from mergelaw.models import causal_lm
from models import write_checkpoint

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Tokenizer
"""


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_checkpoint(tmp_path / "base")
    (folder / "code.py").write_text(CODE)
    return folder


def change(path, **more):
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def nothing_ran(tmp_path) -> bool:
    return not list(tmp_path.rglob("ran"))


MODEL = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize("kind, refused", [("llama", False), ("brought_along", True)])
def test_the_code_of_a_model(checkpoint, tmp_path, kind, refused):
    change(checkpoint / "config.json", auto_map=MODEL, model_type=kind)
    if refused:
        with pytest.raises(MergelawError, match="cannot load this brought_along model"):
            causal_lm.load(checkpoint, "float32")
    else:
        assert type(causal_lm.load(checkpoint, "float32")).__module__.startswith("transformers.")
    assert nothing_ran(tmp_path)


def test_the_code_of_a_tokenizer(checkpoint, tmp_path):
    auto_map = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    change(checkpoint / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    try:
        made = causal_lm.load_tokenizer(checkpoint)
        assert type(made).__module__.startswith("transformers.")
    except MergelawError as error:
        assert "cannot load its tokenizer" in str(error)
    assert nothing_ran(tmp_path)


def test_a_checkpoint_without_a_tokenizer_is_one_line(checkpoint):
    for path in checkpoint.glob("*token*"):
        path.unlink()
    with pytest.raises(MergelawError, match="cannot load its tokenizer") as caught:
        causal_lm.load_tokenizer(checkpoint)
    assert "\n" not in str(caught.value)
