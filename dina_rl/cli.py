"""One YAML file plus `--section.key value` overrides -> a validated config; mistakes are one line each and exit 2.

YAML and overrides are merged first and validated once by pydantic, so that every mistake is reported, and with its full
path. tyro renders `--help` from the same models.
"""

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Literal, NoReturn, TypeVar, get_args, get_origin

import tyro
import yaml
from pydantic import BaseModel, ValidationError

from dina_rl.config.keys import NAME, RENAMED, can_be_off, explain, is_named, section_of
from dina_rl.errors import RunStopped, one_line, shown
from dina_rl.storage import STORAGE_ALONE, StorageFailed
from dina_rl.termination import Terminated, listening
from dina_rl.textfiles import parse_yaml, read_text

Run = TypeVar("Run", bound=BaseModel)
Part = TypeVar("Part", bound=BaseModel)
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what shells use for Ctrl-C
EXIT_TERMINATED = 143  # and for SIGTERM
EXIT_STOPPED = RunStopped.exit_code
EXIT_RAY_LOST = 4  # 3 is storage.StorageFailed's


def fail(message: str) -> NoReturn:
    """End the program over a mistake of the user: one line on stderr, exit code 2, no traceback."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(EXIT_BAD_INPUT)


@contextmanager
def interruptible(run_dir: Path) -> Iterator[None]:
    """End the program with one line on Ctrl-C or SIGTERM, or when the run stops itself.

    What is there stays, to be continued.
    """
    try:
        with listening():
            yield
    except KeyboardInterrupt:
        print(f"\ninterrupted; add --resume to continue {run_dir}", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Terminated:
        print(f"\nterminated; add --resume to continue {run_dir}", file=sys.stderr)
        raise SystemExit(EXIT_TERMINATED) from None
    except StorageFailed as failed:
        _say_mend(str(failed), run_dir)
        raise SystemExit(failed.exit_code) from None
    except RunStopped as stopped:
        print(f"\nerror: {one_line(str(stopped))}", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    except OSError as error:  # where nobody expected it: storage that is away fails at whatever looks at it
        if error.errno not in STORAGE_ALONE:
            raise
        _say_mend(str(error), run_dir)
        raise SystemExit(StorageFailed.exit_code) from None


def _say_mend(what: str, run_dir: Path) -> None:
    print(f"\nerror: {one_line(what)}; when that is mended add --resume to continue {run_dir}", file=sys.stderr)


@contextmanager
def stoppable() -> Iterator[None]:
    """End the program with one line when it stops itself; there is nothing to continue."""
    try:
        yield
    except RunStopped as stopped:
        print(f"error: {one_line(str(stopped))}", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None


def load(model: type[Run], argv: Sequence[str], *, program: str, default_config: str | None = None) -> Run:
    """Read `--config FILE` and overrides from `argv` into `model`, or end the program with clear lines.

    Args:
        program: how the user called it, for `--help`.
        default_config: the YAML file used without `--config`.
    """
    try:
        config_file, overrides, wants_help = _split(list(argv))
        file = config_file or default_config
        values = {} if file is None else read_yaml(file)
        for key, words in overrides:
            _assign(model, values, key, words)
        config = model.model_validate(values)
    except ValidationError as error:
        for line in explain(error)[:-1]:
            print(f"error: {one_line(line)}", file=sys.stderr)
        fail(explain(error)[-1])
    except ValueError as error:
        fail(str(error))
    if wants_help:
        with _read_as_far_as_wanted():
            _print_help(model, config, program)
    return config


def read_yaml(path: str | Path) -> dict[str, object]:
    """A YAML mapping.

    Raises:
        ValueError: missing file, broken YAML, a key written twice, or not a mapping.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"config file {file} does not exist")
    try:
        values = parse_yaml(read_text(file))
    except yaml.YAMLError as error:
        raise ValueError(f"config file {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {file} must hold a mapping of sections, not {type(values).__name__}")
    return values


def _split(argv: list[str]) -> tuple[str | None, list[tuple[str, list[str]]], bool]:
    """(config file, [(dotted key, its words)], help wanted). A key takes the words up to the next `--`."""
    config_file, overrides, wants_help = None, [], False
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word in ("-h", "--help"):
            wants_help = True
            continue
        if not word.startswith("--"):
            raise ValueError(f"unexpected word {word!r}; overrides are written --section.key value")
        key, equals, inline = word[2:].partition("=")
        words = [inline] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            words.append(argv[position])
            position += 1
        key = key.replace("-", "_")
        if key == "config":
            if len(words) != 1:
                raise ValueError("--config takes one file")
            config_file = words[0]
        elif not words and key.rpartition(".")[2].startswith("no_"):
            parent, dot, leaf = key.rpartition(".")
            overrides.append((parent + dot + leaf.removeprefix("no_"), ["false"]))
        else:
            overrides.append((key, words))
    return config_file, overrides, wants_help


