"""The synthetic domains: reproducible, short, varied, and right in what they compute."""

import itertools
import math
import re
import string
from collections import Counter
from fractions import Fraction

import pytest

from mergelaw.demo import DOMAINS, draw, entities
from mergelaw.errors import MergelawError

DRAW = 2000


def documents(domain, count, seed):
    return list(itertools.islice(draw(domain, seed), count))


def answers(domain, pattern):
    """The (match, response) of every prompt of a draw that the pattern describes completely."""
    found = [
        (match, text["response"])
        for text in documents(domain, DRAW, seed=1)
        if (match := re.fullmatch(pattern, text["prompt"]))
    ]
    assert len(found) > 20, "the pattern no longer describes the prompts"
    return found


def polynomial(text):
    """A polynomial's text as a function, read by Python and not by the code that wrote it."""
    source = re.sub(r"(\d)([xn(])", r"\1*\2", text).replace(")(", ")*(").replace("^", "**")
    return lambda x: eval(source, {"x": x, "n": x})


def test_there_are_nine_domains():
    assert list(DOMAINS) == [
        "algebra",
        "analysis",
        "geometry",
        "discrete",
        "number_theory",
        "code",
        "chemistry",
        "physics",
        "biology",
    ]


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_are_short_varied_and_reproducible(domain):
    texts = documents(domain, 6000, seed=0)
    pairs = [(text["prompt"], text["response"]) for text in texts]
    assert all(prompt and response for prompt, response in pairs)
    assert all((prompt + response).isascii() for prompt, response in pairs)
    assert max(len(prompt + response) for prompt, response in pairs) <= 200
    assert 40 < sum(len(prompt + response) for prompt, response in pairs) / 6000 < 100
    assert len(set(pairs)) >= 5000
    assert documents(domain, 100, seed=0) == texts[:100]
    assert documents(domain, 100, seed=1) != texts[:100]


def test_domains_share_no_document():
    counts = Counter(
        (text["prompt"], text["response"])
        for domain in DOMAINS
        for text in {text["prompt"]: text for text in documents(domain, 1000, seed=0)}.values()
    )
    assert max(counts.values()) == 1


def test_an_unknown_domain_is_refused():
    with pytest.raises(MergelawError, match="no synthetic domain is called 'alchemy'"):
        documents("alchemy", 1, seed=0)


@pytest.mark.parametrize("domain", DOMAINS)
def test_facts_do_not_depend_on_the_seed_and_are_asked_for_by_zipfs_law(domain):
    facts = entities(domain)
    assert len(facts) == 400
    assert all(len(attributes) == 4 for attributes in facts.values())
    asked = Counter()
    for seed in (0, 1):
        for text in documents(domain, DRAW, seed)[1::2]:
            words = set(re.findall(r"\w+", text["prompt"]))
            named = [name for name in facts if name in words]
            assert named
            asked.update(named)
            values = [value for name in named for value in facts[name].values()]
            assert any(value in text["response"] for value in values)
    first, *_, tenth = list(facts)[:10]
    assert asked[first] > 4 * asked[tenth] > 0


def test_phrasings_name_only_the_fields_there_are():
    allowed = {"one": "apv", "two": "apqvw", "pair": "abpvw"}
    for domain in DOMAINS.values():
        for kind, fields in allowed.items():
            for text in getattr(domain, kind):
                named = {name for part in text for _, name, *_ in string.Formatter().parse(part)}
                assert named - {None} <= set(fields)
                assert {"v", "w"} & set(fields) <= named


def test_equations_are_solved():
    for match, response in answers("algebra", r"Solve (x\^2.*) = 0\."):
        left = polynomial(match[1])
        roots = {int(root) for root in re.findall(r"x = (-?\d+)", response)}
        assert roots == {x for x in range(-99, 100) if left(x) == 0}
    for match, response in answers("algebra", r"Solve (\d+x .*) = (-?\d+)\."):
        x = int(response.rpartition(" ")[2])
        assert polynomial(match[1])(x) == int(match[2])
    for match, response in answers("algebra", r"Expand (.*)\."):
        assert all(polynomial(match[1])(x) == polynomial(response)(x) for x in range(-3, 4))


def test_derivatives_integrals_and_limits_are_right():
    h = Fraction(1, 10**6)
    for match, response in answers("analysis", r"Differentiate f\(x\) = (\d*x\^.*)\."):
        f, slope = polynomial(match[1]), polynomial(response.removeprefix("f'(x) = "))
        assert all(abs((f(x + h) - f(x - h)) / (2 * h) - slope(x)) < 1e-3 for x in (-2, 0, 3))
    for match, response in answers("analysis", r"Integrate (.*) from 0 to (\d+)\."):
        f, upper = polynomial(match[1]), int(match[2])
        # Simpson's rule is exact for polynomials of degree three.
        area = Fraction(upper, 6) * (f(0) + 4 * f(Fraction(upper, 2)) + f(upper))
        assert area == int(response.rpartition(" ")[2])
    for match, response in answers("analysis", r"Find the limit of \((.*)\)/\((.*)\)\."):
        far = Fraction(polynomial(match[1])(10**9), polynomial(match[2])(10**9))
        assert abs(far - Fraction(response.rpartition(" ")[2])) < 1e-6


