"""Nine synthetic domains, small enough for two CPU cores and different enough to specialise on.

Half of a domain's documents are problems whose answers are computed, which reward a skill; the
other half asks for facts about invented entities, which reward memory. The facts belong to the
domain and not to the seed, so evaluation documents speak of what the training documents taught.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from mergelaw.errors import MergelawError

ENTITIES = 400

Problem = Callable[[Random], tuple[str, str]]
Phrasings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Domain:
    """What a domain's documents are drawn from.

    An entity's name is one syllable of each group. Phrasings are (prompt, response) with the
    fields a, b (entities), p, q (attributes) and v, w (their values).
    """

    problems: tuple[Problem, ...]
    syllables: tuple[str, str, str]
    attributes: dict[str, tuple[str, ...]]
    one: Phrasings  # attribute p of entity a is v
    two: Phrasings  # attributes p and q of entity a are v and w
    pair: Phrasings  # attribute p of entities a and b is v and w


def documents(domain: str, count: int, seed: int) -> list[dict[str, str]]:
    """The first ``count`` documents of a domain: dicts of ASCII ``prompt`` and ``response``.

    A longer draw with the same seed begins with the shorter one. Problems and facts alternate.
    Raises MergelawError for a domain that does not exist.
    """
    if domain not in DOMAINS:
        raise MergelawError(
            f"no synthetic domain is called {domain!r}: take one of {', '.join(DOMAINS)}"
        )
    # A string seeds Random by its digest, which unlike hash() is the same in every process.
    rng = Random(f"{domain} {seed}")
    texts = []
    for position in range(count):
        if position % 2 == 0:
            prompt, response = rng.choice(DOMAINS[domain].problems)(rng)
        else:
            prompt, response = _fact(domain, rng)
        texts.append({"prompt": prompt, "response": response})
    return texts


@cache
def entities(domain: str) -> dict[str, dict[str, str]]:
    """The domain's 400 invented entities, most frequent first: {name: {attribute: value}}."""
    rng = Random(f"{domain} entities")
    groups = [group.split() for group in DOMAINS[domain].syllables]
    names = ["".join(parts) for parts in itertools.product(*groups)]
    attributes = DOMAINS[domain].attributes
    return {
        name: {attribute: rng.choice(values) for attribute, values in attributes.items()}
        for name in rng.sample(names, ENTITIES)
    }


# Zipf's law with exponent 1: the entity of rank r is asked for in proportion to 1 / r.
_ZIPF = list(itertools.accumulate(1 / rank for rank in range(1, ENTITIES + 1)))


def _fact(domain: str, rng: Random) -> tuple[str, str]:
    known = entities(domain)
    a, b = rng.choices(list(known), cum_weights=_ZIPF, k=2)
    p, q = rng.sample(list(DOMAINS[domain].attributes), 2)
    fields = {"a": a, "b": b, "p": p, "q": q, "v": known[a][p]}
    kind = rng.randrange(5)
    if kind == 0:
        phrasings = DOMAINS[domain].one
    elif kind == 1 or a == b:
        phrasings = DOMAINS[domain].two
        fields["w"] = known[a][q]
    else:
        phrasings = DOMAINS[domain].pair
        fields["w"] = known[b][p]
    prompt, response = rng.choice(phrasings)
    return prompt.format(**fields), response.format(**fields)


def _nonzero(rng: Random, largest: int) -> int:
    return rng.choice((-1, 1)) * rng.randint(1, largest)


def _polynomial(coefficients: list[int], variable: str = "x") -> str:
    """Text of a polynomial; the coefficient of the highest power comes first."""
    text = ""
    for place, coefficient in enumerate(coefficients):
        power = len(coefficients) - 1 - place
        if coefficient == 0:
            continue
        sign = "-" if coefficient < 0 else "+"
        size = "" if abs(coefficient) == 1 and power else str(abs(coefficient))
        symbol = variable if power == 1 else f"{variable}^{power}" if power else ""
        if text:
            text += f" {sign} {size}{symbol}"
        else:
            text = f"{'-' if coefficient < 0 else ''}{size}{symbol}"
    return text or "0"


def _ratio(numerator: int, denominator: int) -> str:
    divisor = math.gcd(numerator, denominator)
    numerator, denominator = numerator // divisor, denominator // divisor
    return str(numerator) if denominator == 1 else f"{numerator}/{denominator}"


# Algebra: answers are chains of equations.


