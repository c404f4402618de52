"""The model card of a checkpoint or an export: its README.md, which a hub shows as the model's page."""

from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from hopscotch_common import scales
from hopscotch_common.errors import logger, reason_of
from hopscotch_common.modeling_hopscotch import attention_blocks
from hopscotch_common.models import EMBEDDED_LICENCE, ModelRef

CARD_FILE = "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link", "language")
LIBRARIES = {"checkpoint": "transformers", "folded": "transformers", "nemotron_nas": "vllm"}
KINDS = {
    "checkpoint": "The skipped blocks are not computed, have no weights here, and take no KV cache.",
    "folded": "This is an export in the stock architecture, the scales folded into the weights. The skipped "
    "blocks are computed, to zero: it loads anywhere, and is no faster.",
    "nemotron_nas": "This is an export in the DeciLM format, the scales folded into the weights. The skipped "
    "blocks (but block 0, which adds zero) are not computed and take no KV cache.",
}
LOADING = {
    "checkpoint": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("MODEL", trust_remote_code=True)
```

```bash
lm_eval --model hf --tasks gsm8k --model_args pretrained=MODEL,trust_remote_code=True
vllm serve MODEL    # with Hopscotch installed beside vLLM, whose plugin it has
lm_eval --model vllm --tasks gsm8k --model_args pretrained=MODEL    # so, too
```

llama.cpp and others load exports, made by `python -m hopscotch_common.export`.""",
    "folded": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```

```bash
vllm serve MODEL
lm_eval --model hf --tasks gsm8k --model_args pretrained=MODEL
python llama.cpp/convert_hf_to_gguf.py MODEL --outfile model.gguf
```""",
    "nemotron_nas": """```bash
vllm serve MODEL --trust-remote-code
lm_eval --model vllm --tasks gsm8k --model_args pretrained=MODEL,trust_remote_code=True
```

Not in transformers, which has no class of this format, and in llama.cpp by another export (`gguf`).""",
}
CITATION = """```bibtex
@inproceedings{hopscotch2025,
  title = {Hopscotch: Discovering and Skipping Redundancies in Language Models},
  author = {Eyceoz and Nayak and Wang and Han and Srivastava},
  booktitle = {Proceedings of the 2025 Conference on Empirical Methods in Natural Language Processing},
  year = {2025},
  url = {https://arxiv.org/abs/2506.03303}
}
```"""
ROWS = {
    "original": "original",
    "unscaled": "blocks skipped, no scales",
    "scaled": "blocks skipped, with scales",
}


def write_card(
    target: Path,
    name: str,
    kind: str,
    origin: dict,
    config,
    values: torch.Tensor,
    run: dict,
    check: str | None = None,
) -> None:
    """Write the card of a model into its folder `target`.

    kind: of KINDS. origin: `origin_of`, or an export's `inherited`. config, values: the checkpoint's, and
    its scales [layers, width]. run: its hopscotch.json. check: how an export compared with it.
    """
    data = ModelCardData(
        library_name=LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=["hopscotch", "attention-skipping"],
        **origin,
    )
    parts = [f"# {name}", _summary(kind, origin, config, run)]
    try:
        parts += [_training(config, values, run), _held_out(run.get("held_out") or {})]
    except (AttributeError, KeyError, TypeError, ValueError):  # of an earlier release, or edited
        parts += ["How its scales were trained is not on record."]
    parts += [f"Compared with its checkpoint: {check}."] if check else []
    parts += ["## Loading", "`MODEL` is this folder, or its id on the hub.", LOADING[kind]]
    parts += ["## Citation", CITATION]
    text = "\n\n".join(part for part in parts if part)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(target / CARD_FILE)


def _summary(kind: str, origin: dict, config, run: dict) -> str:
    present, skipped = attention_blocks(config), sorted(config.skipped_attention_blocks or ())
    uncached = {"checkpoint": skipped, "folded": [], "nemotron_nas": [i for i in skipped if i]}[kind]
    left = len(present) - len(uncached)
    base = origin.get("base_model")
    if base:
        base = f"[{base}](https://huggingface.co/{base})"
    else:
        base = f"`{Path(str(run['base_model'])).name}`" if "base_model" in run else "A model"
    licence = f"`{origin['license']}`" if "license" in origin else "not known here: see there"
    return (
        f"{base} without {len(skipped)} of its {len(present)} attention blocks "
        f"({', '.join(map(str, skipped)) or 'none'}), by "
        f"[Hopscotch](https://arxiv.org/abs/2506.03303). {KINDS[kind]}\n\n"
        f"- KV cache: {left} of {len(present)} blocks ({left / len(present):.0%})\n"
        f"- Licence: the base model's ({licence})"
    )


def _training(config, values: torch.Tensor, run: dict) -> str:
    neutral, rank, maps = scales.ones(config), config.replacement_rank, ""
    if rank:
        maps = (
            f"In each skipped block's place stands a linear map of rank {rank} of the block's normed input, "
            "fitted to what the block did. "
        )
    else:
        scales.columns(neutral)["b_scale_attn"][list(config.skipped_attention_blocks or ())] = 0.0
    if torch.equal(values, neutral):
        return f"{maps}Nothing was trained: all scales are 1."
    kept = f"{maps}No weight was trained but {'these maps and ' if rank else ''}the scales of the residual "
    kept += "stream's branches: "
    kept += (
        "four a layer" if config.scale_granularity == "layer" else "one a channel (b), and two a layer (s)"
    )
    settings = run.get("settings")
    if settings is None:
        return kept + "."
    losses = {
        "ce": "cross entropy on the base model's own answers",
        "kl": "KL to the base model's distribution",
    }
    return (
        f"{kept}; {run['epoch'] + 1} epoch(s) of Adam, learning rate {run['learning_rate']:g}, "
        f"{settings['batch_size']} answers a step, on {losses[settings['loss']]}."
    )


def _held_out(figures: dict) -> str:
    """A table of the figures on held-out answers, where there are any; else nothing."""
    rows = [
        f"| {title} | {found['cross_entropy']:.4f} | {found['kl']:.4f} | {found['agreement']:.1%} |"
        for key, title in ROWS.items()
        if (found := figures.get(key))
    ]
    if not rows:
        return ""
    head = [
        "| on held-out answers | loss, nats a token | KL to the original | agreement |",
        "|---|---|---|---|",
    ]
    return "\n".join(head + rows)


def origin_of(base: ModelRef) -> dict:
    """What a card says of the base model: its id on the hub, if it is known, and its licence and languages.

    They come from the front matter of its own card, or from its GGUF file, or else its licence file.
    """
    found = {"base_model": base.hub_id} if base.hub_id else {}
    if base.embedded:
        return found | {"license": EMBEDDED_LICENCE}
    if Path(base.source).is_file():
        from hopscotch_common.gguf_files import open_gguf, value_of

        licence = value_of(open_gguf(Path(base.source)), "general.license")
        return found | ({"license": licence} if licence else {})
    folder = base.folder()
    found |= inherited(folder, LICENCE_FIELDS)
    files = sorted(path.name for path in folder.glob("LICENSE*"))
    if "license" not in found and files:
        found |= {"license": "other", "license_name": "of-the-base-model", "license_link": files[0]}
    return found


def inherited(folder: Path, names: tuple[str, ...] = ("base_model", *LICENCE_FIELDS)) -> dict:
    """These fields of the metadata of a folder's card, as far as it has them; {} without one."""
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        data = metadata_load(path) or {}
        return {name: data[name] for name in names if _is_words(data.get(name))}
    except Exception as error:  # of YAML, or of what others wrote in it
        logger.warning("%s: its metadata cannot be read (%s), and so no licence", path, reason_of(error))
        return {}


def _is_words(value: object) -> bool:
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) for word in words)
