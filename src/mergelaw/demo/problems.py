"""Problems with computed answers, four or five kinds per domain.

A problem is a function that takes a random generator and returns a prompt and a response. The order
of random draws determines the documents: raise GENERATOR_VERSION when it changes.
"""

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from random import Random

Text = tuple[str, str]
Problem = Callable[[Random], Text]


def _nonzero(rng: Random, largest: int) -> int:
    return rng.choice((-1, 1)) * rng.randint(1, largest)


def _polynomial(coefficients: list[int], variable: str = "x") -> str:
    """A polynomial as text; the coefficient of the highest power comes first."""
    text = ""
    for power, coefficient in zip(range(len(coefficients))[::-1], coefficients, strict=True):
        if coefficient:
            size = "" if abs(coefficient) == 1 and power else str(abs(coefficient))
            symbol = ("", variable)[power] if power < 2 else f"{variable}^{power}"
            minus, plus = (" - ", " + ") if text else ("-", "")
            text += f"{minus if coefficient < 0 else plus}{size}{symbol}"
    return text or "0"


# Algebra: answers are chains of equations.


def _linear(rng: Random) -> Text:
    a, b, x = rng.randint(2, 12), _nonzero(rng, 30), _nonzero(rng, 15)
    return f"Solve {_polynomial([a, b])} = {a * x + b}.", f"{a}x = {a * x}, so x = {x}"


def _quadratic(rng: Random) -> Text:
    low, high = sorted((_nonzero(rng, 30), _nonzero(rng, 30)))
    equation = _polynomial([1, -low - high, low * high])
    factors = f"({_polynomial([1, -low])})({_polynomial([1, -high])})"
    roots = f"x = {low}" if low == high else f"x = {low} or x = {high}"
    return f"Solve {equation} = 0.", f"{factors} = 0, so {roots}"


def _system(rng: Random) -> Text:
    x, y = rng.randint(-40, 40), rng.randint(-40, 40)
    prompt = f"Solve x + y = {x + y} and x - y = {x - y}."
    return prompt, f"2x = {2 * x}, so x = {x}, y = {y}"


def _expansion(rng: Random) -> Text:
    a, b, c = rng.randint(2, 6), _nonzero(rng, 12), _nonzero(rng, 12)
    product = _polynomial([a, a * c + b, b * c])
    return f"Expand ({_polynomial([a, b])})({_polynomial([1, c])}).", product


# Analysis: answers are sentences that name the theorem.


def _derivative(rng: Random) -> Text:
    a, b, c = rng.randint(1, 9), _nonzero(rng, 9), _nonzero(rng, 9)
    n = rng.randint(3, 6)
    coefficients = [a, *[0] * (n - 3), b, c, 0]
    slopes = [value * (n - place) for place, value in enumerate(coefficients[:-1])]
    return f"Differentiate f(x) = {_polynomial(coefficients)}.", f"f'(x) = {_polynomial(slopes)}"


def _chain(rng: Random) -> Text:
    a, k, b = rng.randint(2, 12), rng.randint(2, 9), _nonzero(rng, 9)
    inner = _polynomial([k, b])
    outer, sign, slope = rng.choice(
        (("exp", "", "exp"), ("sin", "", "cos"), ("cos", "-", "sin"), ("sinh", "", "cosh"))
    )
    prompt = f"Differentiate f(x) = {a} {outer}({inner})."
    return prompt, f"By the chain rule, f'(x) = {sign}{a * k} {slope}({inner})"


def _integral(rng: Random) -> Text:
    n, a, b, upper = (rng.randint(*ends) for ends in ((1, 3), (1, 6), (-9, 9), (1, 6)))
    integrand = _polynomial([a * (n + 1), *[0] * (n - 1), b])
    antiderivative = _polynomial([a, *[0] * (n - 1), b, 0])
    area = a * upper ** (n + 1) + b * upper
    prompt = f"Integrate {integrand} from 0 to {upper}."
    return prompt, f"An antiderivative is {antiderivative}, hence {area}"


def _limit(rng: Random) -> Text:
    a, b, c, d = rng.randint(1, 20), _nonzero(rng, 20), rng.randint(1, 20), _nonzero(rng, 20)
    prompt = f"Find the limit of ({_polynomial([a, b], 'n')})/({_polynomial([c, d], 'n')})."
    return prompt, f"The sequence converges to {Fraction(a, c)}"


# Geometry: answers are a formula, then a number.


def _rectangle(rng: Random) -> Text:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    prompt = f"A rectangle has sides {a} and {b}. Area and perimeter?"
    return prompt, f"area {a * b}, perimeter {2 * (a + b)}"


