"""Whether a model's family is one that is described, and if not, what to tell the user."""

import difflib

from hopscotch_common.errors import InputError
from hopscotch_common.modeling_hopscotch import FAMILIES, REFUSED


def check_supported(model_type: str, where: object) -> None:
    """Raise InputError, which says `where`, unless a `model_type` of transformers is in FAMILIES."""
    if model_type in FAMILIES:
        return
    if model_type in REFUSED:
        reason = REFUSED[model_type]
        raise InputError(
            f"{where}: architecture {model_type!r} is not supported: {reason}; give another model"
        )
    near = difflib.get_close_matches(model_type, FAMILIES, n=3, cutoff=0.4)
    others = f"nearest to it are {', '.join(near)}" if near else f"supported are {', '.join(FAMILIES)}"
    raise InputError(
        f"{where}: architecture {model_type!r} is not supported; {others}; give another model, or describe "
        "its decoder layer in FAMILIES in hopscotch_common/modeling_hopscotch.py"
    )
