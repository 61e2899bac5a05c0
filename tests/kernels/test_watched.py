"""Whether another mode sees the operations."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from perexfx.kernels.watched import is_watched


def test_who_watches_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that failed leaves torch's own flag set."""
    monkeypatch.setattr("torch.utils._python_dispatch._is_in_torch_dispatch_mode", True)
    assert not is_watched()
    with TorchDispatchMode():
        assert is_watched()
    assert not is_watched()
