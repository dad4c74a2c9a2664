"""From sources to splits, and one clear line for whatever is wrong with a source."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergelaw.data import documents as corpus
from mergelaw.errors import MergelawError


def recipe(source, train=None, evaluation=1, eval_source=None, seed=0):
    return {
        "source": source,
        "eval_source": eval_source,
        "train_documents": train,
        "eval_documents": evaluation,
        "seed": seed,
    }


def records(count, first=0):
    return [
        {"prompt": f"question {n}", "response": f"answer {n}"} for n in range(first, first + count)
    ]


def written(path, content):
    """A file of records: Parquet, JSON lines or a JSON list by its name; text and bytes as given."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in content))
    else:
        path.write_text(json.dumps(content))
    return str(path)


def splits(folder):
    return corpus.read(folder / "train.parquet"), corpus.read(folder / "eval.parquet")


def only_document(tmp_path, record):
    """The document of a file that holds one record."""
    name = written(tmp_path / "one.json", [record])
    corpus.build(recipe({"files": [name]}, train=0), tmp_path / "one")
    (document,) = splits(tmp_path / "one")[1]
    return document


def refusal(tmp_path, source, **changes):
    """What building says when it refuses, which is one line and leaves nothing behind."""
    output = tmp_path / "refused"
    with pytest.raises(MergelawError) as caught:
        corpus.build(recipe(source, **changes), output)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


USER = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "response": "So."},
        {"prompt": "Why?", "completion": "So.", "response": None},
        {"instruction": "Why?", "output": "So.", "input": ""},
        {"instruction": "Why?", "output": "So.", "input": " \n"},
        {"problem": "Why?", "solution": "So."},
        {"question": "Why?", "answer": "So."},
        {"prompt": USER, "response": "So."},
        {"prompt": USER, "completion": [{"role": "assistant", "content": "So."}]},
        {"messages": [*USER, {"role": "assistant", "content": "So."}]},
        {"messages": [*USER, {"role": "assistant", "content": "So."}, *USER]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    ],
)
def test_one_question_and_answer_in_any_form_is_one_document(tmp_path, record):
    document = only_document(tmp_path, record)
    assert document.messages == USER
    assert document.response == "So."
    assert document == only_document(tmp_path, {"prompt": "Why?", "response": "So."})