def test_lengths_and_counts_are_right():
    for match, response in answers("geometry", r"A right triangle has legs (\d+) and (\d+)\..*"):
        assert int(response.rpartition(" ")[2]) == math.hypot(int(match[1]), int(match[2]))
    for match, response in answers("discrete", r"Ways to pick (\d+) of (\d+) .*"):
        k, n = int(match[1]), int(match[2])
        count = math.prod(range(n - k + 1, n + 1)) // math.prod(range(1, k + 1))
        assert response == f"C({n},{k}) = {count} ways"


def test_number_theory_is_right():
    for match, response in answers("number_theory", r"Invert (\d+) mod (\d+)"):
        a, modulus, inverse = int(match[1]), int(match[2]), int(response.rpartition(" ")[2])
        assert a * inverse % modulus == 1
    for match, response in answers("number_theory", r"gcd of (\d+) and (\d+) by Euclid"):
        common = int(response.rpartition(" ")[2])
        a, b = int(match[1]) // common, int(match[2]) // common
        assert (a * common, b * common) == (int(match[1]), int(match[2]))
        assert not any(a % n == b % n == 0 for n in range(2, min(a, b) + 1))
    for match, response in answers("number_theory", r"Factor (\d+) into primes"):
        number = int(match[1])
        factors = [int(one) for one in re.findall(r"\d+", response.rpartition("=")[2])]
        assert math.prod(factors) == number
        assert all(p % n for p in factors for n in range(2, math.isqrt(p) + 1))


def test_code_prints_what_python_prints(capsys):
    for match, response in answers("code", r"(x = \d+\n(?s:.*))"):
        exec(match[1], {})
        assert capsys.readouterr().out.strip() == response
    for match, response in answers("code", r">>> (sorted.*|\[.*|'.*)"):
        assert repr(eval(match[1])) == response


def atoms(side):
    """The atoms on one side of a reaction."""
    total = Counter()
    for term in side.split(" + "):
        amount, formula = re.fullmatch(r"(?:(\d+) )?(\S+)", term).groups()
        for symbol, count in re.findall(r"([A-Z][a-z]?)(\d*)", formula):
            total[symbol] += int(amount or 1) * int(count or 1)
    return total


def test_reactions_are_balanced():
    for prompt in (r"Burn (\d+) mol .*", r"React (\d+) mol .*"):
        for match, response in answers("chemistry", prompt):
            reaction, made = response.split(", ")
            left, right = reaction.split(" -> ")
            assert atoms(left) == atoms(right)
            amount, product = re.fullmatch(r"(\d+) mol (\S+)", made).groups()
            first = re.match(r"(\d*)", left)[1] or 1
            term = next(term for term in right.split(" + ") if term.split()[-1] == product)
            per = int(term.split()[0]) if " " in term else 1
            assert int(amount) * int(first) == int(match[1]) * per


def test_physics_has_the_right_numbers():
    for match, response in answers("physics", r"A body of (\d+) kg moves at (\d+) m/s\..*"):
        m, v = int(match[1]), int(match[2])
        assert response.endswith(f" = {m * v**2 / 2:.0f} J")
    for match, response in answers("physics", r"A (\d+) ohm wire is put on (\d+) V\..*"):
        resistance, voltage = int(match[1]), int(match[2])
        current, power = map(int, re.findall(r"= (\d+) ", response))
        assert (current * resistance, power) == (voltage, voltage**2 / resistance)


def test_strands_and_crosses_are_right():
    opposite = {"A": "T", "T": "A", "G": "C", "C": "G"}
    for match, response in answers("biology", r"Strand opposite to (\w+)\?"):
        assert list(response) == [opposite[base] for base in match[1]]
    for match, response in answers("biology", r"Cross (\w\w)(\w\w) x (\w\w)(\w\w)\."):
        for mother, father, ratio in zip(
            match.groups()[:2], match.groups()[2:], response.split("; "), strict=True
        ):
            young = Counter("".join(sorted(m + f)) for m in mother for f in father)
            shares = {kind: int(n) for n, kind in (part.split() for part in ratio.split(" : "))}
            scale = 4 // sum(shares.values())
            assert {kind: n * scale for kind, n in shares.items()} == young
