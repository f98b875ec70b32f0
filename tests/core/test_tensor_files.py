"""Tensor files: what PyTorch and safetensors wrote, and files that are damaged or malicious."""

import collections
import copy
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from metaopt.core import tensor_files
from metaopt.core.tensor_files import read_safetensors, read_torch

GOLDEN = Path(__file__).parents[1] / "golden" / "torch"
# What tests/golden/torch/README.md says is in both files.
EXPECTED = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 8,
    "a.transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "b.part": np.array([2.0, 5.0, 8.0]),
    "b.count": np.array(7),
    "b.half": np.array([0.5, -1.5, 2.25], np.float16),
    "b.bfloat16": np.array([0.5, -1.5, 256.0], jnp.bfloat16),
    "b.flags": np.array([True, False, True]),
    "b.empty": np.zeros((0, 3), np.float32),
    "b.bytes": np.array([0, 255], np.uint8),
    "b.parameter": np.array([1.0, 2.0], np.float32),
}


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_both_formats_of_pytorch_are_read(name):
    arrays = read_torch(GOLDEN / name)
    assert list(arrays) == list(EXPECTED)
    for key, expected in EXPECTED.items():
        assert arrays[key].dtype == expected.dtype
        np.testing.assert_array_equal(arrays[key], expected)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_a_file_that_is_cut_short_is_refused_wherever_it_is_cut(name, tmp_path):
    whole, path = (GOLDEN / name).read_bytes(), tmp_path / "short.pth"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"short\.pth: "):
            read_torch(path)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_no_changed_byte_makes_anything_but_numbers_or_a_message(name, tmp_path):
    whole, path = (GOLDEN / name).read_bytes(), tmp_path / "changed.pth"
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(1500):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(changed)
        try:
            arrays = read_torch(path)
        except ValueError as error:
            assert "changed.pth: " in str(error) and "\n" not in str(error)
        else:
            read += 1
            assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert 0 < read < 1500


