"""The HTTP API answers as Python does, writes with the token alone, and refuses the rest in one sentence."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest
from starlette.testclient import TestClient

from flows.registry_serve import announcement
from neft.errors import InputError
from neft.models import load_base
from neft.routing import Signature
from neft.tasks import Example
from registry import Registry
from registry.server import Links, create_app
from registry.server.guard import BODY_LIMIT, HEADERS, TARGET_LIMIT
from tests.registry.exhibit import HOSTILE, opened
from tests.registry.serving import served

BEARER = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Two streams with all that is noted on them; nobody writes to it."""
    registry = opened(tmp_path_factory.mktemp("exhibit"))
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def client(shown: Registry) -> TestClient:
    return TestClient(create_app(shown))


def got(client: TestClient, path: str, status: int = 200):
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    return answer.json()


def as_json(value):
    return json.loads(json.dumps(value))


LOOKUPS = {
    "tasks": lambda registry: [each.to_dict() for each in registry.tasks()],
    "search?filter=version > 1&order_by=created DESC": lambda registry: registry.search(
        "version > 1", order_by=["created DESC"], max_results=100
    ).to_dict(),
    "search?filter=&max_results=2": lambda registry: registry.search("", max_results=2).to_dict(),
    "entries/spam": lambda registry: registry.describe("spam"),
    "entries/film-sentiment@champion": lambda registry: registry.describe("film-sentiment@1"),
    "entries/spam/neurons": lambda registry: {
        site: indices.tolist() for site, indices in registry.neurons(registry.get("spam")).indices.items()
    },
    "entries/spam/lineage": lambda registry: registry.lineage("spam").to_dict(),
    "entries/spam/strongest?k=7": lambda registry: [each.to_dict() for each in registry.strongest("spam", 7)],
    "entries/spam/nearest?k=3": lambda registry: [each.to_dict() for each in registry.nearest("spam", 3)],
    "entries/spam/nearest?k=3&by=scores": lambda registry: [
        each.to_dict() for each in registry.nearest("spam", 3, by="scores")
    ],
    "owners?site=model.layers.3.ffn": lambda registry: [
        each.to_dict() for each in registry.owners("model.layers.3.ffn")
    ],
    "owners?site=model.layers.3.ffn&neuron=75": lambda registry: [
        each.to_dict() for each in registry.owners("model.layers.3.ffn", 75)
    ],
    "overlap?first=spam&second=question-type": lambda registry: registry.overlap("spam", "question-type").to_dict(),
    "diff?first=film-sentiment@1&second=film-sentiment@2": lambda registry: registry.diff(
        "film-sentiment@1", "film-sentiment@2"
    ).to_dict(),
    "streams": lambda registry: ["reviews", "support", "support-tuned"],
    "streams/support/overlaps": lambda registry: registry.overlaps("support").to_dict(),
}


@pytest.mark.parametrize("path", LOOKUPS)
def test_a_look_up_answers_as_python_does(shown, client, path):
    found = got(client, f"/api/{path}")
    assert found
    assert found == as_json(LOOKUPS[path](shown))


def test_a_task_comes_with_its_versions(client):
    found = got(client, "/api/tasks/film-sentiment")
    assert [each["reference"] for each in found["versions"]] == ["film-sentiment@1", "film-sentiment@2"]
    assert found["aliases"] == {"champion": 1, "challenger": 2}
    assert [each["tags"] for each in found["versions"]] == [{"stage": "production"}, {}]


def test_an_entry_comes_with_what_is_noted_on_it(shown, client):
    found = got(client, "/api/entries/film-sentiment@champion")
    assert (found["reference"], found["aliases"], found["tags"]) == (
        "film-sentiment@1",
        ["champion"],
        {"stage": "production"},
    )
    sizes = {
        site: len(each) for site, each in shown.neurons(shown.get("film-sentiment@1")).indices.items() if len(each)
    }
    assert found["sites"] == sizes and sum(sizes.values()) == found["neuron_count"]


