"""Writes what torch.save writes, and what it never would, without torch."""

import io
import pickle
import zipfile
from typing import ClassVar


def name(module, attribute):
    """A class or function that pickle will name so."""
    return type(attribute, (), {"__module__": module, "__qualname__": attribute})


class Storage:
    def __init__(self, key, values):
        self.kind = name(
            "torch", {"float32": "FloatStorage", "float16": "HalfStorage"}[values.dtype.name]
        )
        self.key, self.count = key, values.size


class Call:
    """Pickled as a call of `function`, whatever it is."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (
            (self.function, self.args)
            if self.state is None
            else (self.function, self.args, self.state)
        )


# the one in Python, which lets functions be named that do not exist here
class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return (
            ("storage", value.kind, value.key, "cpu", value.count)
            if isinstance(value, Storage)
            else None
        )

    def save_global(self, value, name=None):
        self.write(b"c" + f"{value.__module__}\n{value.__name__}\n".encode())

    dispatch: ClassVar = {**pickle._Pickler.dispatch, type: save_global}

    def save_reduce(self, func, args, state=None, **rest):
        self.save(func) if not isinstance(func, type) else self.save_global(func)
        self.save(args)
        self.write(pickle.REDUCE)
        if state is not None:
            self.save(state)
            self.write(pickle.BUILD)


def tensor(key, values, offset=0, stride=None):
    shape = values.shape
    stride = tuple(step // values.itemsize for step in values.strides) if stride is None else stride
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return Call(
        rebuild,
        Storage(key, values),
        offset,
        shape,
        stride,
        False,
        Call(name("collections", "OrderedDict")),
    )


def write(file, content, storages, compression=zipfile.ZIP_STORED, extra=()):
    """`content` and the bytes of its storages "0", "1", ... as an archive like torch.save's."""
    stream = io.BytesIO()
    Pickler(stream, 2).dump(content)
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("ta_tok/data.pkl", stream.getvalue())
        archive.writestr("ta_tok/byteorder", "little")
        for i, data in enumerate(storages):
            archive.writestr(f"ta_tok/data/{i}", data)
        for key, data in extra:
            archive.writestr(key, data)
    return file


def write_state(file, tensors, args):
    """{"model": {"args", "sd"}} of numpy arrays, as TA-Tok is published."""
    places = {key: tensor(str(i), value) for i, (key, value) in enumerate(tensors.items())}
    return write(
        file,
        {"model": {"args": args, "sd": places}},
        [value.tobytes() for value in tensors.values()],
    )
