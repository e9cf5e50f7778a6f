"""Load the addon's modules for each simulated process, on the simulated machine instead of the real one.

Each process has modules of its own, as real processes do: what they keep in module variables belongs to that process.
Their ``import`` statements find the simulated ``threading``, ``time``, ``socket``, ``psycopg2`` and so on, and
each statement is preceded by a call of `kernel.point`. The addon's files stay as they are.
"""

import ast
import builtins
import collections
import ctypes
import os
import pathlib
import random
import selectors
import socket
import sys
import threading
import time
import types
import uuid
import weakref

from . import client, kernel, machine, threads

PACKAGE = "bus_alt_connection"
# Modules in which a process would escape from the simulation.
_FORBIDDEN = {"asyncio", "concurrent", "multiprocessing", "queue", "select", "signal", "subprocess", "tempfile"}


class Addon:
    """The source code of the addon in ``folder``, compiled once."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.code = {}
        for path in sorted(self.folder.glob("*.py")):
            tree = ast.fix_missing_locations(_Points().visit(ast.parse(path.read_text())))
            self.code[path.stem] = compile(tree, str(path), "exec")


class Program:
    """The modules of one simulated ``process``: the addon's, and those of Odoo that ``odoo`` names."""

    def __init__(self, addon, process, odoo, environ):
        self._addon = addon
        self.modules = dict(odoo)
        self._fakes = _fakes(process, environ, self.modules)
        self._builtins = dict(vars(builtins), __import__=self._import, __build_class__=_build_class)
        self._load(PACKAGE)

    def module(self, name):
        """Return a module of the addon by its short name."""
        return self._load("%s.%s" % (PACKAGE, name))

    def _load(self, full):
        if full in self.modules:
            return self.modules[full]
        stem = full[len(PACKAGE) + 1 :] or "__init__"
        if not full.startswith(PACKAGE) or stem not in self._addon.code:
            raise ModuleNotFoundError("the simulation has no module %s" % full)
        module = types.ModuleType(full)
        module.__file__ = str(self._addon.folder / (stem + ".py"))
        module.__package__ = PACKAGE
        module.__dict__.update(__builtins__=self._builtins, _point=kernel.point)
        self.modules[full] = module
        if stem != "__init__":
            setattr(self.modules[PACKAGE], stem, module)
        exec(self._addon.code[stem], module.__dict__)
        return module

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
        full = name
        if level:
            full = "%s.%s" % (PACKAGE, name) if name else PACKAGE
        root = full.split(".")[0]
        if root in _FORBIDDEN:
            raise ModuleNotFoundError("the simulation has no module %s" % full)
        if full in self._fakes:
            return self._fakes[full]
        if root not in (PACKAGE, "odoo"):
            return __import__(name, globals, locals, fromlist, level)
        module = self._load(full)
        for item in fromlist or ():
            if not hasattr(module, item) and "%s.%s" % (full, item) in self._known():
                self._load("%s.%s" % (full, item))
        return module if fromlist or level else self.modules[root]

    def _known(self):
        return set(self.modules) | {"%s.%s" % (PACKAGE, stem) for stem in self._addon.code}


class _Points(ast.NodeTransformer):
    """Put a call of `kernel.point` before each statement of each function."""

    def visit_FunctionDef(self, node):
        node.body = self._with_points(node.body)
        return node

    def _with_points(self, statements):
        found = []
        for number, statement in enumerate(statements):
            is_docstring = number == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not is_docstring and not isinstance(statement, (ast.Global, ast.Nonlocal)):
                call = ast.Expr(ast.Call(ast.Name("_point", ast.Load()), [], []))
                found.append(ast.copy_location(call, statement))
            found.append(self._inside(statement))
        return found

    def _inside(self, statement):
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(statement, field, None)
            if isinstance(inner, list) and inner and not isinstance(statement, ast.ClassDef):
                setattr(statement, field, self._with_points(inner))
        for handler in getattr(statement, "handlers", ()):
            handler.body = self._with_points(handler.body)
        return statement


def _build_class(function, name, *bases, **keywords):
    """Build a class whose instances hash by their age: by default they do by their address, which is no seed's."""
    built = builtins.__build_class__(function, name, *bases, **keywords)
    if built.__hash__ is object.__hash__ and isinstance(built, type) and hasattr(built, "__dict__"):
        built.__hash__ = _hash
        built.__eq__ = lambda self, other: self is other
    return built


def _hash(self):
    values = object.__getattribute__(self, "__dict__")
    if "_simulated_hash" not in values:
        values["_simulated_hash"] = kernel.K.number("hash")
    return values["_simulated_hash"]


class _Fake(types.ModuleType):
    """A module with what the simulation has of it, and constants of the real one."""

    def __init__(self, real, **content):
        super().__init__(real.__name__)
        self.__dict__.update(content)
        self.__dict__["_real"] = real

    def __getattr__(self, name):
        value = getattr(self.__dict__["_real"], name)
        if isinstance(value, (int, str, bytes)) or isinstance(value, type) and issubclass(value, Exception):
            return value
        raise AttributeError("the simulation has no %s.%s" % (self.__name__, name))


def _fakes(process, environ, modules):
    """Return the modules that are not the real ones in ``process``, by name."""
    fake_os = {
        "environ": environ,
        "getpid": lambda: process.pid,
        "geteuid": lambda: 1000,
        # Of namespaces: those of a machine are the same.
        "stat": lambda _path: types.SimpleNamespace(st_ino=4026531836 + process.machine),
    }
    fake_socket = {
        "socket": machine.Socket,
        "socketpair": machine.socketpair,
        "getaddrinfo": lambda host, *_args, **_kwargs: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0))],
    }
    fake_threading = {
        "Lock": threads.Lock,
        "Condition": threads.Condition,
        "Thread": threads.Thread,
        "stack_size": lambda size=0: 0,
    }
    real_modules = collections.ChainMap(modules, sys.modules)
    return {
        "ctypes": _Fake(ctypes, CDLL=lambda _name: types.SimpleNamespace(mallopt=lambda *_args: 1)),
        "os": _Fake(os, **fake_os),
        "psycopg2": client.library(),
        "random": _Fake(random, uniform=lambda low, high: kernel.K.rng.uniform(low, high)),
        "selectors": _Fake(selectors, DefaultSelector=machine.Selector),
        "socket": _Fake(socket, **fake_socket),
        "sys": _Fake(sys, modules=real_modules, _getframe=sys._getframe),
        "threading": _Fake(threading, **fake_threading),
        "time": _Fake(time, monotonic=_monotonic, sleep=sleep),
        "uuid": _Fake(uuid, uuid4=lambda: uuid.UUID(int=kernel.K.rng.getrandbits(128))),
        "weakref": _Fake(weakref, WeakSet=weakref.WeakSet, finalize=_finalize),
    }


def _finalize(subject, function):
    finalizer = weakref.finalize(subject, function)
    kernel.K.finalizers.append(finalizer)
    return finalizer


def _monotonic():
    kernel.point()
    # Otherwise a loop that waits for a moment to pass, without sleeping, never ends.
    kernel.K.now += 1e-7
    return kernel.K.now


def sleep(seconds):
    if seconds <= 0:
        kernel.K.yield_()
        return
    end = kernel.K.now + seconds
    while kernel.K.now < end:
        kernel.K.wait([], end)