def test_capacity_names_the_owners_in_the_order_of_learning(shown, client):
    found = got(client, "/api/entries/bbc-topic/capacity")
    assert found["learnt"] == ["film-sentiment@1", "bbc-topic@1"]
    assert found["sites"] == as_json([each.to_dict() for each in shown.capacity("bbc-topic")])


def test_a_stream_comes_with_its_curve_and_its_newest_entry(shown, client):
    assert got(client, "/api/streams/support")["newest"] == "spam@1"
    found = got(client, "/api/streams/support/curve")
    assert found["matrix"] == shown.newest_run("support").matrix
    assert (found["status"], found["mlflow_experiment_id"]) == ("finished", "7")


def test_search_goes_from_page_to_page(client):
    seen, token = [], ""
    while token is not None:
        page = got(
            client, f"/api/search?order_by=created&max_results=4{f'&page_token={quote(token)}' if token else ''}"
        )
        seen += [each["reference"] for each in page["entries"]]
        token = page["next_token"]
    assert len(seen) == len(set(seen)) == 9


def test_a_suggestion_is_what_python_suggests(shown, client):
    answer = client.post("/api/suggest", json={"entry": "spam", "k": 3})
    assert answer.json() == as_json([each.to_dict() for each in shown.suggest("spam", 3)])
    assert len(answer.json()) == 3


# Files


@pytest.mark.parametrize("name", ["overlay", "scores"])
def test_a_file_comes_with_its_digest(shown, client, name):
    answer = client.get(f"/api/entries/spam/files/{name}")
    entry = shown.get("spam")
    artifact = {"overlay": entry.overlay_file, "scores": entry.scores_file}[name]
    assert hashlib.sha256(answer.content).hexdigest() == artifact.sha256
    digest = base64.b64encode(hashlib.sha256(answer.content).digest()).decode()
    assert answer.headers["content-digest"] == answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["content-disposition"] == f'attachment; filename="spam-1-{name}.safetensors"'

    again = client.get(f"/api/entries/spam/files/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    part = client.get(f"/api/entries/spam/files/{name}", headers={"Range": "bytes=0-9"})
    assert (part.status_code, part.content) == (206, answer.content[:10])
    assert "content-digest" not in part.headers and part.headers["repr-digest"] == f"sha-256=:{digest}:"


def test_a_file_that_was_altered_is_not_sent(folder, registry, pupil):
    entry = pupil.record("sst2")
    path = registry.artifacts.path(entry.overlay_file.sha256)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = got(TestClient(create_app(registry)), "/api/entries/sst2/files/overlay", 503)
    assert "was altered" in found["detail"]


# What is refused


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("entries/nope", "no task 'nope'"),
        ("entries/spam@7", "no version 7"),
        ("entries/spam@99999999999999999999", "no version 99999999999999999999"),
        ("entries/spam@champion", "no alias 'champion'"),
        ("entries/spam?base_model=gpt2", "not learnt on base model 'gpt2'"),
        ("entries/spam/files/memory", "spam@1 has no memory; it has overlay, scores"),
        ("entries/nope/capacity", "no task 'nope'"),
        ("tasks/nope", "no task 'nope'"),
        ("streams/nope", "no entry of stream 'nope'"),
        ("streams/nope/curve", "no run of stream 'nope'"),
        ("streams/nope/overlaps", "no stream 'nope'"),
        ("owners?site=model.layers.99.ffn", "no site 'model.layers.99.ffn'"),
        ("owners?site=model.layers.3.ffn&neuron=96", "neuron"),
        ("overlap?first=spam&second=nope", "no task 'nope'"),
        ("diff?first=nope&second=spam", "no task 'nope'"),
        ("nothing", "there is nothing at /api/nothing"),
    ],
)
def test_what_does_not_exist_is_404(client, path, says):
    assert says in got(client, f"/api/{path}", 404)["detail"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("entries/spam@", "nothing after '@'"),
        ("entries/spam/strongest?k=0", "query k"),
        ("entries/spam/nearest?k=1001", "query k"),
        ("entries/spam/files/passwd", "path name"),
        ("search?max_results=1001", "query max_results"),
        (f"search?filter={'x' * 4001}", "query filter"),
        ("search?filter=versio > 1", "versio > 1\n  ^"),
        ("search?filter=version > 1&page_token=nonsense", "page"),
        ("owners", "query site"),
        ("owners?site=model.layers.3.ffn&neuron=-1", "query neuron"),
        ("owners?site=a%00b", "NUL"),
        ("entries/a%00b", "NUL"),
    ],
)
def test_what_cannot_be_is_422(client, path, says):
    assert says in got(client, f"/api/{path}", 422)["detail"]


