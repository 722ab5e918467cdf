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
    "convert.converted.load_converted": "checkpoints.open",
    "convert.published.load_published": "checkpoints.open",
    "pipeline.config_of": "checkpoints.config_of",
    "pipeline.embedded_checkpoints": "checkpoints.embedded",
    "pipeline.find_checkpoint": "checkpoints.find",
    "pipeline.identity": "checkpoints.open",
    "pipeline.tokenizer_of": "resources.find_tokenizer",
    "training_checkpoint.load_run": "checkpoints.open",
    "training_checkpoint.open_run": "checkpoints.open",
    "config.ConfigError": "errors.InputError",
    "config.multiples": "errors.multiples",
    "config.preset": "presets.preset",
    "config.PRESETS": "presets.PRESETS",
    "config.SANA_PRESETS": "presets.SANA_PRESETS",
    "plan.CHIPS": "chips.CHIPS",
    "plan.lower_generation": "plan.generation.lower",
    "plan.lower_step": "plan.programs.lower_step",
    "plan.measure": "plan.estimate.measure",
    "plan.open_topology": "plan.programs.open_topology",
    "plan.price": "plan.estimate.price",
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
    if new := NAMES.get(f"{module}.{name}"):
        raise ImportError(f"blip3o_jax.{module}.{name} is now blip3o_jax.{new}.")
    raise AttributeError(f"module 'blip3o_jax.{module}' has no attribute {name!r}")
