"""The model card of a checkpoint or an export: its README.md, which a hub shows as the model's page."""

from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from hopscotch_common import scales
from hopscotch_common.errors import logger, reason_of
from hopscotch_common.loading.models import EMBEDDED_LICENCE, ModelRef
from hopscotch_common.report import ANSWERS, with_error
from hopscotch_common.scales.modeling_hopscotch import attention_blocks
from hopscotch_common.vllm_plugin import family_obstacle

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("card.md")  # in Jinja
LICENCE_FIELDS = ("license", "license_name", "license_link", "language")
LIBRARIES = {"checkpoint": "transformers", "folded": "transformers", "nemotron_nas": "vllm"}
UNPLAIN = set("\n\r`<>[]")  # could become markup in the card's text
ROWS = {  # of held-out figures; the second title is for maps in the blocks' place
    "original": ("original", "original"),
    "unscaled": ("blocks skipped, no scales", "maps in their place, as fitted"),
    "scaled": ("blocks skipped, with scales", "maps and scales, trained"),
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

    kind: a key of LIBRARIES. origin: from `origin_of` or, for an export, `inherited`. config, values: the
    checkpoint's config, and its scales [layers, width]. run: its hopscotch.json. check: how an export
    compared with it.
    """
    try:
        training = _training(config, values, run)
        figures = run.get("held_out") or {}
        rows, answers = _held_out(figures, bool(config.replacement_rank))
    except (AttributeError, KeyError, TypeError, ValueError):  # edited, or from something else
        training, rows, answers = "How its scales were trained is not on record.", [], ""
    present, skipped = len(attention_blocks(config)), sorted(config.skipped_attention_blocks or ())
    # block 0 of nemotron_nas: without a map it stays, and adds zero
    without = [i for i in skipped if i or config.replacement_rank]
    uncached = {"checkpoint": skipped, "folded": [], "nemotron_nas": without}[kind]
    if base := origin.get("base_model"):
        base = f"[{base}](https://huggingface.co/{base})"
    else:
        base = f"`{Path(str(run['base_model'])).name}`" if "base_model" in run else "A model"
    maps = bool(config.replacement_rank)
    data = ModelCardData(
        library_name="mlx" if maps and kind == "nemotron_nas" else LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=["hopscotch", "attention-skipping"],
        **origin,
    )
    card = ModelCard.from_template(
        data,
        TEMPLATE,
        name=name,
        kind=kind,
        base=base,
        present=present,
        skipped=skipped,
        cached=present - len(uncached),
        training=training,
        rows=rows,
        answers=answers,
        check=check,
        maps=maps,
        plugin=family_obstacle(config) is None,
        quantised=bool(getattr(config, "quantization_config", None)),
    )
    card.save(target / CARD_FILE)


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
    rates = dict.fromkeys(run.get("learning_rates") or [run["learning_rate"]])
    rates = ", then ".join(f"{rate:g}" for rate in rates)
    kind = settings.get("quantization")
    quantised = f" All of that, and what is measured below, over weights in {kind}." if kind else ""
    return (
        f"{kept}; {run['epoch'] + 1} epoch(s) of Adam, learning rate {rates}, "
        f"{settings['batch_size']} answers a step, on {losses[settings['loss']]}.{quantised}"
    )


def _held_out(figures: dict, maps: bool) -> tuple[list[str], str]:
    """Return (table rows of the figures on held-out answers, how many answers), as far as there are any."""
    rows, answers = [], ""
    for key, titles in ROWS.items():
        if found := figures.get(key):
            loss, kl = (with_error(found, measure) for measure in ("cross_entropy", "kl"))
            rows.append(f"| {titles[maps]} | {loss} | {kl} | {found['agreement']:.1%} |")
            answers = f"{found[ANSWERS]:d} " if found.get(ANSWERS) else ""
    return rows, answers


def origin_of(base: ModelRef) -> dict:
    """Return what a card says of the base model: its id on the hub, if known, its licence and its languages.

    They come from the front matter of its own card, from its GGUF file, or else from its licence file.
    """
    found = {"base_model": base.hub_id} if base.hub_id else {}
    if base.embedded:
        return found | {"license": EMBEDDED_LICENCE}
    if Path(base.source).is_file():
        from hopscotch_common.loading.gguf_files import open_gguf, value_of

        licence = value_of(open_gguf(Path(base.source)), "general.license")
        return found | ({"license": licence} if licence and _is_words(licence) else {})
    folder = base.folder()
    found |= inherited(folder, LICENCE_FIELDS)
    files = sorted(path.name for path in folder.glob("LICENSE*") if path.is_file())
    if "license" not in found and files:
        found |= {"license": "other", "license_name": "of-the-base-model", "license_link": files[0]}
    return found


def inherited(folder: Path, names: tuple[str, ...] = ("base_model", *LICENCE_FIELDS)) -> dict:
    """Return those of the named metadata fields that a folder's card has; {} if there is no card."""
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        data = metadata_load(path) or {}
        return {name: data[name] for name in names if _is_words(data.get(name))}
    except Exception as error:  # from YAML, or from what others wrote in it
        logger.warning("%s: its metadata cannot be read (%s), and so no licence", path, reason_of(error))
        return {}


def _is_words(value: object) -> bool:
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and not UNPLAIN & set(word.strip()) for word in words)
