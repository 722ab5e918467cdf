"""The benchmarks by the names of the command line."""

from blip3o_jax.evaluate.exporters.dpg import DPG
from blip3o_jax.evaluate.exporters.gedit import GEDIT
from blip3o_jax.evaluate.exporters.geneval import GENEVAL, GENEVAL2
from blip3o_jax.evaluate.exporters.imgedit import IMGEDIT
from blip3o_jax.evaluate.exporters.longtext import LONGTEXT, LONGTEXT_ZH
from blip3o_jax.evaluate.exporters.oneig import ONEIG, ONEIG_ZH
from blip3o_jax.evaluate.exporters.tiif import TIIF, TIIF_MINI
from blip3o_jax.evaluate.exporters.wise import WISE, WISE_LEGACY

BENCHMARKS = {
    **{"geneval": GENEVAL, "geneval2": GENEVAL2, "dpg": DPG},
    **{"wise": WISE, "wise-legacy": WISE_LEGACY, "oneig": ONEIG, "oneig-zh": ONEIG_ZH},
    **{"longtext": LONGTEXT, "longtext-zh": LONGTEXT_ZH, "tiif": TIIF, "tiif-mini": TIIF_MINI},
    **{"imgedit": IMGEDIT, "gedit": GEDIT},
}
