"""Ways to damage an export folder: functions of the folder, and functions that return such."""

import hashlib
import io
import json
import os
import struct

import numpy as np
from refusals import bomb
from safetensors.numpy import load_file
from safetensors.numpy import save as save_bytes

from metaopt.zoo.exports import SPEC, WEIGHTS

KERNEL = "net/readout/kernel"
MARKER = "executed"


def text(payload):
    """Replaces the spec by `payload`."""
    payload = payload if isinstance(payload, bytes) else payload.encode()
    return lambda folder: (folder / SPEC).write_bytes(payload)


def spec(**changes):
    """Sets fields of the spec; ``a__b`` is field b of field a, and None removes a field."""

    def spoil(folder):
        content = json.loads((folder / SPEC).read_text())
        for name, value in changes.items():
            *outer, last = name.split("__")
            inside = content
            for key in outer:
                inside = inside[key]
            inside.pop(last, None)
            if value is not None:
                inside[last] = value
        (folder / SPEC).write_text(json.dumps(content))

    return spoil


def weights(change):
    """Replaces the weights by ``change(bytes)``; the checksum stays the old one."""
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def signed(change):
    """Replaces the weights by ``change(bytes)``, and the checksum by that of the new bytes."""

    def spoil(folder):
        payload = change((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).write_bytes(payload)
        spec(sha256=hashlib.sha256(payload).hexdigest())(folder)

    return spoil


def leaves(change, **described):
    """Replaces the weights by ``change(leaves)``; `described` are fields of the spec."""

    def spoil(folder):
        changed = change(load_file(folder / WEIGHTS))
        signed(lambda _: save_bytes(changed))(folder)
        spec(**described)(folder)

    return spoil


def each(function):
    return lambda arrays: {name: function(array) for name, array in arrays.items()}


def flip(at):
    def change(payload):
        at_byte = at if at >= 0 else len(payload) + at
        return payload[:at_byte] + bytes([payload[at_byte] ^ 0x10]) + payload[at_byte + 1 :]

    return change


def header(change):
    """Rewrites the header of a safetensors file."""

    def rewrite(payload):
        size = struct.unpack("<Q", payload[:8])[0]
        content = json.loads(payload[8 : 8 + size])
        change(content)
        changed = json.dumps(content).encode()
        return struct.pack("<Q", len(changed)) + changed + payload[8 + size :]

    return signed(rewrite)


def replaced(name, make):
    """Removes a file and calls ``make(path)`` in its place."""

    def spoil(folder):
        (folder / name).unlink()
        make(folder / name)

    return spoil


def link_away(name):
    def spoil(folder):
        target = folder.parent / "elsewhere"
        os.replace(folder / name, target)
        (folder / name).symlink_to(target)

    return spoil


def sparse(size):
    def make(path):
        with open(path, "wb") as file:
            file.truncate(size)

    return make


def pickled(name, sign=False):
    def spoil(folder):
        payload = bomb(folder.parent / MARKER)
        if sign:
            signed(lambda _: payload)(folder)
        else:
            (folder / name).write_bytes(payload)

    return spoil


def npz_of_objects(folder):
    buffer = io.BytesIO()
    np.savez(buffer, theta=np.array([{"a": 1}], object))
    signed(lambda _: buffer.getvalue())(folder)


def twice(field):
    def spoil(folder):
        content = (folder / SPEC).read_text()
        entry = json.dumps(json.loads(content)[field])
        (folder / SPEC).write_text(content.rstrip()[:-1] + f', "{field}": {entry}}}')

    return spoil
