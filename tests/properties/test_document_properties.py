"""What holds for every corpus: order does not matter, splits are disjoint, junk is refused."""

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw.artifacts.cache import FileCache
from mergelaw.data.documents import read_split, split_identity, write_split
from mergelaw.data.recipe import Source, SplitRecipe
from mergelaw.errors import MergelawError

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
pairs = st.builds(lambda prompt, response: {"prompt": prompt, "response": response}, texts, texts)
known = ["prompt", "response", "completion", "instruction", "input", "output", "messages"]
columns = st.sampled_from([*known, "conversations", "text", "role", "content", "from", "value"])
values = st.sampled_from(["user", "", "word"])
words = st.sampled_from(["user", "assistant", "human", "gpt", "", "\ud800", "word"])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(columns | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=15,
)


def build(content, train=None, evaluation=1, calibration=0, name="a.jsonl", where=None):
    """(train, eval, calibration, counts) of a file of records, or of raw bytes."""
    if not isinstance(content, bytes):
        content = "\n".join(map(json.dumps, content)).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        recipe = SplitRecipe(
            source=Source(files=[str(path)], where=where),
            train_documents=train,
            eval_documents=evaluation,
            calibration_documents=calibration,
            seed=0,
        )
        documents = []
        for split in ("train", "eval", "calibration"):
            identity = split_identity(recipe, split, FileCache())
            counts = write_split(recipe, split, identity, Path(folder, split))
            documents.append(read_split(Path(folder, split)))
        return *documents, counts


@settings(deadline=None, max_examples=40)
@given(st.data(), st.lists(pairs, min_size=1, max_size=12))
def test_splits_are_disjoint_and_hold_every_document_whatever_the_order(data, records):
    shuffled = data.draw(st.permutations(records))
    counts = build(records, train=0)[-1]
    distinct = counts["records"] - counts["duplicates"]
    evaluation = data.draw(st.integers(0, distinct - 1))
    calibration = data.draw(st.integers(0, distinct - 1 - evaluation))
    *splits, _ = build(records, None, evaluation, calibration)
    assert build(shuffled, None, evaluation, calibration)[:3] == tuple(splits)
    assert list(map(len, splits[1:])) == [evaluation, calibration]
    identities = [one.document for split in splits for one in split]
    assert len(set(identities)) == len(identities) == distinct


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 8), st.integers(0, 4))
def test_more_training_documents_leave_the_rest_as_it_was(fewer, more, evaluation, calibration):
    fewer, more = sorted((fewer, more))
    records = [{"text": f"document {number}"} for number in range(20)]
    small = build(records, fewer, evaluation, calibration)
    large = build(records, more, evaluation, calibration)
    assert large[1:3] == small[1:3]
    assert large[0][:fewer] == small[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(0, 6), st.booleans())
def test_a_document_more_moves_at_most_one_over_each_border(new, evaluation, calibration, rest):
    records = [{"text": f"document {number}"} for number in range(1000, 1020)]
    train = None if rest else 5
    before = build(records, train, evaluation, calibration)[:3]
    after = build([*records, {"text": f"document {new}"}], train, evaluation, calibration)[:3]
    changes = 0
    for old, grown in zip(before, after, strict=True):
        gone = [one for one in old if one not in grown]
        assert len(gone) <= 1
        # What stays keeps its order, so that training sees the same sequence.
        kept = [one for one in old if one in grown]
        assert kept == [one for one in grown if one in old]
        changes += grown != old
    # It lands in front of evaluation's end, behind calibration's beginning, or in between.
    if rest:
        assert before[0] != after[0] and changes <= 2
    else:
        assert changes <= 2


def built_or_refused(*arguments, **options):
    try:
        build(*arguments, **options)
    except MergelawError as error:
        assert "\n" not in str(error)
        # A terminal must be able to show the message.
        str(error).encode()


@settings(deadline=None, max_examples=200)
@given(junk, st.none() | st.dictionaries(columns, st.booleans() | values, max_size=1))
def test_any_json_is_a_corpus_or_refused_in_one_line(value, where):
    built_or_refused(json.dumps(value).encode(), train=0, name="a.json", where=where)
    built_or_refused(json.dumps([value]).encode(), train=0, name="a.json", where=where)
    built_or_refused([value], train=0, where=where)


@settings(deadline=None, max_examples=100)
@given(
    st.binary(max_size=60),
    st.sampled_from(["a.json", "a.jsonl", "a.parquet", "a.csv", "a.csv.gz", "a.jsonl.zst"]),
)
def test_any_bytes_are_a_corpus_or_refused_in_one_line(content, name):
    built_or_refused(content, train=0, name=name)
