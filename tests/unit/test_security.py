"""What SECURITY.md says of the code, of what a run writes, and of the image: read from the sources themselves."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dina_rl.checkpoint import open_run_dir
from dina_rl.config import AlignRun
from dina_rl.markdown import settings

ROOT = Path(__file__).parents[2]
SOURCES = [file for place in ("dina_rl", "actors", "jobs", "benchmarks") for file in (ROOT / place).rglob("*.py")]
UNPICKLES = "dina_rl/scorers/pickled.py"  # a reader of its own, which imports and calls nothing that a file names
NEVER = {
    *("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "joblib.load", "dill.load"),
    *("marshal.loads", "shelve.open", "torch.hub.load", "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load"),
}
ONLY_WITH = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "AutoConfig.from_pretrained": ("trust_remote_code", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoModel.from_pretrained": ("trust_remote_code", False),
    "AutoProcessor.from_pretrained": ("trust_remote_code", False),
}
SUSPECT = re.compile(r"eval\(|exec\(|load|shelve|system|popen|pickle|shell|from_pretrained|remote_code|0\.0\.0|\"::")
SECRETS = {"HF_TOKEN", "RAY_AUTH_TOKEN", "DINA_RL_SERVER_KEY", "DINA_RL_SERVE_TOKEN"}


def name_of(called: ast.expr) -> str:
    """`torch.load` of the call torch.load(...)."""
    if isinstance(called, ast.Attribute):
        return f"{name_of(called.value)}.{called.attr}"
    return called.id if isinstance(called, ast.Name) else "?"


def faults(text: str, file: str) -> Iterator[str]:
    """What of a source runs what it reads, or opens more than it should."""
    if not SUSPECT.search(text):  # most: parsing is dear
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            yield f"{file}:{node.lineno} listens everywhere"
        if isinstance(node, ast.ClassDef) and file != UNPICKLES:
            yield from (f"{file}:{node.lineno} unpickles" for b in node.bases if name_of(b).endswith("Unpickler"))
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if name in NEVER or given.get("shell") is True or given.get("trust_remote_code") is True:
            yield f"{file}:{node.lineno} {name}"
        wanted = ONLY_WITH.get(name)
        if wanted is not None and given.get(wanted[0]) is not wanted[1]:
            yield f"{file}:{node.lineno} {name} without {wanted[0]}={wanted[1]}"
        if name == "yaml.load" and [name_of(each) for each in node.args[1:]] != ["_Loader"]:
            yield f"{file}:{node.lineno} yaml.load"


def test_nothing_that_is_read_is_run() -> None:
    assert len(SOURCES) > 200
    found = [fault for file in SOURCES for fault in faults(file.read_text(), str(file.relative_to(ROOT)))]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "pickle.loads(content)",
        "yaml.load(text, yaml.Loader)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "server.bind(('0.0.0.0', 80))",
        "class Reader(pickle.Unpickler): pass",
        "eval(text)",
    ],
)
def test_a_line_that_would_is_found(line: str) -> None:
    assert list(faults(line, "a.py"))


def test_secrets_of_the_environment_stand_in_nothing_that_a_run_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "hf_a-secret-of-the-environment")
    run = AlignRun.model_validate({"rewards": {"unified_reward": {}, "dina": None}})
    run_dir = open_run_dir(run, tmp_path / "run", resume=False)
    written = [file.read_text() for file in run_dir.rglob("*") if file.is_file()]
    assert len(written) >= 2
    assert not any("a-secret" in text for text in [*written, settings(run)])


def test_the_page_names_the_secrets_and_the_image_bears_none() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    assert {name for name in SECRETS if name not in page} == set()
    image = (ROOT / "deploy" / "Dockerfile").read_text()
    assert not any(word in image for word in ("TOKEN", "KEY", "PASSWORD", "SECRET"))