def _linear(rng: Random) -> tuple[str, str]:
    a, b, x = rng.randint(2, 12), _nonzero(rng, 30), _nonzero(rng, 15)
    return f"Solve {_polynomial([a, b])} = {a * x + b}.", f"{a}x = {a * x}, so x = {x}"


def _quadratic(rng: Random) -> tuple[str, str]:
    low, high = sorted((_nonzero(rng, 30), _nonzero(rng, 30)))
    factors = f"({_polynomial([1, -low])})({_polynomial([1, -high])})"
    roots = f"x = {low}" if low == high else f"x = {low} or x = {high}"
    equation = _polynomial([1, -low - high, low * high])
    return f"Solve {equation} = 0.", f"{factors} = 0, so {roots}"


def _system(rng: Random) -> tuple[str, str]:
    x, y = rng.randint(-40, 40), rng.randint(-40, 40)
    return (
        f"Solve x + y = {x + y} and x - y = {x - y}.",
        f"2x = {2 * x}, so x = {x}, y = {y}",
    )


def _expansion(rng: Random) -> tuple[str, str]:
    a, b, c = rng.randint(2, 6), _nonzero(rng, 12), _nonzero(rng, 12)
    return (
        f"Expand ({_polynomial([a, b])})({_polynomial([1, c])}).",
        _polynomial([a, a * c + b, b * c]),
    )


# Analysis: answers are sentences that name the theorem's verb.


def _derivative(rng: Random) -> tuple[str, str]:
    a, b, c = rng.randint(1, 9), _nonzero(rng, 9), _nonzero(rng, 9)
    n = rng.randint(3, 6)
    coefficients = [a, *[0] * (n - 3), b, c, 0]
    slopes = [value * (n - place) for place, value in enumerate(coefficients[:-1])]
    return (
        f"Differentiate f(x) = {_polynomial(coefficients)}.",
        f"f'(x) = {_polynomial(slopes)}",
    )


def _chain(rng: Random) -> tuple[str, str]:
    a, k, b = rng.randint(2, 12), rng.randint(2, 9), _nonzero(rng, 9)
    inner = _polynomial([k, b])
    outer, sign, slope = rng.choice(
        (("exp", "", "exp"), ("sin", "", "cos"), ("cos", "-", "sin"), ("sinh", "", "cosh"))
    )
    return (
        f"Differentiate f(x) = {a} {outer}({inner}).",
        f"By the chain rule, f'(x) = {sign}{a * k} {slope}({inner})",
    )


def _integral(rng: Random) -> tuple[str, str]:
    n, a, b = rng.randint(1, 3), rng.randint(1, 6), rng.randint(-9, 9)
    upper = rng.randint(1, 6)
    leading = a * (n + 1)
    integrand = _polynomial([leading, *[0] * (n - 1), b])
    antiderivative = _polynomial([a, *[0] * (n - 1), b, 0])
    return (
        f"Integrate {integrand} from 0 to {upper}.",
        f"An antiderivative is {antiderivative}, hence {a * upper ** (n + 1) + b * upper}",
    )


def _limit(rng: Random) -> tuple[str, str]:
    a, b, c, d = rng.randint(1, 20), _nonzero(rng, 20), rng.randint(1, 20), _nonzero(rng, 20)
    return (
        f"Find the limit of ({_polynomial([a, b], 'n')})/({_polynomial([c, d], 'n')}).",
        f"The sequence converges to {_ratio(a, c)}",
    )


# Geometry: answers are a formula, then a number.


def _rectangle(rng: Random) -> tuple[str, str]:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return (
        f"A rectangle has sides {a} and {b}. Area and perimeter?",
        f"area {a * b}, perimeter {2 * (a + b)}",
    )


def _hypotenuse(rng: Random) -> tuple[str, str]:
    m = rng.randint(2, 9)
    n, scale = rng.randint(1, m - 1), rng.randint(1, 40)
    a, b, c = (scale * side for side in (m * m - n * n, 2 * m * n, m * m + n * n))
    return (
        f"A right triangle has legs {a} and {b}. Hypotenuse?",
        f"sqrt({a * a} + {b * b}) = {c}",
    )


def _circle(rng: Random) -> tuple[str, str]:
    r, h = rng.randint(2, 30), rng.randint(2, 60)
    solid, volume = rng.choice(
        (("cylinder", f"{r * r * h} pi"), ("cone", f"{_ratio(r * r * h, 3)} pi"))
    )
    return f"A {solid} has radius {r} and height {h}. Volume?", f"base {r * r} pi, volume {volume}"


