"""Data of the three tasks, from docstrings of the standard library: the same for one version of Python."""

from __future__ import annotations

import importlib
import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path

MODULES = [
    "argparse",
    "ast",
    "asyncio.events",
    "base64",
    "bisect",
    "calendar",
    "collections",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "ctypes.util",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "dis",
    "email.message",
    "email.utils",
    "enum",
    "filecmp",
    "fnmatch",
    "fractions",
    "functools",
    "getpass",
    "gettext",
    "glob",
    "gzip",
    "hashlib",
    "heapq",
    "html",
    "http.client",
    "http.cookiejar",
    "imaplib",
    "inspect",
    "io",
    "ipaddress",
    "itertools",
    "json",
    "keyword",
    "linecache",
    "locale",
    "logging",
    "mailbox",
    "math",
    "mimetypes",
    "multiprocessing.pool",
    "operator",
    "os",
    "os.path",
    "pathlib",
    "pdb",
    "pickle",
    "pickletools",
    "pkgutil",
    "platform",
    "plistlib",
    "pprint",
    "profile",
    "quopri",
    "random",
    "re",
    "reprlib",
    "sched",
    "secrets",
    "shlex",
    "shutil",
    "signal",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "statistics",
    "string",
    "struct",
    "subprocess",
    "sysconfig",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "token",
    "tokenize",
    "traceback",
    "tracemalloc",
    "types",
    "typing",
    "unicodedata",
    "urllib.parse",
    "urllib.request",
    "urllib.robotparser",
    "uuid",
    "venv",
    "warnings",
    "wave",
    "weakref",
    "webbrowser",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
    "xmlrpc.client",
    "zipfile",
    "zlib",
]
MAX_SENTENCE_CHARS = 100
MAX_TEXT_CHARS = 400


def functions() -> Iterator[tuple[str, str, str]]:
    """(module, qualified name, docstring) of public functions and methods of classes, in a fixed order."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, member in sorted(vars(module).items()):
            if name.startswith("_") or getattr(member, "__module__", None) != module_name:
                continue
            text = inspect.getdoc(member)
            if text and (inspect.isroutine(member) or inspect.isclass(member)):
                yield module_name, f"{module_name}.{name}", text


def write(folder: Path, num_items: int) -> None:
    """choice.jsonl, rolling.jsonl and module.jsonl, `num_items` lines each."""
    rng = random.Random(0)
    known = [entry for entry in functions() if len(entry[2]) > 20]
    rng.shuffle(known)
    if len(known) < num_items:
        raise SystemExit(f"only {len(known)} docstrings found, {num_items} asked for")
    sentences = sorted({_sentence(text) for _, _, text in known})
    _write(folder / "choice.jsonl", [_choice(rng, name, text, sentences) for _, name, text in known[:num_items]])
    longest = sorted(known, key=lambda entry: -len(entry[2]))[:num_items]
    _write(folder / "rolling.jsonl", [{"text": text[:MAX_TEXT_CHARS]} for _, _, text in longest])
    _write(folder / "module.jsonl", [{"name": name, "module": module} for module, name, _ in known[:num_items]])


def _choice(rng: random.Random, name: str, text: str, sentences: list[str]) -> dict[str, object]:
    right = _sentence(text)
    choices = [right, *rng.sample([other for other in sentences if other != right], 3)]
    rng.shuffle(choices)
    return {"name": name, "choices": choices, "answer": choices.index(right)}


def _sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())[:MAX_SENTENCE_CHARS]


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
