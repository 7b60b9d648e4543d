"""support/hub.py against a server on this machine, with the real huggingface_hub in processes of their own."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAME = "someone/tiny"
PATHS = re.compile(
    r"/api/models/(?P<info>[^/]+(/[^/]+)?)(/revision/(?P<info_revision>[^/]+))?"
    r"|/api/models/(?P<tree>[^/]+(/[^/]+)?)/tree/(?P<tree_revision>[^/]+)"
    r"|/api/models/(?P<token>[^/]+(/[^/]+)?)/xet-read-token/(?P<token_revision>[^/]+)"
    r"|/(?P<file>[^/]+(/[^/]+)?)/resolve/(?P<file_revision>[^/]+)/(?P<path>.+)"
)


class Hub:
    """A server that answers huggingface_hub as the Hugging Face hub does, for the models in a folder.

    folder/someone/tiny is the model someone/tiny, folder/someone/tiny@v1 its revision v1. Use it in a with block, and
    start programs with `environment`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.log: list[str] = []  # method and path of each request
        self.gated = False  # files only for users who have asked
        self.unknown = 401  # the status for unknown models; 404 with a user's token
        self.cut: dict[str, int] = {}  # file -> bytes after which its next download ends
        self.stays_cut = False  # after that, the file cannot be had
        self.lost: set[str] = set()  # files that cannot be had
        self.error = 0  # a status with which everything is answered
        self.message = ""  # said with it
        self.wrong_size = 0  # added to the size that is announced
        self.page = b""  # an answer to everything, as of a login page
        self.delay = 0.0  # seconds in the middle of each file
        self.store = ""  # address from which hf_xet gets the weights, if the client has it

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(Answer):
            def __init__(self, *arguments):
                self.hub = hub
                super().__init__(*arguments)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a program that asks this server and keeps what it fetches in `home`.

        LOCAL_RANK is left out, since only one process of a machine warns.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LOCAL_RANK"))}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def revisions(self, name: str) -> dict[str, Path]:
        """Return the folder of each revision of a model, by branch or tag and by commit."""
        folders = {"main": self.folder / name}
        for folder in self.folder.glob(f"{name}@*"):
            folders[folder.name.partition("@")[2]] = folder
        folders = {revision: folder for revision, folder in folders.items() if folder.is_dir()}
        return folders | {commit_of(folder): folder for folder in folders.values()}

    def downloads(self) -> Counter:
        """Return how often each file was downloaded."""
        return Counter(line.rpartition("/")[2] for line in self.log if line.startswith("GET") and "/resolve/" in line)