def _midpoint(rng: Random) -> tuple[str, str]:
    x, y, dx, dy = (rng.randint(-12, 12) for _ in range(4))
    return (
        f"Midpoint of ({x}, {y}) and ({x + 2 * dx}, {y + 2 * dy})?",
        f"M = ({x + dx}, {y + dy})",
    )


def _triangle(rng: Random) -> tuple[str, str]:
    a, b = rng.randint(15, 80), rng.randint(15, 80)
    c = 180 - a - b
    largest = max(a, b, c)
    kind = "right" if largest == 90 else "obtuse" if largest > 90 else "acute"
    return f"Two angles of a triangle are {a} and {b} deg.", f"third angle {c} deg, {kind}"


# Discrete mathematics: answers count.


def _choose(rng: Random) -> tuple[str, str]:
    n = rng.randint(4, 60)
    k = rng.randint(2, min(n - 1, 5))
    thing = rng.choice(("cards", "books", "coins", "seats", "flags", "nodes"))
    return f"Ways to pick {k} of {n} {thing}?", f"C({n},{k}) = {math.comb(n, k)} ways"


def _anagrams(rng: Random) -> tuple[str, str]:
    word = "".join(rng.choices("abcd", k=rng.randint(4, 7)))
    repeats = [count for _, count in sorted(Counter(word).items()) if count > 1]
    total = math.factorial(len(word)) // math.prod(map(math.factorial, repeats))
    below = "".join(f"/{count}!" for count in repeats)
    return f"Count the anagrams of {word}.", f"{len(word)}!{below} = {total} ways"


def _bipartite(rng: Random) -> tuple[str, str]:
    m, n = rng.randint(2, 99), rng.randint(2, 99)
    return f"Vertices and edges of K_{m},{n}?", f"|V| = {m + n}, |E| = {m * n}"


def _set_operation(rng: Random) -> tuple[str, str]:
    a, b = (set(rng.sample(range(1, 10), rng.randint(2, 4))) for _ in range(2))
    name, members = rng.choice((("union", a | b), ("meet", a & b), ("minus", a - b)))
    first, second, answer = (
        "{" + ",".join(map(str, sorted(group))) + "}" for group in (a, b, members)
    )
    return f"{first} {name} {second}?", f"{answer}, size {len(members)}"


# Number theory: answers show the steps of the algorithm.


def _gcd(rng: Random) -> tuple[str, str]:
    common = rng.randint(1, 12)
    a, b = common * rng.randint(5, 60), common * rng.randint(2, 40)
    remainders = [max(a, b), min(a, b)]
    while remainders[-1]:
        remainders.append(remainders[-2] % remainders[-1])
    return (
        f"gcd of {a} and {b} by Euclid",
        f"{' > '.join(map(str, remainders))}; gcd {math.gcd(a, b)}",
    )


def _power_residue(rng: Random) -> tuple[str, str]:
    base, exponent, modulus = rng.randint(2, 60), rng.randint(2, 40), rng.randint(3, 30)
    return (
        f"Reduce {base}^{exponent} mod {modulus}",
        f"{base} == {base % modulus}, power == {pow(base, exponent, modulus)}",
    )


def _factorisation(rng: Random) -> tuple[str, str]:
    number = rng.randint(2, 5000)
    rest, factor, factors = number, 2, []
    while rest > 1:
        while rest % factor == 0:
            factors.append(factor)
            rest //= factor
        factor += 1
    if len(factors) == 1:
        return f"Factor {number} into primes", f"{number} is prime"
    return f"Factor {number} into primes", f"{number} = {' * '.join(map(str, factors))}"


def _inverse(rng: Random) -> tuple[str, str]:
    modulus = rng.randint(5, 150)
    a = rng.choice([n for n in range(2, modulus) if math.gcd(n, modulus) == 1])
    inverse = pow(a, -1, modulus)
    return (
        f"Invert {a} mod {modulus}",
        f"{a} * {inverse} = {a * inverse} == 1, inverse {inverse}",
    )


# Code: answers are what the interpreter prints.


def _run(expression: str) -> tuple[str, str]:
    # The expression is one of ours, so evaluating it is safe, and the answer is Python's own.
    return f">>> {expression}", repr(eval(expression))