def test_what_is_too_long_is_refused(client):
    assert "longer than" in got(client, f"/api/entries/{'x' * TARGET_LIMIT}", 414)["detail"]
    assert client.post("/api/suggest", content=b"x" * (BODY_LIMIT + 1)).status_code == 413
    # Just as much as is allowed is read, and found to be no JSON.
    just = client.post("/api/suggest", content=b"x" * BODY_LIMIT, headers={"Content-Type": "application/json"})
    assert just.status_code == 422


def test_a_body_is_counted_as_it_arrives(shown):
    """Whatever its length is said to be: in chunks, it is not said at all."""
    with served(shown) as url:
        where = urlsplit(url)
        with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
            head = "POST /api/suggest HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
            sent = 0
            try:
                while sent < 64:
                    connection.sendall(chunk)
                    sent += 1
            except OSError:
                pass
            answer = b""
            while b"send less" not in answer and (more := connection.recv(4096)):
                answer += more
        assert answer.startswith(b"HTTP/1.1 413 ") and b"send less" in answer


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("suggest", {"entry": "spam", "k": 0}),
        ("suggest", {"entry": "a\0b"}),
        ("suggest", {"entry": "\ud800"}),
        ("suggest", {"entry": ["spam"]}),
        ("suggest", []),
        ("route", {"entry": "spam", "text": ""}),
        ("route", {"entry": "spam"}),
        ("route", {"entry": "spam", "text": "hello"}),  # no signatures
    ],
)
def test_a_bad_body_is_422(client, path, body):
    answer = client.post(f"/api/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and isinstance(answer.json()["detail"], str)


def test_a_failure_is_one_sentence_without_a_trace(shown, monkeypatch):
    def broken() -> None:
        raise RuntimeError("a secret of the program")

    monkeypatch.setattr(shown, "tasks", broken)
    client = TestClient(create_app(shown), raise_server_exceptions=False)
    answer = client.get("/api/tasks")
    assert (answer.status_code, answer.json()) == (500, {"detail": "the server failed; its log says why"})
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS


def test_a_database_that_fails_is_503(folder, registry, pupil):
    pupil.record("sst2")
    client = TestClient(create_app(registry))
    got(client, "/api/tasks")
    with sqlite3.connect(folder / "registry.db") as connection:
        connection.execute("DROP TABLE aliases")
    for path in ("tasks", "entries/sst2"):
        assert str(folder / "registry.db") in got(client, f"/api/{path}", 503)["detail"]


@pytest.mark.parametrize(
    "path", ["/", "/page/style.css", "/api/tasks", "/api/nothing", "/api/search?filter=(", "/api/docs"]
)
def test_every_answer_has_the_headers(client, path):
    answer = client.get(path, headers={"Origin": "http://elsewhere.example"})
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "access-control-allow-origin" not in answer.headers


# Names


@pytest.mark.parametrize(
    "task",
    [
        HOSTILE,
        "'; DROP TABLE entries; --",
        "100 %",
        "Überprüfung 審査",
        "a?b#c",
    ],
)
def test_any_name_can_be_asked_for(registry, pupil, task):
    entry = pupil.record(task)
    client = TestClient(create_app(registry))
    named = quote(entry.reference, safe="")
    assert got(client, f"/api/entries/{named}")["task"] == task
    assert sum(map(len, got(client, f"/api/entries/{named}/neurons").values())) == entry.neuron_count
    assert got(client, f"/api/tasks/{quote(task, safe='')}")["task"] == task
    assert got(client, f"/api/overlap?first={named}&second={named}")["iou"] == 1
    answer = client.get(f"/api/entries/{named}/files/overlay")
    assert hashlib.sha256(answer.content).hexdigest() == entry.overlay_file.sha256
    assert answer.headers["content-type"] == "application/octet-stream"


def test_a_task_of_two_base_models_is_asked_for_by_one(registry, pupil, other_base, new_pupil):
    here, there = pupil.record("sst2"), new_pupil(registry, other_base).record("sst2")
    client = TestClient(create_app(registry))
    assert "several base models" in got(client, "/api/entries/sst2", 422)["detail"]
    for entry in (here, there):
        asked = f"base_model={entry.base_model.fingerprint[:12]}"
        assert got(client, f"/api/entries/sst2?{asked}")["id"] == entry.id
        assert got(client, f"/api/entries/sst2@1/capacity?{asked}")["learnt"] == ["sst2@1"]
        assert [each["id"] for each in got(client, f"/api/tasks/sst2?{asked}")["versions"]] == [entry.id]


# Writing


def test_aliases_and_tags_are_written_with_the_token(anywhere, base, new_pupil):
    pupil = new_pupil(anywhere, base)
    pupil.record("sst2"), pupil.record("sst2")
    client = TestClient(create_app(anywhere, "secret"))

    def put(path: str, body: dict) -> httpx.Response:
        return client.put(f"/api/{path}", json=body, headers=BEARER)

    assert put("tasks/sst2/aliases/champion", {"version": 1}).json() == {"alias": "champion", "entry": "sst2@1"}
    assert put("tasks/sst2/aliases/champion", {"version": 2}).json()["entry"] == "sst2@2"
    assert put("entries/sst2@champion/tags/stage", {"value": "prod"}).json()["entry"] == "sst2@2"
    found = got(client, "/api/entries/sst2@champion")
    assert (found["aliases"], found["tags"]) == (["champion"], {"stage": "prod"})
    assert [each["reference"] for each in got(client, "/api/search?filter=tags.stage = 'prod'")["entries"]] == [
        "sst2@2"
    ]
    assert got(client, "/api/tasks")[0]["tags"] == ["stage=prod"]

    assert client.delete("/api/entries/sst2/tags/stage", headers=BEARER).status_code == 204
    assert client.delete("/api/tasks/sst2/aliases/champion", headers=BEARER).status_code == 204
    found = got(client, "/api/entries/sst2")
    assert (found["aliases"], found["tags"]) == ([], {})

    assert put("tasks/sst2/aliases/champion", {"version": 3}).status_code == 404
    assert put("tasks/sst2/aliases/champion", {"version": 2**40}).status_code == 422
    assert put("tasks/sst2/aliases/1st", {"version": 1}).status_code == 422
    assert put("entries/sst2/tags/stage", {"value": "x" * 5001}).status_code == 422
    assert client.delete("/api/entries/sst2/tags/stage", headers=BEARER).status_code == 404
    assert client.delete("/api/tasks/sst2/aliases/champion", headers=BEARER).status_code == 404


@pytest.mark.parametrize(
    ("token", "header", "status"),
    [
        (None, "Bearer secret", 403),
        ("", "Bearer ", 403),
        ("secret", None, 401),
        ("secret", "Bearer wrong", 401),
        ("secret", "Bearer sécret", 401),
        ("secret", "Basic secret", 401),
        ("secret", "Bearer", 401),
    ],
)
def test_nothing_is_written_without_the_token(registry, pupil, token, header, status):
    pupil.record("sst2")
    registry.set_alias("sst2", "kept")
    client = TestClient(create_app(registry, token))
    headers = {} if header is None else {"Authorization": header.encode()}
    for method, path, body in (
        ("PUT", "tasks/sst2/aliases/new", {"version": 1}),
        ("DELETE", "tasks/sst2/aliases/kept", None),
        ("PUT", "entries/sst2/tags/new", {"value": "x"}),
        ("DELETE", "entries/sst2/tags/kept", None),
    ):
        answer = client.request(method, f"/api/{path}", json=body, headers=headers)
        assert answer.status_code == status
        assert ("NEFT_TOKEN" in answer.json()["detail"]) == (status == 403)
        assert ("www-authenticate" in answer.headers) == (status == 401)
    assert registry.aliases(registry.get("sst2")) == ("kept",) and registry.tags(registry.get("sst2")) == {}


def test_many_at_once_are_answered_while_an_alias_moves(anywhere, base, new_pupil):
    pupil = new_pupil(anywhere, base)
    entries = [pupil.record("sst2") for _ in range(3)]
    anywhere.set_alias("sst2", "champion", 1)
    with served(anywhere, "secret") as url, httpx.Client(base_url=f"{url}/api") as client:

        def work(number: int) -> tuple[int, str]:
            if number % 10 == 0:
                move = {"version": number // 10 % 3 + 1}
                answer = client.put("/tasks/sst2/aliases/champion", json=move, headers=BEARER)
                return answer.status_code, answer.json()["entry"]
            answer = client.get("/entries/sst2@champion")
            return answer.status_code, answer.json()["reference"]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(work, range(200)))
    assert {status for status, _ in found} == {200}
    assert {reference for _, reference in found} <= {entry.reference for entry in entries}


# Routing


def test_a_text_is_routed_by_a_base_that_is_loaded_once(registry, base, new_pupil, tmp_path):
    moved = tmp_path / "base"
    moved.symlink_to(base)
    pupil = new_pupil(registry, moved)
    model, tokenizer = load_base(str(base))
    draw = random.Random(0)
    pools = {"low": [f"w{n}" for n in range(8)], "high": [f"w{n}" for n in range(50, 58)]}
    texts = {task: draw.choices(pool, k=64) for task, pool in pools.items()}
    for task, prompts in texts.items():
        signature = Signature.of(model, tokenizer, [Example(prompt, "") for prompt in prompts])
        pupil.record(task, signature=signature)
    client = TestClient(create_app(registry))

    def routed(text: str) -> str | None:
        answer = client.post("/api/route", json={"entry": "high", "text": text})
        assert answer.status_code == 200, answer.text
        return answer.json()["entry"]

    asked = [*texts["low"][:8], *texts["high"][:8]]
    expected = registry.route(asked, "high")
    assert {"low@1", "high@1"} <= set(expected)
    assert routed(asked[0]) == expected[0]
    moved.unlink()  # a base that was loaded anew would not be found
    assert [routed(text) for text in asked] == expected


def test_a_base_that_is_gone_is_said_to_be(registry, base, new_pupil, tmp_path):
    moved = tmp_path / "base"
    moved.symlink_to(base)
    model, tokenizer = load_base(str(base))
    signature = Signature.of(model, tokenizer, [Example("w1 w2", "")])
    new_pupil(registry, moved).record("sst2", signature=signature)
    moved.unlink()
    client = TestClient(create_app(registry))
    answer = client.post("/api/route", json={"entry": "sst2", "text": "w1"})
    assert answer.status_code == 422 and "cannot be loaded" in answer.json()["detail"]


# The page's files, the description, and the command


def test_the_description_names_every_route(client):
    described = got(client, "/api/openapi.json")
    operations = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert len(operations) == 25
    assert ("PUT", "/api/tasks/{task}/aliases/{alias}") in operations
    assert all(
        operation.get("description") for methods in described["paths"].values() for operation in methods.values()
    )


def test_the_page_loads_nothing_from_elsewhere_and_writes_no_markup():
    page = Path(create_app.__code__.co_filename).parent / "page"
    files = sorted(page.iterdir())
    assert {"index.html", "style.css", "app.js", "docs.html"} <= {file.name for file in files}
    for file in files:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"https?://|@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval", text
        )
        assert not re.search(r"<script(?![^>]*\bsrc=)|\sstyle=|\son\w+=", text), file.name


