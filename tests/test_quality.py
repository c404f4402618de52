"""benchmarks/quality.py: how answers are read and scored, and what the other figures' scripts compute."""

import importlib.util
import json
import math
import random
import re
from decimal import Decimal

import criteria
import generation
import inference
import measuring
import problems
import pytest
import quality
import quality_tables
import training
from driving import write_lines
from measuring import Results
from test_search import write_data
from test_training import loaded, random_samples

from hopscotch_common import scales
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import load_samples
from hopscotch_common.training.loss import evaluate
from hopscotch_common.training.trainer import EpochBatches, EpochTraining


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("She pays $1,234.50 in total.", "1234.5"),
        ("3 apples and 4 pears make 7", "7"),
        ("First 12, then 13.\n#### 18 dollars and 20 cents", "18"),
        ("#### 1\nno, rather\n#### 2", "2"),
        (r"so \boxed{7}, which is less than 100", "7"),
        (r"\boxed{3} and finally \boxed{\$2{,}500}. #### 9", "2500"),
        (r"$$\boxed{\text{total} = 72 \text{ clips}}$$", "72"),
        (r"\boxed{none} but 5", "5"),
        ("#### \n it is 6", "6"),
        ("#### unknown", None),
        ("#### Step 2: add\n18 + 2 = 20, so it is 20.", "20"),
        ("#### 2. Add\n18 + 2 = 20.", "20"),
        ("#### 2.5 metres of 9", "2.5"),
        (r"\boxed{240 \text{ ft}^2}", "240"),
        ("It has 240 ft^2.", "240"),
        (r"\boxed{1\,000}", "1000"),
        ("10 - 3", "3"),
        ("10-3", "3"),
        ("(10)-3", "3"),
        ("it fell to -3", "-3"),
        ("it fell to -$3.25!", "-3.25"),
        ("it fell to −3 degrees", "-3"),
        ("that is 25%", "25"),
        ("1,2,3,4", "4"),
        ("12,345,678 people", "12345678"),
        ("in 1,2345 ways", "2345"),
        ("**18**", "18"),
        ("version 2.50 of it", "2.5"),
        ("€20 or £30", "30"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert problems.parse_answer(text) == (None if number is None else Decimal(number))


def test_gsm8k_file(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    worked = "It is {0}*2 = <<{0}*2={0}>>.\n#### 1,00{0}"
    write_lines(path, [{"question": f"q{i}", "answer": worked.format(i)} for i in range(3)])
    expected = [problems.Problem(f"q{i}", Decimal(1000 + i)) for i in range(2)]
    assert problems.gsm8k(path, 2) == expected
    path.write_text(json.dumps({"question": "q", "answer": "none"}))
    with pytest.raises(SystemExit, match="line 1"):
        problems.gsm8k(path)


def solved(question: str) -> int:
    """The answer of a generated problem, found from its text alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if "remainder" in question:
        return int(math.fmod(numbers[0], numbers[1]))
    if "comes next" in question:
        return numbers[-1] + (numbers[-1] - numbers[-2])
    if "second largest" in question:
        return sorted(numbers, reverse=True)[1]
    if "even" in question:
        return len([n for n in numbers if str(n)[-1] in "02468"])
    return eval(re.search(r"\(.*\) \* \d+", question).group())


def test_generated_problems_have_the_answers_that_they_say():
    made = problems.puzzles(50)
    assert [solved(problem.question) for problem in made] == [problem.answer for problem in made]
    assert made == problems.puzzles(50) and made[:20] == problems.puzzles(20)
    assert made != problems.puzzles(50, seed=1)
    assert len({problem.question for problem in made}) == 50


def test_scores_and_their_errors():
    asked = [problems.Problem("", Decimal(n)) for n in (1, 2, 3, 4)]
    texts = ["1", "it is 2.00", "4", "none"]
    replies = [{"text": t, "tokens": 3, "finish_reason": "length" if t == "4" else "stop"} for t in texts]
    assert quality.score(asked, replies) == {"right": "1100", "truncated": 1, "mean_tokens": 3}
    share, error = quality_tables.accuracy("1100")
    assert (share, error) == (0.5, 0.25)
    draw = random.Random(0)
    reference = "".join(draw.choice("01") for _ in range(200))
    right = "".join(c if draw.random() < 0.9 else "0" for c in reference)
    mean, error = quality_tables.difference(right, reference)
    assert math.isclose(mean, quality_tables.accuracy(right)[0] - quality_tables.accuracy(reference)[0])
    lost = sum(a != b for a, b in zip(right, reference, strict=True)) / 200  # all differences are 0 or -1
    assert math.isclose(error, math.sqrt(lost * (1 - lost) / 199))


def test_results_survive_an_interruption(tmp_path, capsys):
    path, calls = tmp_path / "r.json", []

    def work():
        calls.append(1)
        return {"figure": len(calls)}

    first = Results(path, {"dtype": "float32", "tasks": ("gsm8k",)})
    assert first.measure({"count": 1}, work)["figure"] == 1
    assert first.measure({"count": 2}, work)["figure"] == 2
    assert "holds" not in capsys.readouterr().err
    again = Results(path, {"dtype": "float32", "tasks": ("gsm8k",)})
    assert again.measure({"count": 1}, work)["figure"] == 1 and len(calls) == 2
    told = f"{path}: holds {{'count': 1}} already; name another --result to measure it\n"
    assert capsys.readouterr().err == told
    with pytest.raises(SystemExit, match="another dtype"):
        Results(path, {"dtype": "bfloat16", "tasks": ("gsm8k",)})


def test_of_what_speed_compares_another_begins_each_round():
    seconds = {"stock": 2.0, "0": 4.0, "8": 1.0}
    measured = []

    def measure(name: str) -> dict:
        measured.append(name)
        return {"seconds": dict.fromkeys(inference.PHASES, seconds[name]), "kv_bytes_per_token": 1}

    rounds = inference.in_turn(list(seconds), 4, measure)
    assert " ".join(measured[::3]) == "stock 0 8 stock" and all(list(r) == list(seconds) for r in rounds)
    settings = {"prompt_tokens": 8, "new_tokens": 8, "rows": 1}
    figure = {"of": {"model": "m", "engine": "e"}, "rounds": rounds, "weights": {}}
    titles, _, *rows = (line.split(" | ") for line in inference.table([figure], settings))
    times = [[row[titles.index(f"prefill, times {base}")] for row in rows] for base in ("stock", "0 skipped")]
    assert [[cell.split()[0] for cell in cells] for cells in times] == [
        ["1.00", "0.50", "2.00"],
        ["2.00", "1.00", "4.00"],
    ]


def test_generation(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "apart", lambda work, *arguments: work(*arguments))
    write_lines(tmp_path / "asked.jsonl", [{"question": f"What is {n} + {n}?"} for n in range(5)])
    words = ["--model", tiny_folder(), "--input_file", tmp_path / "asked.jsonl", "--num_samples", 4]
    words += ["--plain_every", 2, "--max_tokens", 6, "--dtype", "float32", "--engines", "transformers"]
    words = [str(word) for word in (*words, "--runs", 2, "--result", tmp_path / "result.json")]
    generation.main(words)
    kinds = ("plain", 0), ("transformers", 0), ("transformers", 1), ("plain", 1)
    found = figures_in(tmp_path)
    assert [figure["of"] for figure in found] == [{"kind": kind, "run": run} for kind, run in kinds]
    assert [figure["answers"] for figure in found] == [2, 4, 4, 2]
    assert all(0 < figure["tokens"] <= 6 * figure["answers"] for figure in found)
    assert found[0]["sample"] == found[3]["sample"] and len(set(found[0]["sample"])) == 2
    assert [figure.get("equal_to_plain") for figure in found] == [None, "2 of 2", "2 of 2", None]
    table = capsys.readouterr().out
    rates = [
        [f["tokens"] / f["seconds"] for f in found if f["of"]["kind"] == k] for k in ("transformers", "plain")
    ]
    times = sum(a / b for a, b in zip(*rates, strict=True)) / 2  # the median of two
    assert f" | {times:.2f} | " in table.splitlines()[-1]
    generation.main(words)  # nothing is measured twice
    assert capsys.readouterr().out == table and figures_in(tmp_path) == found


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return loaded(tiny_folder(), "float32")


def test_query_key_coupling_is_the_norm_of_each_heads_product(tiny):
    width = tiny.config.head_dim
    for layer, coupling in zip(tiny.model.layers, criteria.query_key_coupling(tiny), strict=True):
        q, k = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        total = 0.0
        for head in range(tiny.config.num_attention_heads):
            key_head = head // (tiny.config.num_attention_heads // tiny.config.num_key_value_heads)
            product = q[head * width : (head + 1) * width].T @ k[key_head * width : (key_head + 1) * width]
            total += product.square().sum().item()
        assert math.isclose(coupling, math.sqrt(total), rel_tol=1e-4)


def test_output_changes_are_the_kl_that_evaluation_finds(tiny):
    samples = random_samples(6)
    batches = EpochBatches(tiny, samples, TrainingOptions(1e-3, 4)).in_order()
    changes = criteria.output_changes(tiny, batches, [2], [0, 1])
    for block, change in changes.items():
        scales.reset(tiny, [2, block])
        assert math.isclose(change, evaluate(tiny, batches, "x").kl, rel_tol=1e-4)
    assert len(set(changes.values())) == 2


def test_greedy_picks_follow_their_scores(tiny):
    scores = {0: 3.0, 1: 1.0, 2: 2.0, 3: 4.0}

    def score(skipped, blocks):  # block 1 gone, block 3 becomes the best
        return {b: 0.0 if 1 in skipped and b == 3 else scores[b] for b in blocks}

    assert criteria.greedily(tiny, 3, score) == {"blocks": [1, 3, 2], "candidates": 4 + 3 + 2}


def words_for(model, folder, count: int, *more) -> list[str]:
    """A benchmark's arguments: a model, processed data of random answers, and where figures go."""
    write_data(folder / "data.jsonl", random_samples(count))
    words = [
        "--model",
        model,
        "--data_path",
        folder / "data.jsonl",
        "--result",
        folder / "result.json",
        *more,
    ]
    return list(map(str, words))


def figures_in(folder) -> list[dict]:
    return json.loads((folder / "result.json").read_text())["figures"]


def selection(folder, blocks: list[int], search: str = "race", samples: int = 8) -> str:
    """What the benchmarks read of a selection report."""
    report = {
        "skipped_blocks": blocks,
        "iterations": [{"candidate_epochs": 2.5} for _ in blocks],
        "data": {"samples": samples},
        "arguments": {"learning_rate": 0.01, "batch_size": 2, "search": search},
    }
    path = folder / f"{search}.json"
    path.write_text(json.dumps(report))
    return str(path)


def test_quality_without_answers(tiny_folder, tmp_path, capsys):
    chosen = ["--selection", selection(tmp_path, [2, 1]), "--tasks", "--counts", 0, 1]
    chosen += ["--variants", "unscaled", "channel-kl", "--num_epochs", 1, "--validation_split", 0.25]
    words = words_for(tiny_folder(), tmp_path, 12, *chosen, "--work", tmp_path / "work")
    quality.main(words)
    found = figures_in(tmp_path)
    done = [(len(figure["of"]["blocks"]), figure["of"]["variant"]) for figure in found]
    assert done == [(0, "original"), (1, "unscaled"), (1, "channel-kl")]
    path = tmp_path / "work" / "channel-kl_1" / "report.json"
    report, modified = json.loads(path.read_text()), path.stat().st_mtime_ns
    assert report["arguments"]["granularity"] == "channel" and report["arguments"]["loss"] == "kl"
    assert report["skipped_blocks"] == [2]
    measured = found[-1]["held_out"]
    for which, figures in report["epochs"][0]["held_out"].items():
        assert measured[which]["kl"] == figures["kl"]
        assert math.isclose(math.log(measured[which]["perplexity"]), figures["cross_entropy"])
    quality.main(words)  # nothing is measured twice
    assert path.stat().st_mtime_ns == modified
    capsys.readouterr()
    quality.main([*words, "--table"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ")[:2] for line in lines[2:]]
    assert rows == [["| 0", "original"], ["| 1", "unscaled"], ["| 1", "channel, kl"]]
    assert f"{measured['unscaled']['kl']:.4f}" in lines[3] and f"{measured['scaled']['kl']:.4f}" in lines[4]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("block", [0, 2])
def test_quality_with_answers(tiny_folder, tmp_path, block):
    wide = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)  # vLLM: heads of 32 at least
    test_file = tmp_path / "test.jsonl"
    write_lines(test_file, [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(3)])
    asked = [
        "--selection",
        selection(tmp_path, [block]),
        "--test_file",
        test_file,
        "--puzzles",
        2,
        "--functions",
        2,
    ]
    asked += ["--counts", 1, "--variants", "unscaled", "--max_tokens", 5, "--work", tmp_path / "work"]
    words = words_for(tiny_folder("llama", **wide), tmp_path, 12, *asked)
    quality.main(words)
    (figure,) = figures_in(tmp_path)
    assert figure["served"] == ("folded" if block == 0 else "nemotron_nas")
    assert len(figure["gsm8k"]["right"]) == 3 and len(figure["puzzles"]["right"]) == 2
    assert len(figure["functions"]["right"]) == 2
    quality.main([*words, "--counts", "0"])
    quality.main([*words, "--plot", str(tmp_path / "quality.svg")])
    picture = (tmp_path / "quality.svg").read_text()
    assert "original" in picture and "no scales" in picture and "four scales" not in picture
    answers = json.loads((tmp_path / "work" / "unscaled_1" / "answers.json").read_text())
    del answers["made with"]
    assert all(1 <= reply["tokens"] <= 5 for replies in answers.values() for reply in replies)
    (tmp_path / "result.json").unlink()
    with pytest.raises(SystemExit, match="answers.json: of other settings than these; move it away"):
        quality.main([*words, "--max_tokens", "6"])


def test_criteria(tiny_folder, tmp_path, capsys):
    reports = selection(tmp_path, [2, 1]), selection(tmp_path, [3, 2], "untrained", 2)
    reports += (selection(tmp_path, [1, 3, 2], "cosine", 4),)
    options = ["--counts", 1, 2, "--selection", *reports]
    options += ["--look", 4, "--skip", 4, "--answers", 8, "--held_out", 4]
    words = words_for(tiny_folder(), tmp_path, 24, *options)
    criteria.main(words)
    figures = figures_in(tmp_path)
    chosen = {f["of"]["choose"]: f for f in figures if "choose" in f["of"]}
    named = {"search", "cosine", "weights", "untrained", "output"}
    assert set(chosen) == named | {f"random-{i}" for i in range(5)}
    reported = {"search": ([2, 1], 5.0), "untrained": ([3, 2], 1.25), "cosine": ([1, 3], 2.5)}
    assert {n: (chosen[n]["blocks"], chosen[n]["candidate_epochs"]) for n in reported} == reported
    ranked = sorted(range(4), key=lambda block: chosen["weights"]["scores"][str(block)])
    assert chosen["weights"]["blocks"] == ranked[:2]
    assert chosen["output"]["candidate_epochs"] == pytest.approx((4 + 3) * 2 / 3 * 4 / 8)
    for figure in figures:
        if "judge" in figure["of"] and figure["of"]["count"]:
            assert figure["unscaled"]["kl"] > 0
            assert figure["epochs"][-1]["held_out"] != figure["unscaled"]
    capsys.readouterr()
    criteria.main([*words, "--table"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 2 * 6 and " to " in lines[8] and "random" in lines[8]
    with pytest.raises(SystemExit, match="result.json: search chose 2 blocks; lower --counts, or move it"):
        criteria.main([*words, "--counts", "3"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        criteria.main([*words, "--selection", reports[0], reports[2]])
    assert "--selection: no report of the criterion untrained; give one" in capsys.readouterr().err


def test_training(tiny_folder, tmp_path, capsys):
    names = ["layer-ce", "channel-kl", "channel-kl-lr0.01", "channel-kl-rank4"]
    options = ["--blocks", 2, 1, "--answers", 8, "--held_out", 4, "--settings", *names]
    words = words_for(tiny_folder(), tmp_path, 12, *options)
    training.main(words)
    lines = capsys.readouterr().out.splitlines()
    training.main([*words, "--blocks", "1", "2"])  # the same ones: nothing is measured again
    assert capsys.readouterr().out.splitlines() == lines
    found = {figure["of"]["setting"]: figure for figure in figures_in(tmp_path)}
    assert list(found) == names
    model = loaded(tiny_folder(), "float32", scale_granularity="channel")
    samples = load_samples(tmp_path / "data.jsonl", model.config.vocab_size)
    plain = EpochTraining(model, [1, 2], samples[:8], samples[8:], TrainingOptions(3e-3, 4, loss="kl"))
    assert found["channel-kl"]["unscaled"]["kl"] == pytest.approx(plain.baselines()["unscaled"].kl, rel=1e-4)
    plain.start()
    for number, epoch in enumerate(found["channel-kl"]["epochs"]):
        assert epoch["held_out"]["kl"] == pytest.approx(plain.epoch(number).held_out.kl, rel=1e-4)
    last = {name: figure["epochs"][-1]["held_out"]["kl"] for name, figure in found.items()}
    assert len(set(last.values())) == len(names)
    assert found["layer-ce"]["original"]["kl"] == 0
    assert found["channel-kl-rank4"]["unscaled"] != found["channel-kl"]["unscaled"]
    rows = ["original", "unscaled", "channel-kl", "channel-kl-lr0.01"]
    rows += ["channel-kl-rank4, as fitted", "channel-kl-rank4", "layer-ce"]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {row}" for row in rows]
    with pytest.raises(SystemExit):
        training.main([*words, "--settings", "channel-kl-decay"])


def test_training_of_the_first_blocks_on_shuffled_answers(tiny_folder, tmp_path, capsys):
    options = ["--blocks", 2, 1, "--counts", 1, 2, "--seeds", 0, "--answers", 4, "--held_out", 4]
    words = words_for(tiny_folder(), tmp_path, 12, *options, "--settings", "channel-kl", "--epochs", 1)
    training.main(words)
    lines = capsys.readouterr().out.splitlines()
    model = loaded(tiny_folder(), "float32", scale_granularity="channel")
    samples = load_samples(tmp_path / "data.jsonl", model.config.vocab_size)
    random.Random(0).shuffle(samples)
    for figure, blocks in zip(figures_in(tmp_path), ([2], [1, 2]), strict=True):
        assert figure["of"] == {"setting": "channel-kl", "answers": 4, "blocks": len(blocks), "seed": 0}
        plain = EpochTraining(model, blocks, samples[:4], samples[8:], TrainingOptions(3e-3, 4, loss="kl"))
        assert figure["unscaled"]["kl"] == pytest.approx(plain.baselines()["unscaled"].kl, rel=1e-4)
    assert [line.split(" | ")[2:4] for line in lines[2:]] == [["1", "0"]] * 3 + [["2", "0"]] * 3
    with pytest.raises(SystemExit, match="made with another blocks"):
        training.main([*words, "--blocks", "1", "2"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        training.main([*words, "--counts", "3"])
    assert "--counts: at most 2, as many as --blocks names" in capsys.readouterr().err


def test_differences_are_to_the_variant_that_is_named():
    def figure(blocks: list[int], variant: str, right: str) -> dict:
        return {"of": {"blocks": blocks, "variant": variant}, "gsm8k": {"right": right, "truncated": 1}}

    figures = [
        figure([], "original", "1111"),
        figure([3], "unscaled", "0001"),
        figure([3], "channel-kl", "0111"),
    ]

    def differences(*less) -> list[str]:
        return [line.split(" | ")[3].split(" ±")[0] for line in quality_tables.table(figures, *less)[2:]]

    assert differences() == ["-", "-75.0", "-25.0"]
    assert differences("unscaled") == ["-", "-", "+50.0"]
    elsewhere = [figure([3], "unscaled", "0111")]
    assert differences("unscaled", elsewhere) == ["-", "-50.0", "+0.0"]


def test_differences_are_to_answers_to_the_same_problems(tmp_path, capsys):
    files = [tmp_path / name for name in ("ours.json", "theirs.json", "others.json")]
    of = {"blocks": [], "variant": "original"}
    figures = [{"of": of, "gsm8k": {"right": right, "truncated": 0}} for right in ("0111", "0011", "0011")]
    for file, figure, test_file in zip(files, figures, ("a", "a", "b"), strict=True):
        settings = {"model": "m", "test_file": test_file, "max_tokens": 9}
        settings |= {"functions": 5} if file == files[0] else {}
        file.write_text(json.dumps({"settings": settings, "figures": [figure]}))
    words = ["--model", "m", "--table", "--result", str(files[0]), "--less_in"]
    quality.main([*words, str(files[1])])
    assert "+25.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="others.json: of another test_file than .*ours.json; name a file"):
        quality.main([*words, str(files[2])])
