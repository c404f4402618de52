"""Low-rank maps in skipped blocks' place: the fit, the layer, training, search, checkpoints, scripts."""

import json

import pytest
import torch
from conftest import check_refused
from safetensors.torch import load_file, save_file
from test_families import ONE_OF_EACH, stock_model
from test_search import write_data
from test_training import loaded, loss_of_logits, make_batches, originals_for, random_samples
from torch.testing import assert_close
from transformers import AutoConfig

import block_selection
import param_scale
import unscaled_ckpt
from hopscotch_common import checkpoints, scales
from hopscotch_common.checkpoints.__main__ import verify
from hopscotch_common.errors import InputError, TrainingError
from hopscotch_common.export import decilm
from hopscotch_common.export.formats import export_checkpoint
from hopscotch_common.loading.loader import hopscotch_classes
from hopscotch_common.loading.models import model_ref
from hopscotch_common.scales.modeling_hopscotch import FAMILIES, RECURRENT_TYPES, attention_types
from hopscotch_common.search.candidates import untrained_losses
from hopscotch_common.training.replacement import RIDGE, fit_maps
from hopscotch_common.training.trainer import ScaleTrainer

RANK = 4
PROMPTS = torch.tensor([[0, 0, 5, 6, 7, 8], [0, 9, 10, 11, 12, 13], [14, 15, 16, 17, 18, 19]])
MASK = (PROMPTS != 0).long()


class Hooked:
    """What passes through the attention blocks of a stock model, and `maps` (down, up) in their place.

    Everything is told by forward hooks on the stock modules: what the block reads, and what it adds to the
    stream, behind the norm that some families have there and times Granite's multiplier.
    """

    def __init__(self, stock, maps: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None):
        self.read, self.added, self.maps = {}, {}, maps or {}
        family = FAMILIES[stock.config.model_type]
        for index, layer in enumerate(stock.model.layers):
            if attention_types(stock.config)[index] in RECURRENT_TYPES:
                continue
            multiplier = getattr(layer, "residual_multiplier", 1.0)
            if family.norm_before_attention:
                getattr(layer, family.norm_before_attention).register_forward_hook(
                    lambda _, __, output, index=index: self.read.__setitem__(index, output)
                )
            else:
                layer.register_forward_pre_hook(
                    lambda _, arguments, index=index: self.read.__setitem__(index, arguments[0])
                )
            last = getattr(layer, family.norm_after_attention or family.attention)
            last.register_forward_hook(
                lambda _, __, output, index=index, multiplier=multiplier: self.see(index, output, multiplier)
            )

    def see(self, index: int, output, multiplier: float):
        found = output[0] if isinstance(output, tuple) else output
        self.added[index] = multiplier * found
        if index not in self.maps:
            return None
        down, up = self.maps[index]
        mapped = self.read[index] @ down.T @ up.T / multiplier
        return (mapped, *output[1:]) if isinstance(output, tuple) else mapped


def maps_by_block(model) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {
        index: (layer.replacement_down.detach(), layer.replacement_up.detach())
        for index, layer in enumerate(model.model.layers)
        if layer.replacement_up is not None
    }


