"""Chats as transformers tokenises them, for many tokenizers and templates: where answers are cut."""

from functools import cache
from importlib.resources import files

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as cores
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from mergelaw.data.documents import Document
from mergelaw.data.tokenize import encode, parts
from mergelaw.errors import MergelawError
from mergelaw.models import openrlhf
from mergelaw.models.recipe import Training

SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>", "<|close|>", "<|over|>"]
WORDS = [
    "say red green blue",
    "red cat 5, green dog; blue\nbird",
    "user assistant system [INST] <eot> : 5",
]
QUESTION = [{"role": "user", "content": "say red green"}]
ANSWER = "green  red\nblue 5"


def byte_level(trim=False):
    core = Tokenizer(cores.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return core, trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )


def llama_like(prepend):
    core = Tokenizer(cores.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prepend else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return core, trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=list("<|>[]/:eot"),
    )


def metaspace(scheme, unigram=False):
    core = Tokenizer(cores.Unigram() if unigram else cores.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if unigram:
        return core, trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    return core, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)


def word_piece():
    core = Tokenizer(cores.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIAL, show_progress=False
    )


FAMILIES = {
    "byte level": byte_level,
    "byte level, offsets without blanks": lambda: byte_level(trim=True),
    "a mark before every text": lambda: llama_like(prepend=True),
    "marks for blanks alone": lambda: llama_like(prepend=False),
    "metaspace": lambda: metaspace("always"),
    "metaspace of first words": lambda: metaspace("first"),
    "unigram": lambda: metaspace("always", unigram=True),
    "word piece": word_piece,
}


def turns(user, answer, system="", generate=""):
    """A template of these texts around the contents `c` of turns."""
    return (
        "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
        f"{answer}{{% elif m['role'] == 'system' %}}{system}{{% else %}}{user}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{generate}{{% endif %}}"
    )


def headed(header, end):
    return turns(
        *(
            f"{header.replace('ROLE', role)}{{{{ c }}}}{end}"
            for role in ("user", "assistant", "system")
        )
    )


# name: (template, end of turn that is scored with the answer)
TEMPLATES = {
    "llama 2": (
        turns("<s>[INST] {{ c }} [/INST]", " {{ c }} </s>", "<s>[INST] {{ c }} [/INST]"),
        "</s>",
    ),
    "mistral": ("<s>" + turns("[INST] {{ c }}[/INST]", " {{ c }}</s>"), "</s>"),
    "zephyr": (headed("<|ROLE|>\n", "</s>\n"), "</s>"),
    "chatml": (headed("<|turn|>ROLE\n", "<|close|>\n"), "<|close|>"),
    "vicuna": (turns("user: {{ c }} ", "assistant: {{ c }}</s>"), "</s>"),
    "gemma": (headed("<s><|turn|>ROLE\n", "<|close|>\n"), "<|close|>"),
    "llama 3": (headed("<|turn|>ROLE<|over|>\n\n", "<|close|>"), "<|close|>"),
    "phi": (headed("<|turn|>", "<|close|>\n") + "</s>", "<|close|>"),
    "no space": (headed("<|turn|>", "<|close|>"), "<|close|>"),
    "the next turn opened": (headed("<|turn|>ROLE ", "<|close|>") + "<|turn|>", "<|close|>"),
    "no end": (headed("ROLE: ", "\n"), ""),
    "an end of characters": (headed("ROLE: ", "<eot>\n"), ""),
}


@cache
def tokenizer(family):
    core, trainer = FAMILIES[family]()
    core.train_from_iterator(WORDS * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )


def of(template, family="byte level"):
    ours = tokenizer(family)
    ours.chat_template = template
    return ours


def chat(answer=ANSWER, messages=None):
    return Document("0" * 16, messages or QUESTION, answer)


def whole(document):
    return [*document.messages, {"role": "assistant", "content": document.response}]


def scored(ours, document, **settings):
    (window,) = encode(ours, [document], 10_000, "refuse", "the set", **settings).windows
    return ours.decode(window.ids[window.start : window.stop])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_and_the_answer_is_scored_to_its_end(family, name):
    template, end = TEMPLATES[name]
    ours, document = of(template, family), chat()
    text = ours.apply_chat_template(whole(document), tokenize=False)
    encoded = ours.apply_chat_template(whole(document))
    (part,), changes = parts(ours, [document])
    assert part.ids == encoded["input_ids"]
    begin = text.rindex(ANSWER)
    assert part.start == encoded.char_to_token(begin)
    last = encoded.char_to_token(begin + len(ANSWER) - 1)
    inside, behind = part.ids[part.start : last + 1], part.ids[last + 1 : part.stop]
    assert not {*inside} & {*ours.all_special_ids}
    assert ours.decode(behind).strip() == end
    assert len(behind) <= 2 and ("writes no end" in str(changes)) == (not end)
    assert (part.prompt, part.answer) == (text[:begin], ANSWER)
    # Several turns before the answer are context.
    more = [*QUESTION, {"role": "assistant", "content": "red"}, *QUESTION]
    (part,), _ = parts(ours, [chat("blue", more)])
    assert part.ids == ours.apply_chat_template(whole(chat("blue", more)))["input_ids"]
    assert part.prompt.count("say red green") == 2 and part.answer == "blue"


