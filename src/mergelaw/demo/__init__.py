"""Documents of nine synthetic domains, for the demo and the tests.

``draw`` draws them; the text of a domain's facts is in facts.toml, its problems in problems.
"""

from mergelaw.demo.synthetic import DOMAINS, GENERATOR_VERSION, Domain, draw, entities

__all__ = ["DOMAINS", "GENERATOR_VERSION", "Domain", "draw", "entities"]
