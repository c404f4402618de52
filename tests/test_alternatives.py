"""benchmarks/alternatives.py: other ways to less KV cache, each against an independent computation."""

import json
from types import SimpleNamespace

import alternatives
import pytest
import torch
import ways
from test_search import write_data
from test_training import loaded, random_samples
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

from hopscotch_common import checkpoints, scales
from hopscotch_common.loading.models import model_ref
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.loss import Originals, evaluate
from hopscotch_common.training.trainer import EpochBatches

ANSWERS = random_samples(6, seed=3)
for answer in ANSWERS:  # a newline behind the end of turn, which does not count
    answer.input_ids.append(7)
    answer.labels.append(-100)
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder("qwen2", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def observed(stock):
    return ways.Observed(stock, ANSWERS)


def logits_of(model) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([answer.input_ids])).logits[0] for answer in ANSWERS]


def logits_with(stock, way: str, blocks: list[int], observed) -> list[torch.Tensor]:
    with ways.in_place(ways.replaced(stock, way, blocks, observed)):
        return logits_of(stock)


def test_blocks_with_nothing_in_their_place_diverge_as_this_projects_skips(folder, stock, observed):
    judge = alternatives.Judge(stock, ANSWERS)
    found = alternatives.measure_way(stock, judge, "search", [2, 1], observed, 100)
    model = loaded(folder, "float32")
    originals = Originals(model)
    scales.reset(model, [2, 1])
    batches = EpochBatches(model, ANSWERS, TrainingOptions(1e-3, len(ANSWERS))).in_order()
    expected = evaluate(model, batches, "held out", originals=originals)
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-4)
    assert found["kl_error"] == pytest.approx(expected.kl_error, rel=1e-3)
    assert found["agreement"] == pytest.approx(expected.agreement)
    assert alternatives.Judge(stock, ANSWERS[:1])(stock)["kl_error"] is None
    own = sum(p.numel() for b in (1, 2) for p in stock.model.layers[b].self_attn.parameters())
    assert found["weights"] == pytest.approx(1 - own / sum(p.numel() for p in stock.parameters()))
    assert found["kv_cache"] == 0.5
    assert judge(stock)["kl"] == 0  # nothing stays replaced


def test_a_checkpoint_is_judged_as_its_skips(folder, stock, observed, tmp_path):
    values = torch.ones(LAYERS, 4)
    values[[1, 2], 0] = 0.0
    checkpoints.save_checkpoint(tmp_path / "c", model_ref(str(folder)), [1, 2], values, {})
    judge = alternatives.Judge(stock, ANSWERS)
    found = alternatives.measure_checkpoint(stock, judge, tmp_path / "c", "float32")
    expected = alternatives.measure_way(stock, judge, "search", [1, 2], observed, 100)
    assert (found.pop("blocks"), found.pop("replacement_rank")) == (expected.pop("blocks"), 0)
    assert found == pytest.approx(expected, rel=1e-4)


def test_layers_left_out_are_a_stock_model_without_them(folder, stock, observed):
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = LAYERS - 2, config.layer_types[: LAYERS - 2]
    shorter = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {}
    for name, tensor in stock.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            if parts[2] in ("1", "2"):
                continue
            parts[2] = {"0": "0", "3": "1"}[parts[2]]
        weights[".".join(parts)] = tensor
    shorter.load_state_dict(weights)
    for found, expected in zip(
        logits_with(stock, "layers", [2, 1], observed), logits_of(shorter), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_window_is_transformers_own_sliding_window(folder, stock, observed, monkeypatch):
    monkeypatch.setattr(ways, "SINKS", 0)  # which the stock class has not
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    other = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_sliding_window=True, sliding_window=4, layer_types=kinds
    )
    found = logits_with(stock, "search-window-4", [1, 2], observed)
    for ours, theirs, plain in zip(found, logits_of(other), logits_of(stock), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, plain)


def test_a_wide_window_or_many_sinks_change_nothing(stock, observed, monkeypatch):
    plain = logits_of(stock)
    monkeypatch.setattr(ways, "SINKS", 64)
    for found, expected in zip(logits_with(stock, "search-window-4", [1, 2], observed), plain, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_cache_of_few_bits_is_what_a_cache_gives_back(stock, observed):
    class Coarse(DynamicCache):
        """transformers' own, each vector of which comes back in 16 even steps, number by number."""

        def update(self, keys, values, *more, **options):
            return tuple(map(self.coarse, super().update(keys, values, *more, **options)))

        @staticmethod
        def coarse(tensor: torch.Tensor) -> torch.Tensor:
            vectors = []
            for vector in tensor.reshape(-1, tensor.shape[-1]).tolist():
                least, step = min(vector), (max(vector) - min(vector)) / 15
                vectors.append([least + step * round((number - least) / step) for number in vector])
            return torch.tensor(vectors).view_as(tensor)

    plain, found = logits_of(stock), logits_with(stock, "cache-4", [], observed)
    for answer, ours, original in zip(ANSWERS, found, plain, strict=True):
        with torch.no_grad():
            theirs = stock(torch.tensor([answer.input_ids]), past_key_values=Coarse()).logits[0]
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, original, atol=1e-3)
    for ours, original in zip(logits_with(stock, "cache-16", [], observed), plain, strict=True):
        torch.testing.assert_close(ours, original, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("head", "group"), [(8, 8), (64, 64), (80, 40), (96, 48), (128, 64)])
