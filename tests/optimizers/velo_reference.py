"""VeLO written a second time: float64 NumPy, one scalar or one plain loop at a time.

Follows the published description, not the code of metaopt; nothing is imported from metaopt.
"""

import numpy as np

DECAYS = (0.9, 0.99, 0.999)
TIMES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)


def random_theta(seed, hidden=6, bank=3):
    """Named leaves; the biases and the initial memory are not zero either."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape, scale=0.4: rng.normal(size=shape) * scale
    theta = {f"lstm_init_state/{k}": normal(1, hidden) for k in ("hidden", "cell")}
    sizes = {
        **{name: (30, hidden) for name in ("linear", "linear_1", "linear_2")},
        "rnn/linear": (2 * hidden, 4 * hidden),
        "rnn_to_controls": (hidden, bank),
        "step_size": (hidden, 1),
    }
    for name, (n_in, n_out) in sizes.items():
        theta[f"rnn_params/{name}/w"] = normal(n_in, n_out)
        theta[f"rnn_params/{name}/b"] = normal(n_out)
    for k, size in enumerate(GROUPS):
        theta[f"ff_mod_stack/~/w0__{k}"] = normal(bank, size, 4, scale=0.05)
    tail = {"w1": (4, 4), "w2": (4, 3), "b0": (4,), "b1": (4,), "b2": (3,)}
    for name, shape in tail.items():
        theta[f"ff_mod_stack/~/{name}"] = normal(bank, *shape, scale=0.05)
    return {name: value.astype(np.float32) for name, value in theta.items()}


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


class Loss:
    def __init__(self, num_steps):
        self.decay = np.exp(-1.0 / np.logspace(1.0, np.log10(num_steps), 10))
        self.mean, self.low, self.count = np.zeros(10), np.full(10, 999999999999.0), 0

    def features(self, loss):
        correction = 1.0 - self.decay ** (self.count + 1)
        top = loss if self.count == 0 else np.max(self.mean / correction)
        loss = min(2.0 * abs(top), loss)
        self.mean = self.decay * self.mean + (1.0 - self.decay) * loss
        corrected = self.mean / correction
        self.low = np.minimum(self.low, corrected)
        self.count += 1
        if self.count <= 2:
            return np.zeros(9)
        below = self.low[:-1]
        ratio = (corrected[:-1] - below) / np.maximum(1e-8, corrected[1:] - below)
        return np.clip(ratio - 1.0, -1.0, 1.0)


class Tensor:
    """One tensor; a scalar gets one axis, as in the description."""

    def __init__(self, p):
        self.shape = np.shape(p)
        self.p = np.atleast_1d(np.array(p, np.float64))
        self.m = [np.zeros_like(self.p) for _ in DECAYS]
        self.v = np.zeros_like(self.p)
        order = np.argsort(self.p.shape, kind="stable")
        self.a0, self.a1 = (order[-1], order[-2]) if self.p.ndim > 1 else (None, None)
        self.row = [0.0 for _ in DECAYS]
        self.col = [0.0 for _ in DECAYS]

    def statistics(self):
        log_size = lambda x: 0.5 * np.clip(np.log(1e-8 + abs(10.0 * x)), -5.0, 5.0)
        s = 1.0 / np.sqrt(max(1e-9, np.mean(self.p**2)))
        m, v = [s * m for m in self.m], s * self.v
        rank = np.zeros(5)
        count = sum(1 for size in self.shape if size > 1)
        if count < 5:
            rank[count] = 1.0
        var_m = [log_size(np.mean((x - np.mean(x)) ** 2)) for x in m]
        var_rms = [log_size(np.mean((v - np.mean(x)) ** 2)) for x in m]
        return np.concatenate([[log_size(np.mean(v))], rank, var_m, var_rms])

    def columns(self, g):
        q = g**2 + 1e-30
        self.v = 0.999 * self.v + 0.001 * g**2
        groups = {k: [] for k in range(14)}
        r = 1.0 / np.sqrt(self.v + 1e-6)
        groups[0], groups[1], groups[2] = [g], [np.clip(g, -0.1, 0.1)], [self.p]
        groups[4], groups[6], groups[8] = [self.v], [r], [g * r]
        for k, d in enumerate(DECAYS):
            self.m[k] = d * self.m[k] + (1.0 - d) * g
            groups[3].append(self.m[k])
            groups[5].append(self.m[k] * r)
            if self.a0 is None:
                self.row[k] = d * self.row[k] + (1.0 - d) * q
                row = col = self.row[k]
                groups[7].append(g / np.sqrt(max_(1e-9, row + 1e-9)))
                groups[13].append(self.m[k] / np.sqrt(row))
            else:
                self.row[k] = d * self.row[k] + (1.0 - d) * q.mean(axis=self.a0, keepdims=True)
                self.col[k] = d * self.col[k] + (1.0 - d) * q.mean(axis=self.a1, keepdims=True)
                row, col = self.row[k], self.col[k]
                mean = row.mean(axis=self.a1, keepdims=True)
                left = 1.0 / np.sqrt(max_(1e-9, row / (mean + 1e-9)))
                right = 1.0 / np.sqrt(max_(1e-9, col))
                groups[7].append(g * left * right)
                groups[13].append(self.m[k] * left * right)
            groups[9].append(row)
            groups[10].append(col)
            groups[11].append(1.0 / np.sqrt(row + 1e-8))
            groups[12].append(1.0 / np.sqrt(col + 1e-8))
        wide = [np.broadcast_to(x, self.p.shape) for k in range(14) for x in groups[k]]
        x = np.stack([column.ravel() for column in wide], axis=1)  # [n, 30]
        return x / np.sqrt(1e-5 + np.mean(x**2, axis=0))

    def step(self, g, bank, controls, step_size):
        size = len(controls)
        weights = {
            name: 100.0 / size * sum(controls[i] * stack[i] for i in range(size))
            for name, stack in bank.items()
        }
        x = self.columns(np.clip(np.atleast_1d(g), -1000.0, 1000.0))
        x = x @ np.concatenate([weights[f"w0__{k}"] for k in range(14)]) + weights["b0"]
        x = np.maximum(x, 0.0) @ weights["w1"] + weights["b1"]
        x = np.maximum(x, 0.0) @ weights["w2"] + weights["b2"]
        scale = np.sqrt(np.mean(self.p**2) + 1e-9)
        step = step_size * 0.001 * scale * x[:, 0] * np.exp(0.001 * x[:, 1])
        self.p = self.p - step.reshape(self.p.shape)


def max_(low, x):
    return np.maximum(low, x)


def replay(named, params, grads, losses, num_steps):
    """Params after every step: a list over steps of lists over tensors."""
    theta = {name: np.asarray(value, np.float64) for name, value in named.items()}
    bank = {n.split("/")[-1]: v for n, v in theta.items() if n.startswith("ff_mod_stack")}
    layer = lambda name, x: x @ theta[f"rnn_params/{name}/w"] + theta[f"rnn_params/{name}/b"]
    tensors, loss = [Tensor(p) for p in params], Loss(num_steps)
    h = np.repeat(theta["lstm_init_state/hidden"], len(tensors), axis=0)
    c = np.repeat(theta["lstm_init_state/cell"], len(tensors), axis=0)
    history = []
    for t, value in enumerate(losses):
        done = min(t, num_steps - 1) / num_steps  # past the horizon: our own rule
        shared = np.concatenate([np.tanh(10.0 * (done - np.array(TIMES))), loss.features(value)])
        x = np.stack([np.concatenate([shared, tensor.statistics()]) for tensor in tensors])
        pool = np.max(np.maximum(layer("linear_1", x), 0.0), axis=0)
        z = layer("linear_2", x) + pool
        i, g, f, o = np.split(layer("rnn/linear", np.concatenate([z, h], axis=1)), 4, axis=1)
        c = sigmoid(f + 1.0) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        controls, sizes = layer("rnn_to_controls", h), layer("step_size", h)[:, 0]
        for k, tensor in enumerate(tensors):
            tensor.step(np.asarray(grads[t][k], np.float64), bank, controls[k], sizes[k])
        history.append([tensor.p.reshape(tensor.shape) for tensor in tensors])
    return history
