"""Whether two copies of a model agree."""