def test_a_head_is_rounded_in_equal_groups(head, group):
    """Of 64 channels at most, each with a step and a smallest value of 16 bits."""
    keys = torch.randn(2, 3, head, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([ways.rounded(part, 4) for part in keys.split(group, -1)], -1)
    assert torch.equal(ways.rounded(keys, 4), expected)
    model = SimpleNamespace(config=LlamaConfig(hidden_size=2 * head, num_attention_heads=2))
    bits = (group * 4 + 2 * 16) / group
    assert ways.left(model, "cache-4", []) == {"kv_cache": bits / 16, "weights": 1.0}


def rows(stock, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream before a block, and what it adds, [tokens, hidden] in float64."""
    seen: dict[str, list[torch.Tensor]] = {"x": [], "y": []}
    layer = stock.model.layers[block]
    hooks = [
        layer.input_layernorm.register_forward_pre_hook(lambda _, a: seen["x"].append(a[0][0])),
        layer.self_attn.o_proj.register_forward_hook(lambda _, a, out: seen["y"].append(out[0])),
    ]
    logits_of(stock)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen["x"]).double(), torch.cat(seen["y"]).double()


def test_the_linear_map_is_that_of_least_squares(stock, observed):
    x, y = rows(stock, 2)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    weight, bias = ways.least_squares(observed.moments[2])
    torch.testing.assert_close(x @ weight.T + bias, torch.cat([x, ones], 1) @ expected, atol=1e-6, rtol=1e-5)


def test_the_bound_is_of_canonical_correlations(stock, observed):
    """They are the cosines of the angles between the spaces that the centred columns span."""
    x, y = rows(stock, 2)
    spans = [torch.linalg.qr(each - each.mean(0)).Q for each in (x, x + y)]
    correlations = torch.linalg.svdvals(spans[0].T @ spans[1])
    expected = (1 - correlations.square()).sum().item()
    assert ways.canonical_bound(observed.moments[2]) == pytest.approx(expected, abs=1e-4)


def test_what_is_chosen_is_what_turns_the_stream_least(stock, observed):
    ids = [torch.tensor([answer.input_ids]) for answer in ANSWERS]
    with torch.no_grad():
        states = [stock(each, output_hidden_states=True).hidden_states for each in ids]
    layers = range(LAYERS - 1)  # the last state is behind the final norm
    for i in layers:  # the token before the end of turn, behind which a newline stands
        torch.testing.assert_close(observed.last[:, i], torch.stack([s[i][0, -3] for s in states]))
    similarity = torch.nn.functional.cosine_similarity
    turned = [torch.cat([1 - similarity(s[i][0], s[i + 1][0], -1) for s in states]).mean() for i in layers]
    torch.testing.assert_close(observed.turned_by_layer[:-1], torch.stack(turned))
    assert ways.choose("layers", 1, [], observed) == [int(observed.turned_by_layer.argmin())]
    angles = [
        torch.stack([similarity(s[i][0, -3], s[i + 2][0, -3], -1).arccos() for s in states]).mean()
        for i in range(LAYERS - 2)
    ]
    last = (
        torch.nn.functional.cosine_similarity(observed.last[:, -3], observed.last[:, -1], -1).arccos().mean()
    )
    start = int(torch.stack([*angles, last]).argmin())
    assert ways.choose("consecutive", 2, [], observed) == [start, start + 1]
    assert ways.choose("search", 2, [3, 1, 2], observed) == [3, 1]


def test_the_script(folder, tmp_path, capsys):
    data, selection = tmp_path / "data.jsonl", tmp_path / "selection.json"
    write_data(data, random_samples(12))
    selection.write_text(json.dumps({"skipped_blocks": [1, 2]}))
    words = ["--model", str(folder), "--result", str(tmp_path / "result.json")]
    more = ["--data_path", str(data), "--selection", str(selection), "--counts", "1", "3"]
    alternatives.main([*words, *more, "--calibration", "6", "--held_out", "4"])
    alternatives.main([*words, "--table"])
    alternatives.main([*words, "--plot", str(tmp_path / "picture.svg")])
    drawn = (tmp_path / "picture.svg").read_text()
    assert all((f">{words}<" in drawn) == ("cache" not in way) for way, words in ways.WAYS.items())
    table = capsys.readouterr().out.splitlines()
    assert any(" ± " in line for line in table)
    assert len(table) == 2 * (2 + 10 + 5 + 2)  # three blocks: only what does not follow the search
    assert table[: len(table) // 2] == table[len(table) // 2 :]


@pytest.mark.parametrize("family", ["granite", "gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "glm4"])
def test_attention_that_is_not_added_as_it_is_returned_is_refused(tiny_folder, tmp_path, family):
    words = ["--model", str(tiny_folder(family)), "--result", str(tmp_path / "result.json")]
    words += ["--data_path", str(tmp_path / "not_read"), "--selection", str(tmp_path / "not_read")]
    with pytest.raises(
        SystemExit, match=f"^{family}: what attention returns .*; only --ways without a word$"
    ):
        alternatives.main(words)


def test_attention_that_is_added_as_it_is_is_not_refused(tiny_folder):
    for family in ("llama", "qwen3", "phi3"):
        ways.check_family(AutoConfig.from_pretrained(tiny_folder(family)))
    ways.check_family(AutoConfig.from_pretrained(tiny_folder("granite"), residual_multiplier=1.0))
