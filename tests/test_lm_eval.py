"""A checkpoint in lm-eval; benchmarks/lm_eval_tables.py on what that wrote and on the poster's columns."""

import importlib.util
import json
import subprocess
import sys

import lm_eval_tables as tables
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

from hopscotch_common import checkpoints
from hopscotch_common.loading.models import model_ref

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval") / "checkpoint"
    values = 1 + 0.02 * torch.arange(16.0).view(4, 4)
    values[[0, 2], 0] = 0
    checkpoints.save_checkpoint(folder, model_ref(str(tiny_folder())), [0, 2], values, {})
    return folder


@pytest.fixture(scope="module")
def results(checkpoint, tmp_path_factory):
    """The folder that a real run over two local tasks wrote."""
    root = tmp_path_factory.mktemp("lm_eval")
    arguments = (
        f"--model hf --model_args pretrained={checkpoint},trust_remote_code=True,dtype=float32 --device cpu"
        " --tasks local_generated,local_choices --include_path . --batch_size 2"
        f" --output_path {root / 'results'} --log_samples"
    )
    options = dict(cwd=ROOT / "tests" / "lm_eval", capture_output=True, text=True)
    run = subprocess.run([sys.executable, "-m", "lm_eval", *arguments.split()], **options)
    assert run.returncode == 0, run.stderr[-4000:]
    return root / "results"


@needs_lm_eval
def test_lm_eval_runs_a_checkpoint(checkpoint, results):
    def samples(task):
        (path,) = results.rglob(f"samples_{task}_*.jsonl")
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(found) == 3
        return found

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    model = checkpoints.load_checkpoint(checkpoint)
    for sample in samples("local_generated"):
        ids = torch.tensor([tokenizer.encode(sample["doc"]["question"])])
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert len(answer) > 0
        assert sample["resps"] == [[tokenizer.decode(answer, skip_special_tokens=True)]]
    for sample in samples("local_choices"):
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            question = tokenizer.encode(sample["doc"]["question"])
            answer = tokenizer.encode(choice, add_special_tokens=False)
            with torch.inference_mode():
                logits = model(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(answer)), answer].sum()
            assert float(response[0][0]) == pytest.approx(float(expected), rel=1e-4)


@needs_lm_eval
def test_the_table_of_a_real_run(results, tmp_path, capsys):
    (path,) = results.rglob("results_*.json")
    content = json.loads(path.read_text())
    found = content["results"]["local_choices"]
    a, ea, b, eb = 100 * found["acc,none"], 100 * found["acc_stderr,none"], 12.5, 4.0
    found |= {"acc,none": b / 100, "acc_stderr,none": eb / 100}  # another model's
    (tmp_path / path.name).write_text(json.dumps(content))
    words = [f"original={results}", f"skipped={tmp_path}", "--columns", "local_choices:acc,none"]
    assert tables.main(words) == 0
    title, _, original, skipped = capsys.readouterr().out.splitlines()
    assert title == "| model | local_choices:acc,none |"
    assert original == f"| original | {a:.2f} ± {ea:.2f} |"
    assert skipped == f"| skipped | {b:.2f} ± {eb:.2f} ({b - a:+.2f} ± {(ea**2 + eb**2) ** 0.5:.2f}) |"


def write(folder, date: float, results: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{date}.json").write_text(json.dumps({"date": date, "results": results}))


def gsm8k(flexible: float, strict: float) -> dict:
    return {
        "alias": "gsm8k",
        "sample_len": 1319,
        "exact_match,flexible-extract": flexible,
        "exact_match_stderr,flexible-extract": 0.01,
        "exact_match,strict-match": strict,
        "exact_match_stderr,strict-match": 0.02,
    }


def test_the_posters_columns_over_several_runs(tmp_path, capsys):
    write(tmp_path / "base" / "model", 1.0, {"gsm8k": gsm8k(0.1, 0.1)})  # run again since
    write(tmp_path / "base" / "model", 2.0, {"gsm8k": gsm8k(0.8310, 0.6694)})
    write(
        tmp_path / "base" / "other",
        3.0,
        {"pawsx": {"alias": "pawsx", "acc,none": 0.6326, "acc_stderr,none": "N/A"}},
    )
    write(tmp_path / "four", 1.0, {"gsm8k": gsm8k(0.8105, 0.7703)})
    assert tables.main([f"original={tmp_path / 'base'}", str(tmp_path / "four")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| model | gsm8k FE | gsm8k SM | pawsx |",
        "|---|---|---|---|",
        "| original | 83.10 ± 1.00 | 66.94 ± 2.00 | 63.26 |",
        "| four | 81.05 ± 1.00 (-2.05 ± 1.41) | 77.03 ± 2.00 (+10.09 ± 2.83) | - |",
    ]


def test_what_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        tables.main([str(tmp_path)])
    write(tmp_path / "a", 1.0, {"local": {"acc,none": 0.5, "acc_stderr,none": 0.1}})
    with pytest.raises(SystemExit, match="--columns takes any of: local:acc,none"):
        tables.main([str(tmp_path / "a")])
    with pytest.raises(SystemExit, match="no model has local:f1,none"):
        tables.main([str(tmp_path / "a"), "--columns", "local:f1,none"])
    with pytest.raises(SystemExit, match="named twice"):
        tables.main([str(tmp_path / "a"), str(tmp_path / "a")])