def _value(words: list[str], *, text: bool) -> object:
    """The value that the words of an override mean; as `text` they are not YAML: a prompt may hold a colon."""
    if not words:
        return True
    parsed = [None if word == "None" else word if text else parse_yaml(word) for word in words]
    return parsed[0] if len(parsed) == 1 else parsed


def _is_text(annotation: object) -> bool:
    """Whether a field holds text or paths, one or several, and nothing else."""
    parts = get_args(annotation)
    if not parts:
        return annotation in (str, Path, NoneType, Ellipsis)
    return get_origin(annotation) not in (Literal, dict) and all(_is_text(part) for part in parts)


def _annotation(model: type[BaseModel], key: str) -> object:
    """The annotation of the field at a known dotted key."""
    first, _, rest = key.partition(".")
    annotation = model.model_fields[first].annotation
    if is_named(annotation):
        _, _, rest = rest.partition(".")  # the user's name
    if not rest:
        return annotation
    section = section_of(annotation)
    assert section is not None
    return _annotation(section, rest)


def _assign(model: type[BaseModel], values: dict[str, object], key: str, words: list[str]) -> None:
    """Set a dotted key in nested `values`; an unknown one is refused with the nearest known key."""
    known = known_keys(model)
    if _without_names(model, key) not in known:
        close = [RENAMED[key]] if RENAMED.get(key) in known else difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"--{key}: unknown key" + (f"; did you mean --{close[0]}?" if close else ""))
    *parents, leaf = key.split(".")
    for parent in parents:
        section = values.get(parent)
        if section is None:
            section = values[parent] = {}
        if not isinstance(section, dict):
            raise ValueError(f"--{key}: {parent} is no section in the config file, but {shown(section)}")
        values = section
    try:
        values[leaf] = _value(words, text=_is_text(_annotation(model, key)))
    except yaml.YAMLError as error:
        raise ValueError(f"--{key} {' '.join(words)}: not valid YAML: {' '.join(str(error).split())}") from error


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of `model`, sections included (a section that may be None is switched off by its own name)."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        section = section_of(field.annotation)
        if section is not None and is_named(field.annotation):
            keys.append(f"{prefix}{name}.{NAME}")
            keys.extend(known_keys(section, f"{prefix}{name}.{NAME}."))
        elif section is not None:
            keys.extend(known_keys(section, f"{prefix}{name}."))
    return keys


def _without_names(model: type[BaseModel], key: str) -> str:
    """A dotted key with NAME in place of the names that the user chose."""
    first, dot, rest = key.partition(".")
    field = model.model_fields.get(first)
    if not dot or field is None:
        return key
    section = section_of(field.annotation)
    if section is None:
        return key
    if not is_named(field.annotation):
        return f"{first}.{_without_names(section, rest)}"
    _, dot, rest = rest.partition(".")
    return f"{first}.{NAME}{dot}{_without_names(section, rest) if dot else ''}"


def example(section: type[Part]) -> Part:
    """A section whose every key has its own default; what has none is marked as required."""
    required = [key for key, field in section.model_fields.items() if field.is_required()]
    return section.model_construct(**dict.fromkeys(required, tyro.MISSING))


@contextmanager
def _read_as_far_as_wanted() -> Iterator[None]:
    """What is printed may go to a pager or `head`, which close the pipe when they have seen enough."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(0) from None


def _print_help(model: type[Run], config: Run, program: str) -> NoReturn:
    print(f"{program} [--config FILE.yaml] [--section.key value ...]")
    print("Defaults shown are those of the config file read.")
    for key, on in _switches(config):
        print(
            f"--{key} is on; --{key} None switches it off" if on else f"--{key} is off; any of its keys switches it on"
        )
    print()
    tyro.cli(model, default=_in_full(config), args=["--help"], prog=program, config=(tyro.conf.AvoidSubcommands,))
    raise AssertionError("tyro ends the program after --help")


def _switches(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Dotted key of every section that can be off, and whether it is on."""
    for name, field in type(section).model_fields.items():
        value = dict(section)[name]
        if can_be_off(field.annotation):
            yield prefix + name, value is not None
        if isinstance(value, BaseModel):
            yield from _switches(value, f"{prefix}{name}.")


def _in_full(section: Part) -> Part:
    """`section` as help shows it: with the sections that are off, and one called NAME where the user has named none."""
    shown: dict[str, object] = {}
    for name, field in type(section).model_fields.items():
        value, inner = dict(section)[name], section_of(field.annotation)
        if inner is not None and is_named(field.annotation):
            shown[name] = value or {NAME: example(inner)}
        elif inner is not None:
            shown[name] = _in_full(example(inner) if value is None else value)
    return section.model_copy(update=shown)
