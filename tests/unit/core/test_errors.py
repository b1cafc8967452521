"""Messages of errors in one line."""

from __future__ import annotations

import pandas as pd
import pytest

from lcc_lens.core.errors import RequestError, first_line
from lcc_lens.core.heads import Head


def test_our_own_advice_is_never_cut_and_another_library_s_message_is() -> None:
    message = f"expected data, got {'none, ' * 60}and so on; name more data or lower --n-samples"
    assert first_line(RequestError(message)) == message
    assert first_line(RuntimeError(f"{message}\nTraceback")) == message[:200]
    assert first_line(RuntimeError("")) == "RuntimeError"


def test_a_message_is_one_line_whatever_it_shows() -> None:
    table = pd.DataFrame({"head": ["L1H2", "L3H0"]})
    with pytest.raises(RequestError) as caught:
        Head.of(table)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1
    shown = str(caught.value).split()
    assert " ".join(shown) == "expected a head such as (12, 3) or L12H3, got head 0 L1H2 1 L3H0"