def _list_expression(rng: Random) -> tuple[str, str]:
    values = [rng.randint(0, 20) for _ in range(rng.randint(3, 5))]
    template = rng.choice(
        (
            "sorted({0})",
            "sorted({0}, reverse=True)",
            "{0}[::-1]",
            "{0}[{1}:]",
            "max({0}) - min({0})",
            "sum({0}[:{1}])",
            "[x + {1} for x in {0}]",
        )
    )
    return _run(template.format(values, rng.randint(1, 3)))


def _string_expression(rng: Random) -> tuple[str, str]:
    word = "".join(rng.choices("abcxyz", k=rng.randint(4, 8)))
    template = rng.choice(
        ("{0!r}[::-1]", "{0!r}.upper()", "{0!r} * 2", "sorted({0!r})", "{0!r}.count({0!r}[{1}])")
    )
    return _run(template.format(word, rng.randint(0, 3)))


def _comprehension(rng: Random) -> tuple[str, str]:
    a, b, stop = rng.randint(2, 20), rng.randint(0, 20), rng.randint(3, 6)
    template = rng.choice(
        ("[{0} * i + {1} for i in range({2})]", "{{i: {0} * i + {1} for i in range({2})}}")
    )
    return _run(template.format(a, b, stop))


def _loop(rng: Random) -> tuple[str, str]:
    x, factor, rounds, step = (
        rng.randint(low, high) for low, high in ((0, 20), (2, 5), (2, 4), (0, 9))
    )
    value = x
    for _ in range(rounds):
        value = value * factor + step
    return f"x = {x}\nfor i in range({rounds}):\n    x = x * {factor} + {step}\nprint(x)", str(
        value
    )


# Chemistry: answers are formulas, balanced equations and molar masses.

_MASSES = {"C": 12, "H": 1, "N": 14, "O": 16, "S": 32}
_METALS = {"Li": 1, "Na": 1, "K": 1, "Mg": 2, "Ca": 2, "Zn": 2, "Fe": 3, "Al": 3, "Cr": 3, "Ti": 4}
_NONMETALS = {"F2": 1, "Cl2": 1, "Br2": 1, "I2": 1, "O2": 2, "S2": 2, "N2": 3}


def _formula(counts: dict[str, int]) -> str:
    return "".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in counts.items() if n)


def _amount(n: int, formula: str) -> str:
    return formula if n == 1 else f"{n} {formula}"


def _fuel(rng: Random) -> dict[str, int]:
    # No more oxygen than carbon, so that every fuel needs oxygen to burn.
    carbon = rng.randint(1, 18)
    oxygen = rng.randint(0, min(carbon, 4))
    return {"C": carbon, "H": 2 * rng.randint(1, carbon + 1), "O": oxygen}


