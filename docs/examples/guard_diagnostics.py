"""Read a guard's diagnostics: is the learned optimizer of use, and what does the guard cost?

    python docs/examples/guard_diagnostics.py

Diagnostics are fields of the guard's state, so they work under `jit` and `vmap` and are saved in
checkpoints. `optax.tree_utils.tree_get(state, name)` finds them at any depth of a chain. The
learned optimizer here is good for 100 steps; then its steps double every 20 steps. The race
detects this and continues with Adam's own run.
"""

import jax
import optax

import metaopt
from metaopt import guards
from metaopt.tasks import catalog

WINDOWS, N_T, N_C = 24, 10, 5
TRAIN, HELD_OUT = slice(0, N_T), slice(N_T, N_T + N_C)


def going_wrong(learned: optax.GradientTransformation) -> optax.GradientTransformation:
    """`learned` with steps that double every 20 steps from step 100 on."""
    growing = optax.scale_by_schedule(lambda count: 2.0 ** (jax.nn.relu(count - 100) / 20))
    return optax.chain(learned, growing)


def main() -> list[dict]:
    task = catalog.build("digits")
    k_params, k_theta, k_data = jax.random.split(jax.random.key(0), 3)
    params = task.init(k_params)
    l3rs = metaopt.optimizers.l3rs(lambda_0=0.1)
    learned = going_wrong(l3rs.apply(l3rs.init(k_theta, params), num_steps=WINDOWS * N_T))

    guard = guards.race(learned, optax.adam(3e-3), n_t=N_T, n_c=N_C)
    state = guard.init(params)

    @jax.jit
    def window(params, state, key):
        batches = task.sample(key, (N_T + N_C,))
        train, held_out = (jax.tree.map(lambda x, s=s: x[s], batches) for s in (TRAIN, HELD_OUT))
        updates, state = guard.update(
            None, state, params, loss_fn=task.loss, train_batches=train, eval_batches=held_out
        )
        return optax.apply_updates(params, updates), state

    print("window  learned  fallback  kept")
    rows = []
    for key in jax.random.split(k_data, WINDOWS):
        params, state = window(params, state, key)
        names = ("windows", "losses", "accepted", "wins", "gradient_evals", "loss_evals")
        row = {name: optax.tree_utils.tree_get(state, name) for name in names}
        learned_loss, fallback_loss = row["losses"].tolist()
        kept = "learned" if row["accepted"] else "fallback"
        print(f"{row['windows']:6}  {learned_loss:7.3f}  {fallback_loss:8.3f}  {kept}")
        rows.append(row)

    steps = WINDOWS * N_T
    print(f"won by the learned optimizer, by Adam: {row['wins'].tolist()}")
    print(f"gradients per step: {row['gradient_evals'] / steps:.1f} (Adam alone: 1.0)")
    print(f"losses per step: {row['loss_evals'] / steps:.1f}")
    return rows


if __name__ == "__main__":
    main()
