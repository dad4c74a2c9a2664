"""Documents as windows of tokens: what is scored, and what happens to long ones."""

import copy
from contextlib import contextmanager

import pytest

from mergelaw.data.documents import Document
from mergelaw.data.tokenize import encode, parts
from mergelaw.errors import MergelawError
from models import documents, tokenizer

CHAT = Document("chat", [{"role": "user", "content": "What is 2 + 3?"}], "It is 5.")
PLAIN = Document("plain", None, "Zinc (Zn) melts at 419 degrees.")


def text(ids, ours=None) -> str:
    return (ours or tokenizer()).decode(ids, skip_special_tokens=False)


def scored(window) -> tuple[int, ...]:
    return window.ids[window.start : window.stop]


@contextmanager
def template(text: str | None):
    """The tokenizer with another chat template, for a while."""
    ours = tokenizer()
    usual = ours.chat_template
    try:
        ours.chat_template = text
        yield
    finally:
        ours.chat_template = usual


def encoded(items, max_tokens=10_000, long_documents="refuse", ours=None):
    return encode(ours or tokenizer(), items, max_tokens, long_documents, "the set")


# What is scored


def test_of_a_chat_the_response_and_its_end_are_scored():
    (window,) = encoded([CHAT]).windows
    assert text(window.ids) == "<|user|>What is 2 + 3?<|assistant|>It is 5.<|end|>"
    assert text(scored(window)) == "It is 5.<|end|>"


def test_every_turn_before_the_last_answer_is_only_read():
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2?"},
    ]
    (window,) = encoded([Document("turns", turns, "4")]).windows
    assert text(scored(window)) == "4<|end|>"
    assert "2<|end|>" in text(window.ids[: window.start])


def test_what_a_template_writes_behind_the_end_is_not_scored():
    usual = tokenizer().chat_template
    with template(usual.replace("{{ eos_token }}", "{{ eos_token + '\n' }}")):
        (window,) = encoded([CHAT]).windows
    assert text(window.ids).endswith("<|end|>\n")
    assert text(scored(window)) == "It is 5.<|end|>"


def test_plain_text_without_a_first_token_scores_all_but_its_first():
    (window,) = encoded([PLAIN]).windows
    assert text(window.ids) == PLAIN.response
    assert (window.start, window.stop) == (1, len(window.ids))


def test_plain_text_after_a_first_token_scores_all():
    ours = tokenizer(bos=True)
    (window,) = encoded([PLAIN], ours=ours).windows
    assert text(window.ids, ours) == "<|begin|>" + PLAIN.response
    assert text(scored(window), ours) == PLAIN.response


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_changes_nothing(side):
    ours = tokenizer()
    before = encoded(documents(chat=True))
    usual = ours.padding_side, ours.truncation_side
    try:
        ours.padding_side = ours.truncation_side = side
        assert encoded(documents(chat=True)) == before
    finally:
        ours.padding_side, ours.truncation_side = usual


def test_a_tokenizer_without_a_template_gets_a_plain_one():
    with template(None):
        (window,) = encoded([CHAT]).windows
    assert text(window.ids) == "What is 2 + 3?\n\nIt is 5.<|end|>"
    assert text(scored(window)) == "It is 5.<|end|>"


@pytest.mark.parametrize("policy", ["split", "truncate"])
@pytest.mark.parametrize("max_tokens", [4, 1000])
def test_a_first_token_is_never_scored(policy, max_tokens):
    # Nothing comes before it that could predict it, where a template writes no prompt.
    silent = "{{ messages[-1]['content'] }}"
    with template(silent):
        found = encoded([Document("silent", [], CHAT.response)], max_tokens, policy)
    assert all(window.start >= 1 for window in found.windows)
    assert found.windows[0].stop > 1


# Beginnings: written by the template, put there by the tokenizer, by both or by neither


