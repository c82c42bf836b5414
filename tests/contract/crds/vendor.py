"""Make the small copies of KubeRay's CRD schemas in this folder: `python vendor.py ray.io_rayservices.yaml ...`.

Takes the files of `ray-operator/config/crd/bases/` (KubeRay v1.7.0, Apache License 2.0). Keeps the v1 schema without its
descriptions; parts that occur more than once are written once and referred to (`$defs`).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SMALLEST_SHARED = 200  # characters


def without_descriptions(schema: Any) -> Any:
    """Drop every `description` that is text; a property of that name is a mapping and stays."""
    if isinstance(schema, dict):
        return {
            key: without_descriptions(value)
            for key, value in schema.items()
            if not (key == "description" and isinstance(value, str))
        }
    return [without_descriptions(item) for item in schema] if isinstance(schema, list) else schema


def shared(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema with repeated object schemas under `$defs`."""
    counts: Counter[str] = Counter()

    def count(part: Any) -> None:
        if isinstance(part, dict):
            counts[json.dumps(part, sort_keys=True)] += 1
        for item in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            count(item)

    count(schema)
    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}

    def replace(part: Any, *, top: bool = False) -> Any:
        if isinstance(part, list):
            return [replace(item) for item in part]
        if not isinstance(part, dict):
            return part
        text = json.dumps(part, sort_keys=True)
        # A schema, and not a `properties` map with a property called type; defaults stay where they are looked for.
        is_schema = isinstance(part.get("type"), str) and "default" not in part
        if top or not is_schema or counts[text] < 2 or len(text) < SMALLEST_SHARED:
            return {key: replace(value) for key, value in part.items()}
        if text not in names:
            names[text] = f"d{len(names)}"
            definitions[names[text]] = {key: replace(value) for key, value in part.items()}
        return {"$ref": f"#/$defs/{names[text]}"}

    return {**replace(schema, top=True), "$defs": definitions}


def main() -> None:
    """One `<plural>.v1.json` for each file named on the command line."""
    for name in sys.argv[1:]:
        crd = yaml.load(Path(name).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        [version] = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
        schema = shared(without_descriptions(version["schema"]["openAPIV3Schema"]))
        target = Path(__file__).with_name(f"{crd['spec']['names']['plural']}.v1.json")
        target.write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
