"""What holds for every corpus: order does not matter, splits are disjoint, junk is refused."""

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw.data import documents as corpus
from mergelaw.errors import MergelawError

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
pairs = st.builds(lambda prompt, response: {"prompt": prompt, "response": response}, texts, texts)
known = ["prompt", "response", "completion", "instruction", "input", "output", "messages"]
columns = st.sampled_from([*known, "conversations", "text", "role", "content", "from", "value"])
words = st.sampled_from(["user", "assistant", "human", "gpt", "", "\ud800", "word"])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(columns | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=15,
)


def build(content, train=None, evaluation=1, name="a.jsonl", where=None):
    """The split of a file of records, or of raw bytes, in a folder of its own."""
    if not isinstance(content, bytes):
        content = "\n".join(map(json.dumps, content)).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        recipe = {
            "source": {"files": [str(path)], "where": where or {}},
            "eval_source": None,
            "train_documents": train,
            "eval_documents": evaluation,
            "seed": 0,
        }
        output = Path(folder, "out")
        counts = corpus.build(recipe, output)
        return corpus.read(output / "train.parquet"), corpus.read(output / "eval.parquet"), counts


@settings(deadline=None, max_examples=40)
@given(st.data(), st.lists(pairs, min_size=1, max_size=12))
def test_the_split_is_disjoint_and_does_not_depend_on_the_order_of_records(data, records):
    shuffled = data.draw(st.permutations(records))
    train, evaluation, counts = build(records, train=0, evaluation=1)
    assert build(shuffled, train=0, evaluation=1)[:2] == (train, evaluation)
    distinct = counts["records"] - counts["duplicates"]
    if distinct > 1:
        train, evaluation, _ = build(records)
        assert build(shuffled)[:2] == (train, evaluation)
        identities = [one.document for one in train + evaluation]
        assert len(set(identities)) == len(identities) == distinct


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10), st.integers(0, 10), st.integers(1, 10))
def test_more_training_documents_leave_the_rest_as_it_was(fewer, more, evaluation):
    fewer, more = sorted((fewer, more))
    records = [{"text": f"document {number}"} for number in range(20)]
    small_train, small_evaluation, _ = build(records, fewer, evaluation)
    large_train, large_evaluation, _ = build(records, more, evaluation)
    assert large_evaluation == small_evaluation
    assert large_train[:fewer] == small_train


def built_or_refused(*arguments, **options):
    try:
        build(*arguments, **options)
    except MergelawError as error:
        assert "\n" not in str(error)
        # A terminal must be able to show the message.
        str(error).encode()


@settings(deadline=None, max_examples=200)
@given(junk, st.none() | st.dictionaries(columns, st.none() | st.booleans() | words, max_size=1))
def test_any_json_is_a_corpus_or_refused_in_one_line(value, where):
    built_or_refused(json.dumps(value).encode(), train=0, name="a.json", where=where)
    built_or_refused(json.dumps([value]).encode(), train=0, name="a.json", where=where)
    built_or_refused([value], train=0, where=where)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60), st.sampled_from(["a.json", "a.jsonl", "a.parquet"]))
def test_any_bytes_are_a_corpus_or_refused_in_one_line(content, name):
    built_or_refused(content, train=0, name=name)
