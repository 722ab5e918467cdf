"""Tables of scores, letter by letter."""

from blip3o_jax.evaluate.tables import table


def test_a_table_has_a_line_a_rule_and_a_column_a_tag():
    rates = {"overall": 0.9167, "single_object": 1.0, "counting": 0.7}
    rows = {"scores, correct": rates, "autoencoder, strict": {"overall": 1.0, "counting": None}}
    assert table(rows).splitlines() == [
        "                              single",
        "                     overall  object  counting",
        "scores, correct         0.92    1.00      0.70",
        "autoencoder, strict     1.00                 -",
    ]
    assert table({"count": {"all": 300}, "psnr": {"all": 31.239}}).splitlines() == [
        "         all",
        "count    300",
        "psnr   31.24",
    ]
