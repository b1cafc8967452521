"""Reach the Hugging Face hub, or work from its cache at once where it does not answer."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)
#: Seconds that the hub has to answer in.
_PATIENCE = 5.0


@functools.cache
def reach() -> bool:
    """Ask the hub once in a process whether it answers; where it does not, let its client work offline, from its cache.

    The client would try five times over half a minute otherwise, for every data set that a default names.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # the client's library, and so the type, depends on its version
        logger.info("%s does not answer (%s): working offline", constants.ENDPOINT, error)
        _work_offline()
        return False
    return True


def is_in_use() -> bool:
    """Whether this process has reached the hub already, so that asking it for more contacts nothing new."""
    return bool(reach.cache_info().currsize) and reach()


def _work_offline() -> None:
    from datasets import config
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True