def test_links_are_addresses_of_pages():
    assert Links("http://127.0.0.1:5000/").mlflow == "http://127.0.0.1:5000"
    for wrong in ("javascript:alert(1)", "127.0.0.1:5000", "file:///etc/passwd", "http://"):
        with pytest.raises(InputError, match=r"mlflow .* is no URL of a page"):
            Links(mlflow=wrong)


def test_the_command_serves_until_it_is_interrupted(folder, pupil):
    pupil.record("sst2")
    program = "from flows.cli import main; main()"
    arguments = ["registry", "serve", "--port", "0", "--registry", str(folder), "--mlflow", "http://127.0.0.1:5000"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NEFT_TOKEN": "secret"},
    ) as process:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
            health = httpx.get(f"{address}/api/health", timeout=20).json()
            assert (health["status"], health["writable"]) == ("ok", True)
            assert health["links"] == {"mlflow": "http://127.0.0.1:5000", "prefect": None}
            assert "server" not in httpx.get(address).headers
            process.send_signal(signal.SIGINT)
            assert (process.wait(20), process.stderr.read()) == (0, "")
        finally:
            process.kill()


def test_the_command_refuses_in_a_sentence(neft, folder, pupil):
    pupil.record("sst2")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = neft("registry", "serve", "--port", port, "--registry", folder)
    assert taken.code == 2 and f"cannot listen at 127.0.0.1 port {port}: address already in use" in taken.err
    unknown = neft("registry", "serve", "--host", "no such host", "--registry", folder)
    assert unknown.code == 2 and "--host 'no such host' is no address" in unknown.err
    nothing = neft("registry", "serve", "--registry", folder / "nothing")
    assert nothing.code == 2 and "there is no registry" in nothing.err
    link = neft("registry", "serve", "--mlflow", "javascript:x", "--registry", folder)
    assert link.code == 2 and "is no URL of a page" in link.err


