"""Splits of documents as artifacts of a study: what a change of the data makes again."""

from types import SimpleNamespace

import pytest

import models
from mergelaw.config import parse
from mergelaw.config.merges import Merge
from mergelaw.errors import MergelawError
from mergelaw.merging.methods.learned import Learned
from mergelaw.workflow.study import Study

TRAINING = {"steps": 3, "learning_rate": 1e-3}


def lines(path, numbers, name):
    records = ({"prompt": f"{name} {n}?", "response": f"{n}"} for n in numbers)
    return {"files": [str(models.write_jsonl(path, records))]}


def study(folder, **domains) -> Study:
    """Two trained domains, one of them with evaluation documents of its own, and a held-out one."""
    both = {
        "split": {"source": lines(folder / "split.jsonl", range(40), "split")},
        "apart": {
            "source": lines(folder / "apart.jsonl", range(40), "apart"),
            "eval_source": lines(folder / "eval.jsonl", range(12), "other"),
        },
        "held": {"source": lines(folder / "held.jsonl", range(9), "held"), "held_out": True},
    }
    for name, changes in domains.items():
        both[name] |= changes
    architecture = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1}
    pretraining = {**TRAINING, "domains": ["split", "apart"], "architecture": architecture}
    return Study(
        parse(
            {
                "name": "study",
                "results": str(folder / "results"),
                "corpus": {"eval_documents": 8, "calibration_documents": 5},
                "domains": both,
                "pretraining": pretraining,
                "bases": {"tiny": {"pretraining": {}}},
                "training": TRAINING,
                "methods": {"average": {}},
            },
            "study.yaml",
        )
    )


def changed(before: Study, after: Study) -> set[str]:
    """Folders of the artifacts whose keys differ."""
    paths = {artifact.folder: artifact.path for artifact in before.known.values()}
    return {a.folder for a in after.known.values() if paths[a.folder] != a.path}


MEASURED = {"evals/tiny/average/s0-000", "gradients/tiny/s0", "laws/study", "reports/study"}
CHECKS = {"checks/overlap", "checks/calibration-overlap"}


def test_learned_coefficients_are_an_artifact_that_no_law_knows(tmp_path):
    plain = study(tmp_path)
    learned = Study(
        plain.config.model_copy(
            update={"methods": {**plain.config.methods, "learned": Learned(by="block")}}
        )
    )
    (one,) = learned.coefficients
    assert one.folder == "learned/tiny/learned-s0" and one.inputs["corpora"].keys() == {
        "split",
        "apart",
    }
    assert one.checks["overlap"] is learned.calibration_overlap
    (evaluation,) = learned.learned_evals
    assert evaluation.inputs["coefficients"].path == one.path
    assert [row.k for row in evaluation.rows] == [0, 2]
    assert learned.laws.path == plain.laws.path and learned.report.path != plain.report.path
    order = list(learned.by_path)
    assert order.index(one.path) < order.index(evaluation.path)
    assert set(plain.known) - {plain.report.path} <= set(learned.known)
    other = learned.config.methods | {"learned": Learned(by="scale")}
    (changed,) = Study(learned.config.model_copy(update={"methods": other})).coefficients
    assert changed.path != one.path


def test_merges_that_are_only_measured_share_a_job_and_change_nothing_else(tmp_path):
    plain = study(tmp_path)
    settings = plain.config.model_dump(exclude_unset=True)
    one = {"base": "tiny", "method": "average", "experts": ["split"]}
    both = one | {"experts": ["apart", "split"], "write": False}
    named = {"a": one, "b": both, "c": both | {"experts": ["apart"]}}
    more = Study(parse(settings | {"merges": named}))
    assert set(more.merges) == {"a"}
    assert more.merge_evals["b"] is more.merge_evals["c"] is not more.merge_evals["a"]
    assert more.merge_evals["b"].folder == "evals/tiny/average/more-s0-000"
    assert [row.experts for row in more.merge_evals["b"].rows] == [
        (),
        ("split", "apart"),
        ("apart",),
    ]
    assert len(more.measurements) == len(plain.measurements) + 2
    new = {path for path in more.by_path if path not in plain.by_path}
    assert {path.split("/")[0] for path in new} == {"evals", "reports", "merges"}
    predicted = {"objective": "macro", "value": 1.0, "low": 0.9, "high": 1.1}
    again = Study(parse(settings | {"merges": named | {"b": both | {"predicted": predicted}}}))
    assert again.by_path.keys() == more.by_path.keys()