def begins_by_itself():
    """A tokenizer that puts its beginning before every text, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    ours = copy.deepcopy(tokenizer(bos=True))
    begin = [("<|begin|>", ours.bos_token_id)]
    ours.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=begin
    )
    assert ours("text")["input_ids"][0] == ours.bos_token_id
    return ours


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("by_itself", [True, False])
def test_a_beginning_is_never_doubled(written, by_itself):
    ours = begins_by_itself() if by_itself else copy.deepcopy(tokenizer(bos=True))
    ours.chat_template = ("{{ bos_token }}" if written else "") + tokenizer().chat_template
    (chat,) = encoded([CHAT], ours=ours).windows
    (plain,) = encoded([PLAIN], ours=ours).windows
    assert chat.ids.count(ours.bos_token_id) == int(written)
    assert plain.ids.count(ours.bos_token_id) == 1 and plain.ids[0] == ours.bos_token_id
    # As transformers itself does with a conversation.
    turns = [*CHAT.messages, {"role": "assistant", "content": CHAT.response}]
    theirs = ours.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert list(chat.ids) == theirs


QWEN = (  # a system line of its own where none is given
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>You are helpful.<|end|>' }}{% endif %}"
)
LLAMA = (  # one in any case, with what is given in it
    "{{ '<|system|>Today is a day.' }}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}{{ '<|end|>' }}"
)
GEMMA = (  # none
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
)


@pytest.mark.parametrize("line", [QWEN, LLAMA, ""])
@pytest.mark.parametrize("asked", [True, False])
def test_system_lines_are_read_and_not_scored(line, asked):
    system = [{"role": "system", "content": "Be short."}] if asked else []
    document = Document("system", [*system, *CHAT.messages], CHAT.response)
    with template(line + tokenizer().chat_template):
        (window,) = encoded([document]).windows
    assert text(scored(window)) == "It is 5.<|end|>"
    read = text(window.ids[: window.start])
    assert read.count("<|system|>") == int(bool(line) or asked)
    assert ("Be short." in read) == asked


def test_a_template_without_a_system_line_refuses_one():
    turns = [{"role": "system", "content": "Be short."}, *CHAT.messages]
    with template(GEMMA + tokenizer().chat_template):
        assert text(scored(*encoded([CHAT]).windows)) == "It is 5.<|end|>"
        with pytest.raises(MergelawError, match=r"document turns: .*System role not supported"):
            encoded([Document("turns", turns, "5")])


# What cannot be encoded


@pytest.mark.parametrize(
    "source, words",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] }}", "writes its answer differently or not at all"),
        ("{{ messages[-1]['content'] }}", r"leaves out its user turn \('What is 2"),
    ],
)
def test_a_document_that_the_template_refuses_is_named(source, words):
    with template(source), pytest.raises(MergelawError, match=f"document chat: .*{words}"):
        encoded([CHAT])


def test_a_token_without_a_row_in_the_embedding_is_refused():
    rows = max(encoded([CHAT]).windows[0].ids)
    ours = tokenizer()
    encode(ours, [CHAT], 100, "refuse", "the set", rows=rows + 1)
    with pytest.raises(MergelawError, match=rf"the set: .* \({rows}\), .* has {rows} rows"):
        encode(ours, [CHAT], 100, "refuse", "the set", rows=rows)


def test_a_set_without_anything_to_score_is_refused():
    for items in ([], [Document("empty", None, "")], [Document("one", None, "a")]):
        with pytest.raises(MergelawError, match="the set: no token to score"):
            encoded(items)


def test_an_empty_document_counts_as_nothing():
    found = encoded([Document("empty", None, ""), PLAIN])
    assert (len(found.windows), found.documents, found.dropped_tokens) == (1, 2, 0)
    assert found.windows[0].document == 1


# Long documents


def test_a_long_document_is_refused_by_name():
    with pytest.raises(MergelawError, match=r"the set: document plain has \d+ tokens, max_tokens"):
        encoded([PLAIN], 8)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("max_tokens", [2, 3, 8, 17, 64, 1000])
def test_split_scores_each_token_once(bos, chat, max_tokens):
    ours = tokenizer(bos)
    items = documents(chat)
    found = encoded(items, max_tokens, "split", ours)
    assert max(len(w.ids) for w in found.windows) <= max_tokens
    long = 0
    for number, document in enumerate(items):
        (whole,), _ = parts(ours, [document])
        ids = whole.ids
        long += len(ids) > max_tokens
        seen = []
        for window in (w for w in found.windows if w.document == number):
            assert window.start >= 1  # each has at least one token to be predicted from
            assert window.start < window.stop <= len(window.ids)
            seen.extend(scored(window))
        assert seen == ids[whole.start : whole.stop]
    assert (found.documents, found.long_documents) == (len(items), long)
    assert found.dropped_tokens == 0


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("max_tokens", [14, 17, 64, 1000])
def test_truncate_counts_what_it_drops(chat, max_tokens):
    items = documents(chat)
    found = encoded(items, max_tokens, "truncate")
    everything = sum(part.stop - part.start for part in parts(tokenizer(), items)[0])
    kept = sum(window.stop - window.start for window in found.windows)
    assert found.dropped_tokens == everything - kept
    assert (found.dropped_tokens > 0) == (max_tokens < 1000)
    for window in found.windows:
        (whole,), _ = parts(tokenizer(), [items[window.document]])
        assert list(window.ids) == whole.ids[:max_tokens]
        assert window.stop == min(whole.stop, max_tokens)


def test_a_prompt_that_fills_the_window_leaves_nothing_of_its_document():
    long = Document("long", [{"role": "user", "content": "why " * 50}], "Because.")
    found = encoded([long, CHAT], 40, "truncate")
    assert [window.document for window in found.windows] == [1]
    assert (found.documents, found.long_documents) == (2, 1)
    (whole,), _ = parts(tokenizer(), [long])
    assert found.dropped_tokens == whole.stop - whole.start
