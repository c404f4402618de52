"""The model cards: metadata that the hub takes, and figures that are the run's."""

import shutil

import pytest
import torch
from conftest import stock_config
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from hopscotch_common import checkpoints
from hopscotch_common.checkpoints import card
from hopscotch_common.checkpoints.__main__ import verify
from hopscotch_common.export import formats
from hopscotch_common.loading.loader import hopscotch_config, read_config
from hopscotch_common.loading.models import ModelRef, model_ref
from hopscotch_common.scales.modeling_hopscotch import REPLACEMENT_NAMES

SKIPPED = [0, 2]
BASE_CARD = """---
license: other
license_name: acme
license_link: LICENSE
language: [en, de]
base_model: acme/grandparent
eval_results: nonsense
---
# The base model's own page
"""
FIGURES = {
    "original": {"cross_entropy": 0.25, "kl": 0.0, "agreement": 1.0},
    "unscaled": {"cross_entropy": 0.5, "kl": 0.125, "agreement": 0.75},
    "scaled": {"cross_entropy": 0.375, "kl": 0.0625, "agreement": 0.875, "kl_error": 0.01, "answers": 7},
}
RUN = {
    "epoch": 4,
    "base_model": "acme/parent",
    "learning_rate": 0.003,
    "held_out": FIGURES,
    "settings": {"loss": "kl", "batch_size": 16},
}


@pytest.fixture
def base(tiny_folder, tmp_path):
    """A tiny model where the hub's cache keeps what it fetched of acme/parent."""
    folder = tmp_path / "hub" / "models--acme--parent" / "snapshots" / "0123"
    shutil.copytree(tiny_folder(), folder)
    (folder / "README.md").write_text(BASE_CARD)
    (folder / "LICENSE").write_text("Yours.")
    return folder


def save(folder, base, value: float, run: dict, **options):
    values = torch.full((4, 4), value)
    values[SKIPPED, 0] = 0.0
    checkpoints.save_checkpoint(folder, model_ref(str(base)), SKIPPED, values, run, **options)
    return folder


def read(folder) -> ModelCard:
    """A folder's card, held to what the hub demands of metadata (`ModelCard.validate` asks the hub)."""
    read = ModelCard.load(folder / "README.md")
    data = read.data
    assert read.content == (folder / "README.md").read_text()
    assert data.pipeline_tag == "text-generation" and data.library_name in (*card.LIBRARIES.values(), "mlx")
    assert all(isinstance(tag, str) for tag in data.tags)
    if data.base_model is not None:
        validate_repo_id(data.base_model)
    assert (data.license == "other") == bool(data.license_name and data.license_link)
    assert "None" not in read.content and "/tmp" not in read.content
    return read


def test_a_checkpoint_says_what_it_is(base, tmp_path):
    folder = save(tmp_path / "epoch_4", base, 1.1, RUN)
    found = read(folder)
    assert found.data.base_model == "acme/parent"
    assert (found.data.license, found.data.license_name) == ("other", "acme")
    assert found.data.language == ["en", "de"] and found.data.get("eval_results") is None
    assert (folder / found.data.license_link).read_text() == "Yours."
    for words in (
        "2 of its 4 attention blocks (0, 2)",
        "KV cache: 2 of 4 blocks (50%)",
        "four a layer; 5 epoch(s) of Adam, learning rate 0.003, 16 answers a step, on KL",
        "| on 7 held-out answers | loss",
        "| blocks skipped, no scales | 0.5000 | 0.1250 | 75.0% |",
        "| blocks skipped, with scales | 0.3750 | 0.0625 ± 0.0100 | 87.5% |",
        "needs transformers 5",
        "vllm serve",
        "@inproceedings",
    ):
        assert words in found.text, words
    assert "own page" not in found.text
    verify(folder)


def test_with_maps_it_names_what_loads_them(base, tmp_path):
    names = [f"model.layers.{block}.{half}" for block in SKIPPED for half in REPLACEMENT_NAMES]
    maps = {name: torch.full((2, 32) if "down" in name else (32, 2), 0.01) for name in names}
    checkpoint = save(tmp_path / "epoch_4", base, 1.1, RUN, maps=maps)
    text = read(checkpoint).text
    assert "a linear map of rank 2" in text and "but these maps and the scales" in text
    assert "| maps in their place, as fitted | 0.5000 |" in text and "| maps and scales, trained |" in text
    assert "hopscotch_common.export` writes an export, or says" in text and "no scales" not in text
    formats.export_checkpoint(checkpoint, "nemotron_nas", tmp_path / "nas", device="cpu")
    found = read(tmp_path / "nas")
    text = found.text
    assert found.data.library_name == "mlx"
    assert "mlx_lm.generate --model MODEL" in text and "vllm serve" not in text and "llama.cpp" not in text


