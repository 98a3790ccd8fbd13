"""Several processes: the same training as one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qts_video.methods import QTSplus
from small_training import PARTS, logged, make_trainer

CASES = [{}, {"stage": 2, "lora_rank": 2, "gradient_accumulation_steps": 2}]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Distributed data parallel by gloo, without a search for unused parameters: every logged part and the selector."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("two_processes.py"))
    halves = [case | {"per_device_train_batch_size": 1} for case in CASES]
    done = subprocess.run(
        [*torchrun, script, str(tmp_path), json.dumps(halves)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "find_unused_parameters=True" not in done.stderr
    for number, case in enumerate(CASES):
        one = make_trainer(tmp_path / "one", **case)
        one.train()
        log = json.loads((tmp_path / f"log{number}.json").read_text())
        for name, values in logged(one, *PARTS).items():
            assert log[name] == pytest.approx(values, rel=2e-6), name
        assert len(set(log["kept"])) > 1
        ours, theirs = one.selecting.selector.selector, QTSplus.from_pretrained(tmp_path / str(number)).selector
        for name, parameter in ours.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], parameter, rtol=1e-5, atol=1e-8, msg=name)
