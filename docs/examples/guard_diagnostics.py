"""Read a guard's diagnostics: is the learned optimizer of use, and what does the guard cost?

    python docs/examples/guard_diagnostics.py

Diagnostics are part of the guard's state, so they work under `jit` and `vmap` and are saved in
checkpoints. `state.info` holds them; `optax.tree.get(state, name)` finds them at any depth of a
chain. The learned optimizer here is good for 100 steps; then its steps double every 20 steps. The
race detects this, follows Adam's own run, and lets the learned optimizer rest when it has clearly
lost 12 decisions (`patience`).
"""

import jax
import jax.numpy as jnp
import optax

import metaopt
from metaopt import guards
from metaopt.tasks import catalog

STEPS, N_T = 400, 10


def going_wrong(learned: optax.GradientTransformation) -> optax.GradientTransformation:
    """`learned` with steps that double every 20 steps from step 100 on."""
    growing = optax.scale_by_schedule(lambda count: 2.0 ** (jax.nn.relu(count - 100) / 20))
    return optax.chain(learned, growing)


def main() -> list[dict]:
    task = catalog.build("digits")
    k_params, k_theta, k_data = jax.random.split(jax.random.key(0), 3)
    params = task.init(k_params)
    l3rs = metaopt.optimizers.l3rs(lambda_0=0.1)
    learned = going_wrong(l3rs.apply(l3rs.init(k_theta, params), num_steps=STEPS))

    tx = guards.race(learned, optax.adam(3e-3), n_t=N_T)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, key):
        batch = task.sample(key, ())
        value_fn = lambda params: task.loss(params, batch)
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    print("decision  learned  fallback  leader    loss of the last mini-batch")
    rows = []
    for step, key in enumerate(jax.random.split(k_data, STEPS), start=1):
        params, state = train_step(params, state, key)
        if step % N_T:
            continue  # no decision
        info, loss = state.info, optax.tree.get(state, "leader_loss")
        row = {"loss": loss, **info._asdict()}
        learned_loss, fallback_loss = row["losses"].tolist()
        shown = f"{learned_loss:7.3f}" if jnp.isfinite(learned_loss) else "rests  "
        leader = ("learned", "fallback")[int(row["winner"])]
        print(f"{row['windows']:8}  {shown}  {fallback_loss:8.3f}  {leader:8}  {loss:.3f}")
        rows.append(row)

    print(f"decisions for the learned optimizer, for Adam: {row['wins'].tolist()}")
    print(f"gradients per mini-batch: {row['gradient_evals'] / STEPS:.2f} (Adam alone: 1)")
    return rows


if __name__ == "__main__":
    main()
