"""What must hold of every plan, whatever the pool, the sizes, the seed and the base."""

from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw.evaluation.design import pattern, rotations, sample

pools = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=14, unique=True)
circular = st.sampled_from(["ring", "difference"])
seeds = st.integers(0, 2**31)


def plan(experts, design, seed, *, exhaustive_up_to=0, circles=2, k=None):
    return sample(
        experts,
        design=design,
        k=k,
        circles=circles,
        exhaustive_up_to=exhaustive_up_to,
        seed=seed,
        base="base",
    )


def replicates(rows):
    """(k, replicate) -> its subsets, the base left out."""
    groups = defaultdict(list)
    for row in rows[1:]:
        groups[row.k, row.replicate].append(row.experts)
    return groups


@given(pools, circular, seeds, st.integers(0, 40))
def test_every_expert_is_in_the_same_number_of_subsets(experts, design, seed, exhaustive_up_to):
    rows = plan(experts, design, seed, exhaustive_up_to=exhaustive_up_to)
    assert rows[0].k == 0 and {row.k for row in rows} == set(range(len(experts) + 1))
    for (k, replicate), subsets in replicates(rows).items():
        assert len(set(subsets)) == len(subsets)
        if replicate >= 0:
            assert len(subsets) == len(experts)
        memberships = Counter(name for subset in subsets for name in subset)
        assert memberships == dict.fromkeys(experts, len(subsets) * k // len(experts))


@given(pools, circular, seeds, st.data())
def test_what_adds_up_over_experts_has_no_sampling_error(experts, design, seed, data):
    numbers = st.integers(-(10**6), 10**6)  # integers, so that equal means equal
    value = {name: data.draw(numbers) for name in experts}
    for (k, _), subsets in replicates(plan(experts, design, seed)).items():
        total = sum(value[name] for subset in subsets for name in subset)
        assert total * len(experts) == k * len(subsets) * sum(value.values())


@given(pools, st.text(min_size=1, max_size=8), st.integers(1, 4))
def test_a_new_expert_only_appends_to_an_exhaustive_plan(experts, newcomer, size):
    if newcomer in experts:
        return
    levels = list(range(1, min(size, len(experts)) + 1))
    before = plan(experts, "exhaustive", 0, k=levels)
    after = plan([*experts, newcomer], "exhaustive", 0, k=levels)
    assert after[: len(before)] == before
    assert all(newcomer in row.experts for row in after[len(before) :])


@given(st.integers(6, 16), st.data())
def test_a_new_expert_changes_the_fewest_subsets(pool, data):
    k = data.draw(st.integers(2, pool - 3))
    circle = data.draw(st.permutations(range(pool)))
    at = data.draw(st.integers(0, pool))
    wider = [*circle[:at], pool, *circle[at:]]
    for design in ("ring", "difference"):
        places = pattern(design, k, pool + 1)
        before = set(rotations(circle, pattern(design, k, pool)))
        changed = set(rotations(wider, places)) - before
        containing = {subset for subset in changed if pool in subset}
        span = places[-1] + 1
        assert len(containing) == k
        assert len(changed) == span  # of M + 1
        if design == "ring":
            assert changed == containing


@settings(max_examples=25)
@given(pools, circular, seeds)
def test_a_plan_does_not_depend_on_which_sizes_are_asked_for(experts, design, seed):
    everything = plan(experts, design, seed)
    for k in range(1, len(experts) + 1):
        alone = plan(experts, design, seed, k=[k])
        assert alone[1:] == [row for row in everything if row.k == k]
