"""Meta-train a learned optimizer and export it."""

import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from metaopt import meta
from metaopt.core.types import LearnedOptimizer, TaskFamily, Theta
from metaopt.jobs.settings import TrainJob
from metaopt.meta import devices
from metaopt.meta.loop import read_metrics, train
from metaopt.tasks import catalog
from metaopt.zoo import exports


def meta_train(job: TrainJob) -> Path:
    """Runs a `TrainJob` and returns the folder of the exported optimizer.

    Of several processes each calls it with the same job, but for `process_id`.
    """
    devices.initialise(job.coordinator, job.num_processes, job.process_id, job.cpu_devices)
    lopt = exports.build(job.learned, job.optimizer_config, where="--learned")
    warm = _warm_start(job)
    families = [catalog.family(name) for name in job.tasks]
    k_theta, k_task, k_params = jax.random.split(jax.random.key(job.seed), 3)
    params = families[0].task(families[0].sample(k_task)).init(k_params)
    theta = lopt.init(k_theta, params)
    if warm is not None:
        exports.check_same_structure(f"warm_start: {job.warm_start}", theta, warm)
        theta = warm
    spread = devices.Spread(_mesh(job), job.population_chunk)
    theta, loss = train(
        _trainer(job, lopt, families, spread),
        theta,
        steps=job.max_steps,
        minutes=job.minutes,
        seed=job.seed,
        out=job.out,
        config=_plain(job.identity),
        validate=meta.validation(
            lopt, families, job.horizon[1], on=job.validate_on, mesh=spread.mesh
        ),
        validate_every=job.validate_every,
        checkpoint_every=job.checkpoint_every,
        label=f"{job.learned} by {job.method} on {job.task}",
        overwrite=job.overwrite,
        resume_changed=job.resume_changed,
        tensorboard=job.tensorboard,
        mesh=spread.mesh,
    )
    if jax.process_index() > 0:  # process 0 exports
        return job.out / "export"
    trained = {**_plain(job.identity), "num_steps": list(job.horizon), "validation_loss": loss}
    return exports.save(job.out / "export", job.learned, job.optimizer_config, theta, trained)


def ended_as_begun(job: TrainJob) -> bool:
    """Whether a finished run exported its initial theta, since none was better on held-out runs."""
    held_out = read_metrics(job.out).get("validation_loss", ())
    return exports.load(job.out).trained["validation_loss"] not in held_out


def _mesh(job: TrainJob) -> Mesh | None:
    """All devices, or as many of this one process as share its runs evenly; None for one."""
    count = jax.device_count()
    if count == 1:
        return None
    if job.method == "nes":
        return devices.mesh_for(job.nes.population, job.nes.tasks)
    flag, whole, each = (
        ("--pes.population", job.pes.population, 2)  # its pairs are shared out
        if job.method == "pes"
        else ("--tbptt.tasks", job.tbptt.tasks, 1)
    )
    runs = whole // each
    if jax.process_count() > 1 and runs % count:
        raise ValueError(f"{flag} must be a multiple of {each * count} on {count} devices.")
    used = max(n for n in range(1, count + 1) if runs % n == 0)
    return devices.mesh_for(runs, 1, jax.devices()[:used]) if used > 1 else None


def _trainer(
    job: TrainJob,
    lopt: LearnedOptimizer,
    families: list[TaskFamily],
    spread: devices.Spread,
) -> meta.MetaTrainer:
    if job.method == "nes":
        return meta.nes(lopt, families, job.nes, spread)
    if job.method == "pes":
        return meta.pes(lopt, families, job.pes, spread)
    return meta.tbptt(lopt, families, job.tbptt, spread)


def _warm_start(job: TrainJob) -> Theta | None:
    """The theta to start from, if one is named."""
    if not job.warm_start:
        return None
    given = exports.load(job.warm_start)
    if (given.name, given.config) != (job.learned, job.optimizer_config):
        raise ValueError(
            f"warm_start: {job.warm_start} holds {given.name} {given.config}, but this run trains "
            f"{job.learned} {job.optimizer_config}."
        )
    return given.theta


def _plain(settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))