def test_instruction_and_input_are_joined_by_a_blank_line(tmp_path):
    document = only_document(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert document.messages == [{"role": "user", "content": "Add.\n\n1, 2"}]


def test_the_last_assistant_turn_is_the_response(tmp_path):
    turns = [("system", "Be brief."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    document = only_document(
        tmp_path, {"conversations": [{"from": who, "value": text} for who, text in turns]}
    )
    assert [turn["content"] for turn in document.messages] == ["Be brief.", "a", "b", "c"]
    assert [turn["role"] for turn in document.messages] == ["system", "user", "assistant", "user"]
    assert document.response == "d"


def test_plain_text_has_no_messages(tmp_path):
    document = only_document(tmp_path, {"text": "Once upon a time"})
    assert (document.messages, document.response) == (None, "Once upon a time")


def test_normalised_content_is_the_identity(tmp_path):
    texts = ["caf\u00e9  au\nlait", "cafe\u0301 au lait", "caf\u00e9 au lait ", "tea"]
    pairs = [{"prompt": "Order", "response": text} for text in texts]
    for order in (pairs, pairs[::-1]):
        name = written(tmp_path / "a.json", order)
        counts = corpus.build(recipe({"files": [name]}), tmp_path / "out")
        assert (counts["records"], counts["duplicates"]) == (4, 2)
        train, evaluation = splits(tmp_path / "out")
        # Which of the equal texts stands for them does not depend on their order either.
        assert {document.response for document in train + evaluation} == {
            "cafe\u0301 au lait",
            "tea",
        }
    assert all(len(document.document) == 16 for document in train)


def test_files_of_all_kinds_make_one_corpus_whatever_their_order(tmp_path):
    names = [
        written(tmp_path / "a.json", records(20)),
        written(tmp_path / "b.jsonl", records(20, first=15)),
        written(tmp_path / "c.parquet", records(20, first=30)),
        written(
            tmp_path / "d.jsonl", b"\xef\xbb\xbf" + json.dumps(records(1)[0]).encode() + b"\n\n"
        ),
    ]
    counts = corpus.build(recipe({"files": names}, evaluation=10), tmp_path / "one")
    assert counts["records"] == 61
    assert counts["duplicates"] == 11
    assert (counts["train_documents"], counts["eval_documents"]) == (40, 10)
    train, evaluation = splits(tmp_path / "one")
    texts = [turn["content"] for one in evaluation for turn in one.messages]
    assert counts["eval_bytes"] == sum(len(text) for text in texts) + sum(
        len(one.response) for one in evaluation
    )
    corpus.build(recipe({"files": names[::-1]}, evaluation=10), tmp_path / "two")
    for split in ("train.parquet", "eval.parquet"):
        assert (tmp_path / "one" / split).read_bytes() == (tmp_path / "two" / split).read_bytes()
    assert splits(tmp_path / "two") == (train, evaluation)
    corpus.build(recipe({"files": names}, evaluation=10, seed=1), tmp_path / "three")
    assert splits(tmp_path / "three")[1] != evaluation


def test_the_columns_are_document_messages_and_response(tmp_path):
    name = written(tmp_path / "a.json", [*records(1), {"text": "plain"}])
    corpus.build(recipe({"files": [name]}, train=0, evaluation=2), tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "eval.parquet")
    assert table.column_names == ["document", "messages", "response"]
    assert set(table["messages"].to_pylist()) == {'[{"content":"question 0","role":"user"}]', None}
    assert len(pq.read_table(tmp_path / "out" / "train.parquet")) == 0


def test_where_keeps_the_records_with_the_value(tmp_path):
    rows = [{**record, "subject": "ab"[n % 2], "bad": 1} for n, record in enumerate(records(10))]
    # What is not kept need not be a document.
    rows.append({"subject": "a"})
    for name in ("a.json", "a.parquet"):
        source = {"files": [written(tmp_path / name, rows)], "where": {"subject": "b", "bad": 1}}
        counts = corpus.build(recipe(source), tmp_path / name[2:])
        assert counts["records"] == 5
    assert refusal(tmp_path, {**source, "where": {"topic": "b"}}).endswith(
        "a.parquet: where names the column 'topic', which no record has:"
        " use one of ['bad', 'prompt', 'response', 'subject']"
    )
    assert refusal(tmp_path, {**source, "where": {"subject": "c"}}).endswith(
        "where = {\"subject\":\"c\"} keeps no record: the records have, for example, 'a'; 'b'"
    )


def test_evaluation_documents_come_from_eval_source(tmp_path):
    train = written(tmp_path / "train.json", records(10))
    held = written(tmp_path / "held.json", records(5, first=10))
    both = written(tmp_path / "both.json", records(5, first=9))
    source, eval_source = {"files": [train]}, {"files": [held]}
    corpus.build(recipe(source, evaluation=5, eval_source=eval_source), tmp_path / "out")
    trained, evaluated = splits(tmp_path / "out")
    assert {one.response for one in trained} == {f"answer {n}" for n in range(10)}
    assert {one.response for one in evaluated} == {f"answer {n}" for n in range(10, 15)}
    message = refusal(tmp_path, source, evaluation=5, eval_source={"files": [both]})
    assert "train.json holds documents of eval_source: 1 of them" in message
    assert "'question 9'" in message


def test_too_few_documents_are_counted(tmp_path):
    source = {"files": [written(tmp_path / "a.json", records(5) + records(2))]}
    message = refusal(tmp_path, source, train=4, evaluation=2)
    assert (
        "a.json: 5 distinct documents, but 2 were asked for evaluation and 4 for training"
        in message
    )
    message = refusal(tmp_path, source, evaluation=5)
    assert "5 were asked for evaluation and the rest for training" in message
    message = refusal(tmp_path, source, evaluation=6, eval_source=source)
    assert "6 were asked for evaluation and 0 for training" in message


def test_a_synthetic_source_gives_as_many_documents_as_are_asked_for(tmp_path):
    counts = corpus.build(recipe({"synthetic": "code"}, 800, 100), tmp_path / "out")
    assert (counts["train_documents"], counts["eval_documents"]) == (800, 100)
    assert counts["records"] - counts["duplicates"] == 900
    train, evaluation = splits(tmp_path / "out")
    assert not {one.document for one in train} & {one.document for one in evaluation}
    corpus.build(recipe({"synthetic": "code"}, 1600, 100), tmp_path / "more")
    more_train, same_evaluation = splits(tmp_path / "more")
    assert same_evaluation == evaluation
    assert more_train[:800] == train
    assert "give train_documents a number" in refusal(tmp_path, {"synthetic": "code"})
    assert "'magic': take one of" in refusal(tmp_path, {"synthetic": "magic"}, train=1)


def test_a_synthetic_source_runs_dry_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(
        corpus.synthetic, "documents", lambda domain, count, seed: records(1) * count
    )
    message = refusal(tmp_path, {"synthetic": "code"}, train=5)
    assert "the synthetic domain code: 1 distinct documents" in message


GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "a.json: the file is empty"),
        ("a.json", "[]", "a.json: the file holds no records"),
        ("a.json", "[{]", "a.json, line 1, column 3: not JSON"),
        ("a.json", "[\n{'a': 1}]", "a.json, line 2, column 2: not JSON"),
        ("a.json", GOOD, "a.json: must be a list of records, not {"),
        ("a.json", f"[{GOOD}, 3]", "a.json, record 2: a record must be an object, not 3"),
        ("a.json", b'["\xff"]', "a.json, line 1: not UTF-8"),
        ("a.json", "[" * 100_000, "a.json, line 1: JSON that Python cannot hold"),
        ("a.json", f"[{'1' * 9999}]", "a.json, line 1: JSON that Python cannot hold"),
        ("a.jsonl", "\n\n", "a.jsonl: the file holds no records"),
        ("a.jsonl", f"{GOOD}\n\n{{", "a.jsonl, line 3, column 2: not JSON"),
        ("a.jsonl", f"{GOOD}\n[1]", "a.jsonl, line 2: a record must be an object, not [1]"),
        ("a.jsonl", GOOD.encode() + b"\n\xff", "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", GOOD.encode("utf-16"), "a.jsonl, line 1: not UTF-8"),
        (
            "a.parquet",
            "PAR1 not really PAR1",
            "a.parquet, after row 0: not a readable Parquet file",
        ),
        (
            "a.parquet",
            [{"prompt": "a", "response": b"b"}],
            "a.parquet, row 1: 'response' must be text",
        ),
        ("a.csv", "prompt,response", "a.csv: unknown kind of file: use .json, .jsonl, .parquet"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, message):
    assert message in refusal(tmp_path, {"files": [written(tmp_path / name, content)]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "no response among its columns ['prompt']: a record needs"),
        ({"prompt": "a", "response": None}, "no response among its columns"),
        ({"prompt": "a", "response": " \n"}, "'response' is empty"),
        ({"prompt": "", "response": "b"}, "'prompt' is empty"),
        ({"prompt": [], "response": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "response": 3}, "'response' must be text, not 3"),
        ({"prompt": "a", "response": "\ud800"}, "'response' holds half of a surrogate pair"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be text, not 3"),
        ({"prompt": "a", "completion": USER}, "'completion' holds no assistant turn"),
        ({"messages": USER}, "its messages hold no assistant turn"),
        (
            {"messages": [{"role": "assistant", "content": "b"}]},
            "its messages begin with the response",
        ),
        ({"messages": "a"}, "'messages' must be a list of messages, not 'a'"),
        ({"messages": ["a"]}, "'messages' must be a list of messages, not ['a']"),
        (
            {"messages": [{"role": ["user"], "content": "a"}]},
            "'messages' has a message with role ['user']",
        ),
        (
            {"messages": [{"role": "oracle", "content": "a"}]},
            "'messages' has a message with role 'oracle'",
        ),
        ({"messages": [{"role": "user"}]}, "'content' must be text, not None"),
        ({"text": ""}, "'text' is empty"),
    ],
)
def test_a_bad_record_is_named_with_the_place(tmp_path, record, message):
    name = written(tmp_path / "a.json", [*records(3), record])
    refused = refusal(tmp_path, {"files": [name]})
    assert f"a.json, record 4: {message}" in refused
    assert refused.endswith("correct or remove the record, or set invalid_records: skip")


def test_invalid_records_are_counted_and_skipped_if_one_says_so(tmp_path, capsys):
    good, bad = records(20), {"prompt": "what?", "response": " "}
    source = {"files": [written(tmp_path / "a.jsonl", [*good[:7], bad, *good[7:], bad, bad])]}
    refused = refusal(tmp_path, source)
    assert "a.jsonl, line 8: 'response' is empty" in refused and "(and 2 more like it)" in refused
    skipping = recipe(source | {"invalid_records": "skip"}, train=None, evaluation=5)
    counts = corpus.build(skipping, tmp_path / "skipped")
    assert (counts["records"], counts["duplicates"], counts["invalid_records"]) == (23, 0, 3)
    said = capsys.readouterr().err
    assert "3 of 23 records skipped, the first is " in said and "a.jsonl, line 8" in said
    clean = {"files": [written(tmp_path / "b.jsonl", good)]}
    counts = corpus.build(recipe(clean, train=None, evaluation=5), tmp_path / "clean")
    assert counts["invalid_records"] == 0
    for split in ("train.parquet", "eval.parquet"):
        same = (tmp_path / "clean" / split).read_bytes()
        assert (tmp_path / "skipped" / split).read_bytes() == same


def test_a_missing_file_a_folder_and_a_damaged_parquet_are_named(tmp_path):
    assert "a.json: no such file" in refusal(tmp_path, {"files": [str(tmp_path / "a.json")]})
    (tmp_path / "b.json").mkdir()
    assert "b.json: the file cannot be read" in refusal(
        tmp_path, {"files": [str(tmp_path / "b.json")]}
    )
    path = tmp_path / "c.parquet"
    written(path, records(5000))
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(100)
    path.write_bytes(content)
    assert "c.parquet, after row 0: not a readable" in refusal(tmp_path, {"files": [str(path)]})


def test_a_local_folder_is_a_dataset(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder / "a.jsonl", [{**record, "kind": "x"} for record in records(5)])
    source = {"dataset": str(folder), "revision": None, "config": None, "split": "train"}
    counts = corpus.build(recipe({**source, "where": {"kind": "x"}}), tmp_path / "out")
    assert counts["records"] == 5
    message = refusal(tmp_path, {**source, "split": "test"})
    assert 'data [test]: the dataset cannot be loaded: Unknown split "test"' in message
    (folder / "a.jsonl").write_text('{"prompt": "a", "resp')
    assert "the dataset cannot be loaded: " in refusal(tmp_path, source)


def test_a_dataset_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub.\nTraceback and more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refusal(tmp_path, {"dataset": "org/name", "split": "train"})
    assert message.startswith(
        "org/name [train]: the dataset cannot be loaded: Couldn't reach the Hub:"
    )


def test_a_dataset_of_the_hub_is_taken_from_the_cache_at_its_revision_only(tmp_path):
    """Offline, by the library itself: it would hand out another version than was asked for."""
    import datasets

    file, commit = written(tmp_path / "a.jsonl", records(9)), "a" * 40
    cache = tmp_path / "home" / "datasets"
    datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    # As it lies after a download: by repository, configuration, version and commit.
    (made,) = (info.parent for info in cache.glob("json/*/*/*/dataset_info.json"))
    version = cache / "org___name" / "default" / "0.0.0" / commit
    version.parent.mkdir(parents=True)
    made.rename(version)
    (version / "json-train.arrow").rename(version / "name-train.arrow")
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "name"}))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for revision, status in ((commit, 0), ("main", 0), ("b" * 40, 1)):
        source = {"dataset": "org/name", "revision": revision, "config": None, "split": "train"}
        given = {**recipe(source), "sources": {"source": source}}
        program = "from mergelaw.cli.app import main; main()"
        words = ["corpus", "--recipe", json.dumps(given), "--output", str(tmp_path / revision)]
        run = [sys.executable, "-c", program, *words]
        ended = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == status, ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        f"mergelaw: error: org/name [train]: revision {'b' * 40} is not in the cache, {commit} is:"
        " go online once, or pin that one"
    )


