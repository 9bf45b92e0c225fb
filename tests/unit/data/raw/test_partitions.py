"""Which day and which partitions a path tells, and what is chosen by them."""

from __future__ import annotations

from datetime import date

import pytest

from dpo_ray.data.raw.partitions import date_of, in_partitions, in_period, partitions_of
from dpo_ray.errors import DataError

FIRST, SECOND, THIRD = (date(2026, 11, day) for day in (1, 2, 3))


@pytest.mark.parametrize(
    ("uri", "day"),
    [
        ("/d/date=2026-11-01/a.parquet", FIRST),
        ("s3://b/d/dt=20261101/lang=en/a.parquet", FIRST),
        ("/d/year=2026/month=11/day=01/a.parquet", FIRST),
        ("/d/year=2026/month=11/day=1/a.parquet", FIRST),
        ("/d/prefs-2026-11-01.jsonl.gz", FIRST),
        ("/d/prefs_20261101T020000.jsonl", FIRST),
        ("/d/2026_11_01.parquet", FIRST),
        ("/d/2026-11-01/part-00000.parquet", FIRST),
        ("/backup/2020-01-01/date=2026-11-01/a-2026-11-02.parquet", FIRST),
        ("/backup/2020-01-01/a-2026-11-01.parquet", FIRST),
        ("/backup/2020-01-01/2026-11-01/a.parquet", FIRST),
        ("/d/a-2026-11-01-again-2026-11-01.parquet", FIRST),
        ("/d/a.parquet", None),
        ("/d/year=2026/month=11/a.parquet", None),
        ("/d/part-120261101.parquet", None),
        ("/d/2026-13-01.parquet", None),
        ("/d/2026-1101.parquet", None),
        ("/d/my-2026-11-01-data/a.parquet", None),
        ("/d/lang=en/a.parquet", None),
    ],
)
def test_the_day_of_a_file(uri: str, day: date | None):
    assert date_of(uri) == day


def test_a_name_with_several_days_is_refused():
    with pytest.raises(DataError, match=r"several dates in its name \(2026-11-01, 2026-11-07\)"):
        date_of("/d/2026-11-01_2026-11-07.parquet")
    assert date_of("/d/date=2026-11-02/2026-11-01_2026-11-07.parquet") == SECOND


def test_partitions_are_folders_and_not_files():
    assert partitions_of("/d/date=2026-11-01/lang=en/x=1.parquet") == {"date": "2026-11-01", "lang": "en"}
    assert partitions_of("/d/=1/a=/b.parquet") == {}


FILES = [f"/d/date=2026-11-0{n}/lang={lang}/a.parquet" for n in (1, 2, 3) for lang in ("en", "fr")]


@pytest.mark.parametrize(
    ("since", "until", "days"),
    [(SECOND, None, {2, 3}), (None, SECOND, {1, 2}), (SECOND, SECOND, {2}), (FIRST, THIRD, {1, 2, 3})],
)
def test_both_ends_of_a_period_are_in_it(since: date | None, until: date | None, days: set[int]):
    assert in_period(FILES, since, until) == [file for file in FILES if int(file[16:18]) in days]


def test_a_period_without_files_names_the_days_that_there_are():
    with pytest.raises(DataError, match=r"period from 2026-12-01 to the last one .* of 2026-11-01 to 2026-11-03"):
        in_period(FILES, date(2026, 12, 1), None)


def test_a_file_without_a_day_is_not_passed_over():
    with pytest.raises(DataError, match=r"1 of the 7 files of data\.train tell no date, the first being /d/b\.parquet"):
        in_period([*FILES, "/d/b.parquet"], FIRST, None)


def test_partitions_of_one_key_add_up_and_other_keys_narrow():
    assert in_partitions(FILES, ["date=2026-11-01", "date=2026-11-03"]) == FILES[:2] + FILES[4:]
    assert in_partitions(FILES, ["date=2026-11-01", "lang=fr"]) == [FILES[1]]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["date=2026-11-01", "date=2026-11-09"], r"date=2026-11-09 .*of date there are 2026-11-01 to 2026-11-03"),
        (["day=2026-11-01"], r"no folder is called day=…"),
        (["date=2026-11-01", "source=web"], r"in all of date=2026-11-01, source=web"),
    ],
)
def test_a_partition_without_files_is_named(wanted: list[str], said: str):
    with pytest.raises(DataError, match=said):
        in_partitions([*FILES, "/e/source=web/a.parquet"], wanted)