def _hypotenuse(rng: Random) -> Text:
    m = rng.randint(2, 9)
    n, scale = rng.randint(1, m - 1), rng.randint(1, 40)
    a, b, c = (scale * side for side in (m * m - n * n, 2 * m * n, m * m + n * n))
    prompt = f"A right triangle has legs {a} and {b}. Hypotenuse?"
    return prompt, f"sqrt({a * a} + {b * b}) = {c}"


def _circle(rng: Random) -> Text:
    r, h = rng.randint(2, 30), rng.randint(2, 60)
    solid, parts = rng.choice((("cylinder", 1), ("cone", 3)))
    prompt = f"A {solid} has radius {r} and height {h}. Volume?"
    return prompt, f"base {r * r} pi, volume {Fraction(r * r * h, parts)} pi"


def _midpoint(rng: Random) -> Text:
    x, y, dx, dy = (rng.randint(-12, 12) for _ in range(4))
    prompt = f"Midpoint of ({x}, {y}) and ({x + 2 * dx}, {y + 2 * dy})?"
    return prompt, f"M = ({x + dx}, {y + dy})"


def _triangle(rng: Random) -> Text:
    a, b = rng.randint(15, 80), rng.randint(15, 80)
    c = 180 - a - b
    largest = max(a, b, c)
    kind = "right" if largest == 90 else "obtuse" if largest > 90 else "acute"
    return f"Two angles of a triangle are {a} and {b} deg.", f"third angle {c} deg, {kind}"


# Discrete mathematics: answers count.


def _choose(rng: Random) -> Text:
    n = rng.randint(4, 60)
    k = rng.randint(2, min(n - 1, 5))
    things = rng.choice(("cards", "books", "coins", "seats", "flags", "nodes"))
    return f"Ways to pick {k} of {n} {things}?", f"C({n},{k}) = {math.comb(n, k)} ways"


def _anagrams(rng: Random) -> Text:
    word = "".join(rng.choices("abcd", k=rng.randint(4, 7)))
    repeats = [count for _, count in sorted(Counter(word).items()) if count > 1]
    total = math.factorial(len(word)) // math.prod(map(math.factorial, repeats))
    divisors = "".join(f"/{count}!" for count in repeats)
    return f"Count the anagrams of {word}.", f"{len(word)}!{divisors} = {total} ways"


def _bipartite(rng: Random) -> Text:
    m, n = rng.randint(2, 99), rng.randint(2, 99)
    return f"Vertices and edges of K_{m},{n}?", f"|V| = {m + n}, |E| = {m * n}"


def _set_operation(rng: Random) -> Text:
    a, b = (set(rng.sample(range(1, 10), rng.randint(2, 4))) for _ in range(2))
    name, answer = rng.choice((("union", a | b), ("meet", a & b), ("minus", a - b)))
    left, right, result = ("{" + ",".join(map(str, sorted(s))) + "}" for s in (a, b, answer))
    return f"{left} {name} {right}?", f"{result}, size {len(answer)}"


# Number theory: answers show the steps of the algorithm.


def _gcd(rng: Random) -> Text:
    common = rng.randint(1, 12)
    a, b = common * rng.randint(5, 60), common * rng.randint(2, 40)
    remainders = [max(a, b), min(a, b)]
    while remainders[-1]:
        remainders.append(remainders[-2] % remainders[-1])
    steps = " > ".join(map(str, remainders))
    return f"gcd of {a} and {b} by Euclid", f"{steps}; gcd {math.gcd(a, b)}"


def _power_residue(rng: Random) -> Text:
    base, exponent, modulus = rng.randint(2, 60), rng.randint(2, 40), rng.randint(3, 30)
    answer = f"{base} == {base % modulus}, power == {pow(base, exponent, modulus)}"
    return f"Reduce {base}^{exponent} mod {modulus}", answer


def _factorisation(rng: Random) -> Text:
    number = rng.randint(2, 5000)
    rest, factor, factors = number, 2, []
    while rest > 1:
        while rest % factor == 0:
            factors.append(factor)
            rest //= factor
        factor += 1
    answer = f"= {' * '.join(map(str, factors))}" if len(factors) > 1 else "is prime"
    return f"Factor {number} into primes", f"{number} {answer}"


def _inverse(rng: Random) -> Text:
    modulus = rng.randint(5, 150)
    a = rng.choice([n for n in range(2, modulus) if math.gcd(n, modulus) == 1])
    inverse = pow(a, -1, modulus)
    return f"Invert {a} mod {modulus}", f"{a} * {inverse} = {a * inverse} == 1, inverse {inverse}"


# Code: answers are the interpreter's output.


def _run(template: str, *fields: object) -> Text:
    # The templates are in this module, so eval is safe, and Python itself gives the answer.
    expression = template.format(*fields)
    return f">>> {expression}", repr(eval(expression))