def corpora(tmp_path, **domains):
    """Folders of corpora, each from the numbers of its training and evaluation records."""
    folders = {}
    for domain, (train, evaluation) in domains.items():
        names = {
            split: written(tmp_path / f"{domain}_{split}.json", [records(1, n)[0] for n in numbers])
            for split, numbers in (("train", train), ("eval", evaluation))
        }
        folders[domain] = tmp_path / domain
        corpus.build(
            recipe({"files": [names["train"]]}, None, len(evaluation), {"files": [names["eval"]]}),
            folders[domain],
        )
    return folders


def test_overlap_between_domains_is_refused(tmp_path):
    corpus.check_overlap(corpora(tmp_path, a=([1, 2], [3]), b=([1, 2, 4], [5])))
    with pytest.raises(MergelawError) as caught:
        corpus.check_overlap(corpora(tmp_path, a=([1, 2], [3]), b=([6], [1, 2, 7])))
    message = str(caught.value)
    assert message.startswith("a trains on documents that b evaluates on: 2 of them")
    assert "'question " in message and "remove them" in message


def test_what_is_not_a_corpus_is_refused(tmp_path):
    with pytest.raises(MergelawError, match=r"train\.parquet: not a split of a corpus"):
        corpus.check_overlap({"a": tmp_path})
    written(tmp_path / "b.parquet", [{"document": "b"}])
    with pytest.raises(MergelawError, match="not a split of a corpus"):
        corpus.read(tmp_path / "b.parquet")