class Answer(http.server.BaseHTTPRequestHandler):
    """One connection to a Hub."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        hub.log.append(f"{self.command} {self.path}")
        if hub.error:
            return self.send(hub.error, b"", {"X-Error-Message": hub.message} if hub.message else {})
        if hub.page:
            return self.send(200, hub.page)
        found = PATHS.fullmatch(urllib.parse.urlsplit(self.path).path)
        if not found:
            return self.send(404, b"")
        parts = found.groupdict()
        kind = next(kind for kind in ("info", "tree", "token", "file") if parts[kind])
        name, revision = parts[kind], parts[f"{kind}_revision"] or "main"
        folders = hub.revisions(name)
        if not folders:
            code = {"X-Error-Code": "RepoNotFound"} if hub.unknown == 404 else {}
            return self.send(hub.unknown, b'{"error":"Invalid username or password."}', code)
        if urllib.parse.unquote(revision) not in folders:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = folders[urllib.parse.unquote(revision)]
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if kind == "info":
            siblings = [{"rfilename": file} for file in files]
            return self.send_json({"id": name, "modelId": name, "sha": commit_of(folder), "siblings": siblings})
        if kind == "tree":
            return self.send_json([self.tree_entry(folder, file) for file in files])
        if kind == "token":
            access = {"X-Xet-Cas-Url": hub.store, "X-Xet-Access-Token": "token", "X-Xet-Token-Expiration": str(2**40)}
            return self.send(200, b"{}", access)
        if hub.gated:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if parts["path"] not in files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_of(folder)})
        self.send_file(folder, parts["path"])

    def tree_entry(self, folder: Path, file: str) -> dict:
        content = (folder / file).read_bytes()
        entry = {"type": "file", "path": file, "size": len(content) + self.hub.wrong_size, "oid": sha1(content)}
        if self.hub.store and file.startswith("model"):
            sha256 = hashlib.sha256(content).hexdigest()
            entry |= {"xetHash": sha256, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 130}}
        return entry

    def send_file(self, folder: Path, file: str) -> None:
        hub = self.hub
        content = (folder / file).read_bytes()
        size = len(content)
        begin = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
        headers = {"ETag": f'"{sha1(content)}"', "X-Repo-Commit": commit_of(folder), "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{size - 1}/{size}"
        if self.command == "HEAD":
            headers["X-Linked-Size"] = str(size + hub.wrong_size)
            if hub.store and file.startswith("model"):
                headers["X-Xet-Hash"] = hashlib.sha256(content).hexdigest()
                token = self.path.partition("/resolve/")[0] + f"/xet-read-token/{commit_of(folder)}"
                headers["X-Xet-Refresh-Route"] = f"{hub.url}/api/models{token}"
            return self.send(200, content, headers)
        if file in hub.lost:
            return self.send(500, b"")
        if hub.stays_cut and file in hub.cut:
            hub.lost.add(file)
        self.send(206 if begin else 200, content[begin:], headers, sent=hub.cut.pop(file, None))

    def send_json(self, answer: object) -> None:
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        """Send an answer; with `sent`, end the connection after so many bytes of its body."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):  # a program that was ended
            half = len(body) // 2
            self.wfile.write(body[:sent][:half])
            if "/resolve/" in self.path:
                time.sleep(self.hub.delay)
            self.wfile.write(body[:sent][half:])
        if sent is not None:
            self.close_connection = True


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit_of(folder: Path) -> str:
    """Return a hash of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha1(b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in files))


# ---------------------------------------------------------------- helpers

PROGRAM = """
import sys
from support import UserError, hub, mistakes_in_one_line
def check(folder):
    print("checked", folder)
    if "refuse" in sys.argv:
        raise UserError("not wanted")
with mistakes_in_one_line("main.py"):
    print(hub.fetch(sys.argv[1], "--init_checkpoint", check))
"""


def start(environment: dict[str, str], *words: str, code: str = PROGRAM, **options) -> subprocess.Popen:
    """Start a process that fetches a model, and prints the folder that it checks and the folder that it returns."""
    command = [sys.executable, "-c", code, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **options)


def fetch(environment: dict[str, str], *words: str, **options) -> tuple[Path, str]:
    """Return the folder that a process has fetched, and what it wrote on stderr."""
    process = start(environment, *words, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    checked, returned = out.splitlines()
    assert checked == f"checked {returned}"
    return Path(returned), err


def refusal(environment: dict[str, str], *words: str, **options) -> str:
    """Return the line with which a process answers a mistake."""
    process = start(environment, *words, **options)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("main.py: ")]
    assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
    assert f"--init_checkpoint {words[0]}" in lines[0] or "refuse" in words
    return lines[0]


def write_model(folder: Path, *names: str) -> dict[str, bytes]:
    """Write files of a few thousand random bytes into a model's folder; return them by name."""
    files = {}
    for name in names:
        seed = hashlib.sha256(f"{folder.name}/{name}".encode()).digest()
        files[name] = b"".join(hashlib.sha256(seed + bytes([i])).digest() for i in range(100)) + b"\n"
        if name.startswith("model"):
            files[name] *= 10
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[name])
    return files


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "models").mkdir()
    with Hub(tmp_path / "models") as hub:
        yield hub


