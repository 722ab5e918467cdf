"""Trees of parameters by path."""

from flax.traverse_util import flatten_dict, unflatten_dict


def flatten(tree: dict) -> dict:
    """Nested dicts -> {"a/b/c": leaf}."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: dict) -> dict:
    """Inverse of `flatten`."""
    return unflatten_dict(flat, sep="/")


def split(params, trainable):
    """Params -> (trainable, frozen), two trees without the other's leaves; `trainable` is a
    predicate on "part/.../leaf"."""
    flat = flatten(params)
    chosen = {path: leaf for path, leaf in flat.items() if trainable(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(chosen), unflatten(rest)


def join(*trees):
    """Inverse of `split`."""
    return unflatten({path: leaf for tree in trees for path, leaf in flatten(tree).items()})