def fitted(folder, blocks, samples=None, **options):
    """A model with fitted maps, `blocks` skipped, and the samples that they were fitted on."""
    samples = samples or random_samples(12)
    model = loaded(folder, replacement_rank=RANK, **options)
    wrong = fit_maps(model, make_batches(samples, 3, 40), blocks)
    scales.reset(model, blocks)
    return model, wrong, samples


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "olmo2"])
def test_the_closed_form_is_the_best_map_of_its_rank(tiny_folder, family):
    folder, block = tiny_folder(family), 2
    model, wrong, samples = fitted(folder, [block])
    stock = stock_model(folder, family)
    hooked, reads, adds, streams = Hooked(stock), [], [], []
    for sample in samples:
        with torch.no_grad():
            states = stock(torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states
        reads.append(hooked.read[block][0])
        adds.append(hooked.added[block][0])
        streams.append(states[block][0] + adds[-1])
    x, y, behind = (torch.cat(parts).double() for parts in (reads, adds, streams))
    weight = (RIDGE * x.square().sum(0).mean()).sqrt()
    padded = torch.cat([x, weight * torch.eye(x.shape[1], dtype=x.dtype)])
    whole = torch.linalg.lstsq(padded, torch.cat([y, torch.zeros_like(padded[: x.shape[1], : y.shape[1]])]))
    directions = torch.linalg.svd(x @ whole.solution).Vh[:RANK].T
    expected = whole.solution @ directions @ directions.T

    down, up = maps_by_block(model)[block]
    assert_close((up @ down).T.double(), expected, rtol=1e-3, atol=1e-4)
    error = (y - x @ expected).square().sum() / behind.square().sum()
    assert wrong[block] == pytest.approx(error.item(), rel=1e-3)
    assert error < y.square().sum() / behind.square().sum()


@pytest.mark.parametrize("family", [*ONE_OF_EACH, "granite", "olmo3"])
def test_a_model_with_maps_is_the_stock_one_with_maps_in_the_blocks_place(tiny_folder, tmp_path, family):
    folder = tiny_folder(family)
    present = [
        i
        for i, kind in enumerate(attention_types(stock_model(folder, family).config))
        if kind not in RECURRENT_TYPES
    ]
    blocks = present[1:3]
    model, _, _ = fitted(folder, blocks)
    checkpoints.save_checkpoint(
        tmp_path / "c", model_ref(str(folder)), blocks, scales.snapshot(model), {}, maps=scales.maps_of(model)
    )
    verify(tmp_path / "c")
    saved = checkpoints.load_checkpoint(tmp_path / "c")
    stock = stock_model(folder, family)
    maps = {block: maps_by_block(model)[block] for block in blocks}
    Hooked(stock, maps)
    with torch.no_grad():
        expected = stock(PROMPTS, attention_mask=MASK).logits[2]
        for ours in (model, saved):
            assert_close(ours(PROMPTS, attention_mask=MASK).logits[2], expected, rtol=1e-4, atol=1e-4)
    common = dict(attention_mask=MASK, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = saved.generate(PROMPTS, **common)
    if len(present) == len(stock.model.layers):  # what is recurrent has no other way to go on
        assert torch.equal(tokens, stock.generate(PROMPTS, use_cache=False, **common))
    assert torch.equal(tokens, model.generate(PROMPTS, **common))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_with_maps(tiny_folder, options):
    model, _, _ = fitted(tiny_folder("llama"), [0, 2])
    stock = stock_model(tiny_folder("llama"), "llama")
    Hooked(stock, {block: maps_by_block(model)[block] for block in (0, 2)})
    common = dict(attention_mask=MASK, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    expected = stock.generate(PROMPTS, use_cache=False, **common, **beams)
    assert torch.equal(model.generate(PROMPTS, **common, **options), expected)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_maps_train_with_the_scales(tiny_folder, loss):
    """Two steps against Adam on a plain loop over the same model, without any of the trainer's machinery."""
    folder, blocks, samples = tiny_folder("llama"), [1, 2], random_samples(6)
    model, _, _ = fitted(folder, blocks, samples)
    before = scales.maps_of(model)
    trainer = ScaleTrainer(model, 1e-2, blocks, originals=originals_for(loss, model), map_learning_rate=1e-3)
    batches = make_batches(samples, 3, 40)
    losses = trainer.run(batches, "test")

    plain, _, _ = fitted(folder, blocks, samples)
    own = [scale for _, scale in scales.named_scales(plain)]
    maps = [parameter.requires_grad_() for _, parameter in scales.named_maps(plain)]
    adam = torch.optim.Adam([{"params": own, "lr": 1e-2}, {"params": maps, "lr": 1e-3}])
    stock = stock_model(folder, "llama")
    for batch, loss_of_batch in zip(batches, losses, strict=True):
        samples = [sample for part in batch.minibatches for sample in part.samples]
        total = 0
        for sample in samples:
            ids = torch.tensor([sample.input_ids])
            original = stock(ids).logits[0] if loss == "kl" else None
            total += loss_of_logits(plain(ids).logits[0], sample, original)
        mean = total / sum(sample.num_loss_counted_tokens for sample in samples)
        assert loss_of_batch == pytest.approx(mean.item(), rel=1e-4)
        mean.backward()
        adam.step()
        adam.zero_grad()
    for key, parameter in scales.named_maps(plain):
        assert_close(trainer.state().maps[key][0], parameter.detach(), rtol=1e-3, atol=1e-5)
        assert not torch.equal(before[key], parameter)
    assert_close(scales.snapshot(model), scales.snapshot(plain), rtol=1e-3, atol=1e-4)


def test_a_search_sees_the_maps(tiny_folder):
    folder, samples = tiny_folder("llama"), random_samples(6)
    model = loaded(folder, replacement_rank=RANK)
    (batch,) = make_batches(samples, 6, 200)
    fit_maps(model, [batch], range(4))
    found = untrained_losses(model, batch, [3], [0, 1, 2], "test")
    for block in range(3):
        stock = stock_model(folder, "llama")
        Hooked(stock, {index: maps_by_block(model)[index] for index in (3, block)})
        with torch.no_grad():
            losses = [loss_of_logits(stock(torch.tensor([s.input_ids])).logits[0], s) for s in samples]
        assert found[block] == pytest.approx(sum(losses).item() / batch.num_loss_counted_tokens, rel=1e-4)


def test_few_tokens_are_told(tiny_folder, caplog):
    model = loaded(tiny_folder("llama"), replacement_rank=RANK)  # 32 channels
    for samples, told in ((random_samples(2), True), (random_samples(40), False)):
        caplog.clear()
        fit_maps(model, make_batches(samples, 2, 80), [1, 2])
        tokens = sum(map(len, samples))
        assert (tokens < 4 * 32) == told
        assert (
            caplog.messages
            == [
                f"maps are fitted on {tokens} tokens, fewer than 4 for each of 32 channels: give more answers"
            ]
            * told
        )


def test_a_model_that_is_not_finite_gets_no_maps(tiny_folder):
    model = loaded(tiny_folder("llama"), replacement_rank=RANK)
    model.model.layers[0].self_attn.o_proj.weight.data.fill_(float("nan"))
    for block in (0, 1):  # what it would give; what it reads
        with pytest.raises(TrainingError, match="no map can be fitted"):
            fit_maps(model, make_batches(random_samples(4), 4, 80), [block])


@pytest.fixture
def work(tiny_folder, tmp_path, monkeypatch):
    """A folder with data, in which the scripts run; the flags that they share."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data.jsonl", random_samples(12))
    return ["--model", str(tiny_folder("llama")), "--device", "cpu", "--data_path", "data.jsonl"]


def test_the_scripts_with_maps(work, tmp_path, tiny_folder):
    rank = ["--replacement_rank", "3"]
    found = {}
    for which in ("full", "race", "untrained", "cosine", "without"):
        output = tmp_path / f"{which}.json"
        search = ["--search", which, *rank] if which != "without" else ["--search", "untrained"]
        more = ["--batch_size", "4", *search, "--num_blocks", "2", "--output", str(output)]
        assert block_selection.main([*work, *more]) == 0
        found[which] = json.loads(output.read_text())
        assert len(found[which]["skipped_blocks"]) == 2
    losses, without = (found[which]["iterations"][0]["losses"] for which in ("untrained", "without"))
    assert all(loss != without[block] for block, loss in losses.items())
    blocks = json.loads((tmp_path / "full.json").read_text())["skipped_blocks"]
    common = [*work, *rank, "--blocks_to_skip", str(tmp_path / "full.json")]
    training = ["--granularity", "channel", "--loss", "kl", "--batch_size", "4", "--validation_split", "0.25"]
    for epochs, output, *more in (["2", "whole"], ["1", "parts"], ["2", "parts", "--resume"]):
        where = ["--num_epochs", epochs, "--output_dir", output, *more]
        assert param_scale.main([*common, *training, *where]) == 0
    name = tiny_folder("llama").name
    whole, parts = (tmp_path / folder / f"{name}_scaled_epoch_1" for folder in ("whole", "parts"))
    assert (whole / "scales.safetensors").read_bytes() == (parts / "scales.safetensors").read_bytes()
    config = json.loads((whole / "config.json").read_text())
    assert config["replacement_rank"] == 3
    assert set(checkpoints.load_scales(whole)[1]) == {
        f"model.layers.{block}.replacement_{part}" for block in blocks for part in ("down", "up")
    }
    # b_attn and b_mlp of 32 channels, s_attn and s_mlp, in each of 4 layers; two maps
    added = checkpoints.read_run(whole)["weights"]["parameters_added"]
    assert added == 4 * (2 * 32 + 2) + 2 * (3 * 32 + 32 * 3)
    assert unscaled_ckpt.main([*common, "--output_dir", "unscaled"]) == 0
    unscaled = checkpoints.load_scales(tmp_path / "unscaled" / f"{name}_unscaled")[1]
    assert unscaled.keys() == checkpoints.load_scales(whole)[1].keys()
    step = ["--num_epochs", "1", "--batch_size", "12", "--output_dir", "step"]
    assert param_scale.main([*common, *step]) == 0
    for key, trained in checkpoints.load_scales(tmp_path / "step" / f"{name}_scaled_epoch_0")[1].items():
        assert unscaled[key].abs().max() > 0.01
        # a third of --learning_rate's default, which is how far Adam's first step moves
        assert (trained - unscaled[key]).abs().max().item() == pytest.approx(3e-3 / 3, rel=0.01)
    epochs = json.loads((tmp_path / "whole" / "report.json").read_text())["epochs"]
    assert epochs[1]["loss"] < epochs[0]["loss"]
    assert unscaled_ckpt.main([*common, "--output_dir", "of_four", "--max_samples", "4"]) == 0
    lines = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(lines[:4]))
    assert unscaled_ckpt.main([*common, "--output_dir", "of_all_four"]) == 0
    of_four, of_all_four = (
        checkpoints.load_scales(tmp_path / folder / f"{name}_unscaled")[1]
        for folder in ("of_four", "of_all_four")
    )
    for key, value in of_four.items():
        assert value.equal(of_all_four[key]) and not value.equal(unscaled[key])


@pytest.mark.parametrize(
    ("family", "blocks", "granularity"), [("llama", [0, 2], "channel"), ("granite", [1, 3], "layer")]
)
def test_maps_are_exported_as_matrices(tiny_folder, tmp_path, family, blocks, granularity):
    """In nemotron_nas, which mlx-lm runs: the export's own check compares it with the checkpoint."""
    folder = tiny_folder(family)
    model, _, _ = fitted(folder, blocks, scale_granularity=granularity)
    values = scales.snapshot(model).uniform_(0.9, 1.1, generator=torch.Generator().manual_seed(0))
    values[1, -1] = -1.05  # s_mlp: the stream changes its sign
    maps = scales.maps_of(model)
    checkpoints.save_checkpoint(tmp_path / "c", model_ref(str(folder)), blocks, values, {}, maps=maps)
    report = export_checkpoint(tmp_path / "c", "nemotron_nas", tmp_path / "nas", device="cpu")
    assert report["relative_logit_error"] < 1e-3
    layers = json.loads((tmp_path / "nas" / "config.json").read_text())["block_configs"]
    assert [i for i, layer in enumerate(layers) if layer["attention"]["replace_with_linear"]] == blocks
    weights = load_file(tmp_path / "nas" / "model.safetensors")
    assert [key for key in weights if "linear" in key] == [
        f"model.layers.{block}.self_attn.linear.weight" for block in blocks
    ]
    text = (tmp_path / "nas" / "README.md").read_text()
    assert "KV cache: 2 of 4" in text and "which adds zero" not in text and "A matrix stands in" in text
    # saved again, the maps are among the weights, as LoRA's merged ones are
    again = checkpoints.load_checkpoint(tmp_path / "c")
    again.save_pretrained(tmp_path / "again")
    kept, made = (checkpoints.load_scales(tmp_path / name)[1].keys() for name in ("again", "c"))
    assert kept == made
    report = export_checkpoint(tmp_path / "again", "nemotron_nas", tmp_path / "nas_again", device="cpu")
    assert report["relative_logit_error"] < 1e-3
    with pytest.raises(InputError, match="folded has no place for maps"):
        export_checkpoint(tmp_path / "c", "folded", tmp_path / "folded", device="cpu")


def test_an_export_that_no_engine_runs_is_refused(tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder("qwen2"))
    decilm.check(config, 0)
    with pytest.raises(InputError, match="mlx-lm alone, which does not read qwen2's biases"):
        decilm.check(config, 4)


def test_a_checkpoint_that_lacks_a_map_does_not_load(tiny_folder, tmp_path):
    folder, path = tiny_folder(), tmp_path / "c"
    model, _, _ = fitted(folder, [1])
    values, maps = scales.snapshot(model), scales.maps_of(model)
    checkpoints.save_checkpoint(path, model_ref(str(folder)), [1], values, {}, maps=maps)
    tensors = load_file(path / "scales.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for content in (tensors, index["weight_map"]):
        del content["model.layers.1.replacement_up"]
    save_file(tensors, path / "scales.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    _, model_class = hopscotch_classes("llama")
    with pytest.raises(ValueError, match="a layer's scales are missing .*replacement_up"):
        model_class.from_pretrained(path)


def test_a_checkpoint_without_maps_says_nothing_of_them(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    checkpoints.save_checkpoint(tmp_path / "c", model_ref(str(folder)), [1], torch.ones(4, 4), {})
    assert "replacement_rank" not in json.loads((tmp_path / "c" / "config.json").read_text())
    assert not any("replacement" in key for key in load_file(tmp_path / "c" / "scales.safetensors"))


def test_maps_want_data_and_an_export_with_a_place_for_them(work, capsys):
    maps = ["--blocks_to_skip", "1", "--replacement_rank", "2"]
    check_refused(param_scale, [*work, *maps, "--export", "folded"], "folded has no place for maps", capsys)
    check_refused(unscaled_ckpt, [*work[:4], *maps], "give --data_path", capsys)