def test_the_identity_of_files_is_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.json", records(1))
    source = {"files": ["a.json"], "where": {"x": 1}}
    before = corpus.source_identity(source)
    ((name, digest),) = before["files"]
    assert (name, len(digest)) == ("a.json", 64)
    os.utime("a.json", ns=(1, 1))
    assert corpus.source_identity(source) == before
    written(tmp_path / "a.json", records(2))
    assert corpus.source_identity(source) != before
    with pytest.raises(MergelawError, match=r"b\.json: no such file"):
        corpus.source_identity({"files": ["b.json"]})
    with pytest.raises(MergelawError, match="cannot be read: Is a directory"):
        corpus.source_identity({"files": [str(tmp_path)]})


def test_digests_are_remembered_until_size_or_time_change(tmp_path):
    path, cache = tmp_path / "a.json", tmp_path / "new" / "digests.json"
    source = {"files": [written(path, "[1]")]}
    os.utime(path, ns=(1, 1))
    before = corpus.source_identity(source, cache)
    # Same size and time: the file is not read again, which only a digest that is wrong shows.
    path.write_text("[2]")
    os.utime(path, ns=(1, 1))
    assert corpus.source_identity(source, cache) == before
    os.utime(path, ns=(2, 2))
    changed = corpus.source_identity(source, cache)
    assert changed == corpus.source_identity(source) != before
    assert list(cache.parent.iterdir()) == [cache]
    for damage in ("", "[]", "{", json.dumps({str(path): [3, 2]}), json.dumps({str(path): 7})):
        cache.write_text(damage)
        assert corpus.source_identity(source, cache) == changed
        assert json.loads(cache.read_text())[str(path)][2] == changed["files"][0][1]


