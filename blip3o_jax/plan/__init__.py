"""A run compiled for TPUs that are not here."""
