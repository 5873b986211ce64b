"""YAML as plain values with the line of each, read without building any object YAML asks for.

Only the safe loader's syntax tree is used. Where YAML 1.1 surprises people it is read as they mean
it, or refused: `1e-1` is a number; `010` (8), `16:20` (980) and `1_000` are errors; so are a key
given twice, tags such as `!!python/object`, and files that aliases would blow up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbo.errors import PlanError
from turbo.messages import one_line, reason

if TYPE_CHECKING:
    from yaml import Node

KeyPath = tuple[str, ...]
"""The keys that lead to a value, outermost first."""

FILE_LIMIT = 256 * 1024
VALUES_LIMIT = 5_000
DEPTH_LIMIT = 8

_TAG = "tag:yaml.org,2002:"
_EXPONENT_FLOAT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,39})")
_SPECIAL_FLOATS = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_BOOLEANS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(
    ("false", "no", "off"), False
)


def read_yaml(path: Path) -> tuple[object, dict[KeyPath, int]]:
    """Read a small YAML file.

    Returns:
        The content as dicts, lists, str, int, float, bool and None, and the line (from 1) of each
        key by its path of keys; the empty path is the file itself.

    Raises:
        PlanError: The file cannot be read, is too large or is not YAML of these plain kinds.
    """
    import yaml

    content = _read_bytes(path)
    try:
        loader = _loader_class()(content)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise PlanError(_syntax_problem(path, error)) from None
    except RecursionError:
        raise PlanError(f"{path} is nested too deeply; {DEPTH_LIMIT} levels are read") from None
    reader = _TreeReader(path)
    return (None if node is None else reader.value(node, ())), reader.lines


def write_yaml(data: Mapping[str, Any]) -> str:
    """Nested plain values as YAML that `read_yaml` reads back equal."""
    import yaml

    text: str = yaml.dump(
        data, Dumper=_dumper_class(), sort_keys=False, allow_unicode=True, width=100
    )
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_LIMIT + 1)
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the plan file {str(path)!r}: {reason(error)}") from None
    if len(content) > FILE_LIMIT:
        raise PlanError(f"{path} is larger than {FILE_LIMIT // 1024} KiB; that is not a plan file")
    return content


def _syntax_problem(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{path}, line {mark.line + 1}" if mark else str(path)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    return f"{where}: not valid YAML: {problem}"


@cache
def _loader_class() -> Any:
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """The safe loader, with numbers such as 1e-1."""

    _teach_exponents(PlainLoader)
    return PlainLoader


@cache
def _dumper_class() -> Any:
    import yaml

    class PlainDumper(yaml.SafeDumper):
        """The safe dumper; puts text in quotes that `PlainLoader` would take for a number."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def represent_text(self, text: str) -> Any:
            # Outside double quotes these count as line breaks and are read as something else.
            breaks = any(character in text for character in "\x85\u2028\u2029")
            style = '"' if breaks else None
            return self.represent_scalar(f"{_TAG}str", text, style=style)

    PlainDumper.add_representer(str, PlainDumper.represent_text)
    _teach_exponents(PlainDumper)
    return PlainDumper


def _teach_exponents(kind: Any) -> None:
    kind.add_implicit_resolver(f"{_TAG}float", _EXPONENT_FLOAT, list("-+.0123456789"))


class _TreeReader:
    """Turns YAML's syntax tree into plain values and remembers the lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[KeyPath, int] = {(): 1}
        self.count = 0

    def error(self, node: Node, problem: str) -> PlanError:
        return PlanError(f"{self.path}, line {node.start_mark.line + 1}: {problem}")

    def value(self, node: Node, path: KeyPath) -> object:
        import yaml

        self.count += 1
        # Aliases of aliases make a short file endlessly long, and an alias can hold itself.
        if self.count > VALUES_LIMIT or len(path) > DEPTH_LIMIT:
            raise self.error(node, "too many or too deeply nested values; use fewer aliases")
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, (*path, str(i))) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        raise self.error(node, f"the tag {node.tag!r} is not allowed here")

    def mapping(self, node: Node, path: KeyPath) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise self.error(key_node, "a key must be a plain word")
            if key_node.tag == f"{_TAG}merge":
                raise self.error(key_node, "merge keys (<<) are not read here; write the keys out")
            where = (*path, key)
            if key in result:
                first = self.lines[where]
                raise self.error(
                    key_node, f"{'.'.join(where)} is given twice, first in line {first}"
                )
            self.lines[where] = key_node.start_mark.line + 1
            result[key] = self.value(value_node, where)
        return result

    def scalar(self, node: Node) -> object:
        text: str = node.value
        match node.tag.removeprefix(_TAG):
            case "null":
                return None
            case "bool" if text.lower() in _BOOLEANS:
                return _BOOLEANS[text.lower()]
            case "int" if _PLAIN_INT.fullmatch(text):
                return int(text)
            case "float":
                return self.number(node, text.lower())
            case "str" | "timestamp":
                return text
            case "int" | "bool":
                raise self.error(node, _not_plain(text))
        raise self.error(node, f"the tag {node.tag!r} is not allowed here")

    def number(self, node: Node, text: str) -> float:
        if text in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[text]
        try:
            if "_" in text:  # which Python would take
                raise ValueError
            return float(text)
        except ValueError:
            raise self.error(node, _not_plain(text)) from None


def _not_plain(text: str) -> str:
    return f"{one_line(text, 40)!r} is not a plain decimal number; put it in quotes if it is text"