@pytest.fixture
def tiny(served: Hub) -> dict[str, bytes]:
    """The files of a model at the hub."""
    return write_model(served.folder / NAME, "config.json", "vocab.txt", "model.safetensors")


@pytest.fixture
def environment(served: Hub, tmp_path: Path) -> dict[str, str]:
    return served.environment(tmp_path / "home")


# ---------------------------------------------------------------- what arrives

READ = ["config.json", "spiece.model", "vocab.txt", "tokenizer_config.json", "tokenizer.json"]
NOT_READ = ["README.md", "tf_model.h5", "rust_model.ot", "onnx/config.json", "onnx/model.safetensors", "my_vocab.txt"]


@pytest.mark.parametrize(
    "weights, expected",
    [
        (["model.safetensors"], "model.safetensors"),
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors"),
    ],
)
def test_only_the_files_that_are_read_arrive_byte_for_byte(served, environment, weights, expected):
    """Each file that the project reads is downloaded once and arrives as it is; weights only in the first format."""
    files = write_model(served.folder / NAME, *READ, *NOT_READ, *weights)
    folder, err = fetch(environment, NAME)
    wanted = {*READ, expected}
    assert contents(folder) == {name: files[name] for name in wanted}
    assert served.downloads() == Counter(wanted)
    assert "main.py" not in err


def test_check_comes_before_the_weights(served, environment, tiny):
    """A model that the caller refuses costs no download of weights."""
    assert refusal(environment, NAME, "refuse") == "main.py: error: not wanted"
    assert served.downloads() == Counter(["config.json", "vocab.txt"])


def test_a_second_fetch_downloads_nothing(served, environment, tiny):
    """Files in the cache are not downloaded again."""
    first, _ = fetch(environment, NAME)
    served.log.clear()
    assert fetch(environment, NAME)[0] == first
    assert not served.downloads()


def test_a_new_commit_is_fetched(served, environment, tiny):
    """A name means the newest commit; the unchanged files are not downloaded again."""
    fetch(environment, NAME)
    served.log.clear()
    (served.folder / NAME / "model.safetensors").write_bytes(b"new")
    folder, _ = fetch(environment, NAME)
    assert contents(folder) == tiny | {"model.safetensors": b"new"}
    assert served.downloads() == Counter(["model.safetensors"])


def test_a_name_may_have_a_revision(served, environment, tiny):
    """name@revision is that tag or commit, and not the main branch."""
    older = write_model(served.folder / f"{NAME}@v1", "config.json", "model.safetensors")
    assert contents(fetch(environment, f"{NAME}@v1")[0]) == older
    commit = commit_of(served.folder / f"{NAME}@v1")
    assert contents(fetch(environment, f"{NAME}@{commit}")[0]) == older
    assert contents(fetch(environment, NAME)[0]) == tiny
    served.error = 503
    assert contents(fetch(environment, f"{NAME}@{commit}")[0]) == older


def test_processes_share_a_download(served, environment, tiny):
    """Two processes at once get the same whole model, and each file is downloaded once."""
    served.delay = 0.5  # longer than the two need to start
    started = [start(environment, NAME) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert contents(Path(answers[0][0].splitlines()[-1])) == tiny
    assert served.downloads() == Counter(list(tiny))


# ---------------------------------------------------------------- no connection


def go_offline(served: Hub, environment: dict[str, str], how: str) -> dict[str, str]:
    """Take away the connection to a hub; return the environment of a program that has none."""
    if how == "HF_HUB_OFFLINE":
        return environment | {"HF_HUB_OFFLINE": "1"}
    if how == "nobody answers":
        return environment | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    if how == "an error":
        served.error = 503
    else:
        served.page = b"<html>Log in to this network</html>"
    return environment


WAYS = ["HF_HUB_OFFLINE", "nobody answers", "an error", "a login page"]


@pytest.mark.parametrize("how", WAYS)
def test_a_fetched_model_needs_no_connection(served, environment, tiny, how):
    """Without a connection the copy in the cache is used, and one line says so."""
    online, _ = fetch(environment, NAME)
    environment = go_offline(served, environment, how)
    folder, err = fetch(environment, NAME)
    assert folder == online
    warnings = [line for line in err.splitlines() if line.startswith("main.py: ")]
    commit = commit_of(served.folder / NAME)[:12]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"main.py: --init_checkpoint {NAME}: ") and f"commit {commit}" in warnings[0]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("cached", [False, True])
