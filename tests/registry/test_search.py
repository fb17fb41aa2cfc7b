"""The filter syntax on both databases: every comparator, hostile names and values, and a caret under each mistake."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neft.errors import InputError
from registry import Registry
from registry.filters import DEEPEST, LONGEST, MOST
from registry.search import Search
from tests.registry.conftest import Pupil, new_place

HOSTILE = "'; DROP TABLE entries; --"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def recorded(
    request: pytest.FixtureRequest, base: Path, other_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    """Six entries of two base models, with aliases, tags, links and metrics; nothing here changes them."""
    with new_place(request.param, tmp_path_factory.mktemp("search") / "registry") as place:
        registry = place.open()
        pupil = Pupil(registry, base)
        film = pupil.record("film", metrics={"accuracy": 0.5, "scores": {"film": 0.25}}, mlflow_run_id="run-1")
        news = pupil.record("news", metrics={"accuracy": 0.75, "scores": {"film": 0.5, "news": 1.0}}, stream="Ströme")
        pupil.record("film", metrics={"accuracy": 1}, reused_from=news, prefect_flow_run_id="flow-1")
        pupil.record(HOSTILE, metrics={HOSTILE: 1.0}, stream=HOSTILE)
        pupil.record("film", forgets=film, metrics={})
        other = Pupil(registry, other_base)
        other.record("100%_größe", metrics={"accuracy": -2.5e-3})
        registry.set_alias("film@1", "champion")
        registry.set_alias("film@1", "Best.one")
        registry.set_alias("news@1", "champion")
        registry.set_tag("film@1", "stage", "prod")
        registry.set_tag("film@2", "stage", "it's \\ 100%")
        registry.set_tag("news@1", "stage", "Prüfung 日本")
        registry.set_tag("news@1", HOSTILE, HOSTILE)
        registry.set_tag("news@1", "a key", "")
        yield registry
        registry.close()


def found(registry: Registry, text: str) -> list[str]:
    """References, in the order they were recorded; the hostile task and the last one by a short name."""
    short = {f"{HOSTILE}@1": "evil", "100%_größe@1": "size"}
    return [short.get(entry.reference, entry.reference) for entry in reversed(registry.search(text).entries)]


ALL = ["film@1", "news@1", "film@2", "evil", "film@3", "size"]

FITS = {
    "": ALL,
    "   ": ALL,
    "task = 'film'": ["film@1", "film@2", "film@3"],
    "task != 'film'": ["news@1", "evil", "size"],
    "task <> 'film'": ["news@1", "evil", "size"],
    "task IN ('news', 'nothing')": ["news@1"],
    "task NOT IN ('news', 'film')": ["evil", "size"],
    "task LIKE 'f%'": ["film@1", "film@2", "film@3"],
    "task LIKE 'F%'": [],
    "task ILIKE 'F%'": ["film@1", "film@2", "film@3"],
    "task NOT LIKE 'f%'": ["news@1", "evil", "size"],
    "task NOT ILIKE 'F_LM'": ["news@1", "evil", "size"],
    "task LIKE '100\\%'": [],
    "task LIKE '%größe'": ["size"],
    "task > 'film'": ["news@1"],
    "task <= 'film'": ["film@1", "film@2", "evil", "film@3", "size"],
    "task = '" + HOSTILE.replace("'", "''") + "'": ["evil"],
    "version = 1": ["film@1", "news@1", "evil", "size"],
    "version != 1": ["film@2", "film@3"],
    "version > 1": ["film@2", "film@3"],
    "version >= 1.5": ["film@2", "film@3"],
    "version < 2": ["film@1", "news@1", "evil", "size"],
    "version <= 2 and version > 1": ["film@2"],
    "version IN (2, 3)": ["film@2", "film@3"],
    "version NOT IN (1)": ["film@2", "film@3"],
    "version < 99999999999999999999999": ALL,
    "version IS NULL": [],
    "seed = 1099511627777": ["film@1", "size"],
    "seed = 1099511627777.5": [],
    "neurons = 10 AND parameters > 0": ALL,
    "neurons > 1e2": [],
    "metrics.accuracy >= 0.75": ["news@1", "film@2"],
    "metrics.accuracy = 1": ["film@2"],
    "metrics.accuracy != 1": ["film@1", "news@1", "size"],
    "metrics.accuracy < -.001": ["size"],
    "metrics.accuracy IN (0.5, 1)": ["film@1", "film@2"],
    "metrics.accuracy IS NULL": ["evil", "film@3"],
    "metrics.accuracy IS NOT NULL": ["film@1", "news@1", "film@2", "size"],
    "metrics.`scores/film` >= 0.5": ["news@1"],
    'metrics."scores/film" < 0.5': ["film@1"],
    "metrics.scores/news = 1": ["news@1"],
    f'metrics."{HOSTILE}" = 1': ["evil"],
    "NOT metrics.accuracy > 0": ["evil", "film@3", "size"],
    "alias = 'champion'": ["film@1", "news@1"],
    "alias != 'champion'": ["film@2", "evil", "film@3", "size"],
    "alias = 'Best.one'": ["film@1"],
    "alias LIKE 'best%'": [],
    "alias ILIKE 'best%'": ["film@1"],
    "alias IN ('champion', 'Best.one')": ["film@1", "news@1"],
    "alias IS NULL": ["film@2", "evil", "film@3", "size"],
    "alias IS NOT NULL": ["film@1", "news@1"],
    "tags.stage = 'prod'": ["film@1"],
    "tags.stage != 'prod'": ["news@1", "film@2"],
    "NOT tags.stage = 'prod'": ["news@1", "film@2", "evil", "film@3", "size"],
    "tags.stage = 'it''s \\ 100%'": ["film@2"],
    "tags.stage LIKE '%\\ 100%'": ["film@2"],
    "tags.stage LIKE 'Prüfung __'": ["news@1"],
    "tags.stage IS NULL": ["evil", "film@3", "size"],
    "tags.stage NOT IN ('prod')": ["news@1", "film@2", "evil", "film@3", "size"],
    "tags.`a key` = ''": ["news@1"],
    'tags."' + HOSTILE + "\" = '" + HOSTILE.replace("'", "''") + "'": ["news@1"],
    "stream = 'Ströme'": ["news@1"],
    "stream LIKE '%DROP TABLE%'": ["evil"],
    "base_model IS NULL": [],
    "base_model LIKE '%other'": ["size"],
    "NOT base_model LIKE '%other'": ALL[:-1],
    "base_model = '%'": [],
    "base_model = ''": [],
    "parent = 'film@1'": ["news@1"],
    "parent != 'film@1'": ["film@2", "evil", "film@3"],
    "parent IS NULL": ["film@1", "size"],
    "parent LIKE 'film%'": ["news@1", "evil"],
    "reused_from = 'news@1'": ["film@2"],
    "forgets IS NOT NULL": ["film@3"],
    "forgets = 'film@1'": ["film@3"],
    "mlflow_run_id = 'run-1'": ["film@1"],
    "mlflow_run_id IS NULL": ALL[1:],
    "prefect_flow_run_id = 'flow-1'": ["film@2"],
    "input_digest LIKE 'base-%'": ALL[:-1],
    "data_fingerprint = 'data-news'": ["news@1"],
    "created > '2020-01-01'": ALL,
    "created < '2020-01-01T00:00:00+02:00'": [],
    "created IN ('2020-01-01')": [],
    "created IS NULL": [],
    "task = 'film' and version > 1 And (metrics.accuracy >= 0.8 oR tags.stage = 'prod')": ["film@2"],
    "task = 'news' OR task = 'film' AND version = 2": ["news@1", "film@2"],
    "(task = 'news' OR task = 'film') AND version = 1": ["film@1", "news@1"],
    "NOT (task = 'film' OR NOT version = 1)": ["news@1", "evil", "size"],
    "not not task='film'and version=1": ["film@1"],
    "\n task\t=  'news'\n": ["news@1"],
}


@pytest.mark.parametrize("text", FITS)
def test_a_filter_finds_what_fits(recorded: Registry, text: str) -> None:
    assert found(recorded, text) == FITS[text]


def test_a_base_model_is_found_by_name_and_fingerprint(recorded: Registry, other_base: Path) -> None:
    fingerprint = recorded.get("100%_größe").base_model.fingerprint
    for name in (str(other_base), fingerprint, fingerprint[:8]):
        assert found(recorded, f"base_model = '{name}'") == ["size"]
        assert found(recorded, f"base_model IN ('{name}', 'x')") == ["size"]
        assert found(recorded, f"base_model != '{name}'") == ALL[:-1]


def test_dates_are_moments(recorded: Registry) -> None:
    news = recorded.get("news").created_at
    assert "news@1" in found(recorded, f"created = '{news.isoformat()}'")
    east = news.astimezone(tz=None).isoformat()
    assert "news@1" in found(recorded, f"created >= '{east}' AND created <= '{east}'")
    later = (datetime.now(UTC) + timedelta(days=1)).date().isoformat()
    assert found(recorded, f"created >= '{later}'") == []


MISTAKES = {
    "taks = 'x'": ("taks", "there is no attribute 'taks'; did you mean 'task'?"),
    "TASK = 'film'": ("TASK", "there is no attribute 'TASK'"),
    "task = film": ("film", "a number, or text in single quotes, was expected, but 'film' stands here"),
    'task = "film"': ('"', "text stands in single quotes"),
    "task = 'film": ("'film", "this text has no end"),
    "task = 'film' version = 1": ("version", "AND, OR or the end of the filter was expected"),
    "task 'film'": ("'film'", "a comparator"),
    "task =": ("", "was expected, but it ends here"),
    "task = 5": ("5", "text was expected; put it in single quotes: '5'"),
    "version = '1'": ("'1'", "version is compared with a number"),
    "version LIKE '1'": ("'1'", "version is a number, and LIKE cannot compare it"),
    "version IN ('a')": ("'a'", "version is compared with a number"),
    "version = 1e999": ("1e999", "this number is not finite"),
    "version = 12abc": ("12abc", "this is no number"),
    "metrics.accuracy = 'high'": ("'high'", "metrics.accuracy is compared with a number"),
    "metrics > 1": ("metrics", "metrics needs a name"),
    "tags = 'x'": ("tags", "tags needs a name"),
    "tags.`` = 'x'": ("tags", "tags needs a name"),
    "task.name = 'x'": ("task", "only tags and metrics have names after a dot"),
    "tags.stage = 5": ("5", "text was expected"),
    "created > 'yesterday'": ("'yesterday'", "this is no date"),
    "created > '0001-01-01T00:00+23:00'": ("'0001", "this is no date"),
    "created > 2026": ("2026", "text was expected"),
    "created ILIKE '2026%'": ("'2026%'", "created is a date, and ILIKE cannot compare it"),
    "task IN 'film'": ("'film'", "'(' was expected"),
    "task IN ()": (")", "a number, or text"),
    "task IN ('film'": ("", "',' or ')' was expected"),
    "task LIKE 5": ("5", "text in single quotes was expected"),
    "task NOT = 'x'": ("=", "LIKE, ILIKE or IN was expected"),
    "alias IS 'x'": ("'x'", "NULL or NOT NULL was expected"),
    "alias IS NOT 5": ("5", "NULL was expected"),
    "(task = 'x'": ("", "AND, OR or ')' was expected"),
    "task = 'x')": (")", "AND, OR or the end"),
    "AND task = 'x'": ("AND", "an attribute, tags.NAME or metrics.NAME was expected"),
    "NOT": ("", "an attribute"),
    "task = 'x'; DROP TABLE entries": ("; DROP", "';' was not expected here"),
    "task = 'a\0b'": ("\0b", "no entry can hold the character"),
    "task = '\ud800'": ("\ud800", "no entry can hold the character"),
    "task == 'x'": ("= 'x'", "was expected, but '=' stands here"),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_has_a_caret_under_it(text: str) -> None:
    at, complaint = MISTAKES[text]
    with pytest.raises(InputError) as raised:
        Search.of(text)
    said, shown, caret = str(raised.value).split("\n")
    assert said.startswith("the filter cannot be read: ") and complaint in said
    place = text.index(at, text.index("= ") if at == "= 'x'" else 0) if at else len(text)
    assert caret == " " * (2 + place) + "^", raised.value
    assert shown[2:] == "".join(each if each.isprintable() else " " for each in text)


def test_a_caret_stands_under_wide_characters_and_in_long_filters() -> None:
    with pytest.raises(InputError) as raised:
        Search.of("task = '日本' AND taks = 'x'")
    assert str(raised.value).endswith("\n" + " " * (2 + len("task = '日本' AND ") + 2) + "^")
    long = "task = 'x' AND " * 20
    with pytest.raises(InputError) as raised:
        Search.of(f"{long}taks = 'x'" + " AND task = 'x'" * 20)
    _, shown, caret = str(raised.value).split("\n")
    assert shown[len(caret) - 1 :].startswith("taks = 'x'") and len(shown) < 140


def test_a_filter_is_bounded() -> None:
    with pytest.raises(InputError, match=f"{LONGEST} are the most"):
        Search.of("task = '" + "x" * LONGEST + "'")
    with pytest.raises(InputError, match=f"nested deeper than {DEEPEST}"):
        Search.of("(" * 3000 + "task = 'x'" + ")" * 3000)
    with pytest.raises(InputError, match=f"nested deeper than {DEEPEST}"):
        Search.of("NOT " * 2000 + "task = 'x'")
    with pytest.raises(InputError, match=f"comparison after {MOST}"):
        Search.of(" OR ".join(["seed = 1"] * (MOST + 1)))


def test_the_largest_filter_is_answered(recorded: Registry) -> None:
    assert found(recorded, " OR ".join([f"metrics.m{place} = 1" for place in range(MOST - 1)] + ["task = 'news'"])) == [
        "news@1"
    ]
    deepest = "(" * (DEEPEST - 1) + "task = 'news'" + ")" * (DEEPEST - 1)
    assert found(recorded, deepest) == ["news@1"]
    assert found(recorded, "task LIKE '" + "𝄞\\" * 4900 + "'") == []


PIECES = [
    "task",
    "version",
    "alias",
    "tags.a",
    "metrics.`b`",
    "created",
    "base_model",
    "parent",
    "=",
    "!=",
    "<",
    ">=",
    "LIKE",
    "ILIKE",
    "IN",
    "NOT",
    "IS",
    "NULL",
    "AND",
    "OR",
    "(",
    ")",
    ",",
    "'x'",
    "'2026-01-01'",
    "''",
    "5",
    "-1.5e300",
    ".",
]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join))
def test_any_text_is_answered_or_refused_in_a_sentence(recorded: Registry, text: str) -> None:
    try:
        recorded.search(text)
    except InputError as error:
        assert str(error).startswith("the filter ") and str(error).count("\n") in (0, 2)


def order(registry: Registry, *items: str, text: str = "") -> list[str]:
    entries = registry.search(text, order_by=items).entries
    return [{f"{HOSTILE}@1": "evil", "100%_größe@1": "size"}.get(entry.reference, entry.reference) for entry in entries]


def test_order(recorded: Registry) -> None:
    assert order(recorded) == ALL[::-1]
    assert order(recorded, "created") == order(recorded, "created ASC") == ALL
    assert order(recorded, "metrics.accuracy DESC") == ["film@2", "news@1", "film@1", "size", "film@3", "evil"]
    assert order(recorded, "metrics.accuracy") == ["size", "film@1", "news@1", "film@2", "film@3", "evil"]
    assert order(recorded, "task asc", "version desc") == ["evil", "size", "film@3", "film@2", "film@1", "news@1"]
    assert order(recorded, "tags.stage DESC")[:3] == ["film@1", "film@2", "news@1"]
    assert order(recorded, "parent", text="parent IS NOT NULL") == ["film@3", "news@1", "evil", "film@2"]
    assert order(recorded, "base_model DESC")[0] == "size"
    assert order(recorded, 'metrics."' + HOSTILE + '" DESC')[0] == "evil"


@pytest.mark.parametrize(
    ("item", "place", "complaint"),
    [
        ("taks", 0, "did you mean 'task'"),
        ("task DOWN", 5, "ASC, DESC or nothing was expected"),
        ("task DESC, version", 5, "ASC, DESC or nothing was expected"),
        ("", 0, "an attribute, tags.NAME or metrics.NAME was expected"),
        ("alias", 0, "several aliases"),
        ("1", 0, "an attribute"),
    ],
)
def test_an_order_that_cannot_be_read(item: str, place: int, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as raised:
        Search.of("", [item])
    assert str(raised.value).startswith("the order cannot be read")
    assert str(raised.value).endswith("\n" + " " * (2 + place) + "^")


def test_pages(recorded: Registry) -> None:
    pages: list[int] = []
    sizes, token = [], None
    while True:
        page = recorded.search("version >= 1", order_by=["task"], max_results=4, page_token=token)
        pages += [entry.id for entry in page.entries]
        sizes.append(len(page.entries))
        token = page.next_token
        if token is None:
            break
    whole = [entry.id for entry in recorded.search("version >= 1", order_by=["task"]).entries]
    assert sizes == [4, 2] and pages == whole
    assert recorded.search(max_results=6).next_token is None
    token = recorded.search(max_results=1).next_token
    for wrong in ("junk", "AAAA", "é", "W10=", (token or "")[:-4]):
        with pytest.raises(InputError, match="not of this search"):
            recorded.search(max_results=1, page_token=wrong)
    with pytest.raises(InputError, match="not of this search"):
        recorded.search("version = 1", max_results=1, page_token=token)
    with pytest.raises(InputError, match="max_results is 0"):
        recorded.search(max_results=0)


def test_what_is_recorded_while_pages_are_turned_moves_nothing(pupil: Pupil, registry: Registry) -> None:
    for name in "abc":
        pupil.record(name)
    first = registry.search(max_results=2)
    pupil.record("d")
    second = registry.search(max_results=2, page_token=first.next_token)
    assert [entry.task for entry in (*first.entries, *second.entries)] == ["c", "b", "a"]
    assert second.next_token is None
    assert [entry.task for entry in registry.search(max_results=2).entries] == ["d", "c"]


def test_found_is_ready_for_json(recorded: Registry) -> None:
    page = recorded.search("task = 'news'")
    assert page.to_dict() == {"entries": [recorded.get("news").to_dict()], "next_token": None}
