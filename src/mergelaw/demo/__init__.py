"""Documents of nine synthetic domains, for the demo and the tests.

``documents`` writes them; the text of a domain's facts is in facts.toml, its problems in problems.
"""

from mergelaw.demo.synthetic import DOMAINS, GENERATOR_VERSION, Domain, documents, draw, entities

__all__ = ["DOMAINS", "GENERATOR_VERSION", "Domain", "documents", "draw", "entities"]
