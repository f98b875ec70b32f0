"""Spread over devices and processes, a meta-training gives what it gives on one."""

import os
import re
import shutil
import signal
import time
import types

import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.core import cpu
from metaopt.core.types import Task
from metaopt.jobs.train import UNBOUNDED, TrainJob, meta_train
from metaopt.meta import NESConfig, PESConfig, TBPTTConfig, devices, loop
from metaopt.meta.population import evaluate, evaluate_one
from metaopt.optimizers import L3RS
from metaopt.zoo.exports import load

STEPS = 6


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(cache folder, metrics, theta) of a run on one device."""
    folder = tmp_path_factory.mktemp("alone")
    best, _ = children.train_small(folder / "run", STEPS)
    return folder / "cache", loop.read_metrics(folder / "run"), children.log_lr(best)


def check_same(alone, out):
    metrics = loop.read_metrics(out)
    for name in ("meta_loss", "meta_loss_best", "grad_norm", "validation_loss"):
        np.testing.assert_allclose(metrics[name], alone[1][name], rtol=1e-5, err_msg=name)
    falls = metrics["validation_loss"][[STEPS // 2 - 1, STEPS - 1]]
    assert falls[1] < falls[0]  # so that the best theta is the last
    np.testing.assert_allclose(np.load(out / "best.npy"), alone[2], rtol=1e-5)


@pytest.mark.parametrize("chunk", [3, 4, 8, 100])
def test_chunks_of_the_population_give_what_the_whole_gives(chunk):
    spread = devices.Spread(None, chunk)
    whole, part = (children.small_nes(s) for s in (None, spread))
    results = []
    for trainer, theta, _ in (whole, part):
        state = trainer.init(jax.random.key(0), theta)
        results.append(trainer.step(jax.random.key(1), state))
    for a, b in zip(*(jax.tree.leaves(r) for r in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["pes", "tbptt"])
def test_chunks_of_pairs_and_runs_give_what_the_whole_gives(method):
    results, loops = [], []
    for chunk in (0, 2):
        trainer, theta, _ = children.small_windows(method, chunk=chunk)
        state = trainer.init(jax.random.key(0), theta)
        results.append(trainer.step(jax.random.key(1), state))
        loops.append(str(jax.make_jaxpr(trainer.step)(jax.random.key(1), state)).count("scan["))
    for a, b in zip(*(jax.tree.leaves(r) for r in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert loops[1] == loops[0] + 1  # the loop over chunks


def test_a_chunk_bounds_what_a_device_holds():
    """Every candidate works on 1000 x 1000 numbers; chunks of 2 of 16 need less than 4 of them."""

    def run(theta, start, shared):
        square = jnp.sin(theta * jnp.arange(1000.0)[:, None] + jnp.arange(1000.0))
        return jnp.sum(jnp.linalg.matmul(square, square)[0]) + start + shared

    def peak(chunk):
        of = lambda p, s: evaluate(run, p, s, jnp.zeros([]), devices.Spread(None, chunk))
        compiled = jax.jit(of).lower(jnp.ones(16), jnp.ones(1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    candidate = 4e6
    assert peak(2) < 3 * 2 * candidate < 16 * candidate <= peak(0)


def eight_devices(folder, cache):
    """The same training on 8 devices, one candidate at a time; and what its devices exchange."""
    children.prepare(cache, 8)
    spread = children.all_devices(chunk=1)
    best, _ = children.train_small(folder / "run", STEPS, spread=spread)
    np.save(folder / "run" / "best.npy", children.log_lr(best))
    trainer, theta, _ = children.small_nes(spread)
    step = jax.jit(trainer.step, out_shardings=devices.placed(devices.WHOLE, spread.mesh))
    state = trainer.init(jax.random.key(0), theta)
    text = step.lower(jax.random.key(1), state).compile().as_text()
    (folder / "program.txt").write_text(text)
    odd = devices.Spread(devices.mesh_for(5, 3, jax.devices()[:4]))
    tripled = lambda s: evaluate_one(lambda start, by: start * by, s, jnp.float32(3.0), odd.mesh)
    np.save(folder / "tripled.npy", jax.jit(tripled)(jnp.arange(6.0)))
    given = jnp.arange(5.0), jnp.arange(3.0) * 10, jnp.float32(100.0)
    table = jax.jit(lambda *a: evaluate(lambda p, s, c: p + s + c, *a, odd))(*given)
    np.save(folder / "table.npy", table)


@pytest.fixture(scope="module")
def spread_run(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    assert children.finish(children.start(eight_devices, folder, alone[0])) == [0]
    return folder


def test_eight_devices_give_what_one_gives(alone, spread_run):
    check_same(alone, spread_run / "run")


def collectives(program):
    """How many numbers each exchange between devices of a compiled program takes."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    sizes = [0]
    for line in program.read_text().splitlines():
        if found := re.search(rf"= *(.*) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            sizes += [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    return sizes


def test_only_fitness_values_cross_devices(spread_run):
    """Of the compiled generation: no collective is larger than one loss per candidate and task."""
    assert 0 < max(collectives(spread_run / "program.txt")) <= 8 * 4


def test_a_population_that_does_not_divide_is_filled_up(spread_run):
    expected = np.arange(5.0)[:, None] + 10 * np.arange(3.0) + 100
    np.testing.assert_array_equal(np.load(spread_run / "table.npy"), expected)
    np.testing.assert_array_equal(np.load(spread_run / "tripled.npy"), 3 * np.arange(6.0))


def hosts(out, steps, cache, count, method="nes"):
    """Exit codes of `count` processes, one device each, that train together in folder `out`."""
    port = children.free_port()
    args = (out, steps, cache, port, count)
    return children.finish(
        *[children.start(children.run_host, *args, index, method) for index in range(count)]
    )


@pytest.fixture(scope="module")
def half_by_two_processes(alone, tmp_path_factory):
    out = tmp_path_factory.mktemp("hosts") / "run"
    assert hosts(out, STEPS // 2, alone[0], 2) == [0, 0]
    return out


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_give_what_one_gives(alone, half_by_two_processes, tmp_path, count):
    """The second half by 2 or 4 processes, all of which restore what 2 have saved."""
    out = shutil.copytree(half_by_two_processes, tmp_path / "run")
    assert hosts(out, STEPS, alone[0], count) == [0] * count
    check_same(alone, out)
    told = [(tmp_path / f"run.process-{index}").read_text() for index in range(count)]
    assert told == [f"{count} devices"] * count


def test_sigterm_to_one_process_ends_and_saves_them_all(alone, tmp_path):
    out, port = tmp_path / "run", children.free_port()
    args = (out, 1_000_000, alone[0], port, 2)
    both = [children.start(children.run_host, *args, index) for index in range(2)]
    while all(child.is_alive() for child in both) and not (out / loop.METRICS).exists():
        time.sleep(0.02)
    time.sleep(0.5)
    both[1].terminate()
    assert children.finish(*both) == [128 + signal.SIGTERM] * 2
    step, _ = children.final_checksum(out)
    assert step == len(loop.read_metrics(out)["step"]) > 0


def test_a_run_moves_between_one_device_and_four(alone, tmp_path):
    for steps, count in ((2, 1), (4, 4), (STEPS, 1)):
        child = children.start(
            children.run_small, tmp_path / "run", steps, alone[0], count, checkpoint_every=2
        )
        assert children.finish(child) == [0]
    metrics = loop.read_metrics(tmp_path / "run")
    np.testing.assert_array_equal(metrics["step"], np.arange(STEPS))
    np.testing.assert_allclose(metrics["grad_norm"], alone[1]["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "run" / "best.npy"), alone[2], rtol=1e-5)


@pytest.mark.parametrize(
    "population, tasks, count, shape",
    [
        (8, 4, 8, (8, 1)),
        (32, 4, 3, (3, 1)),
        (2, 4, 8, (2, 4)),
        (4, 3, 8, (8, 1)),
        (6, 4, 1, (1, 1)),
    ],
)
def test_the_mesh_leaves_the_least_to_the_busiest_device(population, tasks, count, shape):
    busiest = lambda p, t: -(-population // p) * (tasks // t)
    possible = [(count // t, t) for t in range(1, count + 1) if count % t == 0 == tasks % t]
    assert busiest(*shape) == min(busiest(*s) for s in possible)
    assert devices.mesh_shape(population, tasks, count) == shape


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1", None, None), "go together"),
        (("auto", 2, 0), "go together"),
        (("localhost", 2, 0), "host:port"),
        (("localhost:1", 2, 2), "process_id must be 0 to 1"),
    ],
)
def test_processes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        devices.initialise(*arguments)


def count_devices(file, given, already):
    """A child's whole life: writes how many devices it has and the cores of each."""
    if already:
        jax.config.update("jax_num_cpu_devices", already)
    devices.initialise("none", cpu_devices=given)
    file.write_text(f"{jax.device_count()} {cpu.cores_each()}")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be counted")
@pytest.mark.parametrize("given, already", [(0, 0), (3, 0), (3, 2)])
def test_the_cores_become_devices(tmp_path, given, already):
    """One per core, or as many as are asked for; not where JAX was told otherwise before."""
    cores = len(os.sched_getaffinity(0))
    child = children.start(count_devices, tmp_path / "found", given, already)
    assert children.finish(child) == [0]
    expected = already or given or cores
    assert (tmp_path / "found").read_text() == f"{expected} {cores / expected}"


def use_a_task_twice(file):
    """A child's whole life: two programs on four devices, and how often their data lie there."""
    children.prepare(file.parent / "cache", 4)
    mesh = devices.mesh_for(4, 1)
    task = Task(
        init=lambda data, key: data[3] * data,
        loss=lambda data, params, batch: params + data.sum(),
        sample=lambda data, key, shape, split: data,
        whole=lambda data, split: data,
        data=jnp.arange(1000.0),
    )
    task = devices.replicated(task, mesh)
    loss, init = devices.jit(Task.loss, mesh), devices.jit(Task.init, mesh)
    results = loss(task, np.float32(1.0), None), init(task, np.uint32(0))[8]
    spread = [x for x in jax.live_arrays() if x.shape == (1000,) and len(x.devices()) == 4]
    file.write_text(" ".join(str(int(x)) for x in (*results, len(spread))))


def test_data_lie_on_every_device_once_for_all_programs(tmp_path):
    child = children.start(use_a_task_twice, tmp_path / "found")
    assert children.finish(child) == [0]
    assert (tmp_path / "found").read_text() == "499501 24 1"


def test_one_process_joins_nothing(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    devices.initialise()
    assert not jax.distributed.is_initialized() and jax.process_count() == 1


JOB = {
    "task": "quadratic",
    "learned": L3RS(base=("sgd",)),
    "method": NESConfig(population=4, tasks=2, min_steps=3, max_steps=5),
    "steps": 3,
}


def run_job(out, cache, **settings):
    children.prepare(cache)
    meta_train(TrainJob(**{**JOB, "out": out, **settings}))


def test_the_command_in_two_processes_exports_what_one_exports(alone, tmp_path):
    port, cache = children.free_port(), alone[0]
    together = {"coordinator": f"localhost:{port}", "num_processes": 2}
    both = [
        children.start(run_job, tmp_path / "both", cache, process_id=index, **together)
        for index in range(2)
    ]
    assert children.finish(*both) == [0, 0]
    assert children.finish(children.start(run_job, tmp_path / "one", cache)) == [0]
    exported = [load(tmp_path / name).theta for name in ("both", "one")]
    for a, b in zip(*map(jax.tree.leaves, exported), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_what_may_change_between_the_parts_of_a_run():
    """Where and how it is computed is not part of a run's identity; what is computed, is."""
    one = TrainJob(**JOB)
    moved = {"coordinator": "none", "population_chunk": 2, "minutes": 3.0, "checkpoint_every": 7}
    assert TrainJob(**JOB, **moved).identity == one.identity
    others = ({"seed": 1}, {"steps": 4}, {"method": NESConfig()}, {"task": "digits"})
    for other in (*others, {"validate_on": "trajectory"}):
        assert TrainJob(**{**JOB, **other}).identity != one.identity


def test_minutes_alone_bound_a_run():
    assert TrainJob().max_steps == 300
    assert TrainJob(minutes=5.0).max_steps == UNBOUNDED
    assert TrainJob(minutes=5.0, steps=10).max_steps == 10
    with pytest.raises(ValueError, match=r"minutes must not be negative, got -1\.0"):
        TrainJob(minutes=-1.0)
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        TrainJob(checkpoint_every=0)


WINDOWS = pytest.mark.parametrize("method", ["pes", "tbptt"])


def windows_on_devices(folder, cache, method, count):
    """A training on `count` devices; what they exchange, and where the state of the runs lies."""
    children.prepare(cache, count)
    spread = children.all_devices() if count > 1 else None
    best, _ = children.train_small(folder / "run", STEPS, spread=spread, method=method)
    np.save(folder / "run" / "best.npy", children.log_lr(best))
    if spread is None:
        return
    trainer, theta, _ = children.small_windows(method, spread.mesh)
    key, whole = jax.random.key(0), devices.WHOLE
    specs = trainer.specs(jax.eval_shape(trainer.init, key, theta))
    trainer = devices.replicated(trainer, spread.mesh)
    init = devices.jit(trainer.init, spread.mesh, specs)
    step = jax.jit(trainer.step, out_shardings=devices.placed((specs, whole), spread.mesh))
    state = init(key, theta)
    (folder / "program.txt").write_text(step.lower(key, state).compile().as_text())
    after, _ = step(key, state)
    shares = [x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(after.runs)]
    (folder / "shares.txt").write_text(" ".join(map(str, shares)))


@pytest.fixture(scope="module")
def windows_alone(tmp_path_factory):
    """method -> (cache folder, metrics, theta) of its run on one device."""
    runs = {}
    for method in ("pes", "tbptt"):
        folder = tmp_path_factory.mktemp(method)
        assert children.finish(
            children.start(windows_on_devices, folder, folder / "cache", method, 1)
        ) == [0]
        metrics = loop.read_metrics(folder / "run")
        runs[method] = (folder / "cache", metrics, np.load(folder / "run" / "best.npy"))
    return runs


def check_same_windows(alone, out):
    metrics = loop.read_metrics(out)
    for name in ("meta_loss", "grad_norm", "num_steps"):
        np.testing.assert_allclose(metrics[name], alone[1][name], rtol=1e-4, err_msg=name)
    ends = [found["validation_loss"][-1] for found in (metrics, alone[1])]  # each part has one
    np.testing.assert_allclose(*ends, rtol=1e-5)
    np.testing.assert_allclose(np.load(out / "best.npy"), alone[2], rtol=1e-5)


@WINDOWS
def test_windows_on_eight_devices_give_what_one_gives(method, windows_alone, tmp_path):
    alone = windows_alone[method]
    child = children.start(windows_on_devices, tmp_path, alone[0], method, 8)
    assert children.finish(child) == [0]
    check_same_windows(alone, tmp_path / "run")
    # Every device keeps an eighth of the inner runs, and none of them ever leaves it.
    assert set((tmp_path / "shares.txt").read_text().split()) == {"0.125"}
    assert 0 < max(collectives(tmp_path / "program.txt")) <= 2 * 8 * 2


@WINDOWS
def test_windows_by_processes_restore_what_others_saved(method, windows_alone, tmp_path):
    """The first half by 2 processes, then by 4, then alone on one device."""
    alone, out = windows_alone[method], tmp_path / "run"
    assert hosts(out, STEPS // 3, alone[0], 2, method) == [0, 0]
    assert hosts(out, 2 * STEPS // 3, alone[0], 4, method) == [0] * 4
    child = children.start(windows_on_devices, tmp_path, alone[0], method, 1)
    assert children.finish(child) == [0]
    check_same_windows(alone, out)


@WINDOWS
def test_runs_that_do_not_divide_over_the_devices(method, monkeypatch):
    config = {"pes": PESConfig(population=6), "tbptt": TBPTTConfig(tasks=3)}[method]
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert config.mesh() is None  # 3 runs on 2 devices: one takes them all
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    multiple = {"pes": "PESConfig.population .* of 4", "tbptt": "TBPTTConfig.tasks .* of 2"}
    with pytest.raises(ValueError, match=multiple[method]):
        config.mesh()
    with pytest.raises(ValueError, match="3 cannot be shared evenly by 2 devices"):
        devices.check_shares("x", 3, types.SimpleNamespace(size=2))