def test_a_model_that_was_not_fetched_needs_a_connection(served, environment, tiny, how, cached):
    """Without a connection and without a whole copy in the cache, one line says what is missing."""
    if cached:  # without the weights
        refusal(environment, NAME, "refuse")
    environment = go_offline(served, environment, how)
    line = refusal(environment, NAME)
    assert environment["HF_ENDPOINT"] in line and "with a connection" in line
    if how == "HF_HUB_OFFLINE":
        assert "HF_HUB_OFFLINE is set" in line


def test_a_cut_does_not_change_a_file(served, environment, tiny):
    """A connection that ends once in the middle of a file: the client gets the rest, or the next start does."""
    served.cut = {"model.safetensors": 20_000}
    start(environment, NAME).communicate(timeout=120)  # clients before 2.0 give up
    folder, _ = fetch(environment, NAME)
    assert contents(folder) == tiny
    assert served.downloads()["model.safetensors"] == 2


def test_a_later_start_completes_a_broken_download(served, environment, tiny):
    """A download that breaks off gives one line and no model; the next start gets the model."""
    served.cut, served.stays_cut = {"model.safetensors": 20_000}, True
    assert "with a connection" in refusal(environment, NAME)
    assert "with a connection" in refusal(environment | {"HF_HUB_OFFLINE": "1"}, NAME)
    served.lost.clear()
    assert contents(fetch(environment, NAME)[0]) == tiny


def test_a_file_of_the_wrong_size_is_refused(served, environment, tiny):
    """A file shorter than the hub says is not taken for the whole file, neither now nor later."""
    served.wrong_size = 1
    assert "size" in refusal(environment, NAME)
    assert "with a connection" in refusal(environment | {"HF_HUB_OFFLINE": "1"}, NAME)


def test_a_store_of_weights_that_does_not_answer(served, environment, tiny):
    """Where hf_xet fails, there is one line, and HF_HUB_DISABLE_XET=1 downloads without it."""
    pytest.importorskip("hf_xet")
    served.store = "http://127.0.0.1:1"
    few_tries = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    assert "with a connection" in refusal(environment | few_tries, NAME)
    assert any("xet-read-token" in line for line in served.log)
    assert contents(fetch(environment | {"HF_HUB_DISABLE_XET": "1"}, NAME)[0]) == tiny


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", ["out/checkpoint-10", "nowhere"])
@pytest.mark.parametrize("status", [401, 404])
def test_an_unknown_name(served, environment, tiny, name, status):
    """A name that is neither a folder nor a model gives a line that is right for both mistakes."""
    served.unknown = status
    line = refusal(environment, name)
    assert "is no folder here" in line and f"{served.url} has no public model" in line and "hf auth login" in line


@pytest.mark.parametrize(
    "name",
    ["./out/checkpoint-10", "/out/checkpoint-10", "~/out", "out/run/checkpoint-10", "a b", "out/", "Modèle"]
    + ["a--b", "a..b", "model.git", "n" * 97],
)
def test_what_can_be_no_name(served, environment, name):
    """What the hub could not have as a name is a mistyped folder; no server is asked."""
    line = refusal(environment, name)
    assert "is no folder here" in line and "give a folder" in line
    assert not served.log