def _combustion(rng: Random) -> tuple[str, str]:
    fuel, amount = _fuel(rng), rng.randint(1, 30)
    # Four molecules of fuel become 4C CO2 and 2H H2O, and what oxygen they lack comes as O2.
    balance = [4, 4 * fuel["C"] + fuel["H"] - 2 * fuel["O"], 4 * fuel["C"], 2 * fuel["H"]]
    burnt, oxygen, dioxide, water = (n // math.gcd(*balance) for n in balance)
    return (
        f"Burn {amount} mol {_formula(fuel)} in O2",
        f"{_amount(burnt, _formula(fuel))} + {_amount(oxygen, 'O2')}"
        f" -> {_amount(dioxide, 'CO2')} + {_amount(water, 'H2O')}, {amount * fuel['C']} mol CO2",
    )


def _synthesis(rng: Random) -> tuple[str, str]:
    metal, nonmetal = rng.choice(list(_METALS)), rng.choice(list(_NONMETALS))
    charge, valence = _METALS[metal], _NONMETALS[nonmetal]
    common = math.lcm(charge, valence)
    atoms, others = common // charge, common // valence
    salt = _formula({metal: atoms, nonmetal[:-1]: others})
    # The non-metal comes in pairs.
    amounts = (2 * atoms, others, 2)
    metals, gas, salts = (n // math.gcd(*amounts) for n in amounts)
    batches = rng.randint(1, 40)
    return (
        f"React {metals * batches} mol {metal} with {nonmetal}",
        f"{_amount(metals, metal)} + {_amount(gas, nonmetal)} -> {_amount(salts, salt)},"
        f" {salts * batches} mol {salt}",
    )


def _molar_mass(rng: Random) -> tuple[str, str]:
    fuel = _fuel(rng)
    counts = {
        "C": fuel["C"],
        "H": fuel["H"],
        "N": rng.randint(0, 3),
        "O": fuel["O"],
        "S": rng.randint(0, 2),
    }
    mass = sum(_MASSES[symbol] * n for symbol, n in counts.items())
    return f"Molar mass of {_formula(counts)}", f"M = {mass} g/mol"


def _moles(rng: Random) -> tuple[str, str]:
    counts, amount = _fuel(rng), rng.randint(2, 9)
    mass = sum(_MASSES[symbol] * n for symbol, n in counts.items())
    return (
        f"Moles in {mass * amount} g of {_formula(counts)}",
        f"M = {mass} g/mol, n = {amount} mol",
    )


# Physics: answers are a law with its numbers and units.


def _force(rng: Random) -> tuple[str, str]:
    m, a = rng.randint(2, 99), rng.randint(2, 60)
    return (
        f"A body of {m} kg accelerates at {a} m/s^2. Force?",
        f"F = m a = {m} kg * {a} m/s^2 = {m * a} N",
    )


def _speed(rng: Random) -> tuple[str, str]:
    u, a, t = rng.randint(0, 30), rng.randint(1, 9), rng.randint(2, 20)
    return (
        f"A cart at {u} m/s gains {a} m/s^2 for {t} s. Speed?",
        f"v = u + a t = {u} + {a * t} = {u + a * t} m/s",
    )


def _ohm(rng: Random) -> tuple[str, str]:
    current, resistance = rng.randint(2, 40), rng.randint(2, 60)
    return (
        f"A {resistance} ohm wire is put on {resistance * current} V. Current and power?",
        f"I = U/R = {current} A, P = U I = {resistance * current * current} W",
    )


def _energy(rng: Random) -> tuple[str, str]:
    m, v = 2 * rng.randint(1, 50), rng.randint(2, 60)
    return (
        f"A body of {m} kg moves at {v} m/s. Kinetic energy?",
        f"E = m v^2/2 = {m // 2} * {v * v} = {m * v * v // 2} J",
    )


def _wave(rng: Random) -> tuple[str, str]:
    frequency, length = rng.randint(2, 99), rng.randint(2, 60)
    return (
        f"A wave of {frequency} Hz is {length} m long. Speed?",
        f"c = f L = {frequency} Hz * {length} m = {frequency * length} m/s",
    )


# Biology: answers are strands, proteins and ratios.

_COMPLEMENT = str.maketrans("ATGC", "TACG")
_CODONS = {
    "UUU": "Phe",
    "CUG": "Leu",
    "AUU": "Ile",
    "AUG": "Met",
    "GUU": "Val",
    "UCU": "Ser",
    "CCG": "Pro",
    "ACU": "Thr",
    "GCA": "Ala",
    "UAU": "Tyr",
    "CAC": "His",
    "CAA": "Gln",
    "AAC": "Asn",
    "AAA": "Lys",
    "GAU": "Asp",
    "GAA": "Glu",
    "UGC": "Cys",
    "UGG": "Trp",
    "CGU": "Arg",
    "GGC": "Gly",
}


def _strand(rng: Random) -> tuple[str, str]:
    strand = "".join(rng.choices("ATGC", k=rng.randint(6, 9)))
    return f"Strand opposite to {strand}?", f"{strand.translate(_COMPLEMENT)}"


def _transcript(rng: Random) -> tuple[str, str]:
    strand = "".join(rng.choices("ATGC", k=rng.randint(6, 9)))
    rna = strand.translate(_COMPLEMENT).replace("T", "U")
    return f"Transcribe the template {strand}.", f"mRNA {rna}"


def _protein(rng: Random) -> tuple[str, str]:
    codons = rng.choices(list(_CODONS), k=3)
    return f"Translate {' '.join(codons)}.", "-".join(_CODONS[codon] for codon in codons)


def _cross(rng: Random) -> tuple[str, str]:
    letters = rng.sample("ABDEFGHKLMNR", 2)
    parents = [
        [rng.choice((gene * 2, gene + gene.lower(), gene.lower() * 2)) for gene in letters]
        for _ in range(2)
    ]
    ratios = []
    for mother, father in zip(*parents, strict=True):
        # Capital letters sort first, so a heterozygote is always written Aa.
        young = Counter("".join(sorted(m + f)) for m in mother for f in father)
        divisor = math.gcd(*young.values())
        ratios.append(" : ".join(f"{n // divisor} {kind}" for kind, n in sorted(young.items())))
    return f"Cross {''.join(parents[0])} x {''.join(parents[1])}.", "; ".join(ratios)


DOMAINS: dict[str, Domain] = {
    "algebra": Domain(
        problems=(_linear, _quadratic, _system, _expansion),
        syllables=(
            "Ab Gal Noe Ded Kro Art Jor Wed Hil Zas",
            "el oi eth ek in urd an ber",
            "ian ring oid mod ix ar",
        ),
        attributes={
            "order": ("12", "24", "36", "60", "120", "168"),
            "kind": ("group", "ring", "field", "module", "lattice"),
            "rank": ("1", "2", "3", "4", "5"),
            "centre": ("trivial", "cyclic", "abelian", "simple"),
        },
        one=(
            ("Give the {p} of {a}.", "{p}({a}) = {v}"),
            ("Let G = {a}. Find {p}(G).", "{p}(G) = {v}"),
            ("Recall {p}({a}).", "{p}({a}) = {v}"),
            ("Let H be isomorphic to {a}. Find {p}(H).", "{p}(H) = {v}"),
        ),
        two=(
            ("Find {p} and {q} of {a}.", "{p}({a}) = {v}, {q}({a}) = {w}"),
            ("Let G = {a}. Find {p}(G) and {q}(G).", "{p}(G) = {v}, {q}(G) = {w}"),
        ),
        pair=(
            ("Find {p}({a}) and {p}({b}).", "{p}({a}) = {v}, {p}({b}) = {w}"),
            ("Let G = {a}, H = {b}. Compare {p}.", "{p}(G) = {v}, {p}(H) = {w}"),
        ),
    ),
    "analysis": Domain(
        problems=(_derivative, _chain, _integral, _limit),
        syllables=(
            "Cau Weier Lip Rie Bana Fou Hoe Sobo Leb Diri",
            "sto cha lo mi rel bes na vi",
            "nal ble dor tsk ne ric",
        ),
        attributes={
            "norm": ("supremum", "energy", "variation", "graph"),
            "limit": ("zero", "one", "infinity", "e", "pi"),
            "continuity": ("uniform", "pointwise", "absolute", "one-sided"),
            "support": ("compact", "bounded", "dense", "empty", "open"),
        },
        one=(
            ("Which {p} does the {a} function have?", "By definition its {p} is {v}"),
            ("State the {p} of the {a} function.", "The {p} of {a} is {v}"),
            ("Suppose f is a {a} function. Its {p}?", "Then the {p} of f is {v}"),
            ("What can be said on the {p} of {a}?", "It is known that the {p} is {v}"),
        ),
        two=(
            ("State {p} and {q} of the {a} function.", "The {p} is {v} and the {q} is {w}"),
            ("Suppose f is {a}. Its {p} and {q}?", "Then the {p} is {v} and the {q} is {w}"),
        ),
        pair=(
            ("State the {p} of {a} and of {b}.", "The {p} is {v} and {w} respectively"),
            ("Let f be {a} and g be {b}. Their {p}?", "Then f has {p} {v} and g has {p} {w}"),
        ),
    ),
    "geometry": Domain(
        problems=(_rectangle, _hypotenuse, _circle, _midpoint, _triangle),
        syllables=(
            "Tri Pen Hex Rho Del Oct Iso Kit Sca Ort",
            "ga mbo lta no qua ri pla co",
            "gon hedron form tope plex ane",
        ),
        attributes={
            "faces": ("4", "6", "8", "12", "20"),
            "mirror": ("vertical", "diagonal", "radial", "missing"),
            "tilt": ("30 deg", "45 deg", "60 deg", "75 deg"),
            "shape": ("flat", "convex", "hollow", "twisted", "pointed"),
        },
        one=(
            ("Draw a {a}. Which {p}?", "{p}: {v}"),
            ("In the figure is a {a}. Name the {p}.", "{a}, {p}: {v}"),
            ("{p} of a {a}?", "{p}: {v}"),
            ("We cut a {a} from paper. {p}?", "{a}, {p}: {v}"),
        ),
        two=(
            ("Draw a {a}. Which {p} and {q}?", "{p}: {v}, {q}: {w}"),
            ("{p} and {q} of a {a}?", "{p}: {v}, {q}: {w}"),
        ),
        pair=(
            ("Draw a {a} and a {b}. Which {p}?", "{p}: first {v}, second {w}"),
            ("A {a} touches a {b}. {p} of each?", "{p}: first {v}, second {w}"),
        ),
    ),
    "discrete": Domain(
        problems=(_choose, _anagrams, _bipartite, _set_operation),
        syllables=(
            "Ham Pet Ram Kur Tur Dij Kon Men Hal Vor",
            "il er sey at an ig or ev",
            "graph ode path cyc net tree",
        ),
        attributes={
            "colours": ("two", "three", "four", "five", "six"),
            "girth": ("three", "four", "five", "seven"),
            "genus": ("none", "one", "two", "many"),
            "matching": ("perfect", "maximal", "greedy", "stable", "absent"),
        },
        one=(
            ("How is the {p} in {a}?", "[{p} -> {v}]"),
            ("{a} has which {p}?", "[{p} -> {v}]"),
            ("Look up {p} for {a}.", "{a} [{p} -> {v}]"),
            ("Every {a} graph has one {p}: which?", "{a} [{p} -> {v}]"),
        ),
        two=(
            ("{a} has which {p} and {q}?", "[{p} -> {v}] [{q} -> {w}]"),
            ("Look up {p} and {q} for {a}.", "{a} [{p} -> {v}] [{q} -> {w}]"),
        ),
        pair=(
            ("Look up {p} for {a} and {b}.", "{a} [{p} -> {v}], {b} [{p} -> {w}]"),
            ("{a} and {b} have which {p}?", "{a} [{p} -> {v}], {b} [{p} -> {w}]"),
        ),
    ),
    "number_theory": Domain(
        problems=(_gcd, _power_residue, _factorisation, _inverse),
        syllables=(
            "fer mer sie car pel dio leg jac wie bern",
            "mat sen rpi mic ell phan end obi",
            "ic al ine ous ary ide",
        ),
        attributes={
            "residue": ("1 mod 4", "3 mod 4", "1 mod 3", "2 mod 3", "5 mod 6"),
            "class": ("perfect", "abundant", "deficient", "amicable"),
            "base": ("2", "3", "5", "7", "10"),
            "density": ("0", "1/2", "1/3", "1/4"),
        },
        one=(
            ("Numbers that are {a}: {p}", "all {a} n: {p} = {v}"),
            ("If n is {a}, its {p}", "n is {a}, thus {p} = {v}"),
            ("Prove the {p} of {a} numbers", "all {a} n: {p} = {v}"),
            ("Is there a {p} for {a} n", "n is {a}, thus {p} = {v}"),
        ),
        two=(
            ("Numbers that are {a}: {p}, {q}", "all {a} n: {p} = {v}; {q} = {w}"),
            ("If n is {a}, its {p} and {q}", "n is {a}, thus {p} = {v}; {q} = {w}"),
        ),
        pair=(
            ("If n is {a} and m is {b}, their {p}", "n: {p} = {v}; m: {p} = {w}"),
            ("The {p} of {a} and {b} numbers", "{a} n: {p} = {v}; {b} m: {p} = {w}"),
        ),
    ),
    "code": Domain(
        problems=(_list_expression, _string_expression, _comprehension, _loop),
        syllables=(
            "py lib sys net arg fmt buf log tok str",
            "_par _sor _map _hash _pool _io _csv _xm",
            "ser s_x kit l2 ify _db",
        ),
        attributes={
            "returns": ("int", "str", "list", "dict", "None"),
            "raises": ("KeyError", "ValueError", "TypeError", "OSError"),
            "cost": ("O(1)", "O(n)", "O(n*n)", "O(log n)"),
            "since": ("3.7", "3.8", "3.9", "3.10", "3.11"),
        },
        one=(
            (">>> {a}.__{p}__", "<{v}>"),
            (">>> import {a}; print({a}.{p})", "<{v}>"),
            (">>> help({a})['{p}']", "def {a}(): # {p}: {v}"),
            ("# docs of {a}: {p}", "def {a}(): # {p}: {v}"),
        ),
        two=(
            (">>> {a}.{p}, {a}.{q}", "(<{v}>, <{w}>)"),
            ("# docs of {a}: {p}, {q}", "def {a}(): # {p}: {v}, {q}: {w}"),
        ),
        pair=(
            (">>> {a}.{p}, {b}.{p}", "(<{v}>, <{w}>)"),
            (">>> import {a}, {b}; {a}.{p}, {b}.{p}", "(<{v}>, <{w}>)"),
        ),
    ),
    "chemistry": Domain(
        problems=(_combustion, _synthesis, _molar_mass, _moles),
        syllables=(
            "meth chlor sulf nitr brom phos flu iod cyan benz",
            "a o i an yl ox et in",
            "cate mide tene dol nane fone",
        ),
        attributes={
            "colour": ("white", "yellow", "green", "violet", "clear"),
            "state": ("solid", "liquid", "gas", "gel"),
            "smell": ("sweet", "sharp", "faint", "rotten", "nutty"),
            "solvent": ("water", "ether", "hexane", "acetone"),
        },
        one=(
            ("A flask holds {a}. Observe the {p}.", "Observed: {v}"),
            ("Data sheet, {a}, {p}", "{a}: {v}"),
            ("We distil {a}. {p}?", "Observed: {v}"),
            ("Label a jar of {a} with its {p}", "{a}: {v}"),
        ),
        two=(
            ("Data sheet, {a}, {p} and {q}", "{a}: {v}, {w}"),
            ("A flask holds {a}. Observe {p} and {q}.", "Observed: {v}, {w}"),
        ),
        pair=(
            ("Data sheet, {a} and {b}, {p}", "{a}: {v}; {b}: {w}"),
            ("We mix {a} with {b}. Each one's {p}?", "Observed: {v} + {w}"),
        ),
    ),
    "physics": Domain(
        problems=(_force, _speed, _ohm, _energy, _wave),
        syllables=(
            "grav phot neut mes quar lept bos tach plas magn",
            "i o u at er on ar el",
            "on ino tron ium eter aton",
        ),
        attributes={
            "spin": ("0", "1/2", "1", "3/2"),
            "charge": ("+1", "-1", "+2/3", "-1/3", "neutral"),
            "mass": ("2 MeV", "5 MeV", "8 MeV", "40 MeV", "90 MeV"),
            "lifetime": ("3 ns", "7 us", "9 ms", "endless"),
        },
        one=(
            ("A detector sees a {a}. Measure its {p}.", "We measure {p} {v} for the {a}"),
            ("Which {p} does the {a} carry?", "The {a} carries {p} {v}"),
            ("A beam of {a} particles: {p}?", "We measure {p} {v}"),
            ("In a field the {a} shows its {p}:", "The {a} carries {p} {v}"),
        ),
        two=(
            ("A detector sees a {a}. Measure {p} and {q}.", "We measure {p} {v} and {q} {w}"),
            ("Which {p} and {q} does the {a} carry?", "The {a} carries {p} {v} and {q} {w}"),
        ),
        pair=(
            ("A {a} hits a {b}. Measure {p}.", "We measure {p} {v} before and {w} after"),
            ("{a} or {b}: which {p}?", "The {a} carries {p} {v} and the {b} {w}"),
        ),
    ),
    "biology": Domain(
        problems=(_strand, _transcript, _protein, _cross),
        syllables=(
            "Flo Fau Myx Bry Cep Ura Pte Zyg Lac Ros",
            "ri ti no ba xo lu do mi",
            "ella don ria psis ium nax",
        ),
        attributes={
            "home": ("marsh", "reef", "forest", "desert", "tundra"),
            "food": ("algae", "insects", "seeds", "nectar", "fish"),
            "waking": ("dawn", "night", "noon", "spring"),
            "coat": ("scales", "fur", "feathers", "slime", "shell"),
        },
        one=(
            ("What is the {p} of {a}?", "{a} has evolved {v} as its {p}"),
            ("A biologist studies {a}. Its {p}?", "Its {p} was {v} in the wild"),
            ("Field notes on {a}, {p}.", "{a} has evolved {v} as its {p}"),
            ("How did {a} adapt its {p}?", "Its {p} was {v} in the wild"),
        ),
        two=(
            ("Field notes on {a}, {p} and {q}.", "{a} has evolved {v} as {p} and {w} as {q}"),
            ("What are {p} and {q} of {a}?", "Its {p} was {v} and its {q} {w} in the wild"),
        ),
        pair=(
            ("Do {a} and {b} share their {p}?", "{a} has {v} and {b} has {w}"),
            ("Field notes on {a} and {b}, {p}.", "The first has {v}, the second {w}"),
        ),
    ),
}
