"""Whether a model's family is one that is described, and if not, what to tell the user."""

from transformers.models.auto import modeling_auto as auto

from hopscotch_common.errors import InputError
from hopscotch_common.modeling_hopscotch import FAMILIES, REFUSED

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")  # have a causal head, too


def check_supported(model_type: str, where: object) -> None:
    """Raise InputError, which says `where`, unless a `model_type` of transformers is in FAMILIES."""
    if model_type in FAMILIES:
        return
    if model_type in REFUSED:
        reason = REFUSED[model_type]
        raise InputError(
            f"{where}: architecture {model_type!r} is not supported: {reason}; give another model"
        )
    kind = _other_kind(model_type)
    if kind is not None:
        raise InputError(
            f"{where}: architecture {model_type!r} is {kind}; give a decoder-only language model, as its "
            f"text generation needs: supported are {', '.join(FAMILIES)}"
        )
    raise InputError(
        f"{where}: architecture {model_type!r} is not supported; supported are {', '.join(FAMILIES)}; give "
        "another model, or describe its decoder layer in FAMILIES in hopscotch_common/modeling_hopscotch.py"
    )


def _other_kind(model_type: str) -> str | None:
    """What a model is that is no decoder-only language model; None where transformers does not tell."""
    for names, kind in (
        (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "a vision-language model"),
        (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "a speech model"),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "an encoder-decoder model"),
    ):
        if model_type in names:
            return kind
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in ENCODERS:
        return None
    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder"
    return "no language model" if model_type in auto.MODEL_MAPPING_NAMES else None
