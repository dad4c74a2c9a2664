"""A study as a graph of jobs, with the resources that each job requests."""