def test_it_names_every_learning_rate_and_what_the_weights_were(base, tmp_path):
    settings = RUN["settings"] | {"quantization": "int8"}
    run = RUN | {"learning_rates": [0.01, 0.01, 0.001], "settings": settings}
    text = " ".join(read(save(tmp_path / "model", base, 1.1, run)).text.split())
    assert "learning rate 0.01, then 0.001, 16 answers" in text and "over weights in int8." in text
    assert "over weights" not in read(save(tmp_path / "whole", base, 1.1, RUN)).text


def test_each_epoch_tells_its_own_figures(base, tmp_path):
    first = save(tmp_path / "epoch_4", base, 1.1, RUN)
    better = FIGURES | {"scaled": FIGURES["scaled"] | {"kl": 0.03125}}
    options = {"share_with": first}
    second = save(tmp_path / "epoch_5", base, 1.2, RUN | {"epoch": 5, "held_out": better}, **options)
    assert read(second).data.to_dict() == read(first).data.to_dict()
    assert "0.0312" in read(second).text and "6 epoch(s)" in read(second).text
    assert "0.0625" in read(first).text and "5 epoch(s)" in read(first).text


@pytest.mark.parametrize("format, left", [("folded", "4 of 4"), ("nemotron_nas", "3 of 4")])
def test_exports_say_what_they_are(base, tmp_path, format, left):
    checkpoint = save(tmp_path / "checkpoint", base, 1.05, RUN)
    report = formats.export_checkpoint(checkpoint, format, tmp_path / format, device="cpu")
    found = read(tmp_path / format)
    assert found.data.license_name == "acme" and found.data.base_model == "acme/parent"
    assert f"KV cache: {left} blocks" in found.text and report["summary"] in found.text
    assert "0.0625" in found.text and "needs transformers" not in found.text
    assert ("trust" in found.text) == (format == "nemotron_nas")


def test_without_training_it_says_so(base, tmp_path):
    text = read(save(tmp_path / "unscaled", base, 1.0, {"base_model": "acme/parent"})).text
    assert "Nothing was trained" in text and "held-out" not in text


@pytest.mark.parametrize("content", ["---\nlicense: [\n---\n", "---\n- 1\n---\n", "\xff", "---\n1: 2\n---\n"])
def test_a_card_of_the_base_that_cannot_be_read_is_left_alone(base, tmp_path, content):
    (base / "README.md").write_bytes(content.encode("latin-1"))
    assert read(save(tmp_path / "checkpoint", base, 1.1, RUN)).data.license_link == "LICENSE"


def test_what_is_not_known_is_not_said(tiny_folder, tmp_path):
    found = read(save(tmp_path / "checkpoint", tiny_folder(), 1.1, {"base_model": str(tiny_folder())}))
    assert found.data.base_model is None and found.data.license is None
    assert f"`{tiny_folder().name}`" in found.text


def test_the_embedded_model_is_known():
    origin = card.origin_of(model_ref("smollm"))
    assert origin == {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}


def test_a_gguf_names_its_licence(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_license("mit")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert card.origin_of(model_ref(str(tmp_path / "model.gguf"))) == {"license": "mit"}


def test_channel_scales_are_told_from_layer_scales(base, tmp_path):
    config = hopscotch_config(read_config(ModelRef("base", str(base))), SKIPPED, "channel")
    values = torch.full((4, 2 * config.hidden_size + 2), 1.1)
    card.write_card(tmp_path, "x", "checkpoint", {}, config, values, {})
    assert "one a channel" in read(tmp_path).text


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("family", "changes", "vllm", "exports"),
    [
        ("phi3", {}, True, True),
        ("phi3", {"rope_parameters": LONGROPE}, False, True),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, False, False),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, True, False),
    ],
)
def test_a_card_names_no_engine_that_refuses_it(tmp_path, family, changes, vllm, exports):
    config = hopscotch_config(stock_config(family, **changes), [1])
    card.write_card(tmp_path, "x", "checkpoint", {}, config, torch.ones(4, 4), {})
    text = read(tmp_path).text
    assert ("vllm serve" in text, "writes an export" in text) == (vllm, exports)


@pytest.mark.parametrize(
    "run", [{"settings": {}}, {"held_out": {"scaled": 1}}, {"base_model": 1, "settings": 2}]
)
def test_a_record_of_another_kind_is_not_guessed_at(base, tmp_path, run):
    assert "not on record" in read(save(tmp_path / "checkpoint", base, 1.1, run)).text
