"""Two processes give the losses of one: DDP through the command, FSDP2 through fully_shard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from finetune import tiny, two_processes

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    tiny.save_encoder(tmp_path / "encoder")
    tiny.save_model(tmp_path / "decoder")
    tiny.save_rows(tmp_path / "rows.jsonl", tiny.labelled())
    tiny.save_data(tmp_path / "sft.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, two_processes.__file__, str(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads((tmp_path / "losses.json").read_text())
    one = two_processes.all_cases(tmp_path, 0, 1)
    assert one.keys() == two.keys()
    for case, losses in one.items():
        assert len(losses) == two_processes.STEPS
        assert losses[0] != pytest.approx(losses[-1], abs=1e-3), case
        assert two[case] == pytest.approx(losses, abs=1e-5), case
    # One process wrote what one process writes.
    for task, method in two_processes.CASES:
        written = {path.name for path in (tmp_path / f"{task}-{method}-2").iterdir()}
        assert written == {path.name for path in (tmp_path / f"{task}-{method}-1").iterdir()}
        assert "metrics.json" in written
