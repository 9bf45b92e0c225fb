"""What the command line says last, where an error is none of ours."""

from __future__ import annotations

import errno
import os

import pytest

from pipelines import cli


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "`dpo-ray gc OUTPUT` lists"),
        (errno.EDQUOT, "TMPDIR"),
        (errno.EROFS, "let this user write there"),
        (errno.EACCES, "name another run.output"),
    ],
)
def test_what_the_disk_refuses_is_no_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, way_out: str
):
    def refused() -> None:
        raise OSError(number, os.strerror(number), "/out/leases/train.json")

    monkeypatch.setattr(cli, "app", refused)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    [told] = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 1
    assert told.startswith(f"{os.strerror(number)}: /out/leases/train.json. What is finished is kept")
    assert way_out in told and "defect" not in told


def test_another_error_is_a_defect_with_its_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken() -> None:
        raise OSError("what is this?")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert told.startswith("\nUnexpected OSError: what is this? (") and "test_cli.py:" in told
