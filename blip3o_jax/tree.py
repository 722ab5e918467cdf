"""Trees of parameters by path."""

from flax.traverse_util import flatten_dict, unflatten_dict


def split(params, trainable):
    """Params -> (trainable, frozen), two trees without the other's leaves; `trainable` is a
    predicate on "part/.../leaf"."""
    flat = flatten_dict(params, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if trainable(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten_dict(chosen, sep="/"), unflatten_dict(rest, sep="/")


def join(*trees):
    """Inverse of `split`."""
    merged = {}
    for tree in trees:
        merged.update(flatten_dict(tree, sep="/"))
    return unflatten_dict(merged, sep="/")
