"""Documents as windows of tokens: what is scored, and what happens to long ones."""

from contextlib import contextmanager

import pytest

from mergelaw.corpus import Document
from mergelaw.errors import MergelawError
from mergelaw.tokens import encode, parts
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
    silent = "{% if messages | length > 1 %}{{ messages[-1]['content'] }}{% endif %}"
    with template(silent):
        found = encoded([CHAT], max_tokens, policy)
    assert all(window.start >= 1 for window in found.windows)
    assert found.windows[0].stop > 1


# What cannot be encoded


@pytest.mark.parametrize(
    "source, words",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if add_generation_prompt %}A{% else %}B{% endif %}", "differently"),
    ],
)
def test_a_document_that_the_template_refuses_is_named(source, words):
    with template(source), pytest.raises(MergelawError, match=f"document chat: .*{words}"):
        encoded([CHAT])


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
        prompt, response, count = parts(ours, [document])[0]
        ids = prompt + response
        long += len(ids) > max_tokens
        seen = []
        for window in (w for w in found.windows if w.document == number):
            assert window.start >= 1  # each has at least one token to be predicted from
            assert window.start < window.stop <= len(window.ids)
            seen.extend(scored(window))
        assert seen == ids[len(prompt) : len(prompt) + count]
    assert (found.documents, found.long_documents) == (len(items), long)
    assert found.dropped_tokens == 0


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("max_tokens", [14, 17, 64, 1000])
def test_truncate_counts_what_it_drops(chat, max_tokens):
    items = documents(chat)
    found = encoded(items, max_tokens, "truncate")
    everything = sum(parts(tokenizer(), [document])[0][2] for document in items)
    kept = sum(window.stop - window.start for window in found.windows)
    assert found.dropped_tokens == everything - kept
    assert (found.dropped_tokens > 0) == (max_tokens < 1000)
    for window in found.windows:
        prompt, response, count = parts(tokenizer(), [items[window.document]])[0]
        assert list(window.ids) == (prompt + response)[:max_tokens]
        assert window.stop == min(len(prompt) + count, max_tokens)


def test_a_prompt_that_fills_the_window_leaves_nothing_of_its_document():
    long = Document("long", [{"role": "user", "content": "why " * 50}], "Because.")
    found = encoded([long, CHAT], 40, "truncate")
    assert [window.document for window in found.windows] == [1]
    assert (found.documents, found.long_documents) == (2, 1)
    assert found.dropped_tokens == parts(tokenizer(), [long])[0][2]