SHIPPED = sorted(
    path.name for path in (files("trl") / "chat_templates").iterdir() if path.name.endswith("jinja")
)
# They write parts of contents alone, as images need them.
OF_PARTS = ("idefics3", "llava_next", "smolvlm")


def as_parts(turns):
    return [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]


@pytest.mark.parametrize("name", SHIPPED)
def test_templates_that_trl_ships(name):
    ours = of((files("trl") / "chat_templates" / name).read_text(encoding="utf-8"))
    for answer in (ANSWER, f"<think>\nred\n</think>\n\n{ANSWER}", f" {ANSWER}\n"):
        document = chat(answer)
        try:
            (part,), changes = parts(ours, [document])
        except MergelawError as error:
            assert "the chat template writes its answer differently" in str(error)
            assert "</think>" in answer
            continue
        settings = {"tokenize": True, "date_string": "26 Jul 2024"}
        turns = as_parts(whole(document)) if name.startswith(OF_PARTS) else whole(document)
        theirs = ours.apply_chat_template(turns, **settings)["input_ids"]
        assert part.ids == theirs or "strftime_now" in ours.chat_template
        assert part.answer == answer or ("changes white space" in changes)
        assert "".join(part.answer.split()) == "".join(answer.split())
        scored = ours.decode(part.ids[part.start : part.stop])  # its first token may hold a blank
        assert scored.removeprefix(" ").startswith(part.answer.removeprefix(" "))


PLAIN = headed("<|turn|>ROLE\n", "<|close|>")


@pytest.mark.parametrize(
    ("template", "document", "words"),
    [
        # system turns
        (turns("{{ c }} ", "{{ c }}</s>"), [{"role": "system", "content": "red"}], "system turn"),
        (
            turns("{{ c }} ", "{{ c }}</s>", "{{ raise_exception('no system here') }}"),
            [{"role": "system", "content": "red"}],
            "refuses it .no system here.",
        ),
        # answers
        (
            turns("{{ c }} ", "{{ c.split('</think>')[-1] }}</s>"),
            "<think>a</think>b",
            "differently",
        ),
        (turns("{{ c }} ", "{{ c.split('.')[0] }}</s>"), "One. Two.", "differently or not at all"),
        (turns("{{ c }} ", "{{ c | replace('red', 'blue') }}</s>"), "a red cat", "differently"),
        (turns("{{ c }} ", "{{ c | upper }}</s>"), "a red cat", "differently"),
        (turns("{{ c }} ", "</s>"), "a red cat", "not at all"),
    ],
)
def test_what_a_template_leaves_out_is_refused(template, document, words):
    document = chat(document) if isinstance(document, str) else chat(ANSWER, document + QUESTION)
    with pytest.raises(MergelawError, match=words):
        parts(of(template), [document])


TRIM = PLAIN.replace("{{ c }}", "{{ c | trim }}")
ASKS = "{% if not messages[0].ticket %}{{ raise_exception('no ticket') }}{% endif %}" + PLAIN
REASONS = turns("{{ m['reasoning'] }}{{ c }}", "{{ m['reasoning'] }}{{ c.split('!')[-1] }}</s>")


@pytest.mark.parametrize(
    ("template", "messages", "answer", "changes"),
    [
        (PLAIN, QUESTION, " red \n", []),
        (TRIM, QUESTION, "red", []),
        (TRIM, QUESTION, " red \n", ["changes white space"]),
        (TRIM, [{"role": "user", "content": "say \n"}], "red", ["changes white space"]),
        (REASONS, [{**QUESTION[0], "reasoning": "hm"}], "red", []),
        (ASKS, [{**QUESTION[0], "ticket": 7}], "red", []),
        (PLAIN, [{**QUESTION[0], "reasoning": "hm"}], "red", ["ignores 'reasoning' of turns"]),
        (
            REASONS,
            [*QUESTION, {"role": "assistant", "content": "hm!red"}, *QUESTION],
            "blue",
            ["rewrites turns before the answer, or leaves out parts of them"],
        ),
    ],
)
def test_what_a_template_changes_is_counted_and_named(template, messages, answer, changes, capsys):
    ours, document = of(template), chat(answer, messages)
    other = chat(messages=[{**QUESTION[0], "ticket": 7}] if template == ASKS else None)
    found = encode(ours, [document, other], 1000, "refuse", "the set")
    assert found.changes == dict.fromkeys(changes, 1)
    for change in changes:
        text = f"mergelaw: the set: the chat template {change} in 1 of 2 documents\n"
        assert text in capsys.readouterr().err
    trimmed = answer.strip() if template == TRIM else answer
    assert found.scored_bytes == len(trimmed) + len(ANSWER)
    (window, _) = found.windows
    text = ours.decode(window.ids[window.start : window.stop])
    assert text.startswith(trimmed) and text.count("<|close|>") + text.count("</s>") == 1