def test_a_merge_to_write_is_confirmed_on_documents_of_no_other_use(tmp_path):
    plain = study(tmp_path)
    settings = plain.config.model_dump(exclude_unset=True)
    one = {"base": "tiny", "method": "average", "experts": ["split"]}
    merges = {"merges": {"a": one, "b": one | {"experts": ["apart"], "write": False}}}
    corpus = settings["corpus"]
    before = Study(parse(settings | merges))
    after = Study(parse(settings | merges | {"corpus": corpus | {"confirm_documents": 0}}))
    assert not after.confirmations and after.by_path.keys() == before.by_path.keys()
    held = {"held": settings["domains"]["held"] | {"eval_documents": 5}}
    more = {"corpus": corpus | {"confirm_documents": 3}, "domains": settings["domains"] | held}
    after = Study(parse(settings | merges | more))
    assert set(after.confirmations) == {"a"}
    confirmation = after.confirmations["a"]
    assert confirmation.inputs["corpora"] == after.corpora["confirm"]
    assert after.merges["a"].inputs["confirmation"] is confirmation
    assert confirmation not in after.measurements and confirmation.path in after.by_path
    assert {a.size[0] for a in after.corpora["confirm"].values()} == {3}
    same = ("corpora/split/eval", "corpora/split/calibration", "corpora/apart/eval")
    paths = {a.folder: a.path for a in before.known.values()}
    assert all(paths[a.folder] == a.path for a in after.known.values() if a.folder in same)


def test_a_method_that_learns_the_design_has_a_job_and_a_law_like_any_other(tmp_path):
    plain = study(tmp_path)
    methods = {**plain.config.methods, "learned": Learned(by="expert", subsets="design")}
    experts = list(plain.config.pool())
    merges = {"both": Merge(base="tiny", method="learned", experts=experts[::-1])}
    settings = plain.config.model_copy(update={"methods": methods, "merges": merges})
    learned = Study(parse(settings.model_dump(by_alias=True, exclude_unset=True)))
    assert not learned.learned_evals and learned.laws.path != plain.laws.path
    evaluation = learned.evals["tiny", "learned", 0, 0]
    assert evaluation.rows == learned.evals["tiny", "average", 0, 0].rows
    (one,) = learned.coefficients  # the merge to write is in the same table
    assert one.rows == [row.experts for row in evaluation.rows if row.experts]
    assert learned.merges["both"].inputs["coefficients"].path == one.path
    assert learned.report.inputs["coefficients"]["tiny"].path == one.path
    # What is learned is no part of what a merge is, so cells are shared.
    assert Learned().recipe() == Learned(subsets="design").recipe()


def test_splits_are_artifacts_and_calibration_is_made_on_request(tmp_path):
    whole = study(tmp_path)
    assert {split: set(domains) for split, domains in whole.corpora.items()} == {
        "train": {"split", "apart"},
        "eval": {"split", "apart", "held"},
        "calibration": {"split", "apart"},
        "confirm": set(),
    }
    calibration = {"corpora/split/calibration", "corpora/apart/calibration"}
    planned = {artifact.folder for artifact in whole.by_path.values()}
    known = {artifact.folder for artifact in whole.known.values()}
    on_request = {"checks/calibration-overlap", "gradients/tiny/s0"}
    assert known - planned == calibration | on_request
    assert whole.expert("tiny", "apart", 0).inputs["corpora"] == {
        "apart": whole.corpora["train"]["apart"]
    }
    assert study(tmp_path, held={"calibration_documents": 1}).corpora["calibration"]["held"]


def test_new_evaluation_documents_train_nothing(tmp_path):
    before = study(tmp_path)
    assert changed(before, study(tmp_path)) == set()
    more = lines(tmp_path / "eval2.jsonl", range(1, 13), "other")
    after = study(tmp_path, apart={"eval_source": more})
    assert changed(before, after) == {"corpora/apart/eval", *CHECKS, *MEASURED}


