"""A reader of pickles that never executes anything: opcodes build plain data and inert records, and call nothing.

Python's unpickler imports whatever a file names and calls it. This machine has no import and no call: a name becomes a
`Global` (two strings), a call becomes a `Record` (the name and its arguments), and the few constructors that a
checkpoint needs (dictionaries, tensors) are interpreted as data. So a malicious file has nothing to act with. Calls of
standard-library functions that no checkpoint needs (os.system, builtins.eval, ...) are still refused, because whoever
audits such a file should hear that loading it elsewhere would run them.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable
from typing import Any

from protojax.audit.tensors import FileError

_MARK = object()

# Standard-library constructors that checkpoints hold (arguments, paths, dates): kept as inert records.
_HARMLESS = {
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "builtins": {"set", "frozenset", "list", "dict", "tuple", "int", "float", "complex", "bytearray", "bytes", "object",
                 "slice", "range", "str", "bool"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "types": {"SimpleNamespace"},
    "uuid": {"UUID"},
}  # fmt: skip
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}
_STANDARD = frozenset(sys.stdlib_module_names) | {"__builtin__", "copy_reg", "posix", "nt", "__main__.os"}


class Global:
    """A name that the file refers to: never imported."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str):
        self.module, self.name = _OLD_NAMES.get(module, module), name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Record:
    """An object that was not made: what it would have been made of. items: what was appended or set in it."""

    __slots__ = ("arguments", "items", "kind", "state")

    def __init__(self, kind: Any, arguments: Any):
        self.kind, self.arguments, self.state = kind, arguments, None
        self.items: list[Any] = []


Reduce = Callable[[Global, tuple], Any]
Persistent = Callable[[Any], Any]


def read_pickle(file: Any, reduce: Reduce, persistent: Persistent) -> Any:
    """The value of the pickle at the position of `file` (read, readline, tell), as data.

    reduce(name, arguments): data for a call that the caller understands, or NotImplemented for an inert record.
    persistent(id): data for a persistent id. Raises FileError for opcodes that no checkpoint has and for calls that
    would run code; ValueError and the like for a damaged stream.
    """
    machine = _Machine(reduce, persistent)
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "STOP":
            return machine.stack[-1]
        machine.run(opcode.name, argument)
    raise FileError("the pickle has no end.")


class _Machine:
    """Stack, memo, and one method for each family of opcodes."""

    def __init__(self, reduce: Reduce, persistent: Persistent):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.reduce, self.persistent = reduce, persistent

    def run(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _PUSHES:
            self.stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            return
        elif name in _METHODS:
            _METHODS[name](self, argument)
        else:
            raise FileError(f"the pickle opcode {name} belongs to no checkpoint; the file is not read.")

    # -- stack and memo
    def mark(self, argument: Any) -> None:
        self.stack.append(_MARK)

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def pop(self, argument: Any) -> None:
        self.stack.pop()

    def pop_mark(self, argument: Any) -> None:
        self.since_mark()

    def dup(self, argument: Any) -> None:
        self.stack.append(self.stack[-1])

    def put(self, argument: Any) -> None:
        self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]

    def get(self, argument: Any) -> None:
        self.stack.append(self.memo[int(argument)])

    # -- containers
    def make_tuple(self, argument: Any) -> None:
        self.stack.append(tuple(self.since_mark()))

    def make_list(self, argument: Any) -> None:
        self.stack.append(self.since_mark())

    def make_dict(self, argument: Any) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.set_pairs(items)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("the stack is too short")
        items = tuple(self.stack[-count:])
        self.stack[-count:] = [items]

    def append(self, argument: Any) -> None:
        self.extend_top([self.stack.pop()])

    def appends(self, argument: Any) -> None:
        self.extend_top(self.since_mark())

    def extend_top(self, items: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Record) else target).extend(items)

    def set_item(self, argument: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pairs([key, value])

    def set_items(self, argument: Any) -> None:
        self.set_pairs(self.since_mark())

    def set_pairs(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, dict):
            target.update((_key(key), value) for key, value in pairs)
        else:
            target.items.extend(pairs)

    # -- names and calls: all inert
    def global_name(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Global(module, name))

    def stack_global(self, argument: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self.stack.append(Global(module, name))

    def call(self, argument: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.called(function, arguments))

    def call_keywords(self, argument: Any) -> None:
        keywords, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self.called(kind, arguments))
        if isinstance(self.stack[-1], Record):
            self.stack[-1].items.append(keywords)

    def inst(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self.called(Global(module, name), tuple(self.since_mark())))

    def obj(self, argument: Any) -> None:
        kind, *arguments = self.since_mark()
        self.stack.append(self.called(kind, tuple(arguments)))

    def called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global):
            raise FileError(
                "the pickle calls something that it has computed itself, as code in disguise does. Nothing was run; "
                "do not load this file with torch.load or pickle."
            )
        _refuse_code(function)
        if isinstance(arguments, tuple):
            if str(function) == "collections.OrderedDict" and not arguments:
                return {}
            if str(function) == "collections.defaultdict":
                return {}
            made = self.reduce(function, arguments)
            if made is not NotImplemented:
                return made
            if str(function) == "copyreg._reconstructor" and arguments:
                return Record(arguments[0], ())
        return Record(function, arguments)

    def build(self, argument: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def persistent_id(self, argument: Any) -> None:
        self.stack.append(self.persistent(self.stack.pop() if argument is None else argument))


def _refuse_code(name: Global) -> None:
    """Raise for a call of the standard library that is not a harmless constructor."""
    root = name.module.partition(".")[0]
    if name.name in _HARMLESS.get(name.module, ()):
        return
    hidden = "." in name.name and any(part in _STANDARD for part in name.name.split("."))
    if root in _STANDARD or hidden:
        raise FileError(
            f"this pickle would call {name} when it is loaded with torch.load or pickle. Nothing was run here; do not "
            "load it, and ask where it came from."
        )


def _key(key: Any) -> Any:
    """A key whose hash cannot recurse; anything else is replaced by an object that is equal to itself alone."""
    if isinstance(key, str | bytes | int | float | Global) or key is None:
        return key
    return object()


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list, "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple, "EMPTY_SET": list,
}  # fmt: skip
_PUSHES = frozenset(
    ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
     "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
     "SHORT_BINUNICODE", "BINUNICODE8")
)  # fmt: skip
_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark, "POP": _Machine.pop, "POP_MARK": _Machine.pop_mark, "DUP": _Machine.dup,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "TUPLE": _Machine.make_tuple, "LIST": _Machine.make_list, "FROZENSET": _Machine.make_list,
    "DICT": _Machine.make_dict,
    "TUPLE1": lambda machine, _: machine.tuple_of(1), "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append, "APPENDS": _Machine.appends, "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_name, "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call, "NEWOBJ": _Machine.call, "NEWOBJ_EX": _Machine.call_keywords,
    "INST": _Machine.inst, "OBJ": _Machine.obj, "BUILD": _Machine.build,
    "PERSID": _Machine.persistent_id, "BINPERSID": _Machine.persistent_id,
}  # fmt: skip
