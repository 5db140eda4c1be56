"""transformers' own FSDP2: two processes on gloo compute, train and save what one does."""

import subprocess
import sys

import pytest
import torch
from hf_tiny import CONFIGS, make, prompts
from transformers import AutoModelForCausalLM

SCRIPT = """
import sys
import torch
import torch.distributed as dist
import linattn.hf
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
folder, out, ids = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2)).train()
model(ids, labels=ids).loss.backward()
torch.optim.SGD(model.parameters(), 0.1).step()
model.save_pretrained(out)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_as_one(name, tmp_path):
    whole = make(name).train()
    whole.save_pretrained(tmp_path / "before")
    ids = prompts()
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [tmp_path / "script.py", tmp_path / "before", tmp_path / "after", tmp_path / "ids.pt"]
    run = subprocess.run([*torchrun, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    whole(ids, labels=ids).loss.backward()
    torch.optim.SGD(whole.parameters(), 0.1).step()
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    for (key, a), (_, b) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
