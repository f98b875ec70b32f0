"""Sharded params give the result of unsharded ones. (VeLO's test is in test_velo.py.)"""

import os
import subprocess
import sys
from pathlib import Path


def test_lstm_l3rs_and_a_guard_on_eight_devices():
    script = Path(__file__).with_name("sharded.py")
    devices = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **devices}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    for name in ("lstm", "l3rs", "race"):
        assert f"{name}: sharded over 8 devices" in process.stdout
