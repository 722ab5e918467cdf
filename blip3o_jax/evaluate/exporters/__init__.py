"""Benchmarks of published models: what each asks for, the layout of its scorer, its results."""