def _list_expression(rng: Random) -> Text:
    values = [rng.randint(0, 20) for _ in range(rng.randint(3, 5))]
    whole = ("sorted({0})", "sorted({0}, reverse=True)", "{0}[::-1]")
    parts = ("{0}[{1}:]", "max({0}) - min({0})", "sum({0}[:{1}])", "[x + {1} for x in {0}]")
    return _run(rng.choice(whole + parts), values, rng.randint(1, 3))


def _string_expression(rng: Random) -> Text:
    word = "".join(rng.choices("abcxyz", k=rng.randint(4, 8)))
    template = rng.choice(
        ("{0!r}[::-1]", "{0!r}.upper()", "{0!r} * 2", "sorted({0!r})", "{0!r}.count({0!r}[{1}])")
    )
    return _run(template, word, rng.randint(0, 3))


def _comprehension(rng: Random) -> Text:
    a, b, stop = rng.randint(2, 20), rng.randint(0, 20), rng.randint(3, 6)
    term = rng.choice(("[{0} * i + {1} {2}]", "{{i: {0} * i + {1} {2}}}"))
    return _run(term, a, b, f"for i in range({stop})")


def _loop(rng: Random) -> Text:
    x, factor, rounds, step = (rng.randint(*ends) for ends in ((0, 20), (2, 5), (2, 4), (0, 9)))
    value = x
    for _ in range(rounds):
        value = value * factor + step
    loop = f"for i in range({rounds}):\n    x = x * {factor} + {step}"
    return f"x = {x}\n{loop}\nprint(x)", str(value)


# Chemistry: answers are formulas, balanced equations and molar masses.

_MASSES = {"C": 12, "H": 1, "N": 14, "O": 16, "S": 32}
_METALS = {"Li": 1, "Na": 1, "K": 1, "Mg": 2, "Ca": 2, "Zn": 2, "Fe": 3, "Al": 3, "Cr": 3, "Ti": 4}
_NONMETALS = {"F2": 1, "Cl2": 1, "Br2": 1, "I2": 1, "O2": 2, "S2": 2, "N2": 3}


def _formula(atoms: dict[str, int]) -> str:
    return "".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in atoms.items() if n)


def _mass(atoms: dict[str, int]) -> int:
    return sum(_MASSES[symbol] * n for symbol, n in atoms.items())


def _sides(left: dict[str, int], right: dict[str, int]) -> str:
    """A reaction from the amounts of its substances, in lowest terms."""
    divisor = math.gcd(*left.values(), *right.values())
    return " -> ".join(
        " + ".join(f"{n // divisor} {name}" if n > divisor else name for name, n in side.items())
        for side in (left, right)
    )


def _fuel(rng: Random) -> dict[str, int]:
    # No more oxygen than carbon, so that every fuel needs oxygen to burn.
    carbon = rng.randint(1, 18)
    oxygen = rng.randint(0, min(carbon, 4))
    return {"C": carbon, "H": 2 * rng.randint(1, carbon + 1), "O": oxygen}


def _combustion(rng: Random) -> Text:
    fuel, amount = _fuel(rng), rng.randint(1, 30)
    # Four molecules of fuel become 4C CO2 and 2H H2O; O2 supplies the oxygen that the fuel lacks.
    oxygen = 4 * fuel["C"] + fuel["H"] - 2 * fuel["O"]
    products = {"CO2": 4 * fuel["C"], "H2O": 2 * fuel["H"]}
    reaction = _sides({_formula(fuel): 4, "O2": oxygen}, products)
    return f"Burn {amount} mol {_formula(fuel)} in O2", f"{reaction}, {amount * fuel['C']} mol CO2"


def _synthesis(rng: Random) -> Text:
    metal, gas = rng.choice(list(_METALS)), rng.choice(list(_NONMETALS))
    common = math.lcm(_METALS[metal], _NONMETALS[gas])
    metals, nonmetals = common // _METALS[metal], common // _NONMETALS[gas]
    salt = _formula({metal: metals, gas[:-1]: nonmetals})
    # A molecule of the non-metal has two atoms, so two units of the salt need whole molecules.
    reaction = _sides({metal: 2 * metals, gas: nonmetals}, {salt: 2})
    divisor, batches = math.gcd(2 * metals, nonmetals, 2), rng.randint(1, 40)
    prompt = f"React {2 * metals // divisor * batches} mol {metal} with {gas}"
    return prompt, f"{reaction}, {2 // divisor * batches} mol {salt}"


def _molar_mass(rng: Random) -> Text:
    carbon, hydrogen, oxygen = _fuel(rng).values()
    nitrogen, sulphur = rng.randint(0, 3), rng.randint(0, 2)
    atoms = {"C": carbon, "H": hydrogen, "N": nitrogen, "O": oxygen, "S": sulphur}
    return f"Molar mass of {_formula(atoms)}", f"M = {_mass(atoms)} g/mol"


