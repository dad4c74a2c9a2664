"""Whatever is in a configuration file: a Config, or a MergelawError of one line, nothing else."""

import copy
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw import config
from mergelaw.errors import MergelawError
from mergelaw.workflow.study import Study

ROOT = Path(__file__).resolve().parents[2]
DEMO = config.read(ROOT / "config" / "config.yaml")
DEMO |= {
    "experts": {"algebra": {}, "code": {"domains": ["code", "physics"]}, "physics": None},
    "baselines": {"multitask": {"training": {"epochs": 1}}},
    "training_seeds": [0, 1],
    "merges": {"m": {"base": "27k", "method": "ties", "experts": ["code"], "weights": [1.0]}},
}

words = st.sampled_from([*DEMO, *DEMO["domains"], *DEMO["bases"], "method", "training", "steps"])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | words
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(words | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
keyed = st.dictionaries(words | st.text(max_size=4), values, max_size=8)


def places(value, at=()):
    yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


PLACES = [place for place in places(DEMO) if place]


def mutated(data, place, change, junk):
    data = copy.deepcopy(data)
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    if change == "replace":
        parent[place[-1]] = junk
    elif change == "remove":
        del parent[place[-1]]
    elif isinstance(parent[place[-1]], dict):
        parent[place[-1]][str(junk)] = junk
    return data


def outcome(data):
    """None, or the error's text; anything but a MergelawError is raised."""
    try:
        parsed = config.parse(data)
    except MergelawError as error:
        assert "\n" not in str(error).replace("\\n", "") or "\n" in repr(data)
        return str(error)
    # What is valid can be resolved, unless files from outside are not there.
    try:
        assert Study(parsed).by_path
    except MergelawError:
        assert "path" in repr(data) or "files" in repr(data) or "dataset" in repr(data)
    return None


@settings(max_examples=150, deadline=None)
@given(values)
def test_junk_is_refused_in_words(data):
    assert outcome(data)


@settings(max_examples=150, deadline=None)
@given(keyed)
def test_junk_among_known_keys_is_refused_in_words(changes):
    outcome(DEMO | changes)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PLACES), st.sampled_from(["replace", "remove", "add"]), values)
def test_a_changed_configuration_is_valid_or_refused_in_words(place, change, junk):
    outcome(mutated(DEMO, place, change, junk))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_file_is_valid_or_refused_in_words(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("config") / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
    try:
        config.load(path)
    except MergelawError:
        pass
    else:
        raise AssertionError("200 characters are no study")


def test_the_one_they_all_start_from_is_valid():
    assert outcome(DEMO) is None
