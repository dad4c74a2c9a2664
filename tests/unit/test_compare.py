"""The regression gate: false alarms at its rate, real ones found, bad input named."""

import math

import numpy as np
import pandas as pd
import pytest

from mergelaw.cli.decide import read_guard
from mergelaw.decide.compare import Guard, compare, conclusion
from mergelaw.errors import MergelawError

DOMAINS = tuple(f"domain{i}" for i in range(8))


def model(random, hard, shift=0.0, noise=0.05, worse=()):
    """Losses of a model on 20 documents a domain; ``shift`` nats a token on the domains worse."""
    rows = []
    for domain in DOMAINS:
        tokens = np.arange(20, 40)
        loss = 1 + hard[domain] + random.normal(0, noise, 20) + shift * (domain in worse)
        rows.append({"domain": domain, "document_nll": loss * tokens, "document_tokens": tokens})
    return pd.DataFrame(rows)


def pair(seed, **options):
    random = np.random.default_rng(seed)
    hard = {domain: random.normal(0, 0.5, 20) for domain in DOMAINS}
    return model(random, hard), model(random, hard, **options)


def test_equal_models_raise_an_alarm_in_at_most_five_percent_of_comparisons():
    alarms = 0
    for seed in range(300):
        table, _ = compare(*pair(seed), DOMAINS, Guard())
        alarms += any(c.regressed for c in table)
    assert alarms / 300 < 0.09  # 0.05 and three standard errors


def test_a_regression_on_one_domain_is_found_and_named():
    table, mean = compare(*pair(1, shift=0.1, worse=("domain3",)), DOMAINS, Guard())
    assert [c.domain for c in table if c.regressed] == ["domain3"]
    assert conclusion(table).startswith("REGRESSION on 1 of 8 domains: domain3 +0.")
    assert mean.value == pytest.approx(np.mean([c.difference.value for c in table]))
    _, macro = compare(*pair(1, shift=0.1, worse=("domain3",)), DOMAINS, Guard(), ["domain3"])
    rest = [c.difference.value for c in table if c.domain != "domain3"]
    assert macro.value == pytest.approx(np.mean(rest))


def test_thresholds_allow_what_they_say():
    models = pair(1, shift=0.1, worse=("domain3", "domain4"))
    table, _ = compare(*models, DOMAINS, Guard(domains={"domain3": 0.2}))
    assert [c.domain for c in table if c.regressed] == ["domain4"]
    assert not any(c.regressed for c in compare(*models, DOMAINS, Guard(allow=0.2))[0])


def test_p_values_are_holms():
    table, _ = compare(*pair(5, shift=0.03, worse=("domain0",)), DOMAINS, Guard())
    raw = sorted(c.difference.p_above(1e-5) for c in table)
    held = np.maximum.accumulate([min((8 - i) * p, 1) for i, p in enumerate(raw)])
    assert sorted(c.p for c in table) == pytest.approx(held.tolist())


def test_the_same_model_twice_is_no_regression_even_with_rounding():
    before, _ = pair(2)
    after = before.assign(document_nll=[nll * (1 + 1e-7) for nll in before["document_nll"]])
    table, _ = compare(before, after, DOMAINS, Guard())
    assert {c.word for c in table} == {"ok"}


def test_models_that_cannot_be_compared_are_one_line():
    before, after = pair(3)
    other = after.assign(document_tokens=[tokens + 1 for tokens in after["document_tokens"]])
    with pytest.raises(MergelawError, match="same tokenizer"):
        compare(before, other, DOMAINS, Guard())
    after["document_nll"] = [np.full(20, math.nan), *after["document_nll"][1:]]
    with pytest.raises(MergelawError, match="second model's loss on domain0 is not finite"):
        compare(before, after, DOMAINS, Guard())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alow: 1", "did you mean 'allow'"),
        ("allow: -1", "allow: .*greater than or equal to 0"),
        ("domains: {domain9: 0.1}", "domains.domain9: no such domain"),
        ("allow: [", "not valid YAML"),
        ("allow: 0.1\nallow: 9", "duplicate key"),
        ("- 1", "holds no keys with values"),
    ],
)
def test_a_bad_guard_is_one_line(tmp_path, text, words):
    (tmp_path / "guard.yaml").write_text(text)
    with pytest.raises(MergelawError, match=words):
        read_guard(tmp_path / "guard.yaml", DOMAINS)
    with pytest.raises(MergelawError, match="No such file"):
        read_guard(tmp_path / "none.yaml", DOMAINS)
