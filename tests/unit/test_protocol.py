"""The paper's protocol gives what its steps, done plainly with transformers, give."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from mergelaw.data.documents import Document
from mergelaw.data.tokenize import encode
from mergelaw.errors import MergelawError
from mergelaw.evaluation.cross_entropy import batches, nll
from models import documents, load, tokenizer, write_checkpoint

QWEN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spaced() -> list[Document]:
    """Documents with white space to strip, one with a system message of its own."""
    items = [Document(d.document, d.messages, f"  {d.response}\n ") for d in documents(True)]
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": " 1 + 1? "}]
    return [*items, Document("system", turns, "2")]


@pytest.fixture(params=["own template", "Qwen's", "no template", "a tokenizer that adds BOS"])
def ours(request):
    made = copy.deepcopy(tokenizer(bos=request.param != "Qwen's"))
    if request.param == "Qwen's":
        made.chat_template = QWEN
    if request.param == "no template":
        made.chat_template = None
    if request.param == "a tokenizer that adds BOS":
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", made.bos_token_id)]
        )
        assert made("x")["input_ids"][0] == made.bos_token_id
    return made


def llama3(turns, generate: bool, bos: str) -> str:
    """Llama 3's format by hand, as the paper's script gives it to tokenizers without a template."""
    text = bos
    for turn in turns:
        text += f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n"
        if turn["role"] == "system":
            text += "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        text += turn["content"] + "<|eot_id|>"
    return text + ("<|start_header_id|>assistant<|end_header_id|>\n\n" if generate else "")


def plainly(model, ours, items, max_length: int) -> tuple[float, int]:
    """(mean loss per scored token, scored tokens): padded to the maximum, one text at a time."""

    def text(turns, generate):
        if ours.chat_template is None:
            return llama3(turns, generate, ours.bos_token or "")
        return ours.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)

    total, count = 0.0, 0
    for document in items:
        turns = [{**turn, "content": turn["content"].strip()} for turn in document.messages]
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": "You are a helpful assistant."}, *turns]
        answer = {"role": "assistant", "content": document.response.strip()}
        cut = {"truncation": True, "max_length": max_length}
        whole = ours(
            text([*turns, answer], False), return_tensors="pt", padding="max_length", **cut
        )
        prefix = ours(text(turns, True), **cut)["input_ids"]
        labels = whole["input_ids"].clone()
        labels[0, : len(prefix)] = -100
        labels[whole["attention_mask"] == 0] = -100
        scored = int((labels != -100).sum())
        if scored:
            with torch.inference_mode():
                loss = model(
                    input_ids=whole["input_ids"],
                    attention_mask=whole["attention_mask"],
                    labels=labels,
                ).loss
            total, count = total + loss.item() * scored, count + scored
    return total / count, count


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m") / "base"
    return load(write_checkpoint(folder, "qwen2", dtype="float32", bos=True, max_tokens=512))


@pytest.mark.parametrize("cut", [True, False])
def test_it_is_the_loss_that_plain_transformers_gives(model, ours, cut):
    items = spaced()
    whole = encode(ours, items, 512, "refuse", "the set", "merging_eval").windows
    max_tokens = sorted(len(window.ids) for window in whole)[len(items) // 2] if cut else 512
    wanted, count = plainly(model, ours, items, max_tokens)
    found = encode(ours, items, max_tokens, "truncate", "the set", "merging_eval")
    values = nll(model, batches(found.windows, 1024, "cpu"), len(items))
    scored = sum(window.stop - window.start for window in found.windows)
    assert scored == count
    assert values.sum() / scored == pytest.approx(wanted, rel=1e-6)
    assert (found.dropped_tokens > 0) == cut


def test_the_newline_after_the_turn_is_scored_in_the_papers_protocol_only():
    ours = copy.deepcopy(tokenizer())
    ours.chat_template = QWEN
    item = Document("a", [{"role": "user", "content": "1 + 1?"}], "2")
    ends = {}
    for protocol in ("mergelaw", "merging_eval"):
        (window,) = encode(ours, [item], 500, "refuse", "the set", protocol).windows
        ends[protocol] = ours.decode(window.ids[window.start : window.stop])
    assert ends == {"mergelaw": "2<|end|>", "merging_eval": "2<|end|>\n"}


def test_a_template_that_prints_the_day_has_one_day():
    ours = copy.deepcopy(tokenizer())
    day = "{% if date_string is defined %}{{ date_string }}{% else %}{{ strftime_now('%d') }}{% endif %}"
    ours.chat_template = day + ours.chat_template
    item = Document("a", [{"role": "user", "content": "1 + 1?"}], "2")
    for protocol in ("mergelaw", "merging_eval"):
        (window,) = encode(ours, [item], 500, "refuse", "the set", protocol).windows
        assert ours.decode(window.ids).startswith("26 Jul 2024")


def test_plain_text_is_refused():
    with pytest.raises(MergelawError, match="plain text, which protocol merging_eval"):
        encode(tokenizer(), documents(False), 500, "truncate", "the set", "merging_eval")
