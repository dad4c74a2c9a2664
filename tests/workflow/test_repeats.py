"""A whole study made again: what has the same bits, on one thread and on two."""

from studies import Place, make_trained, same_measurements

from mergelaw.artifacts import lineage

ON_TWO = ("--set-threads", "pretrain_base=2", "train_expert=2", "evaluate_merges=2")


def digests(place: Place, *kinds: str) -> dict[str, str]:
    return {
        f"{kind}/{name}": lineage.read(path)["digest"]
        for kind in kinds
        for name, path in place.artifacts(kind).items()
    }


def test_on_one_thread_everything_has_the_same_bits(trained, tmp_path):
    again = make_trained(tmp_path / "again")
    kinds = ("corpora", "bases", "experts", "task_vectors", "designs")
    assert digests(again, *kinds) == digests(trained, *kinds)
    same_measurements(again.rows(), trained.rows())
    assert again.laws()["fits"] == trained.laws()["fits"]


def test_on_two_threads_losses_come_close(trained, tmp_path):
    """Documents and designs have the same bits; models are trained, and losses are summed, with
    other roundings. That must be small against what is measured: a hundredth of what an expert
    gains on its own domain.
    """
    two = Place(tmp_path, trained.config)
    two.finish(*ON_TWO)
    assert digests(two, "corpora", "designs") == digests(trained, "corpora", "designs")
    where = ["base", "method", "k", "replicate", "place", "domain"]
    one, other = (place.rows().set_index(where).sort_index() for place in (trained, two))
    assert (one["threads"] == 1).all() and (other["threads"] == 2).all()
    assert one.index.equals(other.index)
    rows = one.reset_index()
    alone = rows[[list(e) == [d] for e, d in zip(rows["experts"], rows["domain"], strict=True)]]
    for base, own in alone.groupby("base"):
        before = rows[(rows["base"] == base) & (rows["k"] == 0)].groupby("domain")["ce"].first()
        gain = (own["domain"].map(before) - own["ce"]).min()
        assert gain > 0
        assert (one.loc[base]["ce"] - other.loc[base]["ce"]).abs().max() < 0.01 * gain