def test_the_identity_of_datasets_and_synthetic_domains(tmp_path):
    source = {"dataset": "org/name", "revision": "abc", "config": None, "split": "train"}
    assert corpus.source_identity({**source, "where": {"x": 1}}) == source
    assert corpus.source_identity({"synthetic": "code"}) == {"synthetic": "code"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".hidden").write_text("x")
    written(tmp_path / "data" / "a.json", records(1))
    identity = corpus.source_identity({**source, "dataset": str(tmp_path)})
    assert [name for name, _ in identity["files"]] == ["data/a.json"]
    with pytest.raises(MergelawError, match="no such folder"):
        corpus.source_identity({**source, "dataset": "./nowhere"})


def test_identities_need_no_heavy_import(tmp_path):
    name = written(tmp_path / "a.json", records(1))
    code = (
        "import sys; from mergelaw import corpus;"
        f"corpus.source_identity({{'files': [{name!r}]}});"
        "heavy = {'pandas', 'pyarrow', 'datasets', 'torch', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_that_changed_after_their_key_was_made_are_noticed(tmp_path):
    source = {"files": [written(tmp_path / "a.jsonl", records(9))]}
    recipe = {"files": [digest for _, digest in corpus.source_identity(source)["files"]]}
    corpus.check_unchanged(recipe, source)
    corpus.check_unchanged({"synthetic": "algebra"}, {"synthetic": "algebra"})
    written(tmp_path / "a.jsonl", records(9, first=1))
    with pytest.raises(MergelawError, match=r"a\.jsonl: changed since the run began; run again"):
        corpus.check_unchanged(recipe, source)
    folder = tmp_path / "dataset"
    folder.mkdir()
    written(folder / "train.parquet", records(9))
    source = {"dataset": str(folder), "revision": None, "config": None, "split": "train"}
    recipe = corpus.source_identity(source)
    corpus.check_unchanged(recipe, source)
    written(folder / "train.parquet", records(8))
    with pytest.raises(MergelawError, match="changed since the run began"):
        corpus.check_unchanged(recipe, source)