def test_special_tokens_in_an_answer_are_scored_and_end_nothing():
    answer = "red </s> blue <|close|> green"
    for name in ("chatml", "no end"):
        template, end = TEMPLATES[name]
        assert scored(of(template), chat(answer)).lstrip() == answer + end


def test_an_end_of_turn_need_not_be_among_the_special_tokens():
    ours = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("byte level").backend_tokenizer, eos_token="</s>"
    )
    ours.chat_template = TEMPLATES["chatml"][0]
    assert "<|close|>" not in ours.all_special_tokens
    assert scored(ours, chat()) == ANSWER + "<|close|>"


def test_tokens_that_swallow_white_space_belong_to_the_template():
    from tokenizers import AddedToken

    core, trainer = byte_level()
    core.train_from_iterator(WORDS, trainer)
    core.add_special_tokens(
        [AddedToken("<|go|>", rstrip=True), AddedToken("<|halt|>", lstrip=True)]
    )
    ours = PreTrainedTokenizerFast(tokenizer_object=core)
    ours.chat_template = headed("ROLE<|go|>", "<|halt|>")
    assert scored(ours, chat("  red ")) == "red<|halt|>"


def test_an_answer_without_a_token_is_counted():
    ours = of(TEMPLATES["chatml"][0], "word piece")
    found = encode(ours, [chat("\u200b"), chat()], 1000, "refuse", "the set")
    assert [window.document for window in found.windows] == [1]
    assert found.changes == {"gives answers without a token": 1}


def test_openrlhf_refuses_a_tokenizer_that_joins_prompt_and_answer():
    recipe = Training(
        trainer="openrlhf",
        steps=1,
        batch_size=1,
        max_tokens=512,
        learning_rate=1e-5,
        dtype="bfloat16",
    )
    template, end = TEMPLATES["mistral"]
    with pytest.raises(MergelawError, match="here: OpenRLHF tokenises prompts apart, which gives"):
        openrlhf.render(of(template), [chat()], recipe, "here")
    template, end = TEMPLATES["chatml"]
    (row,), found, _ = openrlhf.render(of(template), [chat()], recipe, "here")
    assert (row["response"], found) == (ANSWER + end, end)
    with pytest.raises(MergelawError, match=r"here: .* the base's embedding has 4 rows"):
        openrlhf.render(of(template), [chat()], recipe, "here", embedding_rows=4)


def test_every_clock_of_a_template_stands_still(monkeypatch):
    from datetime import datetime

    day = "{{ strftime_now('%H:%M:%S %d %B %Y') }}{{ strftime_now('%d') }} {{ date_string }}"
    ours, seen = of(day + PLAIN), set()
    for number in (1, 2):

        class Day(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 12, number)  # noqa: B023, used in this pass alone

        monkeypatch.setattr(chat_template_utils, "datetime", Day)
        for protocol in ("mergelaw", "merging_eval"):
            (window,) = encode(ours, [chat()], 1000, "refuse", "", protocol).windows
            seen.add(ours.decode(window.ids)[:32])
        assert ours.apply_chat_template(QUESTION, tokenize=False).startswith("00:00:00 0")
    assert seen == {"00:00:00 26 July 202426 26 Jul 2024"[:32]}


def test_a_tokenizer_without_offsets_or_without_words_is_refused():
    from transformers import GemmaTokenizer, PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        vocab_size = 128

        def get_vocab(self):
            return {chr(n): n for n in range(128)}

        def _tokenize(self, text, **settings):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token) % 128

        def _convert_id_to_token(self, number):
            return chr(number)

    slow = Slow(chat_template=headed("ROLE: ", "\n"))
    with pytest.raises(MergelawError, match="a Slow, does not tell which characters"):
        parts(slow, [chat()])
    assert len(parts(slow, [Document("0" * 16, None, "plain text")])[0][0].ids) == 10
    with pytest.raises(MergelawError, match="the set: the base's tokenizer has no vocabulary"):
        encode(GemmaTokenizer(), [chat()], 1000, "refuse", "the set")