def test_a_file_is_no_folder(served, environment):
    """A file is not looked up at the hub."""
    assert "is not a folder" in refusal(environment, "README.md")
    assert not served.log


def test_an_unknown_revision(served, environment, tiny):
    """A revision that a model lacks is named."""
    assert f"{served.url}/{NAME} has no revision v2" in refusal(environment, f"{NAME}@v2")


def test_a_gated_model(served, environment, tiny):
    """A model whose owner must be asked gives the address where to ask."""
    served.gated = True
    line = refusal(environment, NAME)
    assert f"{served.url}/{NAME}" in line and "hf auth login" in line


@pytest.mark.parametrize(
    "status, message",
    [(401, "Invalid credentials in Authorization header"), (403, "You need a token with another scope")],
)
def test_a_token_that_the_hub_refuses(served, environment, tiny, status, message):
    """A stale token, or one that may not read the model, is not taken for a wrong name."""
    served.error, served.message = status, message
    line = refusal(environment, NAME)
    assert "refuses your token" in line and "hf auth login" in line


@pytest.mark.parametrize(
    "files, words",
    [
        (["README.md", "model.safetensors"], ["no config.json", "give an XLNet"]),
        (["config.json", "tf_model.h5"], ["neither model.safetensors nor pytorch_model.bin"]),
        (["config.json", "model.safetensors.index.json"], ["several files", "max_shard_size"]),
        (["config.json", "pytorch_model.bin.index.json"], ["several files", "max_shard_size"]),
    ],
)
def test_a_model_that_cannot_be_read(served, environment, files, words):
    """A model without config.json or without weights in one file is refused before anything is downloaded."""
    write_model(served.folder / NAME, *files)
    line = refusal(environment, NAME)
    assert all(word in line for word in words)
    assert not served.downloads()


def test_a_disk_that_takes_no_more(served, environment, tiny):
    """What the disk refuses is not taken for a lost connection; the line names the cache."""
    resource = pytest.importorskip("resource")
    limit = 10_000  # bytes of a file; the weights have more

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    line = refusal(environment, NAME, preexec_fn=small_disk)
    assert environment["HF_HOME"] in line and "HF_HOME" in line and "File too large" in line


@pytest.mark.parametrize("name, words", [(NAME, "pip install huggingface_hub"), ("./out", "give a folder")])
def test_without_the_package(environment, name, words):
    """The package is needed for names only; a mistyped folder is not told to install it."""
    line = refusal(environment, name, code="import sys; sys.modules['huggingface_hub'] = None" + PROGRAM)
    assert words in line and ("pip install" in line) == (name == NAME)


def test_the_package_is_imported_for_names_only(environment):
    """Importing support.hub imports nothing of huggingface_hub."""
    code = "import sys, support.hub; sys.exit('huggingface_hub' in sys.modules)"
    process = start(environment, code=code)
    process.communicate()
    assert process.returncode == 0


# ---------------------------------------------------------------- to the end


def test_a_served_xlnet_is_read(served, environment):
    """XLNet.from_pretrained reads what was fetched, with the weights that transformers saved."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from xlnet import XLNet

    folder = served.folder / "someone" / "tiny-xlnet"
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=30522, d_model=32, n_layer=2, n_head=4, d_inner=32)
    theirs = transformers.XLNetLMHeadModel(config)
    theirs.save_pretrained(folder)
    vocabulary = (ROOT / "vocab" / "bert-base-uncased.txt").read_bytes()
    (folder / "vocab.txt").write_bytes(vocabulary)

    fetched, _ = fetch(environment, "someone/tiny-xlnet")
    assert (fetched / "vocab.txt").read_bytes() == vocabulary
    expected = theirs.state_dict()
    ours = dict(XLNet.from_pretrained(fetched).named_parameters())
    assert len(ours) > 20
    for name, parameter in ours.items():
        prefix = "" if name.startswith("lm_loss.") else "transformer."
        assert torch.equal(parameter, expected[prefix + name]), name
