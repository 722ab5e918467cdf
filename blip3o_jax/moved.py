"""Old names of the Python API, so that whoever types one is told the new one."""

MODULES = {
    "checkpoint": "training_checkpoint",
    "communication": "plan.collectives",
    "compilation": "kernels.platform",
    "convert.stages": "verify.stages",
    "data.pipeline": "data.feed",
    "decode": "sample.decode",
    "flow": "sample.flow",
    "generate": "sample.generate",
    "mesh": "parallel.mesh",
    "metrics": "train.metrics",
    "models.attention": "kernels.attention",
    "sampler": "sample.programs",
    "sharding": "parallel.parameters",
    "shipped": "resources",
    "synthetic": "convert.random_weights",
    "train.data_config": "data.config",
    "workload": "bench.stages",
}
NAMES = {
    "convert.converted": {"load_converted": "checkpoints.open"},
    "convert.published": {"load_published": "checkpoints.open"},
    "pipeline": {
        "config_of": "checkpoints.config_of",
        "embedded_checkpoints": "checkpoints.embedded",
        "find_checkpoint": "checkpoints.find",
        "identity": "checkpoints.open",
        "tokenizer_of": "resources.find_tokenizer",
    },
    "training_checkpoint": {"load_run": "checkpoints.open", "open_run": "checkpoints.open"},
    "config": {
        "ConfigError": "errors.InputError",
        "multiples": "errors.multiples",
        "preset": "presets.preset",
        "PRESETS": "presets.PRESETS",
        "SANA_PRESETS": "presets.SANA_PRESETS",
    },
    "plan": {
        "CHIPS": "chips.CHIPS",
        "lower_generation": "plan.programs.lower_generation",
        "lower_step": "plan.programs.lower_step",
        "measure": "plan.estimate.measure",
        "open_topology": "plan.programs.open_topology",
        "price": "plan.estimate.price",
    },
}


class Finder:
    """Stands first on sys.meta_path, before an editable install of an older version."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> None:
        package, _, module = name.partition(".")
        if package == "blip3o_jax" and module in MODULES:
            raise ModuleNotFoundError(f"{name} is now blip3o_jax.{MODULES[module]}.", name=name)


def refuse(module: str, name: str):
    """`__getattr__` of a module that lost names: an ImportError says where an old one is now."""
    if name in NAMES[module]:
        new = NAMES[module][name]
        raise ImportError(f"blip3o_jax.{module}.{name} is now blip3o_jax.{new}.")
    raise AttributeError(f"module 'blip3o_jax.{module}' has no attribute {name!r}")
