"""What people do next to a checkpoint: train it on, over processes, adapt it, save it, load it elsewhere."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from hopscotch_common import checkpoints, scales
from hopscotch_common.loading.models import model_ref

SKIPPED = [0, 2]
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
MAPS = {
    f"model.layers.{block}.replacement_{name}": 0.1
    * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for block in SKIPPED
    for name, shape in (("down", (3, 32)), ("up", (32, 3)))
}


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory) -> dict:
    """A checkpoint that skips, and one with maps."""
    made, base = tmp_path_factory.mktemp("checkpoints"), model_ref(str(tiny_folder("llama")))
    for kind, maps in (("skips", {}), ("maps", MAPS)):
        values = 1 + 0.02 * torch.arange(16.0).view(4, 4)
        if not maps:
            values[SKIPPED, 0] = 0
        checkpoints.save_checkpoint(made / kind, base, SKIPPED, values, {}, maps=maps)
    return {kind: made / kind for kind in ("skips", "maps")}


@pytest.fixture(params=["skips", "maps"])
def checkpoint(request, folders):
    return folders[request.param]


def elsewhere(program: str, folder, *arguments, processes: int = 1) -> list[str]:
    """Run a program where this project is not installed; the lines that it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path = folder / "program.py"
    path.write_text(program)
    command = [*launch, str(path), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout.splitlines()


def loss_of(model) -> torch.Tensor:
    return model(IDS, labels=IDS).loss


def test_everything_that_trains_gets_a_gradient(checkpoint):
    model = checkpoints.load_checkpoint(checkpoint)
    model.requires_grad_(True)
    model.train()
    loss_of(model).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, plain[name])


AGAIN = """
import sys, json, torch
from transformers import AutoModelForCausalLM
for kind in ("skips", "maps"):
    for source, target in (("again", "third"), ("third", "fourth")):
        model = AutoModelForCausalLM.from_pretrained(f"{kind}-{source}", trust_remote_code=True)
        assert "hopscotch_common" not in sys.modules
        model.save_pretrained(f"{kind}-{target}")
        print(json.dumps(model(torch.tensor(eval(sys.argv[1]))).logits.tolist()))
"""


def test_saved_again_it_loads_where_this_project_is_not(folders, tmp_path):
    expected = []
    for kind, folder in folders.items():
        model = checkpoints.load_checkpoint(folder)
        model.save_pretrained(tmp_path / f"{kind}-again")
        saved = checkpoints.load_checkpoint(tmp_path / f"{kind}-again")
        assert_close(scales.snapshot(saved), scales.snapshot(model))
        expected += 2 * [model(IDS).logits]
    for line, logits in zip(elsewhere(AGAIN, tmp_path, IDS.tolist()), expected, strict=True):
        assert_close(torch.tensor(json.loads(line)), logits)


PARALLEL = """
import itertools, sys, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
ids = torch.tensor(eval(sys.argv[1]))[rank : rank + 1]
for folder, how in itertools.product(sys.argv[2:], ("ddp", "fsdp")):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        model = model.float()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    if rank == 0:
        print(total.item() / 2)
torch.distributed.destroy_process_group()
"""


def test_several_processes_train_it_on(folders, tmp_path):
    found = elsewhere(PARALLEL, tmp_path, IDS.tolist(), *folders.values(), processes=2)
    expected = []
    for folder in folders.values():
        model = checkpoints.load_checkpoint(folder)
        model.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = loss_of(model)  # rows of equal length: the mean of the processes' means
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        expected += 2 * [loss.item()]  # by either way to share it
    assert list(map(float, found)) == pytest.approx(expected, rel=1e-4)


def test_trainer_trains_and_saves_it(checkpoint, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = checkpoints.load_checkpoint(checkpoint)
    model.requires_grad_(True)
    before = loss_of(model).item()
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    after = loss_of(model).item()
    assert after < before
    assert loss_of(checkpoints.load_checkpoint(tmp_path / "saved")).item() == pytest.approx(after, rel=1e-5)


def test_an_adapter_on_it_is_merged_and_saved(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    model = checkpoints.load_checkpoint(checkpoint)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    loss_of(adapted).backward()
    without = [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    expected = adapted(IDS).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_close(checkpoints.load_checkpoint(tmp_path / "merged")(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_older_checkpoint_has_its_zero_scale_read(checkpoint):
    """Its b_scale_attn of a skipped block is a tensor among the scales, as now."""
    scale = checkpoints.load_scales(checkpoint)[0][SKIPPED[0], 0]
    model = checkpoints.load_checkpoint(checkpoint)
    assert model.state_dict()[f"model.layers.{SKIPPED[0]}.b_scale_attn"] == scale
