"""Documents of nine synthetic domains that two processor cores can train on in seconds.

Half of a domain's documents are problems with computed answers, which test skill. The other half
are questions about invented entities, which test memory. Entities depend on the domain but not on
the seed, so evaluation documents ask for facts that training taught.
"""

import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from random import Random

from mergelaw.demo.problems import PROBLEMS, Problem
from mergelaw.errors import MergelawError, nearest

GENERATOR_VERSION = 1
"""Version of the generators, part of the key of every synthetic corpus.

Raise it in any commit that changes a document: then corpora are written anew and the old ones are
not taken for the new.
"""

ENTITIES = 400
# Zipf's law with exponent 1: questions name the entity of rank r with a probability ~ 1 / r.
_ZIPF = list(itertools.accumulate(1 / rank for rank in range(1, ENTITIES + 1)))


@dataclass(frozen=True)
class Domain:
    """Generators of a domain's problems and the text of its facts, as facts.toml describes it."""

    problems: tuple[Problem, ...]
    syllables: list[str]
    attributes: dict[str, list[str]]
    one: list[tuple[str, str]]
    two: list[tuple[str, str]]
    pair: list[tuple[str, str]]


_FACTS = tomllib.loads((resources.files(__package__) / "facts.toml").read_text(encoding="utf-8"))
DOMAINS = {name: Domain(problems, **_FACTS[name]) for name, problems in PROBLEMS.items()}


def draw(domain: str, seed: int) -> Iterator[dict[str, str]]:
    """Generate documents of a domain without end: dicts of ASCII ``prompt`` and ``response``.

    Problems and facts alternate. Raises MergelawError for an unknown domain.
    """
    if domain not in DOMAINS:
        raise MergelawError(f"no synthetic domain is called {domain!r}{nearest(domain, DOMAINS)}")
    # Random hashes a string seed with SHA-512, so every process draws the same documents.
    rng = Random(f"{domain} {seed}")
    for position in itertools.count():
        if position % 2 == 0:
            prompt, response = rng.choice(DOMAINS[domain].problems)(rng)
        else:
            prompt, response = _fact(domain, rng)
        yield {"prompt": prompt, "response": response}


@cache
def entities(domain: str) -> dict[str, dict[str, str]]:
    """The domain's 400 invented entities, most frequent first: {name: {attribute: value}}."""
    rng = Random(f"{domain} entities")
    groups = [group.split() for group in DOMAINS[domain].syllables]
    names = ["".join(syllables) for syllables in itertools.product(*groups)]
    attributes = DOMAINS[domain].attributes
    return {
        name: {attribute: rng.choice(values) for attribute, values in attributes.items()}
        for name in rng.sample(names, ENTITIES)
    }


def _fact(domain: str, rng: Random) -> tuple[str, str]:
    """Prompt and response about one or two entities, with one or two attributes."""
    facts = entities(domain)
    a, b = rng.choices(list(facts), cum_weights=_ZIPF, k=2)
    p, q = rng.sample(list(DOMAINS[domain].attributes), 2)
    fields = {"a": a, "b": b, "p": p, "q": q, "v": facts[a][p]}
    kind = rng.randrange(5)
    if kind == 0:
        phrasings = DOMAINS[domain].one
    elif kind == 1 or a == b:
        phrasings = DOMAINS[domain].two
        fields["w"] = facts[a][q]
    else:
        phrasings = DOMAINS[domain].pair
        fields["w"] = facts[b][p]
    prompt, response = rng.choice(phrasings)
    return prompt.format(**fields), response.format(**fields)
