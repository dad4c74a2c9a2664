"""Documents of nine synthetic domains, for the demo and the tests: ``draw`` generates them."""

from mergelaw.demo.synthetic import DOMAINS, GENERATOR_VERSION, Domain, draw, entities

__all__ = ["DOMAINS", "GENERATOR_VERSION", "Domain", "draw", "entities"]
