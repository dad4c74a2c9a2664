"""A study as a graph of jobs, and what each job asks for."""