def _moles(rng: Random) -> Text:
    fuel, amount = _fuel(rng), rng.randint(2, 9)
    mass = _mass(fuel)
    return f"Moles in {mass * amount} g of {_formula(fuel)}", f"M = {mass} g/mol, n = {amount} mol"


# Physics: answers are a law with its numbers and units.


def _force(rng: Random) -> Text:
    m, a = rng.randint(2, 99), rng.randint(2, 60)
    prompt = f"A body of {m} kg accelerates at {a} m/s^2. Force?"
    return prompt, f"F = m a = {m} kg * {a} m/s^2 = {m * a} N"


def _speed(rng: Random) -> Text:
    u, a, t = rng.randint(0, 30), rng.randint(1, 9), rng.randint(2, 20)
    prompt = f"A cart at {u} m/s gains {a} m/s^2 for {t} s. Speed?"
    return prompt, f"v = u + a t = {u} + {a * t} = {u + a * t} m/s"


def _ohm(rng: Random) -> Text:
    current, resistance = rng.randint(2, 40), rng.randint(2, 60)
    voltage = resistance * current
    prompt = f"A {resistance} ohm wire is put on {voltage} V. Current and power?"
    return prompt, f"I = U/R = {current} A, P = U I = {voltage * current} W"


def _energy(rng: Random) -> Text:
    m, v = 2 * rng.randint(1, 50), rng.randint(2, 60)
    prompt = f"A body of {m} kg moves at {v} m/s. Kinetic energy?"
    return prompt, f"E = m v^2/2 = {m // 2} * {v * v} = {m * v * v // 2} J"


def _wave(rng: Random) -> Text:
    frequency, length = rng.randint(2, 99), rng.randint(2, 60)
    prompt = f"A wave of {frequency} Hz is {length} m long. Speed?"
    return prompt, f"c = f L = {frequency} Hz * {length} m = {frequency * length} m/s"


# Biology: answers are strands, proteins and ratios.

_COMPLEMENT = str.maketrans("ATGC", "TACG")
_CODONS = {
    "UUU": "Phe", "CUG": "Leu", "AUU": "Ile", "AUG": "Met", "GUU": "Val", "UCU": "Ser",
    "CCG": "Pro", "ACU": "Thr", "GCA": "Ala", "UAU": "Tyr", "CAC": "His", "CAA": "Gln",
    "AAC": "Asn", "AAA": "Lys", "GAU": "Asp", "GAA": "Glu", "UGC": "Cys", "UGG": "Trp",
    "CGU": "Arg", "GGC": "Gly",
}  # fmt: skip


def _strand(rng: Random) -> Text:
    strand = "".join(rng.choices("ATGC", k=rng.randint(6, 9)))
    return f"Strand opposite to {strand}?", strand.translate(_COMPLEMENT)


def _transcript(rng: Random) -> Text:
    strand = "".join(rng.choices("ATGC", k=rng.randint(6, 9)))
    rna = strand.translate(_COMPLEMENT).replace("T", "U")
    return f"Transcribe the template {strand}.", f"mRNA {rna}"


def _protein(rng: Random) -> Text:
    codons = rng.choices(list(_CODONS), k=3)
    return f"Translate {' '.join(codons)}.", "-".join(_CODONS[codon] for codon in codons)


def _cross(rng: Random) -> Text:
    letters = rng.sample("ABDEFGHKLMNR", 2)
    mother, father = (
        [rng.choice((gene * 2, gene + gene.lower(), gene.lower() * 2)) for gene in letters]
        for _ in range(2)
    )
    ratios = []
    for genes in zip(mother, father, strict=True):
        # Capital letters sort first, so a heterozygote is always written Aa.
        young = Counter("".join(sorted(m + f)) for m in genes[0] for f in genes[1])
        divisor = math.gcd(*young.values())
        ratios.append(" : ".join(f"{n // divisor} {kind}" for kind, n in sorted(young.items())))
    return f"Cross {''.join(mother)} x {''.join(father)}.", "; ".join(ratios)


PROBLEMS: dict[str, tuple[Problem, ...]] = {
    "algebra": (_linear, _quadratic, _system, _expansion),
    "analysis": (_derivative, _chain, _integral, _limit),
    "geometry": (_rectangle, _hypotenuse, _circle, _midpoint, _triangle),
    "discrete": (_choose, _anagrams, _bipartite, _set_operation),
    "number_theory": (_gcd, _power_residue, _factorisation, _inverse),
    "code": (_list_expression, _string_expression, _comprehension, _loop),
    "chemistry": (_combustion, _synthesis, _molar_mass, _moles),
    "physics": (_force, _speed, _ohm, _energy, _wave),
    "biology": (_strand, _transcript, _protein, _cross),
}
