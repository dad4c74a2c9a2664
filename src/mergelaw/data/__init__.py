"""Documents of a domain, read, deduplicated, split and tokenised."""
