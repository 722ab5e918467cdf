"""Plain formulas (products, convolutions, attention) and the forms that a platform runs fast."""
