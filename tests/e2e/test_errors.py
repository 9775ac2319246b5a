"""What ends a training: a bug keeps its traceback, and what the machine refuses is one message."""

import subprocess
import sys

import pytest
from conftest import TESTS

BUGS = {
    "advantage": (
        "from alphagrpo_jax.advantage import group_advantage\n"
        "def broken(*_, **__): return np.zeros(2) + np.zeros(3)\n"
        "group_advantage.__code__ = broken.__code__\n",  # whoever has imported it
        "ValueError: operands could not be broadcast",
    ),
    "prompts": (
        "from alphagrpo_jax import prompts as stage\n"
        "def broken(*_, **__): return list(zip([1], [], strict=True))\n"
        "stage.order = broken\n",
        "ValueError: zip() argument 2 is shorter",
    ),
}
FULL_DISK = (
    "from alphagrpo_jax.runtime.metrics import MetricsLog\n"
    "def write(*_): raise OSError(28, 'No space left on device', 'metrics.jsonl')\n"
    "MetricsLog.write = write\n"
)
TRAIN = (
    "import sys\n"
    "import numpy as np\n"
    "{patch}"
    "from absl import app\n"
    "from alphagrpo_jax import train\n"
    "app.run(train.command, argv=sys.argv, flags_parser=train.parse_flags)\n"
)


def train(world, environment, patch: str, workdir) -> tuple[int, str]:
    done = subprocess.run(
        [
            *(sys.executable, "-c", TRAIN.format(patch=patch)),
            *(f"--config={TESTS / 'tiny_world.py'}", f"--workdir={workdir}"),
        ],
        cwd=world,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("stage", sorted(BUGS))
def test_a_bug_in_a_stage_keeps_its_traceback(world, environment, stage):
    patch, message = BUGS[stage]
    code, printed = train(world, environment, patch, world / f"bug_{stage}")
    assert code == 1, printed
    assert "Traceback (most recent call last)" in printed
    assert ", in broken" in printed
    assert message in printed.splitlines()[-1]
    assert "error: " not in printed


def test_a_full_disk_is_one_message(world, environment):
    code, printed = train(world, environment, FULL_DISK, world / "full")
    assert code == 1, printed
    assert "error: [Errno 28] No space left on device: 'metrics.jsonl'; the run's folder" in printed
    assert "run the same command again: it continues from the last checkpoint" in printed
    assert "Traceback" not in printed
