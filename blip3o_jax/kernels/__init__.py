"""Plain formulas in the forms that a platform runs fast."""