@pytest.mark.parametrize("number", range(40, 60))
def test_a_new_document_trains_only_what_sees_it(tmp_path, number):
    before = study(tmp_path)
    more = lines(tmp_path / "split2.jsonl", [*range(40), number], "split")
    after = study(tmp_path, split={"source": more})
    seen = changed(before, after)
    splits = {folder for folder in seen if folder.startswith("corpora/")}
    assert splits and splits <= {f"corpora/split/{s}" for s in ("train", "eval", "calibration")}
    assert ("experts/tiny/split-s0" in seen) == ("corpora/split/train" in seen)
    # The tiny base is trained on it too, and the other expert starts from that base.
    assert ("bases/tiny" in seen) == ("corpora/split/train" in seen)


def test_a_change_of_calibration_alone_makes_nothing_else_again(tmp_path):
    before = study(tmp_path, split={"train_documents": 20})
    after = study(tmp_path, split={"train_documents": 20, "calibration_documents": 3})
    assert changed(before, after) == {"corpora/split/calibration", "checks/calibration-overlap"}


def ready_made(folder, records, **changes) -> Study:
    """A study that trains nothing, with one domain of so many documents."""
    model = {"path": str(folder / "model")}
    domain = {"source": lines(folder / "text.jsonl", range(records), "text")}
    return Study(
        parse(
            {
                "name": "ready",
                "results": str(folder / "results"),
                "domains": {"text": domain | changes},
                "bases": {"one": model, "two": model},
                "experts": {
                    "both": {"checkpoints": {"one": model, "two": model}},
                    "single": {"checkpoints": {"one": model}},
                },
                "methods": {"average": {}},
            }
        )
    )


@pytest.mark.parametrize(
    ("records", "changes", "sizes"),
    [
        (500, {}, {"eval": 200, "calibration": 12}),
        (100, {}, {"eval": 88, "calibration": 12}),
        (8, {}, {"eval": 6, "calibration": 2}),
        (1, {}, {"eval": 1}),
        (100, {"eval_documents": 100}, {"eval": 100}),
        (100, {"eval_documents": 95}, {"eval": 95, "calibration": 5}),
        (100, {"calibration_documents": 30}, {"eval": 70, "calibration": 30}),
        (100, {"train_documents": 40}, {"eval": 88, "calibration": 12}),
    ],
)
def test_documents_that_no_model_is_trained_on_are_measured_on(tmp_path, records, changes, sizes):
    corpora = ready_made(tmp_path, records, **changes).corpora
    found = {split: by_domain["text"].size[0] for split, by_domain in corpora.items() if by_domain}
    assert found == sizes


def test_asked_numbers_that_are_not_there_are_refused_where_nothing_is_trained_too(tmp_path):
    with pytest.raises(MergelawError, match="9 distinct documents, but 10 were asked"):
        ready_made(tmp_path, 9, eval_documents=10).corpora  # noqa: B018


def test_bases_have_the_merges_of_their_own_experts(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    study = ready_made(tmp_path, 9)
    assert {row.experts for row in study.rows["one"]} == {
        (), ("both",), ("single",), ("both", "single"),
    }  # fmt: skip
    assert [row.experts for row in study.rows["two"]] == [(), ("both",)]
    assert study.laws.recipe == {"common_experts": ["both"]}
    assert {key[:2] for key in study.task_vectors} == {
        ("one", "both"), ("one", "single"), ("two", "both"),
    }  # fmt: skip


def test_unreadable_documents_are_named_before_anything_runs(tmp_path):
    gone, few = {"files": [str(tmp_path / "gone.jsonl")]}, lines(tmp_path / "few.jsonl", [1], "few")
    broken = study(tmp_path, split={"source": gone}, held={"source": few})
    with pytest.raises(MergelawError, match=r"gone\.jsonl: no such file.*\(1 more domains"):
        broken.known  # noqa: B018


def test_snakemake_calls_functions_only_for_roles_that_there_are():
    """And need not inspect them for each of ten thousand jobs."""
    from mergelaw.workflow.snakemake import Paths

    pipeline = SimpleNamespace(roles={"base"})
    paths = Paths(pipeline, "evals/{base}/{method}/{name}@{key}")
    assert paths.input("coefficients") == []
    for function in (paths.input("base"), paths.job):
        assert list(function.__signature__.parameters) == ["wildcards"]