def write_zip(path: Path, program: bytes, storages: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, numbers in storages.items():
            archive.writestr(f"archive/data/{key}", numbers)
    return path


class Called:
    """Becomes a call of `function` when a pickle of it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_is_never_executed(tmp_path):
    mark = tmp_path / "executed"
    harmful = {"weight": Called(os.mkdir, str(mark))}
    for protocol in range(6):
        program = pickle.dumps(harmful, protocol)
        path = write_zip(tmp_path / "harm.pth", program, {})
        with pytest.raises(ValueError, match=r"refers to '\w+\.mkdir', but only|instruction"):
            read_torch(path)
        start = b"".join(pickle.dumps(part, 2) for part in (tensor_files.MAGIC, 1001, {}))
        for legacy in (program, start + program):
            (tmp_path / "harm.pth").write_bytes(legacy)
            with pytest.raises(ValueError, match=r"harm\.pth: "):
                read_torch(tmp_path / "harm.pth")
    assert not mark.exists()
    pickle.loads(pickle.dumps(harmful))  # another reader would have made the folder
    assert mark.exists()


class Name:
    """Pickled as a reference to a name of PyTorch, which is not installed here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Stored:
    """Pickled as a reference to a storage."""

    def __init__(self, *description):
        self.description = description


class Pickler(pickle._Pickler):  # the one in Python: its table of types can be extended
    """Writes what `torch.save` would write."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, obj):
        return obj.description if isinstance(obj, Stored) else None

    def save_name(self, obj):
        self.write(f"c{obj.module}\n{obj.name}\n".encode())

    dispatch[Name] = save_name


FLOAT = Name("torch", "FloatStorage")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")


class Tensor:
    """Pickled as a tensor with the given arguments of PyTorch's constructor."""

    def __init__(self, *arguments):
        self.arguments = arguments


def save_tensor(self, obj):
    self.save(REBUILD)
    self.save(obj.arguments)
    self.write(pickle.REDUCE)


Pickler.dispatch[Tensor] = save_tensor


def program_of(tree) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(tree)
    return buffer.getvalue()


def tensor(shape=(2, 2), strides=(2, 1), *, offset=0, count=4, key="0", kind=FLOAT):
    stored = Stored("storage", kind, key, "cpu", count)
    return Tensor(stored, offset, shape, strides, False, collections.OrderedDict())


FOUR = {"0": np.arange(4, dtype=np.float32).tobytes()}


def test_the_helpers_of_the_next_tests_write_what_is_read(tmp_path):
    tree = {"model": {"w": tensor(), "v": tensor((2,), (2,), offset=1)}}
    arrays = read_torch(write_zip(tmp_path / "a.pth", program_of(tree), FOUR))
    np.testing.assert_array_equal(arrays["model.w"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(arrays["model.v"], [1, 3])


def doubled(times: int):
    """A dict that holds another twice, which holds another twice, and so on."""
    tree: dict = {"w": tensor()}
    for _ in range(times):
        tree = {"a": tree, "b": tree}
    return tree


REFUSED = {
    "larger than its storage": ({"w": tensor((2, 3), (2, 1))}, r"shape \(2, 3\) does not fit"),
    "beyond its storage": ({"w": tensor(offset=1)}, "does not fit its storage of 4"),
    "repeated numbers": ({"w": tensor((1 << 40,), (0,))}, "does not fit its storage of 4"),
    "negative stride": ({"w": tensor(strides=(-2, 1))}, "describes a tensor"),
    "strides of another rank": ({"w": tensor(strides=(1,))}, "describes a tensor"),
    "huge and empty": ({"w": tensor((0, 1 << 35, 1 << 35), (1, 1, 1))}, "describes a tensor"),
    "huge stride": ({"w": tensor((1, 1), (1 << 70, 1))}, "describes a tensor"),
    "huge storage": ({"w": tensor(count=1 << 50)}, "its storages overlap"),
    "storage too small": ({"w": tensor(count=5)}, "has 16 bytes, but its tensors need 20"),
    "missing storage": ({"w": tensor(key="7")}, "lacks 'archive/data/7'"),
    "path as key": ({"w": tensor(key="../../x")}, "lacks 'archive/data/../../x'"),
    "two descriptions": (
        {"w": tensor(), "v": tensor(kind=Name("torch", "IntStorage"))},
        "described in two ways",
    ),
    "unknown storage": ({"w": tensor(kind=Name("torch", "ClassStorage"))}, "ClassStorage"),
    "a kind that is a function": ({"w": tensor(kind=REBUILD)}, "describes a storage"),
    "code": ({"w": Name("os", "system")}, r"refers to 'os\.system', but only tensors"),
    "nested name": ({"w": Name("torch", "_utils.os.system")}, "only tensors"),
    "a number": ({"w": tensor(), "epoch": 3}, "entry 'epoch' is a value of type int, not a tensor"),
    "a list": ([tensor()], "holds a value of type list instead of a dict"),
    "a name": ({"f": REBUILD}, "entry 'f' is a reference to 'torch._utils _rebuild_tensor_v2'"),
    "number as key": ({3: tensor()}, "keys of its dicts must be strings"),
    "same name twice": ({"a": {"b": tensor()}, "a.b": tensor()}, "the same name"),
    "endless": (doubled(60), "too many entries"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_in_a_file_is_named(case, tmp_path):
    tree, message = REFUSED[case]
    path = write_zip(tmp_path / "wrong.pth", program_of(tree), FOUR)
    with pytest.raises(ValueError, match=rf"wrong\.pth: .*{message}"):
        read_torch(path)


def test_a_tree_that_contains_itself_is_refused(tmp_path):
    tree: dict = {"w": tensor()}
    tree["again"] = tree
    path = write_zip(tmp_path / "wrong.pth", program_of(tree), FOUR)
    with pytest.raises(ValueError, match="too many entries"):
        read_torch(path)


def test_archives_that_grow_are_refused(tmp_path):
    zeros = {"0": bytes(1 << 22)}
    packed = write_zip(
        tmp_path / "a.pth", program_of({"w": tensor()}), zeros, compression=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(ValueError, match="is compressed"):
        read_torch(packed)
    tree = {"w": tensor(count=1000, shape=(1000,), strides=(1,))}
    tree = {f"w{i}": tree["w"] for i in range(50)}  # one storage, read fifty times
    path = write_zip(tmp_path / "a.pth", program_of(tree), {"0": bytes(4000)})
    assert len(read_torch(path)) == 50
    with pytest.raises(ValueError, match=r"tensors take 200000 bytes, which is more than 20000"):
        read_torch(path, most=20000)
    with pytest.raises(ValueError, match="are too many; at most 100"):
        read_torch(path, most=100)


def test_storages_that_overlap_are_refused(tmp_path):
    """A small file could otherwise hold any number of large storages."""
    keys = [f"{i:02d}" for i in range(20)]
    tree = {key: tensor(key=key, count=500, shape=(500,), strides=(1,)) for key in keys}
    path = write_zip(tmp_path / "a.pth", program_of(tree), {"00": bytes(2000)})
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("archive/data/00")
        for key in keys[1:]:  # entries of the directory that all point to the first storage
            entry = copy.copy(first)
            entry.filename = f"archive/data/{key}"
            archive.filelist.append(entry)
        archive._didModify = True
    with pytest.raises(ValueError, match=r"a\.pth: .*(overlap|Overlap|differ)"):
        read_torch(path)


def test_other_files_are_no_files_of_pytorch(tmp_path):
    path = tmp_path / "a.pth"
    with pytest.raises(ValueError, match=r"a\.pth: cannot be read"):
        read_torch(path)
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"not a whole file that torch\.save wrote"):
        read_torch(path)
    path.write_bytes(pickle.dumps(3, 2))
    with pytest.raises(ValueError, match=r"not a file that torch\.save wrote"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", b"")
    with pytest.raises(ValueError, match=r"holds 0 files data\.pkl"):
        read_torch(path)
    link = tmp_path / "link.pth"
    link.symlink_to(GOLDEN / "zip.pth")
    with pytest.raises(ValueError, match="symbolic link"):
        read_torch(link)


def test_safetensors_are_read_as_their_library_wrote_them(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3, np.int64),
        "c": np.array([True, False]),
    }
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(arrays, path)
    found = read_safetensors(path)
    assert sorted(found) == sorted(arrays)
    for name, expected in arrays.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)
    whole = path.read_bytes()
    for length in (0, 7, 8, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors: not a whole safetensors file"):
            read_safetensors(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="are too many; at most 100"):
        read_safetensors(path, most=100)


def test_safetensors_with_other_sizes_than_they_promise_are_refused(tmp_path):
    def write(header: str, numbers: bytes) -> Path:
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + numbers)
        return path

    good = '{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    found = read_safetensors(write(good, b"\x80\x3f\x00\xc0"))["w"]
    np.testing.assert_array_equal(found.astype(np.float32), [1.0, -2.0])
    for header in (
        good.replace("[2]", "[3]"),
        good.replace("[2]", "[4611686018427387904,4]"),
        good.replace("[0,4]", "[0,400]"),
        good.replace("BF16", "BF17"),
        "[" * 100_000,
    ):
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read_safetensors(write(header, b"\x80\x3f\x00\xc0"))
    with pytest.raises(ValueError, match="tensor 'w' has dtype F8_E4M3; known are"):
        read_safetensors(write(good.replace("BF16", "F8_E4M3").replace("[2]", "[4]"), b"1234"))
