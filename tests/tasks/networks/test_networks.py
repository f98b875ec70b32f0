"""Networks: the papers' sizes, XLA's convolutions, causal attention, PyTorch's initialisation."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.tasks import networks
from metaopt.tasks.networks.layers import DepthwiseConv, by_slices, by_xla


@pytest.mark.parametrize(
    "net, shape, expected",
    [
        (networks.MLP((20, 10)), (1, 28, 28, 1), 15_910),
        (networks.MLP((20, 2)), (1, 2), 102),
        (networks.CNN(10), (1, 28, 28, 1), 7_306),
        (networks.CNN(10), (1, 32, 32, 3), 7_706),
        (networks.cnn5(50), (1, 64, 64, 3), 97_442),
        (networks.resnet34(1000), (1, 224, 224, 3), 21_797_672),  # as torchvision counts
    ],
)
def test_networks_have_the_papers_number_of_parameters(net, shape, expected):
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape))["params"]
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == expected


def test_resnet34_has_the_110_arrays_that_l3rs_embeds():
    images = jnp.zeros((1, 224, 224, 3))
    shapes = jax.eval_shape(networks.resnet34(25).init, jax.random.key(0), images)
    assert len(jax.tree.leaves(shapes["params"])) == 110


def test_initial_weights_and_biases_are_uniform_within_one_over_sqrt_fan_in():
    params = networks.MLP((400, 10)).init(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    for leaf in jax.tree.leaves(params["Dense_0"]):
        bound = 100**-0.5
        assert jnp.abs(leaf).max() <= bound
        np.testing.assert_allclose(jnp.std(leaf), bound / 3**0.5, rtol=0.1)


@pytest.mark.parametrize(
    "kernel, stride, padding",
    [(1, 2, "VALID"), (3, 1, "SAME"), (3, 2, "SAME"), (5, 2, "VALID"), (5, 3, "SAME")],
)
def test_convolution_by_slices_equals_xlas(kernel, stride, padding):
    k_x, k_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(k_x, (2, 9, 12, 3))
    w = jax.random.normal(k_w, (kernel, kernel, 3, 4))

    @partial(jax.jit, static_argnums=0)
    def output_and_grads(convolve, x, w):
        def loss(x, w):
            y = convolve(x, w, stride, padding)
            return jnp.sum(jnp.sin(y)), y

        grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, w)
        return y, *grads

    by_both = zip(output_and_grads(by_slices, x, w), output_and_grads(by_xla, x, w), strict=True)
    for ours, theirs in by_both:
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * jnp.abs(theirs).max())


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 2)])
def test_depthwise_convolution_by_slices_equals_xlas(kernel, stride):
    x = jax.random.normal(jax.random.key(0), (2, 9, 12, 3))
    forms = [DepthwiseConv(kernel, stride, form=form) for form in ("slices", "xla")]
    variables = forms[0].init(jax.random.key(1), x)

    def output_and_grads(net):
        loss = lambda v, x: jnp.sum(jnp.sin(net.apply(v, x)))
        return net.apply(variables, x), *jax.grad(loss, argnums=(0, 1))(variables, x)

    by_both = map(jax.tree.leaves, map(output_and_grads, forms))
    for ours, theirs in zip(*by_both, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * jnp.abs(theirs).max())


def test_convolution_equals_flaxs_with_the_same_weights():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    ours = networks.Conv(5, 3, 2, padding="SAME")
    variables = ours.init(jax.random.key(1), x)
    theirs = nn.Conv(5, (3, 3), (2, 2), padding="SAME")
    np.testing.assert_allclose(
        ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_no_norm_mixes_examples_in_evaluation(norm):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    net = networks.small_resnet(3, norm=norm)
    together, variables = jax.jit(net.init_with_output)(jax.random.key(1), x)
    alone = jax.jit(net.apply)(variables, x[:2])
    np.testing.assert_allclose(alone, together[:2], atol=1e-5)


def test_batch_norm_normalises_and_keeps_running_statistics_with_the_momentum_it_states():
    """Those of the first layer, from its convolution by hand."""
    net = networks.small_resnet(3, norm="batch")
    x = 2.0 + jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    variables = jax.jit(net.init)(jax.random.key(1), x)
    train = jax.jit(partial(net.apply, train=True, mutable=True, capture_intermediates=True))
    _, changed = train(variables, x)
    convolved = networks.Conv(8, 3, padding="SAME", use_bias=False).apply(
        {"params": variables["params"]["stem"]}, x
    )
    seen = changed["batch_stats"]["BatchNorm_0"]
    mean, var = convolved.mean((0, 1, 2)), convolved.var((0, 1, 2))
    np.testing.assert_allclose(seen["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen["var"], 0.9 + 0.1 * var, rtol=1e-4)
    (normalised,) = changed["intermediates"]["BatchNorm_0"]["__call__"]
    expected = (convolved - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(normalised, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "net", [networks.Transformer(11, width=8, layers=2, max_length=6), networks.GRU(11, width=8)]
)
def test_language_models_see_only_the_past(net):
    tokens = jnp.array([[1, 2, 3, 4, 5, 6]])
    before, variables = jax.jit(net.init_with_output)(jax.random.key(0), tokens)
    after = jax.jit(net.apply)(variables, tokens.at[0, 4].set(9))
    np.testing.assert_allclose(before[0, :4], after[0, :4], atol=1e-6)
    assert jnp.abs(before[0, 4:] - after[0, 4:]).max() > 1e-3


def test_a_gru_follows_the_published_recurrence():
    net, tokens = networks.GRU(5, width=3), jnp.array([[1, 4, 2, 2]])
    logits, variables = jax.jit(net.init_with_output)(jax.random.key(0), tokens)
    params = jax.tree.map(np.asarray, variables["params"])
    cell, sigmoid = params["cell"], lambda x: 1 / (1 + np.exp(-x))
    gate = lambda name, x: x @ cell[name]["kernel"] + cell[name].get("bias", 0.0)
    h, expected = np.zeros(3), []
    for x in params["embedding"]["embedding"][np.asarray(tokens[0])]:
        reset = sigmoid(gate("ir", x) + gate("hr", h))
        update = sigmoid(gate("iz", x) + gate("hz", h))
        new = np.tanh(gate("in", x) + reset * gate("hn", h))
        h = (1 - update) * new + update * h
        expected.append(h @ params["head"]["kernel"] + params["head"]["bias"])
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)


def test_a_vit_without_positions_does_not_see_the_order_of_patches():
    net = networks.ViT(3, patch=2, width=8, heads=2)
    image = jax.random.normal(jax.random.key(1), (1, 4, 6, 2))
    params = jax.jit(net.init)(jax.random.key(0), image)["params"]
    logits = jax.jit(lambda params, image: net.apply({"params": params}, image))
    swapped = image.at[:, :2, :2].set(image[:, 2:, 4:]).at[:, 2:, 4:].set(image[:, :2, :2])
    assert jnp.abs(logits(params, image) - logits(params, swapped)).max() > 1e-4
    blind = {**params, "position": jnp.zeros((6, 8))}
    np.testing.assert_allclose(logits(blind, image), logits(blind, swapped), atol=1e-5)
    within = image.at[:, 0, 0].set(image[:, 1, 1])  # a change inside of a patch
    assert jnp.abs(logits(blind, image) - logits(blind, within)).max() > 1e-4


def test_networks_refuse_long_texts_and_unknown_settings():
    with pytest.raises(ValueError, match="7 tokens, but max_length is 6"):
        networks.Transformer(5, max_length=6).init(jax.random.key(0), jnp.zeros((1, 7), int))
    with pytest.raises(ValueError, match="8x9 pixels are not whole patches of 4"):
        networks.ViT(5, patch=4).init(jax.random.key(0), jnp.zeros((1, 8, 9, 1)))
    with pytest.raises(ValueError, match="norm must be 'batch' or 'group', got"):
        networks.small_resnet(5, norm="layer").init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(ValueError, match="init must be 'torch' or 'flax', got 'he'"):
        networks.MLP((2,), init_style="he").init(jax.random.key(0), jnp.zeros((1, 8)))