def test_it_is_said_when_others_can_listen_in(monkeypatch):
    monkeypatch.setenv("NEFT_TOKEN", "secret")
    for host in ("127.0.0.1", "localhost", "::1"):
        assert "encryption" not in announcement(host, 5055)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        assert "there is no encryption" in announcement(host, 5055)
    assert "http://[::1]:5055/api/docs" in announcement("::1", 5055)
    monkeypatch.delenv("NEFT_TOKEN")
    assert "NEFT_TOKEN" in announcement("127.0.0.1", 5055)


def test_a_site_elsewhere_cannot_read_a_server_on_loopback(shown):
    guarded = TestClient(create_app(shown, hosts=("127.0.0.1", "localhost")))
    for host, status in {"127.0.0.1:5055": 200, "localhost": 200, "rebound.example:5055": 400}.items():
        answer = guarded.get("/api/tasks", headers={"Host": host})
        assert answer.status_code == status
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_what_is_near_a_set_that_is_sent(shown, client):
    wanted = shown.neurons(shown.get("spam"))
    body = {"space_of": "spam", "neurons": {site: each.tolist() for site, each in wanted.indices.items()}, "k": 3}
    answer = client.post("/api/nearest", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json() == as_json([each.to_dict() for each in shown.nearest(wanted, 3)])
    assert answer.json()[0] == {"entry": "spam@1", "task": "spam", "value": 1.0}
    for wrong in ({"neurons": {"model.layers.99.ffn": [1]}}, {"neurons": {"model.layers.3.ffn": [10**6]}}):
        assert client.post("/api/nearest", json=body | wrong).status_code in (404, 422)
