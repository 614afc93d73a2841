#!/usr/bin/env bash
# jax 0.10.2, CPU: infinity times a mask of zeros is NaN in eager code and 0 under jit; if the mask is bool it is 0 in both,
# as XLA makes a select of the product with a converted bool. Guess before the run: NaN in all four, as IEEE 754 and NumPy
# have it.
# Seen: NaN only for the float mask in eager code. A masked gradient that is a product is a select or not by how it is run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet jax==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import jax
import jax.numpy as jnp
import numpy

x, mask = jnp.array([jnp.inf], jnp.float32), jnp.array([False])


def by_bool(x, mask):
    return x * mask


def by_float(x, mask):
    return x * mask.astype(jnp.float32)


found = {
    f"{function.__name__}, {mode}": float(run(x, mask)[0])
    for function in (by_bool, by_float)
    for mode, run in (("eager", function), ("jit", jax.jit(function)))
}
with numpy.errstate(invalid="ignore"):
    by_numpy = float((numpy.array([numpy.inf]) * numpy.array([False]))[0])
print(f"jax {jax.__version__}: {found}; NumPy: {by_numpy}")
assert numpy.isnan(by_numpy)
assert {name for name, value in found.items() if numpy.isnan(value)} == {"by_float, eager"}
assert all(value == 0 for name, value in found.items() if name != "by_float, eager")
PY
