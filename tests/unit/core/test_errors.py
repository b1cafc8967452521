"""Messages of errors in one line."""

from __future__ import annotations

from lcc_lens.core.errors import RequestError, first_line


def test_our_own_advice_is_never_cut_and_another_library_s_message_is() -> None:
    message = f"expected data, got {'none, ' * 60}and so on; name more data or lower --n-samples"
    assert first_line(RequestError(message)) == message
    assert first_line(RuntimeError(f"{message}\nTraceback")) == message[:200]
    assert first_line(RuntimeError("")) == "RuntimeError"
